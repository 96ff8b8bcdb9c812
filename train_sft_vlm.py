"""Stage 2: dialogues about images. The projection and the language model learn; see --help for every flag."""

from dataclasses import dataclass

from common.cli import flag, parse_flags, run_main
from trainer.arguments import VLMTrainingFlags
from trainer.stage import run_stage


@dataclass
class SFTFlags(VLMTrainingFlags):
    data_path: list[str] = flag(
        ["dataset/sft_data.jsonl"], "JSONL or JSON files with the dialogues", resumable=True
    )
    images_path: str = flag(
        "dataset/sft_images", "folder that relative image paths start from", resumable=True
    )
    epochs: int = flag(2, "passes over the data")
    batch_size: int = flag(4, "rows of one micro-batch on one rank", resumable=True)
    learning_rate: float = flag(1e-6, "peak learning rate; a cosine brings it down to a tenth")
    max_seq_len: int = flag(1536, "longest row in tokens, images included; longer rows are cut in their text")
    log_interval: int = flag(10, "optimizer steps between two lines of metrics.jsonl", resumable=True)


def main() -> int:
    flags = parse_flags(SFTFlags, __doc__)
    return run_stage(flags, "sft_vlm", bases=("pretrain_vlm",))


if __name__ == "__main__":
    run_main(main)
