"""Measure training steps on this machine's GPUs and add them to launch/measurements.json: `make bench-planner`.

python -m launch.measure                        # the points that fit, each in its own process: about eight minutes
python -m launch.measure --gpus 2 --only zero3  # on two GPUs, those points whose name has it
python -m launch.check                          # then: every point beside the planner

A point is a whole optimizer step through train's own engine, on random tokens in documents of 1,024: two steps to warm
up (six with --fp8), then the median of three. The peak is torch.cuda.max_memory_allocated(), over all of them,
the largest of any rank.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.check import setup_of
from launch.plan import ZERO_FILES, memory_of
from launch.speed import MEASUREMENTS
from train.config import TrainConfig, make_config, make_plan
from train.exit_codes import leave
from train.hardware import gpu_of
from train.memory import GIB, memory_needed

WARM_UP, TIMED = 2, 3
LIMIT_S = 240  # of a point; the first compiles the kernels
DEFAULTS = {
    "zero_file": "zero2", "recompute": "none", "optimizer": "adamw", "fp8": False, "vocab_size": 50304,
    "document_tokens": 1024, "grad_accum": 2,  # so that gradients are added up
}  # fmt: skip
POINTS = [  # the first three of 1.3B set constants of Python's time
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 1, "zero_file": "zero1"},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 1},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 1, "zero_file": "zero3"},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 4},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 2, "zero_file": "zero1"},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 4, "zero_file": "zero3", "recompute": "layer"},
    {"size": "1.3B", "seq_len": 2048, "micro_batch": 8},
    {"size": "1.3B", "seq_len": 8192, "micro_batch": 4, "zero_file": "zero1", "recompute": "layer"},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 12, "zero_file": "zero1"},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 12, "zero_file": "zero1", "fp8": True},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 4},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 16, "recompute": "layer"},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 4, "optimizer": "muon"},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 8, "fp8": True},
    {"size": "1.3B-gated", "seq_len": 4096, "micro_batch": 4, "optimizer": "adamw8bit"},
    {"size": "2.7B", "seq_len": 8192, "micro_batch": 2, "zero_file": "zero1"},
    {"size": "2.7B", "seq_len": 4096, "micro_batch": 8, "zero_file": "zero3", "recompute": "layer"},
    {"size": "2.7B", "seq_len": 8192, "micro_batch": 2, "recompute": "layer"},
    {"size": "6.7B", "seq_len": 8192, "micro_batch": 1, "zero_file": "zero1", "optimizer": "adamw8bit"},
    {"size": "6.7B", "seq_len": 4096, "micro_batch": 4, "zero_file": "zero3", "recompute": "layer"},
    {"size": "6.7B", "seq_len": 8192, "micro_batch": 1, "recompute": "layer"},
    {"size": "6.7B", "seq_len": 8192, "micro_batch": 1},  # two GPUs have room for this one and the next
    {"size": "6.7B", "seq_len": 8192, "micro_batch": 1, "zero_file": "zero3"},
]


def name_of(point):
    parts = [point["size"], point["zero_file"], point["optimizer"], f"recompute-{point['recompute']}"]
    parts += ["fp8"] if point["fp8"] else []
    parts += [f"{point['n_gpus']}-gpus"] if point.get("n_gpus", 1) > 1 else []
    return "-".join(parts) + f"-{point['micro_batch']}x{point['seq_len']}"


def plan_of(point, n_gpus, ds_config):
    """(TrainConfig, Plan) of a point, whose data is random."""
    config, _ = make_config(
        {name: point[name] for name in ("size", "seq_len", "micro_batch", "recompute", "optimizer", "fp8")}
        | {"data": "random", "run": "none", "steps": 100, "ds_config": ds_config}
        | {"batch_tokens": n_gpus * point["grad_accum"] * point["micro_batch"] * point["seq_len"]}
    )
    assert isinstance(config, TrainConfig)
    return config, make_plan(config, vocab_size=point["vocab_size"], n_tokens=10**12, world_size=n_gpus)


def measure(point, ds_config):
    """Run one point. All ranks call it, in processes that hold nothing else. Returns {"step_ms", "peak_gib", ...}."""
    import torch
    import torch.distributed as dist

    from model.fp8 import CURRENT_STEPS  # steps that take longer
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.processes import start_processes

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config, plan = plan_of(point, world_size, ds_config)
    start_processes(int(os.environ.get("RANK", 0)), world_size, config.timeout_minutes)
    engine = make_engine(plan, config, complete_ds_config(read_ds_config(ds_config), plan, config, world_size))
    device, on_gpu = engine.device, torch.cuda.is_available()
    set_learning_rate(engine, plan.lr, plan)
    tokens = torch.randint(0, plan.model.vocab_size, (plan.micro_batch, plan.model.seq_len), device=device)
    documents = (torch.arange(plan.model.seq_len, device=device) // point["document_tokens"]).expand_as(tokens)
    times = []
    for _ in range(WARM_UP + (CURRENT_STEPS if config.fp8 else 0) + TIMED):
        began = time.perf_counter()
        for _ in range(plan.grad_accum):
            loss = engine(tokens, targets=tokens.roll(-1, dims=1), document_ids=documents)
            engine.backward(loss)
            engine.step()
        if config.fp8:
            engine.module.scales.end_step()
        loss.item()  # waits for the GPU, as the loop's progress line does
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peaks = torch.zeros(2, device=device)
    if on_gpu:
        peaks = (
            torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=device) / GIB
        )
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
    dist.destroy_process_group()
    gpu = gpu_of(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "gpu": gpu.name if gpu else torch.cuda.get_device_name() if on_gpu else "cpu",
        "step_ms": round(sorted(times[-TIMED:])[TIMED // 2] * 1e3, 1),
        "peak_gib": round(peaks[0].item(), 2), "reserved_gib": round(peaks[1].item(), 2),
        "torch": torch.__version__,
    }  # fmt: skip


def start(point, n_gpus, ds_config):
    """Measure a point in new processes, one a GPU. Returns rank 0's figures; raises ValueError with its last line."""
    port = str(29600 + os.getpid() % 1000)
    children = []
    for rank in range(n_gpus):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_gpus), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-m", "launch.measure", "--point", json.dumps(point), "--ds-config", str(ds_config)]
        children.append(
            subprocess.Popen(
                command, cwd=Path(__file__).resolve().parents[1], env=environment, text=True,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )
        )  # fmt: skip
    try:
        out, err = children[0].communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"not done after {LIMIT_S} s") from None
    finally:
        for child in children:
            child.kill()
            child.wait()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if children[0].returncode or not lines:
        raise ValueError((err.strip().splitlines() or ["it said nothing"])[-1])
    return json.loads(lines[-1])


def write_measurements(content, path):
    """measurements.json with a line for each point, figure and constant, so that changes are seen."""

    def items(value, indent):
        space = " " * indent
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"{space}  {json.dumps(item)}" for item in value) + f"\n{space}]"
        nested = all(isinstance(item, dict) for item in value.values()) and indent < 4
        inner = [
            f"{space}  {json.dumps(key)}: " + (items(item, indent + 2) if nested and indent == 2 else json.dumps(item))
            for key, item in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{space}}}"

    pieces = []
    for key, value in content.items():
        if key == "constants":
            groups = [f"    {json.dumps(name)}: {items(group, 4)}" for name, group in value.items()]
            text = "{\n" + ",\n".join(groups) + "\n  }"
        else:
            text = items(value, 2) if isinstance(value, list | dict) else json.dumps(value)
        pieces.append(f"  {json.dumps(key)}: {text}")
    whole = "{\n" + ",\n".join(pieces) + "\n}\n"
    beside = path.with_suffix(".new")
    beside.write_text(whole)
    beside.replace(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: 1)")
    parser.add_argument("--only", default="", help="points whose name has this")
    parser.add_argument("--list", action="store_true", help="print the points and what the planner says, measure none")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS, help="the file to add to (launch/measurements.json)")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # one point, in this process
    parser.add_argument("--ds-config", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.point:
        print(json.dumps(measure(json.loads(flags.point), flags.ds_config)))
        return 0
    points = [point for point in (DEFAULTS | point for point in POINTS) if flags.only in name_of(point)]
    try:
        if not points:
            raise ValueError(f"no point's name has {flags.only!r}; --list prints them")
        return measure_all(points, flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure_all(points, flags):
    import torch

    if not flags.list and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is visible; run this on a machine that has one, or give --list")
    content, done = json.loads(flags.out.read_text()), 0
    for point in points:
        assert point["zero_file"] in ZERO_FILES
        ds_config = Path(__file__).resolve().parents[1] / f"ds_configs/{point['zero_file']}.json"
        point = {"n_gpus": flags.gpus} | point
        parts = memory_of(setup_of({"gpu": "h200"} | point))  # on any GPU
        said = f"{name_of(point)}: planned {sum(parts.values()) / GIB:.1f} GiB"
        if flags.list:
            print(said)
            continue
        if memory_needed(parts, flags.gpus) > torch.cuda.get_device_properties(0).total_memory:
            print(f"{said}, more than this GPU has: left out", flush=True)
            continue
        try:
            figures = start(point, flags.gpus, ds_config)
        except ValueError as error:
            print(f"{said}; failed: {error}", flush=True)
            continue
        print(f"{said}, took {figures['peak_gib']} GiB, {figures['step_ms']} ms a step", flush=True)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        told = {"id": f"{day}-{name_of(point)}", "use": "checks"}
        content["points"].append(told | point | figures | {"source": f"python -m launch.measure, {day}"})
        write_measurements(content, flags.out)  # after each, so that a lost machine loses one point
        done += 1
    return 0 if done or flags.list else 1


if __name__ == "__main__":
    leave(main())
