"""train/launch.py with a fault built in, for tests/test_faults.py.

FAULTS='[["nan", 70, 1, 1], ...]': the kind, the step, for how many steps, on which rank. Kinds: nan (the loss is
multiplied by not-a-number), spike (the loss is multiplied by 30), sleep (50 ms more a forward pass), hang (the rank
sleeps for ever in its forward pass), die (kill -9 of itself).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["DS_ACCELERATOR"] = "cpu"


def build_in(faults, rank):
    from model.hybrid import HybridLM

    forward, calls = HybridLM.forward, [0]  # one call a step: the runs of the test do not accumulate or measure

    def faulty(self, *args, **kwargs):
        calls[0] += 1
        loss = forward(self, *args, **kwargs)
        for kind, step, steps, on_rank in faults:
            if on_rank != rank or not step <= calls[0] < step + steps:
                continue
            if kind == "sleep":
                time.sleep(0.05)
            elif kind == "hang":
                time.sleep(1000)
            elif kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                loss = loss * {"nan": float("nan"), "spike": 30.0}[kind]
        return loss

    HybridLM.forward = faulty


if __name__ == "__main__":
    from train.exit_codes import leave
    from train.launch import main

    build_in(json.loads(os.environ["FAULTS"]), int(os.environ["RANK"]))
    leave(main())
