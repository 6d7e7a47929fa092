"""DeepSpeed's JSON, checked and completed, and the engine made from it. The only place that merges the two.

A JSON of ds_configs/ says how memory and communication are arranged. What a run is (batch, rate, clipping ...) are
flags. DeepSpeed itself ignores top-level keys that it does not know (0.19.8), so a typing error would silently give
its default: here every key is known or refused.
"""

import difflib
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import deepspeed
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import Field, ValidationError

from model.hybrid import HybridLM
from train.checkpoint import tell_optimizer, torch_optimizer
from train.memory import bucket_size, zero_of
from train.optim import make_optimizer
from train.run_dir import flatten
from train.traffic import save_traffic

ROOT = Path(__file__).resolve().parents[1]


class DataTypes(DeepSpeedConfigModel):
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None


class Settings(DeepSpeedConfigModel):
    """The keys that may stand in a JSON, and what each may be; DeepSpeed itself checks some of its sections alone."""

    bf16: DeepSpeedBF16Config = DeepSpeedBF16Config()
    data_types: DataTypes = DataTypes()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    gradient_predivide_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    prescale_gradients: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    zero_optimization: DeepSpeedZeroConfig
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    steps_per_print: int = Field(10, ge=1)
    disable_python_gc: bool = False
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()


SECTIONS = ("bf16", "data_types", "zero_optimization", "comms_logger")
OWNED_KEYS = {
    "train_batch_size": "--batch-tokens",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--batch-tokens and --micro-batch",
    "gradient_clipping": "--clip",
    "optimizer": "--lr, --weight-decay, --beta1, --beta2, --optimizer",
    "scheduler": "--lr, --min-lr, --warmup-steps, --steps, --schedule",
    "seed": "--seed",
    "fp16": "bf16.enabled: the loss is not scaled here, so float16 gradients would vanish",
    "amp": "bf16.enabled",
    "torch_autocast": "bf16.enabled",
    "activation_checkpointing": "--recompute",
    "wandb": "--wandb",
    "tensorboard": "--tensorboard",
    "csv_monitor": "metrics.csv of the run's folder, which is always written",
    "data_efficiency": "--data",
    "aio": "offloading to NVMe, which our checkpoints cannot read",
    "checkpoint": "--save-every and --keep: the checkpoints are train/checkpoint.py's",
}
# Keys of zero_optimization that its schema takes and that we refuse, each with the reason.
REFUSED_ZERO_KEYS = {
    "cpu_offload": "it is the old name of offload_optimizer",
    "cpu_offload_param": "it is the old name of offload_param",
    "cpu_offload_use_pin_memory": "it is the old name of pin_memory in offload_optimizer",
    "stage3_gather_fp16_weights_on_model_save": "our checkpoints are not DeepSpeed's: it would do nothing",
    "stage3_gather_16bit_weights_on_model_save": "our checkpoints are not DeepSpeed's: it would do nothing",
    "elastic_checkpoint": "our checkpoints are not DeepSpeed's: it would do nothing",
    "load_from_fp32_weights": "our checkpoints are not DeepSpeed's: it would do nothing",
    "pipeline_loading_checkpoint": "our checkpoints are not DeepSpeed's: it would do nothing",
    "legacy_stage1": "DeepSpeed 0.19 has one stage 1, and ignores it",
    "compute_grad_norm": "without the norm nothing is clipped and none is recorded",
    "save_muon_momentum_buffer_in_memory": "it belongs to DeepSpeed's own Muon, which is not used",
    "offload_param": "our checkpoints are not tested with weights that lie on the CPU; use offload_optimizer",
    "zenflow": "it updates weights late, so the losses are not AdamW's",
    "zero_quantized_weights": "the weights would be rounded to 8 bits on their way, so the losses are not AdamW's",
    "zero_quantized_nontrainable_weights": "every weight is trained here, so it would do nothing",
    "zero_quantized_gradients": "the gradients would be rounded to 4 bits on their way, so the losses are not AdamW's",
}
ONLY_STAGE_3 = ("stage3_", "zero_hpz", "sub_group_size", "leaf_module")


def default_ds_config(world_size):
    """The JSON for so many processes on this machine: ZeRO-2 in bf16 on GPUs, ZeRO-2 in float32 without.

    One GPU holds the same in stage 1, which adds micro-batches up in a quarter of stage 2's memory traffic.
    """
    if not torch.cuda.is_available():
        return ROOT / "ds_configs/cpu.json"
    return ROOT / "ds_configs" / ("zero2.json" if world_size > 1 else "zero1.json")


def _refuse_unknown(where, given, schema):
    allowed = {field.alias or name for name, field in schema.model_fields.items()} - REFUSED_ZERO_KEYS.keys()
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{where} has an unknown key {key!r}{meant} Allowed: {', '.join(sorted(allowed))}")


def _once(pairs):
    """A JSON object's keys and values as a dict; json alone keeps the last value of a key that stands twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands twice in one object")
    return dict(pairs)


def read_ds_config(path):
    """A DeepSpeed JSON as a dict. Raises FileNotFoundError or ValueError, in one line, for whatever would not act."""
    path = Path(path)
    if not path.is_file() and (ROOT / path).is_file():  # ds_configs/zero2.json, from any folder
        path = ROOT / path
    if not path.is_file():
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "ds_configs").glob("*.json")))
        raise FileNotFoundError(f"--ds-config {path} does not exist; there are {known}")
    try:
        settings = json.loads(path.read_text(), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"--ds-config {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--ds-config {path} holds a {type(settings).__name__}; it must be one JSON object")
    for key in settings:
        if key in _REMOVED_TOP_LEVEL_CONFIG_KEYS:
            reason = _REMOVED_TOP_LEVEL_CONFIG_KEYS[key].strip()
            raise ValueError(f"--ds-config {path} sets {key!r}, which DeepSpeed no longer has: {reason}")
        if key in OWNED_KEYS:
            raise ValueError(
                f"--ds-config {path} sets {key!r}, which belongs to {OWNED_KEYS[key]}; take it out of the file"
            )
    _refuse_unknown(f"--ds-config {path}", settings, Settings)
    sections = {name: settings.get(name, {}) for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            keys = sorted(Settings.model_fields[name].annotation.model_fields)
            raise ValueError(f"--ds-config {path}: {name!r} must be an object with some of {keys}")
    zero = sections["zero_optimization"]
    for key in zero:
        if key in _REMOVED_ZERO_CONFIG_KEYS:
            raise ValueError(f"--ds-config {path}: {_REMOVED_ZERO_CONFIG_KEYS[key].strip()}")
        if key in REFUSED_ZERO_KEYS:
            raise ValueError(
                f"--ds-config {path} sets zero_optimization.{key}, which is refused: {REFUSED_ZERO_KEYS[key]}"
            )
    for name, section in sections.items():
        _refuse_unknown(f"--ds-config {path}, {name!r},", section, Settings.model_fields[name].annotation)
    if "stage" not in zero:
        raise ValueError(f"--ds-config {path} has no zero_optimization.stage; allowed: 0, 1, 2 or 3")
    try:
        taken = flatten(Settings(**settings).model_dump(mode="json", by_alias=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        given = "" if isinstance(first["input"], dict) else f" {json.dumps(first['input'])}"
        raise ValueError(f"--ds-config {path}: {where}{given}: {first['msg']}") from None
    for name, given in flatten(settings).items():  # "2", true and "auto" would be taken for numbers
        value = taken.get(name)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            given, value = json.dumps(given), json.dumps(value)
            raise ValueError(f"--ds-config {path}: {name} {given} would be taken for {value}; write that")
    for reason in wrong_combinations(settings, zero, zero["stage"]):
        raise ValueError(f"--ds-config {path}: {reason}")
    return settings


def wrong_combinations(settings, zero, stage):
    """Yield what cannot go together in a JSON, each in one line with the reason."""
    bf16 = settings.get("bf16", {})
    for key in zero:
        if stage != 3 and key.startswith(ONLY_STAGE_3):
            yield f"zero_optimization.{key} acts in stage 3 alone, and the stage is {stage}; take it out"
    if bf16.get("enabled") and bf16.get("immediate_grad_update", False) != (stage == 1):
        yield (
            "immediate_grad_update must be true in stage 1, which else keeps every bf16 gradient beside the float32 "
            f"sums, and acts in no other; the stage is {stage}"
        )
    if stage == 0 and bf16.get("enabled"):
        yield "stage 0 keeps no float32 copy of bf16 weights, so small updates are lost; use stage 1, 2 or 3"
    offload = zero.get("offload_optimizer") or {}
    if offload and stage not in (1, 2):
        yield f"offload_optimizer is tested here in stages 1 and 2, and the stage is {stage}; use stage 2"
    if offload.get("device", "none") not in ("cpu", "none"):
        yield f"offload_optimizer to {offload['device']} is refused: our checkpoints read the optimizer from memory"
    if not {"device", "pin_memory"}.issuperset(offload):
        yield "offload_optimizer takes device and pin_memory here; its other keys act on NVMe, stage 3 or SuperOffload"
    if zero.get("reduce_scatter") is False and stage == 3:
        yield "stage 3 without reduce_scatter is for DeepSpeed's own Muon, which is not used; take it out"
    if bf16.get("bf16_master_weights_and_grads") or bf16.get("bf16_optimizer_states"):
        yield "bf16 master weights or optimizer states lose small updates, and checkpoints hold float32; take them out"
    if bf16.get("enabled") and settings.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        yield "bf16 without data_types.grad_accum_dtype 'fp32' adds micro-batches up in bf16; set it to 'fp32'"
    if settings.get("communication_data_type") == "fp16":
        yield "communication_data_type fp16 overflows, as gradients are not scaled here; use fp32 (or bf16)"
    if settings.get("gradient_allreduce_op", "mean") != "mean":
        yield "gradient_allreduce_op other than 'mean' makes the gradient grow with the number of processes"
    if settings.get("gradient_predivide_factor", 1.0) != 1.0 and not settings.get("prescale_gradients"):
        yield "gradient_predivide_factor does nothing without prescale_gradients"
    if settings.get("zero_allow_untested_optimizer") is not True and stage:
        yield "zero_allow_untested_optimizer must be true: the optimizer is given to DeepSpeed, not made by it"
    if settings.get("zero_force_ds_cpu_optimizer") is not False and offload:
        yield "zero_force_ds_cpu_optimizer must be false with offload_optimizer: the optimizer is torch's"


def complete_ds_config(settings, plan, config, world_size=1):
    """The JSON with what the flags own: what DeepSpeed is given. ValueError if it cannot be on that many processes."""
    stage = settings["zero_optimization"]["stage"]
    group = settings["zero_optimization"].get("zero_hpz_partition_size", 1)
    if world_size > group and world_size % group:
        raise ValueError(
            f"zero_hpz_partition_size {group} does not divide {world_size} processes; make it the GPUs of one node"
        )
    if config.optimizer == "adamw8bit" and (settings["zero_optimization"].get("offload_optimizer") or {}):
        raise ValueError("--optimizer adamw8bit steps on the GPU; take offload_optimizer out of --ds-config")
    zero = dict(settings["zero_optimization"])
    if stage in (1, 2):
        zero["reduce_bucket_size"] = bucket_size(zero_of(settings), plan.model)
    return {
        **settings,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": config.clip if stage else 0.0,  # in stage 0 clip_and_keep_norm does it
    }


def make_network(shape, config, device):
    """The HybridLM of a run on a device, with random weights that are drawn there.

    Drawn on the CPU, the weights of 6.7B would take most of a minute, on every rank.
    """
    torch.manual_seed(config.seed)
    with torch.device(device):
        return HybridLM(
            shape, kernels=config.kernels, recompute=config.recompute, z_loss=config.z_loss, fp8=config.fp8
        )


def make_engine(plan, config, ds_config, weights=None, guard=None):
    """A DeepSpeed engine around a HybridLM. All ranks call it, after the process group is up.

    weights: {parameter name: float32 tensor} to start from, or None for random ones from config.seed.
    guard: a train.guard.Guard that keeps the optimizer from steps that must not be taken, or None.
    """
    model = make_network(plan.model, config, deepspeed.get_accelerator().current_device_name())
    if weights is not None:
        model.load_state_dict(weights)
    with redirect_stdout(None):  # stage 1 in bf16 prints its memory for each group of parameters
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config), config=ds_config)
    save_traffic(engine.optimizer)
    tell_optimizer(engine)
    if guard:
        guard.protect(torch_optimizer(engine), engine.optimizer)
    if engine.zero_optimization_stage() == 0:
        clip_and_keep_norm(engine, config.clip)
    return engine


def clip_and_keep_norm(engine, clip):
    """Stage 0 alone: clip before each step as DeepSpeed would, and keep the norm, which it throws away."""
    step = engine.optimizer.step

    def clipped_step(*args, **kwargs):
        # the engine takes _global_grad_norm from its optimizer after the step
        engine.optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(
            engine.module.parameters(), clip or math.inf
        )
        step(*args, **kwargs)

    engine.optimizer.step = clipped_step


def set_learning_rate(engine, lr, plan):
    """Give every group the rate `lr`, and Muon's matrices the same part of plan.muon_lr as lr is of plan.lr."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr / plan.lr * plan.muon_lr if "momentum" in group else lr
