"""Stage 1: captions. The projection and the language model's last layer learn; see --help for every flag."""

from dataclasses import dataclass

from common.cli import flag, parse_flags, run_main
from trainer.arguments import TRAINABLE, VLMTrainingFlags
from trainer.stage import run_stage


@dataclass
class PretrainFlags(VLMTrainingFlags):
    data_path: list[str] = flag(
        ["dataset/pretrain_data.jsonl"], "JSONL or JSON files with the captions", resumable=True
    )
    images_path: str = flag(
        "dataset/pretrain_images", "folder that relative image paths start from", resumable=True
    )
    epochs: int = flag(4, "passes over the data")
    trainable: str = flag("proj_last", "which weights learn", TRAINABLE)


def main() -> int:
    flags = parse_flags(PretrainFlags, __doc__)
    return run_stage(flags, "pretrain_vlm", bases=("lm", "llm"))


if __name__ == "__main__":
    run_main(main)
