"""Started by DeepSpeed's launcher for tests/test_gradients.py: ZeRO-2 in bf16, DeepSpeed's own way and ours.

gradients_worker.py DATA OUT   writes OUT: {"ours": {"losses": [...], "norms": [...], "weights": [...]}, ...}
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

STEPS, GRAD_ACCUM, BUCKET = 3, 2, 17_000  # less than a third of the weights, more than the largest of them
WAYS = ("DeepSpeed's", "ours", "ours, an owner at a time")


def run(data, way):
    """{what: numbers} of a few steps. All ranks; each has its own part of the weights."""
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
        batch_tokens=2 * GRAD_ACCUM * world_size * 64,
    )  # fmt: skip
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=world_size)
    settings = engines.read_ds_config("ds_configs/zero2.json")
    settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    settings["zero_optimization"]["use_multi_rank_bucket_allreduce"] = way != "ours, an owner at a time"
    save_traffic = engines.save_traffic
    if way == "DeepSpeed's":
        engines.save_traffic = lambda optimizer: None
    engine = engines.make_engine(plan, config, engines.complete_ds_config(settings, plan, config, world_size))
    engines.save_traffic = save_traffic
    batches, losses, norms = training_batches(stream, plan, config.seed, rank, world_size, 1, "cpu"), [], []
    for step in range(1, STEPS + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        for _ in range(GRAD_ACCUM):
            batch = next(batches)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    weights = [part.double().square().sum().item() for part in engine.optimizer.single_partition_of_fp32_groups]
    replaced = "average_tensor" in vars(engine.optimizer)
    n_parameters = sum(p.numel() for p in engine.module.parameters())
    engine.destroy()
    return {"losses": losses, "norms": norms, "weights": weights, "replaced": replaced, "parameters": n_parameters}


def main(data, out):
    from train.processes import start_processes

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_processes(rank, world_size, 5)
    results = {way: run(data, way) for way in WAYS}
    Path(out).with_suffix(f".{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    from train.exit_codes import leave

    main(*sys.argv[-2:])
    leave(0)
