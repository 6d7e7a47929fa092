"""What `--explain` prints: every value that a run would work with, and where it came from. Starts nothing."""

import dataclasses

from deepspeed.runtime.config import DeepSpeedConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from train.config import SIZE_DEFAULTS, flag
from train.engine import ONLY_STAGE_3, default_ds_config
from train.run_dir import flatten

DERIVED = "derived"
MODEL_FLAGS = ("layer_pattern", "seq_len", "rope_scaling")
OWNED = {
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "derived: batch / (processes x micro-batch)",
    "gradient_clipping": "--clip",
}
# What DeepSpeed settles besides its sections, by the names of its JSON.
TOP_LEVEL = (
    "gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients", "communication_data_type",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "managed_gradient_accumulation",
    "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "disable_python_gc",
)  # fmt: skip


def flag_rows(config, origins, plan, world_size):
    """Yield (flag, value, origin); a flag that was left open has the value that was worked out for it."""
    for f in dataclasses.fields(config):
        value, origin = getattr(config, f.name), origins[f.name]
        if value is None and f.name in SIZE_DEFAULTS[config.size]:
            value, origin = SIZE_DEFAULTS[config.size][f.name], f"size {config.size}"
        elif value is None and f.name in MODEL_FLAGS:
            value, origin = getattr(plan.model, f.name), f"size {config.size}"
        elif value is None and f.name == "ds_config":
            value, origin = default_ds_config(world_size), "default of this machine"
        elif value is None and f.name == "steps":
            length = next((n for n in ("tokens", "epochs") if getattr(config, n) is not None), None)
            value, origin = plan.steps, f"derived: {flag(length)}" if length else "derived: one pass over the data"
        elif value is None and getattr(plan, f.name, None) is not None:
            value, origin = getattr(plan, f.name), DERIVED
        yield flag(f.name), value, origin


def plan_rows(plan, world_size):
    yield "processes", world_size, "--world-size or the launcher"
    yield "gradient accumulation", plan.grad_accum, DERIVED
    yield "sequences a step", plan.batch_sequences, DERIVED
    yield "tokens in all", plan.steps * plan.batch_sequences * plan.model.seq_len, DERIVED
    yield "last step of this start", plan.last_step, DERIVED
    yield "last learning rate", plan.min_lr, "derived: --min-lr x --lr"
    yield "parameters", plan.model.n_parameters, DERIVED


def model_rows(config, origins, plan):
    for f in dataclasses.fields(plan.model):
        origin = f"size {config.size}"
        if f.name == "vocab_size":
            origin = "the tokenizer of --data, up to a multiple of 128"
        elif f.name in MODEL_FLAGS and getattr(config, f.name) is not None:
            origin = f"{origins[f.name]} {flag(f.name)}"
        elif f.name.startswith("rope_") and f.name != "rope_theta" and config.rope_scaling is not None:
            origin = "derived: --rope-scaling"
        yield f.name, getattr(plan.model, f.name), origin


def deepspeed_rows(config, plan, ds_config, world_size):
    """Yield (key, value, origin) of what DeepSpeed itself makes of its JSON, its own defaults included.

    Left out is what cannot act: keys of other stages, and what is not set at all.
    """
    file = config.ds_config or default_ds_config(world_size)
    resolved = DeepSpeedConfig(ds_config)
    settled = {
        "train_batch_size": plan.batch_sequences,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": resolved.gradient_clipping,
        "data_types": {"grad_accum_dtype": resolved.grad_accum_dtype},
        **{key: getattr(resolved, key) for key in TOP_LEVEL},
        "bf16": resolved.bfloat16_config.model_dump(),
        "fp16": {"enabled": resolved.float16_config.enabled},
        "torch_autocast": {"enabled": resolved.torch_autocast_enabled},
        "zero_optimization": resolved.zero_config.model_dump(mode="json", by_alias=True),
    }
    stage = ds_config["zero_optimization"]["stage"]
    zero = settled["zero_optimization"]
    for key in [key for key in zero if zero[key] is None or (stage != 3 and key.startswith(ONLY_STAGE_3))]:
        del zero[key]
    if "leaf_module" not in ds_config["zero_optimization"]:
        zero.pop("leaf_module", None)  # classes of other people's models
    written = flatten(ds_config)
    for key, value in flatten(settled).items():
        origin = str(file) if key in written else "DeepSpeed's default"
        if key == "gradient_clipping" and stage == 0:
            origin = "stage 0: --clip acts in train/engine.py"
        elif key in OWNED:
            origin = OWNED[key]
        elif key == "zero_optimization.reduce_bucket_size" and value == plan.model.largest_parameter:
            origin = "derived: the largest weight"
        elif key == "train_batch_size":
            origin = "derived: --batch-tokens / --seq-len"
        yield key, value, origin


def explain(config, origins, plan, ds_config, world_size):
    """Print the four tables."""
    console = Console(width=None if Console().is_terminal else 160)
    for title, rows in (
        ("flags", flag_rows(config, origins, plan, world_size)),
        ("worked out", plan_rows(plan, world_size)),
        ("model", model_rows(config, origins, plan)),
        ("DeepSpeed", deepspeed_rows(config, plan, ds_config, world_size)),
    ):
        table = Table(title, "value", "from", box=SIMPLE_HEAD)
        table.columns[0].no_wrap = True
        for name, value, origin in rows:
            counted = isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
            table.add_row(name, f"{value:,}" if counted else "-" if value is None else str(value), origin)
        console.print(table)
