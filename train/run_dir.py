"""A run's folder: what lies where, the record of what it is, and whether it may go on.

runs/demo/
    config.json                     the resolved configuration, written before step 1
    metrics.jsonl, metrics.csv      one object, and one row, a step
    events.jsonl                    what happened beside the steps: starts, resumes, saves, skipped steps, hangs
    profile/                        what --profile-steps recorded (train/profiler.py)
    log/rank00000.stacks.txt        where each process stood when the run hung
    checkpoints/step_0000400/       see train/checkpoint.py
    best.json                       which of them has the lowest held-out loss
    tensorboard/, trackers/         what train/trackers.py keeps
    eval/questions.json             what the benchmarks are asked while it trains
    eval/step_0000400.json          scores of that checkpoint
    report.html
"""

import dataclasses
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from curation.shards import new_file
from model.config import ModelConfig
from train.config import TrainConfig

CHECKPOINT_PREFIX = "step_"

# What may differ when a run goes on: where it stops, how it is watched, and how the work is laid out over machines.
MAY_CHANGE = frozenset({
    "run.data", "run.run", "run.stop_after", "run.micro_batch", "run.ds_config", "run.save_every", "run.keep",
    "run.eval_every", "run.eval_tokens", "run.eval_data", "run.eval_tasks", "run.eval_items",
    "run.resume", "run.verify_data", "run.timeout_minutes",
    "run.skip_sigma", "run.rollback_after",
    "run.preset", "run.kernels", "run.recompute", "run.norms_every", "run.wandb", "run.tensorboard", "run.clearml",
    "run.save", "run.profile_steps",
    "plan.last_step", "plan.micro_batch", "plan.grad_accum", "plan.profile_steps",
})  # fmt: skip
# A run that was started before ModelConfig or TrainConfig had a field was of that field's default.
LATER_FIELDS = {f"model.{f.name}": f.default for f in fields(ModelConfig) if f.default is not MISSING}
LATER_FIELDS |= {f"run.{f.name}": f.default for f in fields(TrainConfig) if f.default is not MISSING}
COMPARED = ("run", "plan", "model", "data.manifest_sha256")  # the rest (versions, argv ...) is there to be read


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def config(self):
        return self.path / "config.json"

    @property
    def metrics(self):
        return self.path / "metrics.jsonl"

    @property
    def metrics_csv(self):
        return self.path / "metrics.csv"

    @property
    def events(self):
        return self.path / "events.jsonl"

    def stacks(self, rank):
        return self.path / "log" / f"rank{rank:05d}.stacks.txt"

    @property
    def best(self):
        return self.path / "best.json"

    @property
    def questions(self):
        return self.path / "eval" / "questions.json"

    @property
    def report(self):
        return self.path / "report.html"

    def checkpoint(self, step):
        return self.path / "checkpoints" / f"{CHECKPOINT_PREFIX}{step:07d}"

    def checkpoints(self):
        """Finished checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*")
        return sorted(path for path in found if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit())

    def unfinished(self):
        """What a crash left of checkpoints that were being written or deleted, oldest first."""
        return sorted((self.path / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*.part"))


def write_json(path, value):
    """Write value as JSON, whole or not at all."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """Raises ValueError, naming the file, where it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None


def flatten(value, prefix=""):
    """{"run": {"seed": 1}} -> {"run.seed": 1}"""
    if not isinstance(value, dict):
        return {prefix: value}
    inner = [flatten(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
    return {key: item for flat in inner for key, item in flat.items()}


def differences(before, now):
    """What stops a run from going on, a line each: "run.seed: 1234 before, 99 now"."""
    old, new = LATER_FIELDS | flatten(before), LATER_FIELDS | flatten(now)
    compared = [k for k in old | new if k.startswith(COMPARED) and k not in MAY_CHANGE]
    return [f"{k}: {old.get(k)!r} before, {new.get(k)!r} now" for k in compared if old.get(k) != new.get(k)]


def check_new_or_resumed(run_dir, resume, config):
    """Raise ValueError when the folder cannot be one, holds a run already, or one that these flags do not continue."""
    there = next(path for path in (run_dir.path.absolute(), *run_dir.path.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--run {run_dir.path}: {there} is a file; give the name of a new or empty folder")
    if not run_dir.config.exists():
        if run_dir.path.is_dir() and any(run_dir.path.iterdir()) and not resume:
            raise ValueError(f"--run {run_dir.path} is a folder with other files in it; give a new or empty one")
        return
    if not resume:
        raise ValueError(f"--run {run_dir.path} holds a run already; go on with --resume, or give another folder")
    changed = differences(read_json(run_dir.config), config)
    if changed:
        raise ValueError(f"--resume would change the run in {run_dir.path}: {'; '.join(changed)}; use the first flags")


def read_metrics(path):
    """The objects of metrics.jsonl, in order; a last line cut short by a crash is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_metrics(path, step):
    """Drop what metrics.jsonl says of steps after `step`: a run that goes on from there writes them again."""
    if Path(path).exists():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        with new_file(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def heldout_losses(run_dir):
    """{checkpoint name: held-out loss} of every step at which metrics.jsonl has one."""
    rows = read_metrics(run_dir.metrics) if run_dir.metrics.exists() else []
    return {run_dir.checkpoint(row["step"]).name: row["heldout_loss"] for row in rows if "heldout_loss" in row}


def best_checkpoint(run_dir, losses):
    """The name of the checkpoint of lowest held-out loss, of those that were measured at their step, or None.

    losses: as heldout_losses gives them.
    """
    measured = [p.name for p in run_dir.checkpoints() if math.isfinite(losses.get(p.name, math.nan))]
    return min(measured, key=lambda name: (losses[name], name), default=None)


def note_best(run_dir, losses):
    """Write best.json, and return what best_checkpoint does; without a measured checkpoint there is no such file."""
    best = best_checkpoint(run_dir, losses)
    if best is None:
        run_dir.best.unlink(missing_ok=True)
    else:
        write_json(run_dir.best, {"checkpoint": best, "heldout_loss": losses[best]})
    return best


def remove_unfinished(run_dir):
    """Delete what a crash left of checkpoints that were being written."""
    for path in run_dir.unfinished():
        shutil.rmtree(path)


def put_aside(path):
    """Rename a damaged checkpoint, so that it does not count as one; whoever wants to look into it still can."""
    aside = path.with_name(path.name + ".damaged")
    with suppress(OSError):  # on a read-only disk it stays, and is passed over again
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def remove_folder(path):
    """Delete a checkpoint folder; renamed first, so that a crash half-way leaves nothing that looks whole."""
    going = path.with_name(path.name + ".part")
    os.replace(path, going)
    shutil.rmtree(going)


def describe(config, plan, ds_config, world_size, data_sha256):
    """What goes to config.json: everything a reader needs to know, or to repeat, the run."""
    plan_fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "model"}
    return {
        "run": dataclasses.asdict(config),
        "plan": plan_fields,
        "model": dataclasses.asdict(plan.model),
        "parameters": plan.model.n_parameters,
        "deepspeed": ds_config,
        "data": {"path": str(config.data), "manifest_sha256": data_sha256},
        "world_size": world_size,
        "git_commit": git_commit(),
        "argv": sys.argv,
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "deepspeed", "numpy")},
    }


def git_commit():
    """The commit of this source tree, "+changes" if it has any, or None outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
