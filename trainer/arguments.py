"""The flags of the training stages: each field is a flag, with its help and default.

A stage's own defaults are set in its script, by a subclass.
"""

import math
import os
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from common.cli import DeviceFlags, EncoderFlags, check_seed, flag
from common.setup import ENCODERS, TOKENIZERS
from common.weights import SIZES

ROW_FILES = "JSONL, JSON or Parquet files, folders of them, or hf://datasets/OWNER/NAME"
TRAINABLE = ("proj", "proj_first_last", "proj_last", "proj_attn", "proj_llm")
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "none")
SIZE_FLAGS = [name for name in (*SIZES, "pixel_shuffle") if name != "vocab_size"]  # the tokenizer's to say
FOLLOWS = "; if not given: the base's, {} without a base"
resumable = partial(flag, resumable=True)  # a run that goes on may have another value
MAY_BE_ZERO = ("num_workers", "warmup_iters", "grad_clip", "max_bad_steps", "seed", "eval_share")


def flag_by_release(help_text: str, release_2: Any, release_3: Any, **settings: Any) -> Any:
    """A flag that is, where it is not given, what the release of the base takes; 2 without a base."""
    told = f"; if not given: {_shown(release_2)}, or {_shown(release_3)} with a base of release 3"
    return flag(None, help_text + told, by_release={2: release_2, 3: release_3}, **settings)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value or "none")


@dataclass
class TrainingFlags(DeviceFlags):
    """Flags of every stage. ValueError names a flag whose value makes no sense."""

    data_path: list[str] = resumable([], f"the rows to train on: {ROW_FILES}; several are read in order")
    out_dir: str = resumable("out", "folder for weights; metrics go to runs/ in it")
    epochs: int = flag(1, "passes over the data")
    batch_size: int = resumable(16, "rows of one micro-batch on one rank")
    tokens_per_batch: int | None = flag(None, "--batch_size in tokens, padding included: as many rows as fit")
    pack: bool = resumable(False, "put several rows into one sequence of --max_seq_len tokens, if cheaper")
    accumulation_steps: int = resumable(1, "micro-batches for one optimizer step")
    learning_rate: float = flag(4e-4, "peak learning rate; a cosine brings it down to a tenth")
    warmup_iters: int = flag(0, "optimizer steps of linear warm-up before the cosine")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 switches clipping off")
    max_steps: int | None = flag(None, "stop after this many optimizer steps, whatever --epochs says")
    max_seq_len: int = flag(640, "longest row in tokens, images included; longer rows are cut in their text")
    from_weight: str | None = flag(None, "base weights, or 'none'; if not given: what the stage before wrote")
    hidden_size: int | None = flag(None, "width of the language model" + FOLLOWS.format(512))
    num_hidden_layers: int | None = flag(None, "layers of the language model" + FOLLOWS.format(8))
    num_attention_heads: int | None = flag(None, "query heads" + FOLLOWS.format(8))
    num_key_value_heads: int | None = flag(None, "key and value heads" + FOLLOWS.format(2))
    use_moe: bool | None = flag(None, "mixture-of-experts layers" + FOLLOWS.format(False))
    tokenizer_path: str | None = flag(None, "folder of the tokenizer" + FOLLOWS.format(TOKENIZERS[2]))
    compile: bool = resumable(False, "compile the model with torch.compile")
    activation_checkpointing: bool = resumable(False, "recompute activations: less memory, a third slower")
    num_workers: int = resumable(min(8, os.cpu_count() or 1), "processes that prepare batches; 0: this one")
    seed: int = flag(1337, "seed of initial weights, order and dropout")
    log_interval: int = resumable(100, "optimizer steps between two lines of metrics.jsonl")
    save_interval: int = resumable(1000, "optimizer steps between two saves of weights and state")
    keep_checkpoints: int = resumable(2, "how many of the newest training states stay on the disk")
    resume: str = resumable("auto", "auto: continue a stopped run; never: start over; or a checkpoint folder")
    resume_override: bool = resumable(False, "go on though flags that decide what is learnt have changed")
    eval_data_path: list[str] = resumable([], "rows to measure the loss on while training")
    eval_share: float = flag(0.0, "instead: hold the rows of this share of the pictures out of --data_path")
    eval_interval: int = resumable(1000, "optimizer steps between two such measurements")
    on_bad_sample: str = resumable("skip", "unusable rows: skip and list, or end the run", ("skip", "error"))
    max_bad_steps: int = resumable(10, "steps in a row that may be skipped as not finite")
    loss_spike: float | None = resumable(None, "skip steps whose loss is above so many times its mean")
    timeout_seconds: float = resumable(1800.0, "how long a rank waits for the others")
    tracker: str | None = resumable(None, "send the metrics to the package of that name as well", TRACKERS)
    use_wandb: bool = resumable(False, "old name of --tracker wandb")
    wandb_project: str = resumable("MiniMind-V", "project name for the tracker, whichever it is")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_number = type(value) in (int, float)  # which a bool is not
            if is_number and (not 0 <= value < math.inf or (value == 0 and name not in MAY_BE_ZERO)):
                bound = "not be negative" if name in MAY_BE_ZERO else "be above 0"
                raise ValueError(f"--{name} must {bound}, found {value}")
        check_seed(self.seed)
        if self.eval_share >= 1 or (self.eval_share and self.eval_data_path):
            raise ValueError("--eval_share must be below 1, and goes without --eval_data_path")
        if self.data_path == []:
            raise ValueError("--data_path is needed: the rows to train on")
        self.tracker = self.tracker or ("wandb" if self.use_wandb else "none")
        if self.use_wandb and self.tracker != "wandb":
            raise ValueError(f"--use_wandb is --tracker wandb, but --tracker {self.tracker} is given")

    def defaults_of(self, release: int) -> dict[str, Any]:
        """What the flags become that follow the release of the base."""
        given = {item.name: item.metadata.get("by_release") for item in fields(self)}
        return {name: values[release] for name, values in given.items() if values}

    def model_config(self) -> dict[str, Any]:
        """The flags that are fields of the model's config, as far as they are set."""
        return {name: value for name in SIZE_FLAGS if (value := getattr(self, name, None)) is not None}


@dataclass
class VLMTrainingFlags(TrainingFlags, EncoderFlags):
    """Flags of the stages that see."""

    images_path: str = resumable("", "folder that the rows' relative image paths start from")
    trainable: str = flag("proj_llm", "which weights learn", TRAINABLE)
    vision_model_path: str | None = flag(None, "folder of the image encoder" + FOLLOWS.format(ENCODERS[2]))
    pixel_shuffle: int | None = flag(None, "side of the patches that become a token" + FOLLOWS.format(1))
    eval_blank: bool = resumable(False, "measure it with grey pictures, too: the gap is what is seen")
    sample_data_path: list[str] = resumable([], "rows to answer while training, at every --eval_interval")
    sample_rows: int = resumable(8, "how many of them, spread evenly: the first question of each")
    cache_features: str | None = resumable(None, "folder for encoder outputs: encode each image once")
    cache_dtype: str = flag("float16", "of --cache_features; int8 halves the disk", ("float16", "int8"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_blank and not (self.eval_share or self.eval_data_path):
            raise ValueError("--eval_blank needs rows to evaluate: --eval_data_path or --eval_share")
