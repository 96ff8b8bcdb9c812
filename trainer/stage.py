"""One training stage from flags to files: what the stage scripts share around the loop."""

import contextlib
import dataclasses
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError, user_errors
from common.distributed import Runtime, explained, runtime
from common.setup import build_lm, build_vlm, find_base, load_base, set_trainable
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights, weight_name, write_json
from dataset.feature_cache import encode_missing, open_feature_cache
from dataset.vlm_dataset import VLMDataset
from model.model_minimind import MiniMindForCausalLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import TrainingFlags, VLMTrainingFlags
from trainer.batches import planned_steps, step_sampler
from trainer.loop import train
from trainer.metrics import Metrics
from trainer.state import Checkpoint, Checkpoints, check_settings, read_checkpoint, settings_of
from trainer.trackers import open_tracker

log = logging.getLogger(__name__)


def run_stage(flags: TrainingFlags, stage: str, bases: tuple[str, ...]) -> int:
    """Runs `stage` ("lm", "pretrain_vlm" or "sft_vlm"), which starts from what one of `bases` wrote, or from
    its own checkpoint.

    Writes `{out_dir}/{stage}_{hidden}.pth` and its sidecar, everything else of the run to `{out_dir}/runs/`;
    returns the exit code.
    """
    out_dir = Path(flags.out_dir)
    path = out_dir / weight_name(stage, flags.hidden_size, flags.use_moe)
    run_dir = out_dir / "runs" / path.stem
    with user_errors(f"--out_dir {flags.out_dir}: cannot be written"):
        out_dir.mkdir(parents=True, exist_ok=True)
    with runtime(flags.device, flags.seed) as run:
        if not run.is_main:
            logging.disable(logging.WARNING)
        checkpoint = find_checkpoint(flags.resume, run_dir / "checkpoints", run)
        base = None if checkpoint else find_base(flags.from_weight, out_dir, bases, flags)
        model, processor = build_model(flags, base)
        model.to(run.device)
        samples = open_samples(flags.data_path, model, processor, flags, run)
        settings = settings_of(flags, samples, run.world_size)
        total_steps = planned_steps(step_sampler(samples, flags, run), flags)
        arguments = dataclasses.asdict(flags)

        def write_weights(state_dict: dict[str, torch.Tensor], step: int) -> None:
            tokenizer = processor.tokenizer
            save_weights(path, half_state(state_dict), describe(model, tokenizer, stage, step, arguments))

        if checkpoint:
            check_settings(checkpoint, settings, flags.resume_override)
            if checkpoint.about["finished"] and checkpoint.about["step"] >= total_steps:
                if run.is_main and not path.is_file():
                    write_weights(checkpoint.load()["model"], total_steps)
                log.info("%s: done before, after %d steps; --resume never starts over", path, total_steps)
                return 0
        eval_samples = None
        if flags.eval_data_path:
            eval_samples = open_samples(flags.eval_data_path, model, processor, flags, run)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info(
            "%s: %s rows, %.2fM weights learn, from %s, on %s x %d",
            stage,
            f"{len(samples):,}",
            learning / 1e6,
            checkpoint.folder if checkpoint else base or "scratch",
            run.device,
            run.world_size,
        )
        run.catch_signals()
        run.limit_waiting(flags.timeout_seconds)
        about = {"settings": settings, "arguments": arguments}
        about["run_id"] = checkpoint.about["run_id"] if checkpoint else secrets.token_hex(4)
        resumed_step = checkpoint.about["step"] if checkpoint else 0
        tracker = open_tracker(flags, run_dir.name, run_dir, about["run_id"], resumed_step, run)
        checkpoints = Checkpoints(
            run_dir / "checkpoints", flags.keep_checkpoints, run.is_main, about, write_weights
        )
        if flags.resume == "never" and checkpoint is None:
            with run.together(), user_errors("--resume never"):
                checkpoints.clear()
        metrics = Metrics(run_dir, total_steps, run, stage, tracker, resumed_step)
        parts = model, samples, eval_samples, flags, run, metrics, checkpoints, total_steps

        def training() -> int:  # loads the state itself, so that nothing else keeps it in memory
            return train(*parts, checkpoint.load() if checkpoint else None)

        summary = {"stage": stage, "arguments": arguments}
        code = written_up(training, summary, metrics, checkpoints, run)
        if skipped := metrics.summary()["skipped_rows"]:
            log.warning("warning: %d rows were skipped, see %s", skipped, metrics.bad_samples)
        log.info("%s: weights are in %s", "stopped by a signal" if code else "done", path)
        return code


def written_up(
    training: Callable[[], int],
    about: dict[str, Any],
    metrics: Metrics,
    checkpoints: Checkpoints,
    run: Runtime,
) -> int:
    """The exit code that `training` returns, once its last checkpoint is on the disk. However it ends, the
    run's summary.json says so, beside `about`."""
    code = 1
    try:
        stopped = training()
        with run.together():
            checkpoints.close()
            if failure := metrics.take_error():
                raise failure
        code = stopped
    except RuntimeError as error:
        if told := explained(error):
            raise told from None
        raise
    finally:
        metrics.close()
        if run.is_main:
            summary = metrics.summary() | about | {"exit_code": code}
            with contextlib.suppress(UserError):  # a full disk is told by what matters more
                write_json(metrics.run_dir / "summary.json", summary)
        checkpoints.close()
    return code


def build_model(flags: TrainingFlags, base: Path | None) -> tuple[MiniMindForCausalLM, MiniMindVLMProcessor]:
    """The model as the flags say, with the weights of `base` if there is one, and the right ones learning."""
    tokenizer = load_tokenizer(flags.tokenizer_path)
    visual = isinstance(flags, VLMTrainingFlags)
    if visual:
        model, processor = build_vlm(flags.model_config(), flags.vision_model_path, tokenizer)
    else:
        model, processor = build_lm(flags.model_config(), tokenizer)
    if base is not None:
        asked = flags.tokenizer_path != default(flags, "tokenizer_path")
        load_base(model, base, tokenizer, asked)
    if visual:
        set_trainable(model, flags.trainable)
    if flags.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()  # only re-entrant checkpoints need them; frozen layers do not
    return model, processor


def find_checkpoint(resume: str, folder: Path, run: Runtime) -> Checkpoint | None:
    """What --resume names; every rank gets the same one.

    Ranks that torchrun has started again go on with what this run has done, whatever --resume says.
    """
    (restarts,) = run.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))  # agents count differently
    if resume == "never":
        old = folder / ".resume-never"  # there as long as the folder is that of the run before
        with run.together(), user_errors("--resume never"):
            if run.is_main and not restarts and folder.exists():
                old.touch()
        (is_old,) = run.sum(run.is_main and old.exists())
        if is_old or not restarts:
            return None
    if resume not in ("auto", "never") and not (restarts and folder.exists()):
        checkpoint = read_checkpoint(Path(resume))
        if checkpoint is None or not checkpoint.intact():
            raise UserError(
                f"--resume {resume}: not the folder of an intact checkpoint, such as {folder}/step-1000"
            )
        return checkpoint
    step = -1.0
    with run.together():
        if run.is_main and (newest := Checkpoints(folder, 1, is_main=False).newest_intact()):
            step = newest.about["step"]
    (step,) = run.sum(step if run.is_main else 0)
    return read_checkpoint(folder / f"step-{step:.0f}") if step >= 0 else None


def open_samples(
    paths: list[str],
    model: torch.nn.Module,
    processor: MiniMindVLMProcessor,
    flags: TrainingFlags,
    run: Runtime,
) -> VLMDataset:
    """The rows of `paths`; with --cache_features, their pictures are encoded first, each rank its share."""
    files = [Path(path) for path in paths]
    visual = isinstance(flags, VLMTrainingFlags)
    images = Path(flags.images_path) if visual and flags.images_path else None
    with run.main_first():
        samples = VLMDataset(files, processor, flags.max_seq_len, images)
        if flags.tokens_per_batch and (longest := samples.lengths().max()) > flags.tokens_per_batch:
            raise UserError(
                f"--tokens_per_batch {flags.tokens_per_batch}: a row of {paths[0]} has {longest} tokens; "
                f"give at least that, or a smaller --max_seq_len"
            )
    if visual and flags.cache_features:
        with run.together(), user_errors("--cache_features"):
            samples.features = open_feature_cache(
                Path(flags.cache_features), model, processor, flags.cache_dtype
            )
            encode_missing(
                samples.features, model, processor, samples.image_paths(), run.rank, run.world_size
            )
        with user_errors("--cache_features"):
            samples.features.check_complete()
    return samples


def default(flags: TrainingFlags, name: str):
    return next(item.default for item in dataclasses.fields(flags) if item.name == name)
