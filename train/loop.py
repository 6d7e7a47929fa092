"""One training run, from checked inputs to the last checkpoint."""

import dataclasses
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from model.ops import load_ops
from train.checkpoint import delete_old, newest_whole, open_weights, restore_optimizer, save_checkpoint
from train.config import make_plan
from train.engine import complete_ds_config, default_ds_config, make_engine, read_ds_config, set_learning_rate
from train.explain import explain
from train.memory import GIB, zero_of
from train.metrics import Metrics
from train.optim import check_optimizer
from train.run_dir import (
    RunDir,
    check_new_or_resumed,
    cut_metrics,
    heldout_losses,
    note_best,
    remove_unfinished,
    write_json,
)
from train.schedule import learning_rate
from train.training_data import open_training_data
from train.validate import heldout_loss


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


def train(config, origins=None, explain_for=None):
    """Train one model. Every process that the launcher starts calls it; see train/launch.py.

    origins: where each flag's value came from, for the record (train.config.make_config).
    explain_for: print what the run would be on this many processes, and do nothing else.

    Raises ValueError or FileNotFoundError, before any process waits for another, for inputs that cannot be;
    Stopped after SIGTERM or Ctrl-C; FloatingPointError if the loss is not a number.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), explain_for or int(os.environ.get("WORLD_SIZE", 1))
    ds_settings = read_ds_config(config.ds_config or default_ds_config())
    data = open_training_data(config, rank, world_size, verify=config.verify_data and not explain_for)
    plan = make_plan(
        config, vocab_size=data.vocab_size, n_tokens=data.n_tokens, world_size=world_size,
        zero=zero_of(ds_settings) if config.micro_batch == "auto" else None, gpu_memory_gib=gpu_memory_gib(config),
    )  # fmt: skip
    data_lines = data.check(plan)
    ds_config = complete_ds_config(ds_settings, plan, config, world_size)
    if explain_for:
        if rank == 0:
            explain(config, origins, plan, ds_config, world_size)
        return
    check_optimizer(config)
    ops = load_ops(config.kernels)  # here already, so that missing kernels stop the run before a GPU is taken
    record = describe(config, plan, ds_config, world_size, data.sha256) | {"kernels": ops.__name__, "origins": origins}
    run_dir = RunDir(Path(config.run))
    check_new_or_resumed(run_dir, config.resume, record)
    initial = None
    if config.init_from and not (config.resume and run_dir.checkpoints()):
        initial = open_weights(config.init_from, plan.model, data.tokenizer_file)

    stop = catch_signals()
    start_processes(rank, world_size, config.timeout_minutes)
    device = deepspeed.get_accelerator().current_device_name()
    checkpoint = newest_whole(run_dir, say=say_on(rank)) if config.resume else None
    start = checkpoint.step if checkpoint else 0
    if config.init_from and not (checkpoint or initial):  # every checkpoint of the run's own is damaged
        initial = open_weights(config.init_from, plan.model, data.tokenizer_file)
    weights = checkpoint or initial
    engine = make_engine(plan, config, ds_config, weights=weights.tensors() if weights else None)
    if checkpoint:
        restore_optimizer(engine, checkpoint)
    metrics = None
    if rank == 0:
        remove_unfinished(run_dir)
        cut_metrics(run_dir.metrics, start)
        losses = heldout_losses(run_dir)
        note_best(run_dir, losses)  # a checkpoint beyond the step that the run goes on from is not the best any more
        write_json(run_dir.config, record)
        metrics = Metrics(run_dir.metrics, start + 1, plan.last_step)
        going = f"goes on from step {start}" if start else "starts"
        metrics.say(
            f"{config.run} {going}, to {plan.last_step:,}: {config.size}, {plan.model.n_parameters:,} parameters, "
            f"{world_size} processes x {plan.grad_accum} x {plan.micro_batch} sequences of {plan.model.seq_len} tokens"
        )
        for line in data_lines:
            metrics.say(line)

    batches = data.batches(plan, rank, world_size, start + 1, device, checkpoint)
    batch_tokens = plan.batch_sequences * plan.model.seq_len
    saved_step = start
    for step in range(start + 1, plan.last_step + 1):
        began = time.perf_counter()
        set_learning_rate(engine, learning_rate(step, plan), plan)
        total_loss = torch.zeros((), device=device)
        for _ in range(plan.grad_accum):
            batch = next(batches)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(loss)  # DeepSpeed divides by the number of micro-batches
            engine.step()  # steps the optimizer after the last of them
            total_loss += loss.detach()
        mean_loss, must_stop = mean_over_processes(total_loss / plan.grad_accum, stop)
        row = {
            "step": step,
            "loss": mean_loss,
            "tokens": step * batch_tokens,
            "tokens_per_s": batch_tokens / (time.perf_counter() - began),
            "lr": learning_rate(step, plan),
            "grad_norm": float(engine.get_global_grad_norm()),
        }
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the loss of step {step} is {mean_loss}; the last checkpoint is of step {saved_step}"
            )
        last = step == plan.last_step or must_stop
        if config.eval_every and (step % config.eval_every == 0 or (step == plan.last_step and not must_stop)):
            row |= heldout_loss(engine, data.heldout, plan, config.eval_tokens)
        if metrics:
            metrics.log(row)
        if last or (config.save_every and step % config.save_every == 0):
            save_checkpoint(
                engine, run_dir.checkpoint(step), step=step, tokens=step * batch_tokens,
                run=record | data.state(), tokenizer=data.tokenizer_file,
            )  # fmt: skip
            saved_step = step
            if rank == 0:
                if "heldout_loss" in row:
                    losses[run_dir.checkpoint(step).name] = row["heldout_loss"]
                delete_old(run_dir, config.keep, losses)
        if must_stop:
            break
    if metrics:
        metrics.close()
        print(f"checkpoint: {run_dir.checkpoint(saved_step)}")
    dist.destroy_process_group()
    if saved_step < plan.last_step:
        raise Stopped(f"stopped at step {saved_step} of {plan.last_step}; go on with --resume")


def gpu_memory_gib(config):
    """What this process's GPU has, for --micro-batch auto; None without a GPU or without the fused kernels on it."""
    if config.micro_batch != "auto" or not torch.cuda.is_available():
        return None
    if not load_ops(config.kernels).__name__.endswith("fused"):
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory / GIB


def start_processes(rank, world_size, timeout_minutes):
    """Join the process group that the launcher's environment describes; alone, a group of one.

    timeout_minutes: without a limit of its own a lost process stalls the others for half an hour.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # DeepSpeed would compile a shared-memory all-reduce at the first start: g++ is needed, a stale lock hangs it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # each process would take all cores, and the processes of a machine would wait for one another
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores)))
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)


def mean_over_processes(loss, stop):
    """The loss averaged over the ranks, and whether any of them was asked to stop. All ranks call it."""
    values = torch.stack([loss.float(), loss.new_tensor(float(stop.asked))])
    dist.all_reduce(values)
    return values[0].item() / dist.get_world_size(), values[1].item() > 0


def catch_signals():
    """Note SIGTERM and Ctrl-C instead of dying of them; the loop saves and leaves after the step it is in.

    A second Ctrl-C ends the process at once.
    """

    class Stop:
        asked = False

    def note(number, frame):
        Stop.asked = True
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return Stop


def say_on(rank):
    return (lambda line: print(line, file=sys.stderr, flush=True)) if rank == 0 else (lambda line: None)


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
