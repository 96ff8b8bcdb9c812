"""The training loop, once, for every stage.

A step is one optimizer step: all micro-batches of all ranks.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from common.cli import ToldElsewhere, UserError
from common.distributed import Runtime, autocast
from dataset.errors import DataError
from dataset.vlm_dataset import VLMDataset
from trainer.arguments import TrainingFlags
from trainer.batches import step_loader, step_sampler
from trainer.learner import Learner, model_inputs
from trainer.metrics import Metrics
from trainer.state import Checkpoints, Progress

log = logging.getLogger(__name__)
Answers = Callable[[Callable[[], int]], list[dict[str, Any]]]  # asked again and again whether to stop


def train(
    model: torch.nn.Module,
    samples: VLMDataset,
    eval_samples: VLMDataset | None,
    flags: TrainingFlags,
    runtime: Runtime,
    metrics: Metrics,
    checkpoints: Checkpoints,
    total_steps: int,
    resumed: dict[str, Any] | None = None,
    answers: Answers | None = None,
) -> int:
    """Trains `model` in place for `total_steps` (see `planned_steps`), counted from the beginning also where
    there is a state `resumed` to go on from. Returns the exit code: 0, or that of the signal which ended it.
    The state is saved every `save_interval` steps, when a signal asks for it and at the end, also where a
    DataError (a row that is not usable) or a UserError (too many bad steps) ends it."""
    sampler = step_sampler(samples, flags, runtime)
    learner = Learner(model, flags, runtime, samples.pixels)
    progress = Progress()
    if resumed is not None:
        progress = learner.restore(resumed)
        metrics.restore(resumed["metrics"])
        resumed = None  # as large as model and optimizer together: nobody else may hold it either

    def settle(running: int = 0) -> None:
        for told in learner.settle(progress, running):
            metrics.step(**told)

    def save(finished: bool = False) -> None:
        settle()
        runtime.save_asked = False
        checkpoints.save(learner.state(progress) | {"metrics": metrics.state()}, finished)

    def evaluate_if_due() -> int:
        """Returns the exit code of a signal that came meanwhile: the evaluation is then made up for later."""
        due = progress.step == total_steps or (progress.step and progress.step % flags.eval_interval == 0)
        if not (eval_samples or answers) or not due or progress.evaluated_step == progress.step:
            return 0
        checkpoints.wait()  # no lock may be held by its thread while worker processes are forked
        found, stop_code = evaluate(model, eval_samples, flags, runtime) if eval_samples else ({}, 0)
        if getattr(flags, "eval_blank", False) and not stop_code:
            blank, stop_code = evaluate(model, eval_samples.with_blank(model), flags, runtime)
            found["eval_loss_blank"] = blank["eval_loss"]
        if answers and not stop_code:
            stop_code = show(model, answers, flags, metrics, progress.step)
        if not stop_code:
            if found:
                metrics.write({"step": progress.step, "epoch": progress.epoch, **found})
            progress.evaluated_step = progress.step
        return stop_code

    model.train()
    if stop_code := evaluate_if_due():  # what a signal prevented before
        return stop_code
    while progress.step < total_steps:
        sampler.set_epoch(progress.epoch, progress.epoch_step)
        checkpoints.wait()
        for micro_batches in step_loader(samples, sampler, flags, runtime):
            try:
                totals = count(checkpoints.failure or metrics.failure or micro_batches, runtime)
            except (DataError, UserError):
                if progress.step:
                    save()  # what was learnt so far is not lost
                raise
            rate = learning_rate(progress.step, total_steps, flags)
            learner.step(micro_batches, totals, rate, progress)
            done = progress.step == total_steps
            intervals = flags.log_interval, flags.eval_interval, flags.save_interval
            is_due = done or 0 in [progress.step % interval for interval in intervals]
            settle(running=0 if is_due or totals["save"] or totals["stop_code"] else 1)
            if progress.bad_in_a_row >= flags.max_bad_steps:  # the step that still runs may be the last
                settle()
            if done or progress.step % flags.log_interval == 0:
                metrics.report(progress, rate)
            hopeless = progress.bad_in_a_row > flags.max_bad_steps
            with metrics.paused():
                try:
                    stop_code = totals["stop_code"] or (0 if hopeless else evaluate_if_due())
                except (DataError, ToldElsewhere):
                    save()
                    raise
                due = totals["save"] or (progress.step % flags.save_interval == 0 and not done)
                if stop_code or hopeless or due:
                    save()
            if hopeless:
                found = f"{progress.bad_in_a_row} steps in a row were bad, the last for its {metrics.bad}"
                left = f"Their rows are in {metrics.bad_batches}, the weights from before them are saved"
                message = f"{found}; --max_bad_steps is {flags.max_bad_steps}. {left}"
                raise UserError(message) if runtime.is_main else ToldElsewhere
            if stop_code:
                return stop_code
            if done:
                break
        settle()
        if not progress.learnt_tokens and not progress.bad_steps:
            raise metrics.no_usable_row()
        if progress.step < total_steps:
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0
    save(finished=True)
    return 0


def count(micro_batches: list[dict] | Exception, runtime: Runtime) -> dict[str, int]:
    """Totals of the step over all ranks, and what signals ask for. Where one rank has an error instead of
    batches, it is raised there, and ToldElsewhere on the others."""
    bad = isinstance(micro_batches, Exception)
    batches = [] if bad else micro_batches
    # Read once: a signal may come at any moment. They may reach ranks at different steps: all ranks act at
    # the first step that any of them noted one.
    own_code = runtime.stop_code
    tokens, rows = (sum(batch[name] for batch in batches) for name in ("supervised_tokens", "rows"))
    found = runtime.sum(tokens, rows, bad, runtime.save_asked, own_code == 130, own_code == 143)
    tokens, rows, failed, saves, interrupts, terminations = map(int, found)
    if bad:
        raise micro_batches
    if failed:
        raise ToldElsewhere
    stop_code = 143 if terminations else 130 if interrupts else 0
    return {"supervised_tokens": tokens, "rows": rows, "save": saves, "stop_code": own_code or stop_code}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, samples: VLMDataset, flags: TrainingFlags, runtime: Runtime
) -> tuple[dict[str, float | int], int]:
    """Mean loss over the supervised tokens of all rows, in the training precision; and the exit code of a
    signal that ended it early, else 0. Every rank must call it."""
    sampler = step_sampler(samples, flags, runtime, training=False)
    loss, tokens, skipped, stop_code = 0.0, 0, 0, 0
    model.eval()
    for micro_batches in step_loader(samples, sampler, flags, runtime):
        if stop_code := count(micro_batches, runtime)["stop_code"]:
            break
        for batch in micro_batches:
            inputs = model_inputs(batch, runtime.device, samples.pixels)
            with autocast(flags.dtype, runtime.device):
                loss += float(model(**inputs, num_items_in_batch=1, skip_logits=True).loss)
            tokens += batch["supervised_tokens"]
            skipped += len(batch["skipped"])
    model.train()
    loss, tokens, skipped = runtime.sum(loss, tokens, skipped)
    if not tokens and not stop_code and runtime.is_main:
        log.warning("warning: none of %d rows counts: eval_loss is null", len(samples))
    mean = loss / tokens if tokens else math.nan
    return {"eval_loss": mean, "eval_tokens": int(tokens), "eval_skipped_rows": int(skipped)}, stop_code


@torch.no_grad()
def show(model: torch.nn.Module, answers: Answers, flags: TrainingFlags, metrics: Metrics, step: int) -> int:
    """Shows the main process's `answers`, given in the training precision, unless a signal ends them early:
    returns its exit code, else 0. Every rank must call it."""
    run = metrics.runtime
    model.eval()
    with run.together(), autocast(flags.dtype, run.device), torch.compiler.set_stance("force_eager"):
        said = answers(lambda: run.stop_code) if run.is_main else []
    model.train()
    stop_code = count([], run)["stop_code"]
    if said and not stop_code:
        metrics.show(step, said)
    return stop_code


def learning_rate(step: int, total_steps: int, flags: TrainingFlags) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it; `step` counts from 0."""
    if step < flags.warmup_iters:
        return flags.learning_rate * (step + 1) / flags.warmup_iters
    progress = (step - flags.warmup_iters) / max(total_steps - flags.warmup_iters, 1)
    return flags.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
