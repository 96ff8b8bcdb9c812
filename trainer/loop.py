"""The training loop, once, for every stage.

A step is one optimizer step: all micro-batches of all ranks. Its loss is the mean over the supervised tokens
of that global batch, plus the auxiliary loss averaged over its rows, however it is split.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.collate import StepDataset, StepSampler
from dataset.errors import DataError
from dataset.vlm_dataset import VLMDataset
from model.processing_vlm import image_slots
from trainer.arguments import TrainingFlags
from trainer.distributed import Runtime, ignore_signals, resolve_dtype
from trainer.metrics import Metrics

log = logging.getLogger(__name__)
COMPILED_MULTIPLE = 32  # lengths are rounded up to it, so that few of them have to be compiled for
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
MODEL_INPUTS += ("pixel_values", "image_features", "image_counts")


def train(
    model: torch.nn.Module,
    samples: VLMDataset,
    eval_samples: VLMDataset | None,
    flags: TrainingFlags,
    runtime: Runtime,
    metrics: Metrics,
    save: Callable[[int], None],
) -> int:
    """Trains `model` in place and returns the exit code: 0, or that of the signal which ended the run.

    `save(step)` is called every `save_interval` steps and at the end, also where a DataError ends it: for a
    row that is not usable.
    """
    sampler = step_sampler(samples, flags, runtime)
    loader = step_loader(samples, sampler, flags, runtime)
    total_steps = planned_steps(sampler, flags)
    dtype = resolve_dtype(flags.dtype, runtime.device)
    autocast = torch.autocast(runtime.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=dtype == torch.float16)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=flags.learning_rate, fused=True)
    forward = distribute(model, flags, runtime)
    model.train()
    step = epoch = learnt_tokens = 0
    while step < total_steps:
        sampler.set_epoch(epoch)
        for micro_batches in loader:
            try:
                totals = count(micro_batches, runtime)
            except DataError:
                if step:
                    save(step)  # what was learnt so far is not lost
                raise
            rate = learning_rate(step, total_steps, flags)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums = backward(forward, micro_batches, totals, autocast, scaler, runtime)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(learning, flags.grad_clip or math.inf)
            if totals["supervised_tokens"]:  # otherwise weight decay alone would change the weights
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            learnt_tokens += totals["supervised_tokens"]
            metrics.step(**sums)
            stop_code = totals["stop_code"]
            done = step == total_steps or stop_code
            if done or step % flags.log_interval == 0:
                metrics.report(step, epoch, rate, float(norm))
            with metrics.paused():
                if done or step % flags.save_interval == 0:
                    save(step)
                if eval_samples is not None and not stop_code and (done or step % flags.eval_interval == 0):
                    found = evaluate(model, eval_samples, flags, runtime)
                    metrics.write({"step": step, "epoch": epoch, **found})
            if stop_code:
                return stop_code
            if done:
                break
        if not learnt_tokens:
            raise DataError(f"no row has a supervised token within --max_seq_len {flags.max_seq_len}")
        epoch += 1
    return 0


def backward(
    forward: torch.nn.Module,
    micro_batches: list[dict],
    totals: dict[str, int],
    autocast: torch.autocast,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
) -> dict[str, float | torch.Tensor]:
    """Accumulates the step's gradient over `micro_batches`; returns what Metrics.step wants of this rank."""
    sums = {"loss": 0.0, "aux_loss": 0.0}
    tokens = max(totals["supervised_tokens"], 1)
    for number, batch in enumerate(micro_batches, start=1):
        inputs = model_inputs(forward, batch, runtime.device)
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last or runtime.world_size == 1 else forward.no_sync():
            with autocast:
                output = forward(**inputs, num_items_in_batch=tokens, skip_logits=True)
                loss = output.loss + output.aux_loss * (batch["rows"] / max(totals["rows"], 1))
            if "image_counts" not in batch:
                loss = loss + untouched(forward)
            # DDP divides by the number of ranks; the sums above are already those of the global batch.
            scaler.scale(loss * runtime.world_size).backward()
        sums["loss"] += output.loss.detach() * tokens
        sums["aux_loss"] += output.aux_loss.detach() * batch["rows"]
    counts = ("supervised_tokens", "tokens", "rows", "skipped_rows")
    return sums | {name: sum(batch[name] for batch in micro_batches) for name in counts}


def model_inputs(model: torch.nn.Module, batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The batch's tensors for `forward`. Where rows share pictures, each is encoded here, once."""
    inputs = {k: batch[k].to(device, non_blocking=True) for k in MODEL_INPUTS if k in batch}
    if "first_image" in batch:
        counts, pixel_values = batch["image_counts"], inputs.pop("pixel_values")
        images = pixel_values[torch.arange(pixel_values.shape[1]) < counts[:, None]]  # (images, 3, H, W)
        first, picture = (numbers.to(device) for numbers in batch["first_image"].unique(return_inverse=True))
        model = getattr(model, "module", model)  # out of DDP
        features = model.get_image_embeddings(images[first], model.vision_encoder)  # (pictures, P, W)
        inputs["image_features"] = image_slots(features[picture], counts)
    return inputs


def untouched(model: torch.nn.Module) -> torch.Tensor | float:
    """A zero that depends on the projection: DDP waits for its gradient even where a rank had no image."""
    projection = [p for name, p in model.named_parameters() if "vision_proj." in name and p.requires_grad]
    return sum(0.0 * parameter.sum() for parameter in projection)


def count(micro_batches: list[dict] | DataError, runtime: Runtime) -> dict[str, int]:
    """Totals of the step over all ranks. DataError, on every rank, if one met a row that is not usable."""
    bad = isinstance(micro_batches, DataError)
    batches = [] if bad else micro_batches
    own_code = runtime.stop_code  # read once: a signal may come at any moment
    tokens, rows = (sum(batch[name] for batch in batches) for name in ("supervised_tokens", "rows"))
    tokens, rows, failed, stops = map(int, runtime.sum(tokens, rows, bad, own_code))
    if bad:
        raise micro_batches
    if failed:
        raise DataError("")  # the rank that met it says which
    # Signals may reach ranks at different steps: all stop at the first step that any of them noted one.
    return {"supervised_tokens": tokens, "rows": rows, "stop_code": (own_code or 130) if stops else 0}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, samples: VLMDataset, flags: TrainingFlags, runtime: Runtime
) -> dict[str, float | int]:
    """Mean loss over the supervised tokens of all rows, in the training precision; every rank must call
    it."""
    sampler = StepSampler(
        samples.lengths(),
        flags.batch_size,
        1,
        runtime.rank,
        runtime.world_size,
        shuffle=False,
        tokens_per_batch=flags.tokens_per_batch,
    )
    dtype = resolve_dtype(flags.dtype, runtime.device)
    loss, tokens = 0.0, 0
    model.eval()
    for micro_batches in step_loader(samples, sampler, flags, runtime):
        count(micro_batches, runtime)
        for batch in micro_batches:
            inputs = model_inputs(model, batch, runtime.device)
            with torch.autocast(runtime.device.type, dtype, enabled=dtype != torch.float32):
                loss += float(model(**inputs, num_items_in_batch=1, skip_logits=True).loss)
            tokens += batch["supervised_tokens"]
    model.train()
    loss, tokens = runtime.sum(loss, tokens)
    return {"eval_loss": loss / max(tokens, 1), "eval_tokens": int(tokens)}


def learning_rate(step: int, total_steps: int, flags: TrainingFlags) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it; `step` counts from 0."""
    if step < flags.warmup_iters:
        return flags.learning_rate * (step + 1) / flags.warmup_iters
    progress = (step - flags.warmup_iters) / max(total_steps - flags.warmup_iters, 1)
    return flags.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def planned_steps(sampler: StepSampler, flags: TrainingFlags) -> int:
    """Optimizer steps of the whole run: those of all epochs, or --max_steps if that is less."""
    steps = 0
    for epoch in range(flags.epochs):
        steps += sampler.steps_of_epoch(epoch)
        if flags.max_steps and steps >= flags.max_steps:
            return flags.max_steps
    return steps


def step_sampler(samples: VLMDataset, flags: TrainingFlags, runtime: Runtime) -> StepSampler:
    return StepSampler(
        samples.lengths(),
        flags.batch_size,
        flags.accumulation_steps,
        runtime.rank,
        runtime.world_size,
        flags.seed,
        tokens_per_batch=flags.tokens_per_batch,
    )


def step_loader(
    samples: VLMDataset, sampler: StepSampler, flags: TrainingFlags, runtime: Runtime
) -> Iterator:
    """Fetches whole steps: each item is a step's list of micro-batches, or the DataError that it met."""
    return DataLoader(
        StepDataset(
            samples,
            samples.processor.tokenizer.pad_token_id,
            flags.max_seq_len if flags.pack else None,
            COMPILED_MULTIPLE if flags.compile else 1,
        ),
        batch_size=None,
        sampler=sampler,
        num_workers=flags.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(flags.seed),  # so that a run's own generator is left alone
    )


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
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
