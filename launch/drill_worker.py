"""What the drill's ranks run instead of train/launch.py: the same, with a fault built in from outside.

    launch/drill_worker.py [--pace S] [--fault KIND:STEP:RANK --once FILE] [--skip STEP] -- flags of train/launch.py

--pace makes each step take S seconds longer, so that the drill has time to break something in the middle of a run.
--fault nan makes the gradient of a step not-a-number on one rank, spike multiplies its loss by a hundred; stuck waits
for ever when that step should begin, unless FILE is there, which it makes. --skip leaves out the update of a step, as
the guard would: the unbroken run that a faulty one is compared with.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.exit_codes import leave
from train.launch import main

SPIKE = 100.0


def build_in(options):
    """Patch the model's forward pass and the guard; the step is what the loop asks the learning rate of."""
    import torch

    from model.hybrid import HybridLM
    from train import loop
    from train.guard import Guard

    now = {"step": 0}
    forward, learning_rate, why_not = HybridLM.forward, loop.learning_rate, Guard.why_not

    class NotANumber(torch.autograd.Function):
        """The loss as it is, with a gradient that is not a number."""

        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def is_time_for(kind):
        return options.fault == (kind, now["step"], int(os.environ["RANK"]))

    def faulty_forward(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        if self.training and is_time_for("nan"):
            return NotANumber.apply(loss)
        return SPIKE * loss if self.training and is_time_for("spike") else loss

    def noted_rate(step, plan):
        if step != now["step"]:
            now["step"] = step
            time.sleep(options.pace)
            if is_time_for("stuck") and not options.once.exists():
                options.once.touch()
                threading.Event().wait()
        return learning_rate(step, plan)

    def why_not_or_by_order(self, norm):
        return "by order" if now["step"] == options.skip else why_not(self, norm)

    HybridLM.forward, loop.learning_rate, Guard.why_not = faulty_forward, noted_rate, why_not_or_by_order


def read_fault(text):
    """nan:12:1 -> ("nan", 12, 1)"""
    kind, step, rank = text.split(":")
    if kind not in ("nan", "spike", "stuck"):
        raise ValueError(kind)
    return kind, int(step), int(rank)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--fault", type=read_fault)
    parser.add_argument("--once", type=Path)
    parser.add_argument("--skip", type=int)
    split = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:split])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    build_in(options)
    leave(main(sys.argv[split + 1 :]))
