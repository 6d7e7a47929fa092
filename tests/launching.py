"""Starts real programs of ours, as a user does."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def launch(*flags, processes=1, timeout=240, cwd=ROOT, program="train/launch.py"):
    """Run a program as users run train/launch.py, with DeepSpeed's launcher on CPU processes. Returns the finished
    process."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={processes}", f"--master_port={free_port()}",
        str(ROOT / program), *map(str, flags),
    ]  # fmt: skip
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
