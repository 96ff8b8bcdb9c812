"""One training stage from flags to files: what the stage scripts share around the loop."""

import contextlib
import dataclasses
import logging
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common import weights
from common.cli import UsageError, UserError, user_errors
from common.distributed import Runtime, explained, ignore_signals, runtime
from common.setup import ENCODERS, TOKENIZERS, build_lm, build_vlm, load_base, place, settings_of_base
from common.tokenizer import load_tokenizer
from dataset.feature_cache import FeatureCache, encode_missing
from dataset.files import sha256_of
from dataset.vlm_dataset import VLMDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import VLMConfig
from model.processing_vlm import MiniMindVLMProcessor
from trainer import state
from trainer.arguments import SIZE_FLAGS, TrainingFlags, VLMTrainingFlags
from trainer.batches import planned_steps, step_sampler
from trainer.loop import Answers, train
from trainer.metrics import Metrics
from trainer.trackers import open_tracker

log = logging.getLogger(__name__)


def run_stage(
    flags: TrainingFlags, stage: str, bases: tuple[str, ...], answer: Callable[..., Answers] | None = None
) -> int:
    """Runs `stage` ("lm", "pretrain_vlm" or "sft_vlm") from what one of `bases` wrote or its own checkpoint;
    returns the exit code. `answer(flags, model, processor)` answers the questions of --sample_data_path.
    Writes `{out_dir}/{stage}_{hidden}.pth` and its sidecar, all else of the run to `{out_dir}/runs/`."""
    out_dir = Path(flags.out_dir)
    tokenizer_asked = flags.tokenizer_path is not None
    named = state.named_checkpoint(flags.resume)
    base = None if named else find_base(flags, bases)
    flags, config = follow(flags, named, base)
    path = out_dir / weights.weight_name(stage, flags.hidden_size, flags.use_moe)
    run_dir = out_dir / "runs" / path.stem
    saves = run_dir / "checkpoints"
    with runtime(flags.device, flags.seed) as run, state.run_lock(run_dir, run):
        if not run.is_main:
            logging.disable(logging.WARNING)
        checkpoint = state.find_checkpoint(flags.resume, saves, run)
        new = {"step": 0, "run_id": secrets.token_hex(4), "sha256": None}
        before = checkpoint.about if checkpoint else new
        base_digest = sha256_of(base) if base and base.is_file() else None
        run.agree("checkpoint and weights to start from", str([path.name, base_digest, before["sha256"]]))
        if checkpoint:
            base, config = None, checkpoint.about.get("config", config)
        elif base and not base.is_file():
            raise UserError(f"{base}: no such weights")
        elif bases and not base and flags.from_weight != "none":
            missing = weights.weight_name(bases[0], flags.hidden_size, flags.use_moe)
            ways = "run the stage before, or give --from_weight PATH, or --from_weight none"
            raise UserError(f"no {missing} in {out_dir}: {ways}")
        model, processor = build_model(flags, config, base, tokenizer_asked)
        place(model, run.device, flags.dtype, getattr(flags, "encoder_dtype", "auto"))
        samples, eval_samples = open_samples(model, processor, flags, run)
        settings = state.settings_of(flags, samples, run.world_size, base_digest)
        run.agree("rows", settings["data_path (rows)"])
        total_steps = planned_steps(step_sampler(samples, flags, run), flags)
        arguments = dataclasses.asdict(flags)

        def write_weights(state_dict: dict[str, Tensor], step: int) -> None:
            sidecar = weights.describe(model, processor.tokenizer, stage, step, arguments)
            weights.save_weights(path, weights.half_state(state_dict), sidecar)

        if checkpoint:
            state.check_settings(checkpoint, settings, flags.resume_override)
            if checkpoint.about["finished"] and checkpoint.about["step"] >= total_steps:
                if run.is_main and not path.is_file():
                    write_weights(checkpoint.load()["model"], total_steps)
                log.info("%s: done before, after %d steps; --resume never starts over", path, total_steps)
                return 0
        with run.main_first():
            answers = answer(flags, model, processor) if vars(flags).get("sample_data_path") else None
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        what = f"{len(samples):,} rows, {learning / 1e6:.2f}M weights learn"
        start = checkpoint.folder if checkpoint else base or "scratch"
        log.info("%s: %s, from %s, on %s x %d", stage, what, start, run.device, run.world_size)
        run.catch_signals()
        run.limit_waiting(flags.timeout_seconds)
        tracker = open_tracker(flags, run_dir, before["run_id"], before["step"], run)
        about = {"settings": settings, "arguments": arguments, "config": config, "run_id": before["run_id"]}
        checkpoints = state.Checkpoints(saves, flags.keep_checkpoints, run.is_main, about, write_weights)
        if flags.resume == "never" and checkpoint is None:
            with run.together(), user_errors("--resume never"):
                checkpoints.clear()
        metrics = Metrics(run_dir, total_steps, run, stage, tracker, before["step"])
        parts = model, samples, eval_samples, flags, run, metrics, checkpoints, total_steps

        def training() -> int:  # loads the state itself, so that nothing else keeps it in memory
            return train(*parts, checkpoint.load() if checkpoint else None, answers)

        code = written_up(training, {"stage": stage, "arguments": arguments}, metrics, checkpoints)
        if skipped := metrics.skipped():
            log.warning("warning: skipped rows: %d, see %s", len(skipped), metrics.bad_samples)
        log.info("%s: weights are in %s", "stopped by a signal" if code else "done", path)
        return code


def written_up(
    training: Callable[[], int], about: dict[str, Any], metrics: Metrics, checkpoints: state.Checkpoints
) -> int:
    """The exit code that `training` returns, once its last checkpoint is on the disk. However it ends, the
    run's summary.json says so, beside `about`."""
    code, run = 1, metrics.runtime
    try:
        stopped = training()
        with run.together():
            checkpoints.close()
            if metrics.failure:
                raise metrics.failure
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
                weights.write_json(metrics.run_dir / "summary.json", summary)
        checkpoints.close()
    return code


def find_base(flags: TrainingFlags, stages: tuple[str, ...]) -> Path | None:
    """The weights to start from: `--from_weight`, or what one of `stages` wrote to --out_dir in the size that
    the flags leave open or name. None where there are none, UserError where there are several sizes."""
    if flags.from_weight is not None:
        return None if flags.from_weight == "none" else weights.published_weights(Path(flags.from_weight))
    found: dict[tuple[int, bool], Path] = {}
    for stage in stages:
        for path in sorted(Path(flags.out_dir).glob(f"{stage}_*.pth")):
            if match := re.fullmatch(rf"{stage}_(\d+)(_moe)?", path.stem):
                size = int(match[1]), bool(match[2])
                if flags.hidden_size in (None, size[0]) and flags.use_moe in (None, size[1]):
                    found.setdefault(size, path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found.values())
        ways = "name one with --from_weight, or by --hidden_size and --use_moe or --no_use_moe"
        raise UserError(f"{flags.out_dir} has weights of several sizes to start from: {names}; {ways}")
    return next(iter(found.values()), None)


def follow(
    flags: TrainingFlags, checkpoint: state.Checkpoint | None, base: Path | None
) -> tuple[TrainingFlags, dict[str, Any]]:
    """The flags, where they are open those of `checkpoint`, else of `base`, else the defaults of the release;
    with them the model's config. UserError where a size contradicts `base`."""
    config, found = {}, {}
    if checkpoint:
        config, found = checkpoint.about.get("config", {}), checkpoint.about["settings"]
    elif base and base.is_file():
        config, found = settings_of_base(base, flags.model_config(), vars(flags).get("vision_model_path"))
        found |= {name: config.get(name) for name in SIZE_FLAGS}
    release = weights.release_of(config)
    defaults = {name: getattr(VLMConfig(), name) for name in SIZE_FLAGS}
    defaults |= {"tokenizer_path": TOKENIZERS[release], "vision_model_path": ENCODERS[release]}
    defaults = {name: found.get(name) or value for name, value in defaults.items()}
    defaults |= flags.defaults_of(release)
    unset = {name for name, value in vars(flags).items() if value is None} & defaults.keys()
    flags = dataclasses.replace(flags, **{name: defaults[name] for name in unset})
    config = config | flags.model_config()
    try:
        positions = MiniMindConfig(**config).max_position_embeddings
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if flags.max_seq_len > positions:
        raise UsageError(f"--max_seq_len must be at most {positions}, found {flags.max_seq_len}")
    return flags, config


def build_model(
    flags: TrainingFlags, config: dict[str, Any], base: Path | None, tokenizer_asked: bool
) -> tuple[MiniMindForCausalLM, MiniMindVLMProcessor]:
    """The model of `config`, with the weights of `base` if there is one, and the right ones learning."""
    tokenizer = load_tokenizer(flags.tokenizer_path)
    if isinstance(flags, VLMTrainingFlags):
        model, processor = build_vlm(config, flags.vision_model_path, tokenizer)
        set_trainable(model, flags.trainable)
    else:
        model, processor = build_lm(config, tokenizer)
    if base is not None:
        load_base(model, base, tokenizer, tokenizer_asked)
    if flags.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()  # only re-entrant checkpoints need them; frozen layers do not
    return model, processor


def open_samples(
    model: nn.Module, processor: MiniMindVLMProcessor, flags: TrainingFlags, run: Runtime
) -> tuple[VLMDataset, VLMDataset | None]:
    """The rows to train on, and those to measure the loss on, if there are any."""
    samples, eval_samples = open_rows(flags.data_path, processor, flags, run), None
    if flags.eval_share:
        with run.together(), user_errors("--eval_share"):
            samples, eval_samples = samples.split(flags.eval_share)
    elif flags.eval_data_path:
        eval_samples = open_rows(flags.eval_data_path, processor, flags, run)
    for part, use in ((samples, "to train on"), (eval_samples, "to evaluate")):
        if part:
            log.info("%s: %s", use, part.about())
            cache_features(part, model, processor, flags, run)
    return samples, eval_samples


def open_rows(
    paths: list[str], processor: MiniMindVLMProcessor, flags: TrainingFlags, run: Runtime
) -> VLMDataset:
    images = Path(folder) if (folder := getattr(flags, "images_path", None)) else None
    with run.main_first():
        samples = VLMDataset([Path(path) for path in paths], processor, flags.max_seq_len, images)
        if flags.tokens_per_batch and (longest := samples.lengths().max()) > flags.tokens_per_batch:
            found = f"--tokens_per_batch {flags.tokens_per_batch}: a row of {paths[0]} has {longest} tokens"
            raise UserError(f"{found}; give at least that, or a smaller --max_seq_len")
    return samples


def cache_features(
    samples: VLMDataset, model: nn.Module, processor: MiniMindVLMProcessor, flags: TrainingFlags, run: Runtime
) -> None:
    """With --cache_features, encodes the pictures of `samples`, each rank its share."""
    if folder := getattr(flags, "cache_features", None):
        with run.together(), user_errors("--cache_features"):
            pictures = samples.image_paths()
            samples.features = cache = FeatureCache(Path(folder), model, processor, flags.cache_dtype)
            workers = {"num_workers": flags.num_workers, "worker_init_fn": ignore_signals}
            encode_missing(cache, model, processor, pictures, run.rank, run.world_size, **workers)
        with user_errors("--cache_features"):
            samples.features.check_complete()


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Marks which weights learn: the projection, with parts of the language model; never the encoder."""
    last = model.config.num_hidden_layers - 1
    learns = {
        "proj": r"vision_proj\.",
        "proj_last": rf"vision_proj\.|model\.layers\.{last}\.",
        "proj_first_last": rf"vision_proj\.|model\.layers\.(0|{last})\.",
        "proj_attn": r"vision_proj\.|model\.layers\.\d+\.self_attn\.[qkvo]_proj\.",
        "proj_llm": r"(?!vision_encoder\.)",
    }[trainable]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.match(learns, name) is not None)
