"""A program for tests/test_any_to_any.py: runs that go on from one checkpoint in many layouts, and what they computed.

deepspeed --num_gpus=2 tests/layouts.py DATA OUT OPTIMIZERS [FROM]

Without FROM: 24 steps in ZeRO-2, saved after step 4 in OUT/<optimizer>/step_0000004, and the same layout from there.
With FROM, an OUT of such a start: from its checkpoints, other stages and micro-batches. Losses and samples go to
OUT/<processes>.json as {optimizer: {layout: [[loss, [sample, ...]] of each step]}}.
"""

import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

SAVED, STEPS = 4, 24
# {processes: [(stage, micro-batch)]} of batches of 8 sequences; what is left over is accumulated
LAYOUTS = {1: [(3, 4), (1, 8)], 2: [(0, 2), (3, 1)], 4: [(2, 1)]}


def fake_bitsandbytes():
    """bitsandbytes' step in plain PyTorch: its own needs a GPU. What is tested is how the moments are saved."""
    from train.optim import BLOCK, EightBit

    def create_dynamic_map(signed):
        fine = torch.logspace(-6, 0, 128, dtype=torch.float64).float()
        below = -fine[1:].flip(0) if signed else torch.logspace(-7, -6.01, 127)
        return torch.cat([below, torch.zeros(1), fine]).sort().values

    def step_8bit(
        kind, grad, weight, first, second, beta1, beta2, beta3, alpha, eps, step, lr, levels1, levels2, scales1,
        scales2, weight_decay,
    ):  # fmt: skip
        blocks = torch.arange(len(grad)) // BLOCK
        moments = []
        for codes, levels, scales, beta, new in (
            (first, levels1, scales1, beta1, grad), (second, levels2, scales2, beta2, grad.square())
        ):  # fmt: skip
            moment = beta * levels[codes.int()] * scales[blocks] + (1 - beta) * new
            packed = EightBit(len(grad), levels)
            packed.pack(moment)
            codes.copy_(packed.codes)
            scales.copy_(packed.scales)
            moments.append(moment)
        update = moments[0] / (1 - beta1**step) / ((moments[1] / (1 - beta2**step)).sqrt() + eps)
        weight.mul_(1 - lr * weight_decay).sub_(lr * update)

    functional = types.ModuleType("bitsandbytes.functional")
    functional.create_dynamic_map, functional.optimizer_update_8bit_blockwise = create_dynamic_map, step_8bit
    sys.modules.update({"bitsandbytes": types.ModuleType("bitsandbytes"), "bitsandbytes.functional": functional})


def run(data, folder, optimizer, stage, micro_batch, start=None):
    """Steps from `start`, a checkpoint, or from the beginning; [[loss, samples] of each step]."""
    from curation.shards import open_stream
    from train.checkpoint import gather, restore_optimizer, save_checkpoint
    from train.config import TrainConfig, make_plan
    from train.data import training_batches
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.schedule import learning_rate

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = TrainConfig(
        size="tiny", data=str(data), steps=STEPS, micro_batch=micro_batch, optimizer=optimizer, kernels="torch"
    )
    stream = open_stream(data, "train")
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=world_size)
    settings = read_ds_config(ROOT / "ds_configs/cpu.json")
    settings["zero_optimization"]["stage"] = stage
    engine = make_engine(
        plan, config, complete_ds_config(settings, plan, config), weights=start.tensors() if start else None
    )
    if start:
        restore_optimizer(engine, start)
    first = start.step + 1 if start else 1
    batches = training_batches(stream, plan, config.seed, rank, world_size, first, "cpu")
    rows = []
    for step in range(first, STEPS + 1):
        set_learning_rate(engine, learning_rate(step, plan), plan)
        loss, samples = 0.0, []
        for _ in range(plan.grad_accum):
            batch = next(batches)
            part = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(part)
            engine.step()
            loss += part.item() / plan.grad_accum
            samples += [hash(tuple(row.tolist())) for row in batch.tokens]  # of ints: the same in every process
        found = gather((loss, samples))
        rows.append([sum(loss for loss, _ in found) / world_size, sorted(s for _, part in found for s in part)])
        if step == SAVED:
            save_checkpoint(
                engine, folder / f"step_{step:07d}", step=step, tokens=0, run={}, tokenizer=ROOT / "Makefile"
            )
    engine.destroy()
    return rows


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from model.weights import load_checkpoint
    from train.exit_codes import leave

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, as in train/loop.py
    deepspeed.init_distributed(verbose=False)
    fake_bitsandbytes()
    data, out, optimizers, *earlier = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    found, processes = {}, int(os.environ["WORLD_SIZE"])
    for optimizer in optimizers.split(","):
        folder = Path(earlier[0] if earlier else out) / optimizer
        rows = found[optimizer] = {}
        if not earlier:
            rows["unbroken"] = run(data, folder, optimizer, 2, 2)
            rows["stage 2, micro-batch 2"] = run(
                data, folder, optimizer, 2, 2, load_checkpoint(folder / f"step_{SAVED:07d}")
            )
        for stage, micro_batch in LAYOUTS[processes]:
            start = load_checkpoint(folder / f"step_{SAVED:07d}")
            rows[f"stage {stage}, micro-batch {micro_batch}"] = run(data, folder, optimizer, stage, micro_batch, start)
    if os.environ["RANK"] == "0":
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{processes}.json").write_text(json.dumps(found))
    leave(0)
