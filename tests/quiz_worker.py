"""A program for tests/test_eval_during_training.py: the same steps with and without questions in between.

deepspeed --num_gpus=3 tests/quiz_worker.py DATA QUESTIONS OUT

Writes {stage: [{"plain": losses, "asked": losses, "kept": whether every ask left weights, optimizer and random states
as they were, "eval": [scores of each ask], "broken": scores of a network that is not a number} of each rank]}.
"""

import json
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

STEPS, MICRO_BATCH = 4, 2


def state_of(engine):
    """Everything that an ask must leave as it is, of this rank."""
    from train.checkpoint import flat_parameters, torch_optimizer

    moments = [t for kept in torch_optimizer(engine).state.values() for t in kept.values() if torch.is_tensor(t)]
    weights = [getattr(weight, "ds_tensor", weight).detach() for weight in engine.module.parameters()]  # ZeRO-3's part
    tensors = [t.clone() for t in [*flat_parameters(engine), *moments, *weights]]
    return tensors, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), engine.module.training


def same(a, b):
    return (
        all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and torch.equal(a[1], b[1]) and a[2:] == b[2:]
    )


def run(data, questions, stage, asks):
    from curation.shards import open_stream
    from train.config import TrainConfig, make_plan
    from train.data import training_batches
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate
    from train.quiz import Quiz
    from train.schedule import learning_rate

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batch_tokens = world_size * MICRO_BATCH * 64 * 2
    config = TrainConfig(
        size="tiny", data=str(data), steps=STEPS, micro_batch=MICRO_BATCH, batch_tokens=batch_tokens, kernels="torch"
    )
    stream = open_stream(data, "train")
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=world_size)
    settings = read_ds_config(ROOT / "ds_configs/cpu.json")
    settings["zero_optimization"]["stage"] = stage
    engine = make_engine(plan, config, complete_ds_config(settings, plan, config))
    quiz = Quiz(questions if rank == 0 else None, plan)
    batches = training_batches(stream, plan, config.seed, rank, world_size, 1, "cpu")
    losses, scores, kept = [], [], True
    for step in range(STEPS + 1):
        if asks:
            before = state_of(engine)
            scores.append(quiz.ask(engine)["eval"])
            kept = kept and same(before, state_of(engine))
        if step == STEPS:
            break
        set_learning_rate(engine, learning_rate(step + 1, plan), plan)
        for _ in range(plan.grad_accum):
            batch = next(batches)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    broken = None
    if asks:
        for parameter in engine.module.parameters():
            parameter.data.fill_(float("nan"))
            if stage == 3:
                parameter.ds_tensor.data.fill_(float("nan"))
        broken = quiz.ask(engine)["eval"]
    engine.destroy()
    return losses, scores, kept, broken


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from train.checkpoint import gather
    from train.exit_codes import leave

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, as in train/loop.py
    deepspeed.init_distributed(verbose=False)
    data, questions, out = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    questions, found = json.loads(Path(questions).read_text()), {}
    for stage in (1, 2, 3):
        plain, *_ = run(data, questions, stage, asks=False)
        asked, scores, kept, broken = run(data, questions, stage, asks=True)
        ranks = gather({"plain": plain, "asked": asked, "kept": kept, "eval": scores, "broken": broken})
        found[stage] = ranks
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(found))
    leave(0)
