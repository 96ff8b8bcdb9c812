"""Stage 0: the language model, from text: rows of {"text": ...} or {"conversations": [...]}.

Only for those who have no base weights; `scripts/download.py lm` fetches the published ones.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import flag, parse_flags, run_main
from trainer.arguments import ROW_FILES, TrainingFlags
from trainer.stage import run_stage


@dataclass
class LMFlags(TrainingFlags):
    data_path: list[str] = flag(["dataset/lm_data.jsonl"], f"the texts: {ROW_FILES}", resumable=True)
    learning_rate: float = flag(5e-4, "peak learning rate; a cosine brings it down to a tenth")


def main() -> int:
    flags = parse_flags(LMFlags, __doc__)
    return run_stage(flags, "lm", bases=())


if __name__ == "__main__":
    run_main(main)
