"""Started by DeepSpeed's launcher for tests/test_traffic.py: ZeRO-2 and 3 in bf16, DeepSpeed's own way and ours.

traffic_worker.py DATA OUT   writes OUT.RANK.json: {"zero2": {"losses": [...], "norms": [...], "replaced": ...}, ...}
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

STEPS, GRAD_ACCUM, BUCKET = 4, 2, 17_000  # less than a third of the weights, more than the largest of them
ZERO2 = ("DeepSpeed's zero2", "zero2", "zero2, an owner at a time")
ZERO3 = ("DeepSpeed's zero3", "zero3", "zero3, recomputed")
WAYS = dict.fromkeys((1, 2, 3), ZERO2 + ZERO3)  # by the number of processes
WAYS[2] += ("zero3, compiled",)  # by torch.compile, layer by layer
WAYS[4] = ("DeepSpeed's zero3_hpz", "zero3_hpz", "zero3_hpz, recomputed")  # two groups that each share a second copy


def run(data, way):
    """{what: numbers} of a few steps. All ranks."""
    import torch
    from torch import distributed as dist

    from curation.shards import open_stream
    from train import engine as engines
    from train.config import TrainConfig, make_plan
    from train.data import training_batches
    from train.schedule import learning_rate

    rank, world_size = dist.get_rank(), dist.get_world_size()
    stream = open_stream(data, "train")
    config = TrainConfig(
        size="tiny", data=data, run="unused", steps=STEPS, micro_batch=2, seq_len=64,
        batch_tokens=2 * GRAD_ACCUM * world_size * 64, recompute="layer" if "recomputed" in way else "none",
    )  # fmt: skip
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=world_size)
    theirs, file = way.startswith("DeepSpeed's "), way.removeprefix("DeepSpeed's ").split(",")[0]
    settings = engines.read_ds_config(f"ds_configs/{file}.json")
    settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    if file.startswith("zero3"):  # gather all but the smallest, for each pass
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 0}
        settings["zero_optimization"]["stage3_max_reuse_distance"] = 0
    if file == "zero3_hpz":
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    if way == "zero2, an owner at a time":
        settings["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    save_traffic = engines.save_traffic
    if theirs:
        engines.save_traffic = lambda optimizer: None
    engine = engines.make_engine(plan, config, engines.complete_ds_config(settings, plan, config, world_size))
    engines.save_traffic = save_traffic
    if "compiled" in way:
        for layer in engine.module.layers:
            layer.compile(backend="aot_eager")  # all of it but the code for the machine, which needs a C++ compiler
    batches, losses, norms = training_batches(stream, plan, config.seed, rank, world_size, 1, "cpu"), [], []
    for step in range(1, STEPS + 1):
        engines.set_learning_rate(engine, learning_rate(step, plan), plan)
        for _ in range(GRAD_ACCUM):
            batch = next(batches)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        with torch.no_grad():  # a held-out loss, say
            engine.eval()
            losses.append(engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids).item())
            engine.train()
    replaced = bool({"average_tensor", "partition_grads"} & vars(engine.optimizer).keys())
    engine.destroy()
    return {"losses": losses, "norms": norms, "replaced": replaced}


def main(data, out):
    from train.processes import start_processes

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_processes(rank, world_size, 5)
    results = {way: run(data, way) for way in WAYS[world_size]}
    Path(out).with_suffix(f".{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    from train.exit_codes import leave

    main(*sys.argv[-2:])
    leave(0)
