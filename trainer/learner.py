"""What takes an optimizer step: model, optimizer and scaler, and the gradient of a global batch.

A step's loss is the mean over the supervised tokens of all micro-batches of all ranks, plus the auxiliary
loss averaged over their rows, however they are split.
"""

import contextlib
import logging
import math
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from common.cli import user_errors
from common.distributed import Runtime, autocast, resolve_dtype
from common.weights import cpu_copy
from model.model_vlm import load_weights, without_encoder
from trainer.arguments import TrainingFlags
from trainer.state import Progress, generator_states, set_generator_states

log = logging.getLogger(__name__)
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
MODEL_INPUTS += ("pixel_values", "image_features", "image_counts", "first_image")
SPIKE_MEMORY = 0.98  # of the running mean that --loss_spike compares with


class Learner:
    """Model, optimizer and scaler of a run: takes steps, and can be saved and restored in between."""

    def __init__(self, model: torch.nn.Module, flags: TrainingFlags, runtime: Runtime):
        self.model, self.flags, self.runtime = model, flags, runtime
        self.autocast = autocast(flags.dtype, runtime.device)
        half = resolve_dtype(flags.dtype, runtime.device) == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.learning = list(learning), list(learning.values())
        self.optimizer = torch.optim.AdamW(self.learning, lr=flags.learning_rate, fused=True)
        self.forward = distribute(model, flags, runtime)

    def step(self, micro_batches: list[dict], totals: dict, rate: float, progress: Progress) -> dict:
        """One optimizer step, which `progress` then counts; returns what Metrics.step wants of this rank,
        `grad_norm`, and in `bad` why the step changed nothing, or ""."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = backward(self.forward, micro_batches, totals, self.autocast, self.scaler, self.runtime)
        self.scaler.unscale_(self.optimizer)
        clip = self.flags.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.learning, clip))  # the same on all ranks
        tokens = totals["supervised_tokens"]
        (loss,) = self.runtime.sum(float(sums["loss"]) / max(tokens, 1))
        bad = self._what_is_wrong(loss, norm, progress)
        if tokens and not bad:  # without tokens, weight decay alone would change the weights
            self.scaler.step(self.optimizer)
            progress.learnt_tokens += tokens
            mean = loss if progress.mean_loss is None else progress.mean_loss
            progress.mean_loss = SPIKE_MEMORY * mean + (1 - SPIKE_MEMORY) * loss
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        progress.bad_steps += bool(bad)
        progress.bad_in_a_row = progress.bad_in_a_row + 1 if bad else 0
        sums["learnt_rows"] = sums["rows"]
        if bad:  # its numbers would spoil the means
            sums |= {"loss": 0.0, "aux_loss": 0.0, "supervised_tokens": 0, "learnt_rows": 0}
        return sums | {"grad_norm": norm, "bad": bad}

    def _what_is_wrong(self, loss: float, norm: float, progress: Progress) -> str:
        # In fp16 an infinite norm is the scaler's business, which lowers its scale, as long as it can.
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        limit = self.flags.loss_spike
        if limit and progress.mean_loss and loss > limit * progress.mean_loss:
            return f"loss {loss:.4g} is above {limit:g} times its mean {progress.mean_loss:.4g}"
        return ""

    def state(self, progress: Progress) -> dict[str, Any]:
        """Copies on the CPU of everything that `restore` needs; every rank must call it."""
        weights = without_encoder(self.model.state_dict())
        own = {"model": weights, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        generators = self.runtime.gather(generator_states(self.runtime.device))
        copies = cpu_copy(own) if self.runtime.is_main else {}
        return copies | {"learning": self.names, "progress": asdict(progress), "generators": generators}

    def restore(self, state: dict[str, Any]) -> Progress:
        with user_errors("--resume"):
            load_weights(self.model, state["model"])
        if state["learning"] == self.names:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            log.warning("warning: other weights learn than before: the optimizer starts afresh")
        if state["scaler"]:  # a device without bfloat16 may go on where one with it stopped
            self.scaler.load_state_dict(state["scaler"])
        if self.runtime.rank < len(state["generators"]):
            set_generator_states(state["generators"][self.runtime.rank], self.runtime.device)
        return Progress(**state["progress"])


def backward(
    forward: torch.nn.Module,
    micro_batches: list[dict],
    totals: dict[str, int],
    autocast: torch.autocast,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
) -> dict[str, Any]:
    """Accumulates the step's gradient over `micro_batches`; returns what Metrics.step wants of this rank."""
    sums: dict[str, Any] = {"loss": 0.0, "aux_loss": 0.0}
    tokens = max(totals["supervised_tokens"], 1)
    for number, batch in enumerate(micro_batches, start=1):
        inputs = model_inputs(batch, runtime.device)
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last or runtime.world_size == 1 else forward.no_sync():
            with autocast:
                output = forward(**inputs, num_items_in_batch=tokens, skip_logits=True)
                loss = output.loss + output.aux_loss * (batch["rows"] / max(totals["rows"], 1))
            if "image_counts" not in batch:  # DDP waits for the projection's gradient all the same
                projection = (p for name, p in forward.named_parameters() if "vision_proj." in name)
                loss = loss + sum(0.0 * weight.sum() for weight in projection if weight.requires_grad)
            # DDP divides by the number of ranks; the sums above are already those of the global batch.
            scaler.scale(loss * runtime.world_size).backward()
        sums["loss"] += output.loss.detach() * tokens
        sums["aux_loss"] += output.aux_loss.detach() * batch["rows"]
    counts = ("supervised_tokens", "tokens", "rows")
    sums |= {name: sum(batch[name] for batch in micro_batches) for name in counts}
    return sums | {"skipped": [message for batch in micro_batches for message in batch["skipped"]]}


def model_inputs(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The batch's tensors for `forward`."""
    return {name: batch[name].to(device, non_blocking=True) for name in MODEL_INPUTS if name in batch}


def distribute(model: torch.nn.Module, flags: TrainingFlags, runtime: Runtime) -> torch.nn.Module:
    """The callable that trains: compiled if asked for, under DDP where there are several ranks."""
    if flags.compile:
        # Block by block: they share one compilation, and what depends on the data (images, masks, loss) stays
        # outside, so that the number of compilations is bounded whatever the lengths.
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    if runtime.world_size == 1:
        return model
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    # The encoder's and RoPE's buffers never change: nothing to broadcast.
    settings = {"broadcast_buffers": False, "process_group": runtime.group}
    return DistributedDataParallel(model, device_ids=ids, **settings)
