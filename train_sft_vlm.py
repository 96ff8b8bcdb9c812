"""Stage 2: dialogues about images. The projection and the language model learn; see --help for every flag."""

from dataclasses import dataclass

from common.cli import flag, parse_flags, run_main
from inference.samples import sample_answers
from trainer.arguments import ROW_FILES, TRAINABLE, VLMTrainingFlags, flag_by_release
from trainer.stage import run_stage


@dataclass
class SFTFlags(VLMTrainingFlags):
    data_path: list[str] | None = flag_by_release(
        f"the dialogues: {ROW_FILES}", ["dataset/sft_data.jsonl"], ["dataset/sft_i2t.parquet"], resumable=True
    )
    images_path: str | None = flag_by_release(
        "folder that relative image paths start from", "dataset/sft_images", None, resumable=True
    )
    epochs: int = flag(2, "passes over the data")
    batch_size: int = flag(4, "rows of one micro-batch on one rank", resumable=True)
    learning_rate: float | None = flag_by_release(
        "peak learning rate; a cosine brings it down to a tenth", 1e-6, 5e-6
    )
    max_seq_len: int | None = flag_by_release(
        "longest row in tokens, images included; longer rows are cut in their text", 1536, 768
    )
    trainable: str | None = flag_by_release(
        "which weights learn", "proj_llm", "proj_first_last", choices=TRAINABLE
    )
    log_interval: int = flag(10, "optimizer steps between two lines of metrics.jsonl", resumable=True)


def main() -> int:
    flags = parse_flags(SFTFlags, __doc__)
    return run_stage(flags, "sft_vlm", bases=("pretrain_vlm",), answer=sample_answers)


if __name__ == "__main__":
    run_main(main)
