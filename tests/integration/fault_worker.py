"""Run by torchrun: trains on two ranks; on one of them something goes wrong that nobody foresaw.

Arguments: those of train_pretrain_vlm.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_pretrain_vlm
import trainer.learner
from common.cli import run_main

backward = trainer.learner.backward


def failing(learner, *step):
    if learner.runtime.rank == 1:
        raise LookupError("nobody foresaw this")
    return backward(learner, *step)


trainer.learner.backward = failing
run_main(train_pretrain_vlm.main)
