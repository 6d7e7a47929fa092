"""For how long a save holds training up, beside the same steps without one.

    python train/bench_save.py --size nano
    deepspeed --num_gpus=8 train/bench_save.py --size 1.3B --folder /a/folder/on/the/disk/in/question

Trains on random tokens. Each save is begun after a step; steps go on until every rank has written, and it is finished.
What it costs: the time of begin(), what steps beside the writing take longer than quiet ones (their median), and the
time of finish(). The first save also allocates the host memory that the others use again.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.config import get_preset
from train.config import OPTIMIZERS, SIZE_DEFAULTS, TrainConfig, make_plan

WARM_UP = 3  # steps; on a GPU the first compiles kernels
BYTES_PER_PARAMETER = 12  # weight and two moments, float32
HEADINGS = ("save", "GB a rank", "begin s", "write s", "steps", "quiet step s", "beside s", "finish s", "held up s")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="nano", help="a name in model.config.PRESETS (default: nano)")
    parser.add_argument("--micro-batch", type=int, help="sequences in a pass of one process (default: the size's)")
    parser.add_argument("--grad-accum", type=int, default=1, help="passes in a step (default: 1)")
    parser.add_argument("--ds-config", help="a DeepSpeed JSON (default: as train/launch.py's)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--kernels", default="auto", help="as train/launch.py's (default: auto)")
    parser.add_argument("--recompute", default="none", help="as train/launch.py's (default: none)")
    parser.add_argument("--saves", type=int, default=4, help="saves to measure (default: 4)")
    parser.add_argument("--steps", type=int, default=10, help="quiet steps between them (default: 10)")
    parser.add_argument("--every-minutes", type=float, default=30, help="a save that often (default: 30)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench_save"), help="a new folder, deleted at the end"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher always passes it
    flags = parser.parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        check(flags, rank)
        rows = measure(flags, rank, world_size)
        if rank == 0:
            show(rows, flags, world_size)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(flags, rank):
    """Raise ValueError, in one line, for what cannot be measured."""
    for name in ("saves", "steps", "grad_accum"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} is too small; allowed: 1 or more")
    if flags.every_minutes <= 0:
        raise ValueError(f"--every-minutes {flags.every_minutes} is out of range; allowed: more than 0")
    if rank == 0 and flags.folder.exists():
        raise ValueError(f"--folder {flags.folder} exists, and would be deleted at the end; give a new one")
    there = next(folder for folder in flags.folder.absolute().parents if folder.exists())
    needed, free = BYTES_PER_PARAMETER * get_preset(flags.size).n_parameters, shutil.disk_usage(there).free
    if free < 1.1 * needed:
        raise ValueError(f"{there} has {free / 1e9:,.1f} GB free, a checkpoint of {flags.size} {needed / 1e9:,.1f} GB")


def measure(flags, rank, world_size):
    """Train and save. All ranks call it. Returns a dict of numbers for each save; times are the slowest rank's."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch.distributed as dist

    from train.checkpoint import BackgroundSave, gather
    from train.engine import complete_ds_config, default_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.optim import check_optimizer
    from train.processes import start_processes
    from train.run_dir import RunDir, remove_folder

    model = get_preset(flags.size)
    micro_batch = flags.micro_batch or SIZE_DEFAULTS[flags.size]["micro_batch"]
    config = TrainConfig(
        size=flags.size, data="random tokens", steps=1 << 20, micro_batch=micro_batch, optimizer=flags.optimizer,
        batch_tokens=world_size * flags.grad_accum * micro_batch * model.seq_len, warmup_steps=0,
        kernels=flags.kernels, recompute=flags.recompute,
    )  # fmt: skip
    plan = make_plan(config, vocab_size=model.vocab_size, n_tokens=1 << 50, world_size=world_size)
    settings = read_ds_config(flags.ds_config or default_ds_config(world_size))
    ds_config = complete_ds_config(settings, plan, config, world_size)
    check_optimizer(config)
    start_processes(rank, world_size, config.timeout_minutes)
    device = deepspeed.get_accelerator().current_device_name()
    engine = make_engine(plan, config, ds_config)
    set_learning_rate(engine, 1e-4, plan)
    tokens = torch.randint(model.vocab_size, (micro_batch, model.seq_len), device=device)
    run_dir, save = RunDir(flags.folder), BackgroundSave()
    tokenizer = Path(__file__)  # any small file

    def timed_step():
        """Seconds of a training step, and whether every rank has written by then."""
        began = time.perf_counter()
        for _ in range(flags.grad_accum):
            loss = engine(tokens, targets=tokens)
            engine.backward(loss)
            engine.step()
        waits = torch.stack([loss.detach().float(), loss.new_tensor(float(not save.written)).float()])
        dist.all_reduce(waits)  # as the loop does, and what the ranks wait for one another in
        return time.perf_counter() - began, waits[1].item() == 0

    def slowest(seconds):
        return max(gather(seconds))

    for _ in range(WARM_UP):
        timed_step()
    rows, quiet = [], [timed_step()[0] for _ in range(flags.steps)]
    for step in range(1, flags.saves + 1):
        dist.barrier()
        began = time.perf_counter()
        save.begin(engine, run_dir.checkpoint(step), step=step, tokens=0, run={}, tokenizer=tokenizer)
        begun, times, written = time.perf_counter(), [], False
        while not written:
            seconds, written = timed_step()
            times.append(seconds)
        before_finish = time.perf_counter()
        save.finish()
        finished = time.perf_counter()
        rows.append({
            "gb_a_rank": 4e-9 * save.host_copy.numel,
            "begin_s": slowest(begun - began),
            "writing_s": slowest(before_finish - begun),
            "steps_meanwhile": len(times),
            "steps_meanwhile_s": slowest(sum(times)),
            "finish_s": slowest(finished - before_finish),
        })  # fmt: skip
        quiet += [timed_step()[0] for _ in range(flags.steps)]
        if rank == 0:
            remove_folder(run_dir.checkpoint(step))
    if rank == 0:
        shutil.rmtree(flags.folder)
    dist.destroy_process_group()
    for row in rows:
        row["quiet_step_s"] = median(quiet)
        slower = row["steps_meanwhile_s"] - row["steps_meanwhile"] * row["quiet_step_s"]
        row["held_up_s"] = row["begin_s"] + max(slower, 0.0) + row["finish_s"]
        row["share_percent"] = 100 * row["held_up_s"] / (60 * flags.every_minutes)
    return rows


def show(rows, flags, world_size):
    """Print the table, and all numbers as one line of JSON."""
    from train.bench_data import print_table

    cells = [
        [
            "first" if i == 0 else str(i + 1), f"{row['gb_a_rank']:.2f}", f"{row['begin_s']:.3f}",
            f"{row['writing_s']:.2f}", str(row["steps_meanwhile"]), f"{row['quiet_step_s']:.3f}",
            f"{row['steps_meanwhile_s'] / row['steps_meanwhile']:.3f}", f"{row['finish_s']:.3f}",
            f"{row['held_up_s']:.2f}",
        ]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    print_table(f"{flags.size}, {flags.optimizer}, {world_size} processes", HEADINGS, cells)
    last = rows[-1]
    print(
        f"a save every {flags.every_minutes:g} minutes holds training up for {last['share_percent']:.3f} % of the "
        f"time (the first: {rows[0]['share_percent']:.3f} %)"
    )
    print(json.dumps({"size": flags.size, "optimizer": flags.optimizer, "world_size": world_size, "saves": rows}))


if __name__ == "__main__":
    code = main()
    from train.exit_codes import leave  # here: what it imports is not for --help

    leave(code)
