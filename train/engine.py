"""DeepSpeed's JSON, checked and completed, and the engine made from it. The only place that merges the two.

A JSON of ds_configs/ says how memory and communication are arranged. What a run is (batch, rate, clipping ...) are
flags. DeepSpeed itself ignores top-level keys that it does not know (0.19.8), so a typing error would silently give
its default: here every key is known or refused.
"""

import difflib
import json
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from model.hybrid import HybridLM
from train.optim import make_optimizer

ROOT = Path(__file__).resolve().parents[1]

# The keys that may stand in a JSON, with their sub-keys; None where any value goes, or DeepSpeed's own schema checks.
KNOWN_KEYS = {
    "bf16": {"enabled", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"},
    "data_types": {"grad_accum_dtype"},
    "communication_data_type": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": None,
    "prescale_gradients": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "zero_optimization": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "steps_per_print": None,
    "disable_python_gc": None,
    "comms_logger": {"enabled", "verbose", "prof_all", "prof_ops", "debug"},
    "aio": {
        "block_size",
        "queue_depth",
        "thread_count",
        "single_submit",
        "overlap_events",
        "use_gds",
        "intra_op_parallelism",
    },
}
OWNED_KEYS = {
    "train_batch_size": "--batch-tokens",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--batch-tokens and --micro-batch",
    "gradient_clipping": "--clip",
    "optimizer": "--lr, --weight-decay, --beta1, --beta2",
    "scheduler": "--lr, --min-lr, --warmup-steps, --steps",
    "seed": "--seed",
}


def default_ds_config():
    """The JSON for this machine: ZeRO-2 in bf16 on GPUs, ZeRO-2 in float32 without."""
    return ROOT / "ds_configs" / ("zero2.json" if torch.cuda.is_available() else "cpu.json")


def _unknown(where, key, allowed):
    close = difflib.get_close_matches(key, allowed, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{where} has an unknown key {key!r}{meant} Allowed: {', '.join(sorted(allowed))}")


def read_ds_config(path):
    """A DeepSpeed JSON as a dict. Raises FileNotFoundError or ValueError, in one line, for whatever would not act."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "ds_configs").glob("*.json")))
        raise FileNotFoundError(f"--ds-config {path} does not exist; there are {known}")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--ds-config {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--ds-config {path} holds a {type(settings).__name__}; it must be one JSON object")
    for key, value in settings.items():
        if key in OWNED_KEYS:
            raise ValueError(
                f"--ds-config {path} sets {key!r}, which belongs to {OWNED_KEYS[key]}; take it out of the file"
            )
        if key not in KNOWN_KEYS:
            raise _unknown(f"--ds-config {path}", key, KNOWN_KEYS)
        if KNOWN_KEYS[key] is not None:
            if not isinstance(value, dict):
                raise ValueError(
                    f"--ds-config {path}: {key!r} must be an object with some of {sorted(KNOWN_KEYS[key])}"
                )
            for inner in value:
                if inner not in KNOWN_KEYS[key]:
                    raise _unknown(f"--ds-config {path}, {key!r},", inner, KNOWN_KEYS[key])
    try:
        zero = DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"--ds-config {path}, 'zero_optimization': {where}: {first['msg']}") from None
    if zero.stage == 0:  # DeepSpeed then keeps no float32 copy of bf16 weights, and no gradient norm
        raise ValueError(
            f"--ds-config {path} has no zero_optimization.stage of 1, 2 or 3; stage 2 suits every size here"
        )
    return settings


def complete_ds_config(settings, plan, config):
    """The JSON with what the flags own: what DeepSpeed is given."""
    return {
        **settings,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": config.clip,
    }


def make_engine(plan, config, ds_config, weights=None):
    """A DeepSpeed engine around a HybridLM. All ranks call it, after the process group is up.

    weights: {parameter name: float32 tensor} to start from, or None for random ones from config.seed.
    """
    torch.manual_seed(config.seed)
    model = HybridLM(plan.model, kernels=config.kernels, recompute=config.recompute)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(deepspeed.get_accelerator().current_device_name())
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config), config=ds_config)
    return engine


def set_learning_rate(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
