"""Stage 1: captions. The projection and the language model's last layer learn; see --help for every flag."""

from dataclasses import dataclass

from common.cli import parse_flags, run_main
from inference.samples import sample_answers
from trainer.arguments import ROW_FILES, TRAINABLE, VLMTrainingFlags, flag_by_release
from trainer.stage import run_stage


@dataclass
class PretrainFlags(VLMTrainingFlags):
    data_path: list[str] | None = flag_by_release(
        f"the captions: {ROW_FILES}",
        ["dataset/pretrain_data.jsonl"],
        ["dataset/pretrain_i2t.parquet"],
        resumable=True,
    )
    images_path: str | None = flag_by_release(
        "folder that relative image paths start from", "dataset/pretrain_images", None, resumable=True
    )
    epochs: int | None = flag_by_release("passes over the data", 4, 2)
    max_seq_len: int | None = flag_by_release(
        "longest row in tokens, images included; longer rows are cut in their text", 640, 450
    )
    trainable: str | None = flag_by_release("which weights learn", "proj_last", "proj", choices=TRAINABLE)


def main() -> int:
    flags = parse_flags(PretrainFlags, __doc__)
    return run_stage(flags, "pretrain_vlm", bases=("lm", "llm"), answer=sample_answers)


if __name__ == "__main__":
    run_main(main)
