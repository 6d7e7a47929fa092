"""launch.doctor as a rank that has something wrong with it: python tests/doctor_worker.py FAULT [its flags]"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import checks, doctor  # noqa: E402

measure, look_up = checks.product_tflops, checks.versions


def crowded_product(device):
    """The same product on a core that two busy programs of higher priority keep."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    busy = [sys.executable, "-uc", "print()\nwhile True: pass"]
    loops = [subprocess.Popen(busy, stdout=subprocess.PIPE) for _ in range(3)]
    for loop in loops:
        loop.stdout.readline()
    os.nice(12)
    try:
        return measure(device)
    finally:
        for loop in loops:
            loop.kill()


def freeze(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)


match sys.argv.pop(1):
    case "slow":
        checks.product_tflops = crowded_product
    case "neglected":
        checks.versions = lambda: look_up() | {"torch": "1.0.0"}
        now = time.time
        time.time = lambda: now() + 60
    case "frozen":
        doctor.own_checks = freeze
    case "frozen_link":
        doctor.exchange_rounds = freeze
code = doctor.main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
