"""One training stage from flags to files: what the stage scripts share around the loop."""

import dataclasses
import logging
from pathlib import Path

import torch

from dataset.feature_cache import encode_missing, open_feature_cache
from dataset.vlm_dataset import VLMDataset
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import TrainingFlags, VLMTrainingFlags
from trainer.checkpoint import describe, save_weights, weight_name
from trainer.cli import UserError, user_errors
from trainer.distributed import Runtime, runtime
from trainer.loop import planned_steps, step_sampler, train
from trainer.metrics import Metrics, open_tracker
from trainer.setup import build_lm, build_vlm, find_base, load_base, set_trainable
from trainer.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def run_stage(flags: TrainingFlags, stage: str, bases: tuple[str, ...]) -> int:
    """Runs `stage` ("lm", "pretrain_vlm" or "sft_vlm"), which starts from what one of `bases` wrote.

    Writes `{out_dir}/{stage}_{hidden}.pth` and its sidecar, metrics in `{out_dir}/runs/`; returns the exit
    code.
    """
    out_dir = Path(flags.out_dir)
    name = weight_name(stage, flags.hidden_size, flags.use_moe)
    with user_errors(f"--out_dir {flags.out_dir}: cannot be written"):
        out_dir.mkdir(parents=True, exist_ok=True)
    with runtime(flags.device, flags.seed) as run:
        if not run.is_main:
            logging.disable(logging.WARNING)
        base = find_base(flags.from_weight, out_dir, bases, flags)
        tokenizer = load_tokenizer(flags.tokenizer_path)
        if isinstance(flags, VLMTrainingFlags):
            model, processor = build_vlm(flags.model_config(), flags.vision_model_path, tokenizer)
        else:
            model, processor = build_lm(flags.model_config(), tokenizer)
        if base is not None:
            asked = flags.tokenizer_path != default(flags, "tokenizer_path")
            load_base(model, base, tokenizer, asked)
        model.to(run.device)
        if isinstance(flags, VLMTrainingFlags):
            set_trainable(model, flags.trainable)
        if flags.activation_checkpointing:
            model.activation_checkpointing_enable()
            model.disable_input_require_grads()  # only re-entrant checkpoints need them; frozen layers do not
        samples = open_samples(flags.data_path, model, processor, flags, run)
        eval_samples = None
        if flags.eval_data_path:
            eval_samples = open_samples(flags.eval_data_path, model, processor, flags, run)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info(
            "%s: %s rows, %.2fM weights learn, from %s, on %s x %d",
            stage,
            f"{len(samples):,}",
            learning / 1e6,
            base or "scratch",
            run.device,
            run.world_size,
        )
        run.catch_signals()
        total_steps = planned_steps(step_sampler(samples, flags, run), flags)
        tracker = open_tracker(flags.use_wandb, flags.wandb_project, name, dataclasses.asdict(flags), run)
        metrics = Metrics(out_dir / "runs" / Path(name).stem, total_steps, run, stage, tracker)
        path = out_dir / name

        def save(step: int) -> None:
            if run.is_main:
                save_weights(path, model, describe(model, tokenizer, stage, step, dataclasses.asdict(flags)))

        try:
            code = train(model, samples, eval_samples, flags, run, metrics, save)
        finally:
            metrics.close()
        if metrics.skipped_rows:
            log.warning(
                "warning: %d rows without a supervised token were skipped, all epochs together",
                metrics.skipped_rows,
            )
        if run.is_main:
            log.info("%s: weights are in %s", "stopped by a signal" if code else "done", path)
        return code


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
