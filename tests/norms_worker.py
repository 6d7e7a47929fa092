"""Started by DeepSpeed's launcher for tests/test_norms.py: gradient norms by part with every ZeRO stage.

norms_worker.py DATA OUT   writes OUT: {"zero2, accumulation 4": [[gradient norm, {part: norm}] of each step], ...}
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from parity_worker import CLIP, make_run  # noqa: E402 - the path is set first

STEPS = 3
RUNS = {  # number of processes -> [(file of ds_configs/, accumulation)]
    1: [("zero0", 4), ("zero2", 1), ("zero3", 4)],
    2: [("zero0", 1), ("zero1", 4), ("zero2", 1), ("zero2", 4), ("zero3", 1), ("zero2_offload", 1)],
}
IN_BF16 = [("zero1 in bf16", 4), ("zero2 in bf16", 4)]  # DeepSpeed has an optimizer of its own for the first
RUNS[1] += IN_BF16
RUNS[2] += IN_BF16


def norms_of(data, name, grad_accum):
    """[[gradient norm, {part: norm}] of each step]. All ranks."""
    from torch import distributed as dist

    from train.data import training_batches
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.norms import GradientNorms
    from train.schedule import learning_rate

    rank, world_size = dist.get_rank(), dist.get_world_size()
    config, plan, stream = make_run(data, world_size, grad_accum)
    file, _, in_bf16 = name.partition(" in ")
    settings = read_ds_config(f"ds_configs/{file}.json")
    if not in_bf16:
        settings.pop("bf16", None)
    for size in settings["zero_optimization"].keys() & {"reduce_bucket_size", "allgather_bucket_size"}:
        settings["zero_optimization"][size] = 5_000_000
    if settings["zero_optimization"].get("offload_optimizer"):
        settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    engine = make_engine(plan, config, complete_ds_config(settings, plan, config))
    norms = GradientNorms(engine, every=1, clip=CLIP)
    batches, rows = training_batches(stream, plan, config.seed, rank, world_size, 1, "cpu"), []
    for step in range(1, STEPS + 1):
        set_learning_rate(engine, learning_rate(step, plan), plan)
        norms.begin(step)
        for _ in range(grad_accum):
            batch = next(batches)
            engine.backward(engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids))
            engine.step()
        whole = float(engine.get_global_grad_norm())
        rows.append([whole, norms.end(whole)["grad_norm_by_part"]])
    engine.destroy()
    return rows


def main(data, out):
    from train.processes import start_processes

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_processes(rank, world_size, 5)
    results = {f"{name}, accumulation {n}": norms_of(data, name, n) for name, n in RUNS[world_size]}
    if rank == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    from train.exit_codes import leave

    main(*sys.argv[-2:])
    leave(0)
