"""One training run, from checked inputs to the last checkpoint."""

import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from model.fp8 import why_not_fp8
from model.ops import load_ops
from train.checkpoint import newest_whole, open_weights, restore_optimizer
from train.config import make_plan
from train.engine import complete_ds_config, default_ds_config, make_engine, read_ds_config, set_learning_rate
from train.explain import explain
from train.guard import WINDOW, Guard
from train.memory import GIB, zero_of
from train.metrics import Metrics
from train.norms import GradientNorms
from train.optim import check_optimizer
from train.processes import Stop, start_processes, tell
from train.profiler import Profiler
from train.quiz import Cost, Quiz, make_questions
from train.run_dir import RunDir, check_new_or_resumed, cut_metrics, describe, remove_unfinished, write_json
from train.saves import Saves, go_back
from train.schedule import learning_rate
from train.stragglers import Clock, Stragglers
from train.trackers import check_trackers
from train.training_data import open_training_data
from train.validate import heldout_loss
from train.warm_up import warm_up
from train.watchdog import Watchdog


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


def train(config, origins=None, explain_for=None):
    """Train one model. Every process that the launcher starts calls it; see train/launch.py.

    origins: where each flag's value came from, for the record (train.config.make_config).
    explain_for: print what the run would be on this many processes, and do nothing else.

    Raises ValueError or FileNotFoundError, before any process waits for another, for inputs that cannot be;
    Stopped after SIGTERM, SIGUSR1 or Ctrl-C; LostContact if another process is gone; FloatingPointError if the loss
    does not recover.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), explain_for or int(os.environ.get("WORLD_SIZE", 1))
    ds_settings = read_ds_config(config.ds_config or default_ds_config(world_size))
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
    check_trackers(config)
    ops = load_ops(config.kernels)  # here already, so that missing kernels stop the run before a GPU is taken
    if config.fp8 and (lack := why_not_fp8()):
        raise ValueError(f"--fp8 cannot run: {lack}; leave it out")
    record = describe(config, plan, ds_config, world_size, data.sha256) | {"kernels": ops.__name__, "origins": origins}
    run_dir = RunDir(Path(config.run))
    check_new_or_resumed(run_dir, config.resume, record)
    initial = None
    if config.init_from and not (config.resume and run_dir.checkpoints()):
        initial = open_weights(config.init_from, plan.model, data.tokenizer_file, rank, world_size)

    questions = make_questions(config, plan, data.tokenizer_file) if config.eval_data and rank == 0 else None

    stop = Stop()
    agreed = {what: record[what] for what in ("run", "plan", "model", "deepspeed", "data")}
    start_processes(rank, world_size, config.timeout_minutes, agreed)
    device = deepspeed.get_accelerator().current_device_name()
    checkpoint = newest_whole(run_dir, say=say_on(rank)) if config.resume else None
    if config.init_from and not (checkpoint or initial):  # every checkpoint of the run's own is damaged
        initial = open_weights(config.init_from, plan.model, data.tokenizer_file, rank, world_size)
    step = checkpoint.step if checkpoint else 0
    quiz, cost = Quiz(questions, plan) if config.eval_data else None, Cost()
    metrics = None
    if rank == 0:
        remove_unfinished(run_dir)
        write_json(run_dir.config, record)
        cut_metrics(run_dir.metrics, step)
        metrics = Metrics(run_dir, config, plan, step + 1, world_size, record)
        going = f"goes on from step {step}" if step else "starts"
        batch = (
            f"{world_size} processes x {plan.grad_accum} x {plan.micro_batch} sequences of {plan.model.seq_len} tokens"
        )
        text = f"to {plan.last_step:,}: {config.size}, {plan.model.n_parameters:,} parameters, {batch}"
        metrics.event("resume" if step else "start", step, f"{config.run} {going}, {text}")
        for line in data_lines:
            metrics.say(line)
        if quiz:
            quiz.write(run_dir.questions)
            metrics.say(quiz.about)

    watchdog = Watchdog(rank, world_size, config.timeout_minutes * 60, run_dir.stacks(rank), metrics)
    with watchdog, Profiler(plan, run_dir, metrics) as profiler:
        warm_up(plan, config, ds_config, device, metrics)
        engine, guard, norms = ready(plan, config, ds_config, checkpoint, initial)
        if metrics and config.fp8:
            scales = engine.module.scales
            how = "" if torch.cuda.is_available() else ", worked out in float32: there is no GPU here"
            metrics.say(f"fp8: {scales.n_products} of the layers' {scales.n_all} matrix products are in 8 bits{how}")
        saves = Saves(engine, run_dir, config.keep, data.tokenizer_file, metrics)
        passed = checkpoint.run.get("passed_over", 0) if checkpoint else 0  # steps of data that no weight has seen
        batches = data.batches(plan, rank, world_size, step + passed + 1, device, checkpoint)
        batch_tokens = plan.batch_sequences * plan.model.seq_len
        forward, waiting, stragglers, returns = Clock(), Clock(), Stragglers(), Counter()
        while step < plan.last_step:
            step += 1
            profiler.begin(step)
            began = time.perf_counter()
            set_learning_rate(engine, learning_rate(step, plan), plan)
            if norms:
                norms.begin(step)
            total_loss = torch.zeros((), device=device)
            for i in range(plan.grad_accum):
                watchdog.note(step, "data")
                with waiting:
                    batch = next(batches)
                watchdog.note(step, "forward")
                with forward:
                    loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
                watchdog.note(step, "backward")
                engine.backward(loss)  # DeepSpeed divides by the number of micro-batches
                total_loss += loss.detach()
                if i == plan.grad_accum - 1:
                    mean = total_loss / plan.grad_accum
                    told = tell(mean, stop.code, saves.written, forward.take(), waiting.take())
                    guard.loss = told.loss
                    watchdog.note(step, "optimizer")
                engine.step()  # steps the optimizer after the last of them, if the guard lets it
            if config.fp8:
                engine.module.scales.end_step()
            grad_norm = float(engine.get_global_grad_norm())
            skipped = guard.note(grad_norm)
            last = step == plan.last_step or bool(told.stop)
            row = {
                "step": step,
                "loss": told.loss,
                "tokens": step * batch_tokens,
                "tokens_per_s": batch_tokens / (time.perf_counter() - began),
                "lr": learning_rate(step, plan),
                "grad_norm": grad_norm,
            } | ({"skipped": skipped} if skipped else {})
            if norms:
                row |= norms.end(grad_norm)
            if config.eval_every and (step % config.eval_every == 0 or (step == plan.last_step and not told.stop)):
                began, note = time.perf_counter(), partial(watchdog.note, step, "eval")
                row |= heldout_loss(engine, data.heldout, plan, config.eval_tokens, note)
                if quiz:
                    row |= quiz.ask(engine, note)
                row["eval_s"] = round(time.perf_counter() - began, 3)
                if (line := cost.line(began, config.eval_every)) and metrics:
                    metrics.say(line)
            if metrics:
                metrics.log(row)
                if skipped:
                    metrics.event("skip", step, f"step {step} is skipped: {skipped}")
                for slow, why in stragglers.note(told).items():
                    metrics.event("slow_rank", step, f"{watchdog.name(slow)} is slow: {why}", rank=slow)
            if saves.pending and told.written:
                saves.finish()
            if config.save and (last or (config.save_every and step % config.save_every == 0)):
                watchdog.note(step, "save")
                state = {"guard": guard.state(), "skipped_steps": guard.skipped_steps, "passed_over": passed}
                if config.fp8:
                    state["fp8"] = engine.module.scales.state()
                saves.begin(step, step * batch_tokens, record | data.state() | state, row.get("heldout_loss"))
            if last and config.save:
                saves.finish(must=True)
            if told.stop:
                break
            if guard.in_a_row >= (config.rollback_after or WINDOW):
                if saves.pending:
                    saves.finish()
                checkpoint = go_back(run_dir, step, guard, returns, metrics, say_on(rank))
                passed += step - checkpoint.step
                step = checkpoint.step
                engine.destroy()
                engine, guard, norms = ready(plan, config, ds_config, checkpoint, None)
                saves.engine = engine
    if metrics:
        kind, word = ("finished", "finished") if step == plan.steps else ("stop", "stopped")
        metrics.event(kind, step, f"{word} at step {step:,}")
        metrics.close()
        print(f"checkpoint: {run_dir.checkpoint(step) if config.save else 'none (--no-save)'}")
    dist.destroy_process_group()
    if step < plan.last_step:
        how = "go on with --resume" if config.save else "nothing is saved (--no-save)"
        raise Stopped(f"stopped at step {step} of {plan.last_step}; {how}", told.stop)


def ready(plan, config, ds_config, checkpoint, initial):
    """The engine, its guard and its meter of norms, as the checkpoint has them; else with the weights of `initial`, or
    random ones.
    """
    weights = checkpoint or initial
    guard = Guard(config.skip_sigma, checkpoint.run.get("guard") if checkpoint else None)
    engine = make_engine(plan, config, ds_config, weights=weights.tensors() if weights else None, guard=guard)
    if checkpoint:
        restore_optimizer(engine, checkpoint)
        if config.fp8:
            engine.module.scales.load(checkpoint.run["fp8"])
    return engine, guard, GradientNorms(engine, config.norms_every, config.clip) if config.norms_every else None


def gpu_memory_gib(config):
    """What this process's GPU has, for --micro-batch auto; None without a GPU or without the fused kernels on it."""
    if config.micro_batch != "auto" or not torch.cuda.is_available():
        return None
    if not load_ops(config.kernels).__name__.endswith("fused"):
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory / GIB


def say_on(rank):
    return (lambda line: print(line, file=sys.stderr, flush=True)) if rank == 0 else (lambda line: None)
