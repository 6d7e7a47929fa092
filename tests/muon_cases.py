"""A program for tests/test_muon.py: three steps with Muon under several ZeRO stages, each step saved as a checkpoint.

deepspeed --num_gpus=2 tests/muon_cases.py OUT [CHECKPOINT ...]

OUT/stage2_accum4/step_0000001 ... hold weights and moments, and the gradient's norm in their record. Each CHECKPOINT,
of step 2, is gone on from in OUT/from_<number>.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from model.config import ModelConfig  # noqa: E402
from train.config import Plan, TrainConfig  # noqa: E402

STEPS, SEQUENCES = 3, 16
# two heads' worth of everything, and widths that no number of processes divides evenly
MODEL = ModelConfig(
    d_model=24, layer_pattern="MA", n_heads=4, n_kv_heads=2, d_ff=56, seq_len=16, vocab_size=96, d_state=8,
    mamba_head_dim=16, chunk_size=8, attention_gate=True, qk_norm=True, tied_embeddings=False,
)  # fmt: skip
CONFIG = TrainConfig(
    size="tiny", data="unused", run="unused", optimizer="muon", muon_momentum=0.9, clip=0.1, weight_decay=0.1,
    kernels="torch",
)  # fmt: skip
LR, MUON_LR = 1e-3, 2e-2


def plan(micro_batch, grad_accum):
    return Plan(
        model=MODEL, steps=STEPS, last_step=STEPS, batch_sequences=SEQUENCES, micro_batch=micro_batch,
        grad_accum=grad_accum, lr=LR, min_lr=0.0, warmup_steps=0, muon_lr=MUON_LR,
    )  # fmt: skip


def rate(step):
    """A rate that changes from step to step, as a part of the peak."""
    return 1 / step


def batch(step):
    """(SEQUENCES, l + 1) tokens, learnable, so that the gradient keeps a direction."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(MODEL.vocab_size, (SEQUENCES, MODEL.seq_len + 1), generator=generator) // 2 * 2


def run_case(folder, stage, grad_accum, resumed=None):
    import json

    from train.checkpoint import restore_optimizer, save_checkpoint
    from train.engine import complete_ds_config, make_engine, read_ds_config, set_learning_rate

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = json.loads((ROOT / "ds_configs/cpu.json").read_text())
    settings["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 5000}
    if rank == 0:
        folder.mkdir(parents=True)
        (folder / "ds.json").write_text(json.dumps(settings))
    torch.distributed.barrier()
    p = plan(SEQUENCES // world_size // grad_accum, grad_accum)
    ds_config = complete_ds_config(read_ds_config(folder / "ds.json"), p, CONFIG)
    engine = make_engine(p, CONFIG, ds_config, weights=resumed.tensors() if resumed else None)
    if resumed:
        restore_optimizer(engine, resumed)
    for step in range(resumed.step + 1 if resumed else 1, STEPS + 1):
        set_learning_rate(engine, LR * rate(step), p)
        for tokens in batch(step).view(grad_accum, world_size, p.micro_batch, -1)[:, rank]:
            engine.backward(engine(tokens[:, :-1], targets=tokens[:, 1:]))
            engine.step()
        record = {"grad_norm": float(engine.get_global_grad_norm())}
        name = folder / f"step_{step:07d}"
        save_checkpoint(engine, name, step=step, tokens=step, run=record, tokenizer=folder / "ds.json")
    engine.destroy()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from model.weights import load_checkpoint
    from train.exit_codes import leave

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, as in train/loop.py
    deepspeed.init_distributed(verbose=False)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    out, earlier = Path(arguments[0]), arguments[1:]
    for stage in (0, 1, 2, 3):
        for grad_accum in (1, 4):
            run_case(out / f"stage{stage}_accum{grad_accum}", stage, grad_accum)
    for i, path in enumerate(earlier):
        run_case(out / f"from_{i}", 1 + i % 3, 1, load_checkpoint(path))
    leave(0)
