"""Writes a stand-in for release 3's language model, with random weights, and its tokenizer in a folder beside
it: a base for a training that needs nothing published. Its argument is the .pth to write."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from release3 import make_state, make_tokenizer

SIZES = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)


def main(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(make_state(SIZES, visual=False), out)
    make_tokenizer().save_pretrained(out.with_suffix(""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
