"""Started by DeepSpeed's launcher for tests/test_parity.py: a tiny model trained with every ZeRO stage.

parity_worker.py DATA OUT   writes OUT: {"zero2, accumulation 4": [[loss, gradient norm], ...], ...}
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

STEPS, BATCH_SEQUENCES, CLIP = 20, 8, 0.3  # norms are about 0.7, so the clipping acts
FILES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_hpz")  # of ds_configs/
ACCUMULATIONS = (1, 4)


def make_run(data, world_size, grad_accum):
    """(config, plan, token stream) of one run; the batch is the same however it is split."""
    from curation.shards import open_stream
    from train.config import TrainConfig, make_plan

    micro_batch = BATCH_SEQUENCES // grad_accum // world_size
    config = TrainConfig(size="tiny", data=data, run="unused", steps=STEPS, clip=CLIP, micro_batch=micro_batch)
    stream = open_stream(data, "train")
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=world_size)
    assert (plan.batch_sequences, plan.grad_accum) == (BATCH_SEQUENCES, grad_accum)
    return config, plan, stream


def plain_run(data, steps, measure):
    """[[measure(model, loss), gradient norm] of each step] of a plain loop on one process, the whole batch at a time.

    measure: called when the gradients are there, before they are clipped.
    """
    import torch

    from model.hybrid import HybridLM
    from train.data import training_batches
    from train.optim import parameter_groups
    from train.schedule import learning_rate

    config, plan, stream = make_run(str(data), 1, 1)
    torch.manual_seed(config.seed)
    model = HybridLM(plan.model)
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-8)
    batches, rows = training_batches(stream, plan, config.seed, 0, 1, 1, "cpu"), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        batch = next(batches)
        loss = model(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
        loss.backward()
        measured = measure(model, loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([measured, norm.item()])
    return rows


def zero_run(data, file, grad_accum):
    """[[loss, gradient norm] of each step] of a DeepSpeed engine with a JSON's settings, in float32. All ranks."""
    from torch import distributed as dist

    from train.data import training_batches
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.schedule import learning_rate

    rank, world_size = dist.get_rank(), dist.get_world_size()
    config, plan, stream = make_run(data, world_size, grad_accum)
    settings = read_ds_config(f"ds_configs/{file}.json")
    settings.pop("bf16", None)
    for size in settings["zero_optimization"].keys() & {"reduce_bucket_size", "allgather_bucket_size"}:
        settings["zero_optimization"][size] = 5_000_000  # what a GPU's buckets take, two cores need not
    if settings["zero_optimization"].get("offload_optimizer"):
        settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = False  # needs a GPU's driver
    engine = make_engine(plan, config, complete_ds_config(settings, plan, config))
    batches, rows = training_batches(stream, plan, config.seed, rank, world_size, 1, "cpu"), []
    for step in range(1, STEPS + 1):
        set_learning_rate(engine, learning_rate(step, plan), plan)
        total = 0.0
        for _ in range(grad_accum):
            batch = next(batches)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(loss)
            engine.step()
            total = total + loss.detach()
        dist.all_reduce(total)
        rows.append([total.item() / grad_accum / world_size, float(engine.get_global_grad_norm())])
    engine.destroy()
    return rows


def main(data, out):
    import torch
    from torch import distributed as dist

    from train.processes import start_processes

    rank = int(os.environ["RANK"])
    start_processes(rank, int(os.environ["WORLD_SIZE"]), 5)
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout.total_seconds() == 300, "the time-out of --timeout-minutes does not act"
    results = {
        f"{file}, accumulation {grad_accum}": zero_run(data, file, grad_accum)
        for file in FILES
        for grad_accum in ACCUMULATIONS
    }
    if rank == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    from train.exit_codes import leave

    main(*sys.argv[-2:])
    leave(0)
