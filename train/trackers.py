"""Weights & Biases, TensorBoard and ClearML: each a program of its own beside the run, which reads its metrics.jsonl.

So a slow network, a server that is gone or a hook in a library cannot slow the run, stop it or change its numbers. A
run that goes on goes on in the same place: what the tracker calls it is kept in the run's folder, under trackers/.
What did not get through can be sent again, and an old run too:

python -m train.trackers runs/demo --wandb braid
"""

import argparse
import contextlib
import math
import os
import secrets
import select
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from train.config import flag
from train.run_dir import RunDir, read_json
from train.tail import Tail, flat_row

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("wandb", "tensorboard", "clearml")  # flags, and the packages that they need
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
WAIT_S = 30  # at the end of a run, for what is not yet sent; a tracker that needs longer goes on alone


class WandbRun:
    def __init__(self, run_dir, project, first_step):
        import wandb

        kept = KeptId(run_dir, "wandb")
        self.run = wandb.init(
            project=project, id=kept.read() or secrets.token_hex(4), resume="allow", name=run_dir.path.name,
            dir=kept.path.parent, config=read_json(run_dir.config),
            # its readings would be of this process, and rows have the GPU's
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )  # fmt: skip
        kept.write(self.run.id)
        # its own count of steps only rises, and would drop what a run repeats after it went back to a checkpoint
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        self.run.log(values)

    def close(self, whole):
        self.run.finish(exit_code=0 if whole else 1)


class TensorBoardRun:
    def __init__(self, run_dir, project, first_step):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: what was written of later steps, by a run that went back to a checkpoint, is not shown
        self.writer = SummaryWriter(run_dir.path / "tensorboard", purge_step=first_step, flush_secs=10)

    def log(self, step, values):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, whole):
        self.writer.close()


class ClearMLRun:
    def __init__(self, run_dir, project, first_step):
        # in a thread: the process that it would fork to report from hangs now and then (clearml 2.1.12)
        os.environ["CLEARML__DEVELOPMENT__REPORT_USE_SUBPROCESS"] = "false"
        from clearml import Task

        kept = KeptId(run_dir, "clearml")
        known = None if Task.is_offline() else kept.read()  # offline, every session is a task of its own
        self.task = Task.init(
            project_name=project, task_name=run_dir.path.name, reuse_last_task_id=known or False,
            continue_last_task=0 if known else False,  # 0: our steps are counted from the first start already
            output_uri=False, auto_resource_monitoring=False, auto_connect_streams=False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks={"detect_repository": False},  # it hangs likewise; config.json has the commit
        )  # fmt: skip
        kept.write(self.task.id)
        self.task.connect_configuration(read_json(run_dir.config), name="config.json")

    def log(self, step, values):
        for key, value in values.items():
            title, _, series = key.partition("/")
            self.task.get_logger().report_scalar(title, series or title, value, step)

    def close(self, whole):
        if not whole and not self.task.is_offline():
            self.task.mark_failed(status_message="the training process ended without a word")
        self.task.close()


OPEN = {"wandb": WandbRun, "tensorboard": TensorBoardRun, "clearml": ClearMLRun}


class KeptId:
    """What a tracker calls the run: a line in trackers/<name>.id."""

    def __init__(self, run_dir, name):
        self.path = run_dir.path / "trackers" / f"{name}.id"
        self.path.parent.mkdir(exist_ok=True)

    def read(self):
        return self.path.read_text().strip() if self.path.exists() else None

    def write(self, value):
        self.path.write_text(f"{value}\n")


def check_trackers(config):
    """Raise ValueError for a tracker that is asked for and not installed."""
    for name in NAMES:
        if getattr(config, name) and find_spec(name) is None:
            raise ValueError(f"{flag(name)} needs {name}, which is not installed: pip install {name}")


def start_trackers(run_dir, config, first_step):
    """The Tracker of each that is asked for."""
    return [Tracker(run_dir, name, getattr(config, name), first_step) for name in NAMES if getattr(config, name)]


class Tracker:
    """The program that sends a run's rows to one tracker, seen from the training process."""

    def __init__(self, run_dir, name, value, first_step):
        """value: of the tracker's flag; first_step: the rows from there on are sent."""
        self.flags = [flag(name)] + ([value] if isinstance(value, str) else [])
        self.name, self.run_dir = name, run_dir
        self.log_path = run_dir.path / "trackers" / f"{name}.log"
        self.log_path.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "train.trackers", str(run_dir.path.resolve()), *self.flags]
        command += ["--follow", "--from-step", str(first_step)]
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is for the run
            )  # fmt: skip

    def problem(self):
        """One line if it has ended though the run goes on, else None."""
        if self.process.poll() is None:
            return None
        lines = self.log_path.read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no message").removeprefix("error: ")
        return (
            f"{self.name} has stopped, and the run goes on without it: {said} (all of it in {self.log_path}); send "
            f"the rows later with: python -m train.trackers {self.run_dir.path} {' '.join(self.flags)}"
        )

    def go_back(self, first_step):
        """metrics.jsonl has been cut, and its rows from first_step on are to be sent."""
        self._tell(f"from {first_step}")

    def _tell(self, line):
        with contextlib.suppress(OSError):  # it has ended: problem() says why
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def close(self):
        """End it after what it has not yet sent; one line if that was not possible in WAIT_S seconds, else None."""
        self._tell("done")
        try:
            return None if self.process.wait(WAIT_S) == 0 else self.problem()
        except subprocess.TimeoutExpired:
            return f"{self.name} has not sent everything yet; process {self.process.pid} goes on with that"


def follow(run_dir, tracker, first_step, hear):
    """Send the rows of metrics.jsonl from first_step on; returns whether the end was "done" or "gone".

    hear: a function that is asked before the file is read, so that nothing written before the end is missed. It gives
    one of those two, "from <step>" for a file that was cut and is to be sent again from there on, or "" for no news.
    """
    tail = Tail(run_dir.metrics)
    while True:
        heard = hear()
        if heard.startswith("from "):
            tail.close()
            tail, first_step = Tail(run_dir.metrics), int(heard.removeprefix("from "))
        for row in tail.rows():
            if row["step"] >= first_step:
                values = flat_row(row, "/")
                numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
                tracker.log(row["step"], numbers)
        if heard in ("done", "gone"):
            return heard


def hear_training(wire):
    """A line from the training process at the other end of `wire`; "" without one in a second, "gone" at its end."""
    if not select.select([wire], [], [], 1)[0]:
        return ""
    return wire.readline().decode().strip() or "gone"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.trackers", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--wandb", metavar="PROJECT")
    one.add_argument("--tensorboard", action="store_true")
    one.add_argument("--clearml", metavar="PROJECT")
    parser.add_argument("--from-step", type=int, default=1, help="send the rows from this step on (default: all)")
    parser.add_argument("--follow", action="store_true", help="go on until standard input ends, as training asks for")
    flags = parser.parse_args(argv)
    run_dir = RunDir(flags.run)
    name = next(name for name in NAMES if getattr(flags, name))
    try:
        check_trackers(flags)
        for path in (run_dir.config, run_dir.metrics):
            if not path.is_file():
                raise FileNotFoundError(f"{flags.run} is not a run folder: it has no {path.name}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.follow:  # it is told by its standard input; a scheduler sends these to all processes of a job
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    try:
        tracker = OPEN[name](run_dir, getattr(flags, name), flags.from_step)
        wire = sys.stdin.buffer.raw if flags.follow else None  # raw: a line in a buffer would not wake select
        end = follow(run_dir, tracker, flags.from_step, lambda: hear_training(wire) if wire else "done")
        tracker.close(whole=end == "done")
    except Exception as error:  # whatever another project's library raises is one line for the run
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
