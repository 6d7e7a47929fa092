"""Train one model on every GPU (or, without GPUs, process) that the launcher gives us.

deepspeed --num_gpus=8 train/launch.py --size 6.7B --data data/eight --run runs/6.7B
"""

import argparse
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(ROOT)

from train.config import TrainConfig, add_flags, make_config
from train.exit_codes import BAD_INPUT, DONE, FAILED, leave
from train.hardware import load_gpus


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, TrainConfig)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed always passes it; we read LOCAL_RANK
    parser.add_argument("--explain", action="store_true", help="print every value of the run and where it came from")
    parser.add_argument("--world-size", type=int, metavar="INT", help="with --explain: for how many GPUs (default: 1)")
    parser.add_argument("--preflight", action="store_true", help="test the nodes first, and stop where one is broken")
    flags = vars(parser.parse_args(argv))
    flags.pop("local_rank")
    preflight = flags.pop("preflight")
    asked, world_size = flags.pop("explain"), flags.pop("world_size")
    explain_for = (world_size or int(os.environ.get("WORLD_SIZE", 1))) if asked else None
    try:
        if world_size is not None and (not asked or world_size < 1):
            raise ValueError(f"--world-size {world_size} is for --explain alone, and at least 1; the launcher sets it")
        if preflight and asked:
            raise ValueError("--preflight starts tests, and --explain starts nothing; give one of them")
        config, origins = make_config(flags)
        load_gpus()  # which a user may edit; what is wrong there would else end the run at its first line
    except ValueError as error:
        say(int(os.environ.get("RANK", 0)), f"error: {error}")
        return BAD_INPUT
    if preflight and (code := run_doctor(sys.argv[1:] if argv is None else argv)):
        return code
    rank = int(os.environ.get("RANK", 0))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for GPUs, and warns that it found none
    # about calls that DeepSpeed makes
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from train.loop import Stopped, train  # here, so that --help waits for neither
    from train.watchdog import LostContact

    try:
        train(config, origins, explain_for)
    except Stopped as stopped:
        if rank == 0:  # all ranks have agreed on it, so none has to wait and see whether the first one speaks
            say(rank, str(stopped))
        return stopped.code
    except (ValueError, FileNotFoundError, ImportError) as error:  # ImportError: kernels that are not installed
        say(rank, f"error: {error}")
        return BAD_INPUT
    except LostContact as error:
        print(f"error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return FAILED
    except (FloatingPointError, OSError) as error:
        say(rank, f"error: {error}")
        return FAILED
    return DONE


def run_doctor(words):
    """The preflight's exit code. In a process of its own, whose GPU may fail or hang."""
    words = [word for word in words if word != "--preflight" and not word.startswith("--local_rank")]
    return subprocess.call([sys.executable, str(ROOT / "launch/doctor.py"), "--", *words])


def say(rank, line):
    """Print one line for all ranks: rank 0's, or another's own if rank 0 has nothing to say and lives on."""
    if rank:
        time.sleep(10)  # by then the launcher has ended us, if rank 0 stopped for the same reason
        line = f"{line} (rank {rank} on {socket.gethostname()})"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    leave(main())
