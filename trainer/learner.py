"""What takes an optimizer step: model, optimizer and scaler, and the gradient of a global batch.

A step's loss is the mean over the supervised tokens of all micro-batches of all ranks, plus the auxiliary
loss averaged over their rows, however they are split.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import user_errors
from common.distributed import Runtime, autocast, resolve_dtype
from common.weights import cpu_copy
from dataset.pixels import Pixels
from model.model_vlm import load_weights, without_encoder
from trainer.arguments import TrainingFlags
from trainer.state import Progress, generator_states, set_generator_states

log = logging.getLogger(__name__)
MODEL_INPUTS = ("input_ids", "position_ids", "sequence_ids", "label_positions", "label_ids")
MODEL_INPUTS += ("pixel_values", "picture_numbers", "image_features", "image_positions")
COUNTS = ("supervised_tokens", "tokens", "rows")
SPIKE_MEMORY = 0.98  # of the running mean that --loss_spike compares with


class Learner:
    """Model, optimizer and scaler of a run: takes steps, and can be saved and restored in between."""

    def __init__(self, model: nn.Module, flags: TrainingFlags, runtime: Runtime, pixels: Pixels | None):
        self.model, self.flags, self.runtime, self.pixels = model, flags, runtime, pixels
        self.autocast = autocast(flags.dtype, runtime.device)
        half = resolve_dtype(flags.dtype, runtime.device) == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.learning = list(learning), list(learning.values())
        self.optimizer = torch.optim.AdamW(self.learning, lr=flags.learning_rate, fused=True)
        self.forward = distribute(model, flags, runtime)
        exact = torch.float32 if runtime.device.type == "mps" else torch.float64
        self.mean_loss = torch.tensor(math.nan, dtype=exact, device=runtime.device)
        self.taken: list[tuple[dict, torch.Tensor, torch.cuda.Event | None]] = []

    def step(self, micro_batches: list[dict], totals: dict, rate: float, progress: Progress) -> None:
        """One optimizer step, which `progress` then counts. Nothing here waits for a GPU: whether a step is
        good it decides itself, and the optimizer's kernel heeds it, as it does for a gradient scaler."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = backward(self, micro_batches, totals)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.learning, self.flags.grad_clip or math.inf)  # on all ranks
        tokens, mean = totals["supervised_tokens"], self.mean_loss
        own = sums.pop("loss").to(mean.dtype)
        loss = self.runtime.gather(own[None] / max(tokens, 1)).sum()
        # In fp16 an infinite norm is the scaler's business, which lowers its scale, as long as it can.
        overflow = self.scaler.scale(torch.ones_like(norm)) > 1
        bad = ~loss.isfinite() | ~(norm.isfinite() | overflow)
        if self.flags.loss_spike:
            bad |= loss > self.flags.loss_spike * mean
        if tokens:  # without any, weight decay alone would change the weights
            self.optimizer.found_inf = (bad | ~norm.isfinite()).float()
            self.optimizer.step()
            update = torch.where(mean.isnan(), loss, SPIKE_MEMORY * mean + (1 - SPIKE_MEMORY) * loss)
            self.mean_loss = torch.where(bad, mean, update)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch_step += 1
        figures = (own, sums.pop("aux_loss"), loss, norm, bad, mean, self.mean_loss)
        told = torch.stack([figure.to(mean.dtype) for figure in figures]).to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if loss.is_cuda else None
        sums |= {"step": progress.step, "learnt_tokens": tokens, "bad": ""}
        sums["where"] = [where for batch in micro_batches for where in batch["where"]]
        self.taken.append((sums, told, event))

    def settle(self, progress: Progress, running: int = 0) -> Iterator[dict[str, Any]]:
        """What Metrics.step takes, of each step but the last `running`, once known; `progress` notes it."""
        while len(self.taken) > running:
            sums, told, event = self.taken.pop(0)
            if event:
                event.synchronize()  # the one place where the CPU waits for a GPU
            own, aux_loss, loss, norm, is_bad, mean, new_mean = told.tolist()
            sums |= {"loss": own, "aux_loss": aux_loss, "grad_norm": norm, "learnt_rows": sums["rows"]}
            if is_bad:  # its numbers would spoil the means
                sums |= {"loss": 0.0, "aux_loss": 0.0, "supervised_tokens": 0, "learnt_rows": 0}
                spike = f"loss {loss:.4g} is above {self.flags.loss_spike or 0:g} times its mean {mean:.4g}"
                is_finite = math.isfinite(loss) and math.isfinite(norm)
                sums["bad"] = spike if is_finite else f"loss {loss:.4g}, gradient norm {norm:.4g}"
            elif sums["learnt_tokens"]:
                progress.learnt_tokens += sums["learnt_tokens"]
                progress.mean_loss = new_mean
            progress.bad_steps += bool(is_bad)
            progress.bad_in_a_row = progress.bad_in_a_row + 1 if is_bad else 0
            yield sums

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
        progress = Progress(**state["progress"])
        self.mean_loss.fill_(math.nan if progress.mean_loss is None else progress.mean_loss)
        return progress


def backward(learner: Learner, micro_batches: list[dict], totals: dict[str, int]) -> dict[str, Any]:
    """Accumulates the step's gradient; returns this rank's sums, losses on the device, and skipped rows."""
    forward, run = learner.forward, learner.runtime
    losses = torch.zeros(2, device=run.device)
    tokens = max(totals["supervised_tokens"], 1)
    for number, batch in enumerate(micro_batches, start=1):
        inputs = model_inputs(batch, run.device, learner.pixels)
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last or run.world_size == 1 else forward.no_sync():
            with learner.autocast:
                output = forward(**inputs, num_items_in_batch=tokens, skip_logits=True)
                loss = output.loss + output.aux_loss * (batch["rows"] / max(totals["rows"], 1))
            if "image_positions" not in batch:  # DDP waits for the projection's gradient all the same
                projection = (p for name, p in forward.named_parameters() if "vision_proj." in name)
                loss = loss + sum(0.0 * weight.sum() for weight in projection if weight.requires_grad)
            # DDP divides by the number of ranks; the sums above are already those of the global batch.
            learner.scaler.scale(loss * run.world_size).backward()
        losses += torch.stack([output.loss.detach() * tokens, output.aux_loss.detach() * batch["rows"]])
    sums = {name: sum(batch[name] for batch in micro_batches) for name in COUNTS}
    sums["skipped"] = [message for batch in micro_batches for message in batch["skipped"]]
    return sums | {"loss": losses[0], "aux_loss": losses[1]}


def model_inputs(batch: dict, device: torch.device, pixels: Pixels | None) -> dict[str, Any]:
    """What `forward` takes of a batch of collate.py, on the device; bytes are normalised there."""
    inputs = {name: batch[name].to(device, non_blocking=True) for name in MODEL_INPUTS if name in batch}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = pixels.normalised(inputs["pixel_values"])
    return inputs | {"sequences": batch["sequences"]}


def distribute(model: nn.Module, flags: TrainingFlags, runtime: Runtime) -> nn.Module:
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
    return DistributedDataParallel(model, ids, broadcast_buffers=False, process_group=runtime.group)
