"""How long a training step takes: matrix products at a measured part of the peak, everything else by its bytes.

times = step_time(setup)      # {part: seconds} of one optimizer step

A roofline (Williams et al., CACM 52, 2009): the efficiencies of products and of each
kernel are measured, or assumed, one by one; launch/measurements.json holds them and says where each comes from.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from model.config import ModelConfig
from train.hardware import Gpu
from train.memory import Zero, layer_parameters

MEASUREMENTS = Path(__file__).with_name("measurements.json")

FORWARD_TIMES = {"none": 1, "layer": 2}  # how often the layers' forward pass runs


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to run a model: what memory and time follow from."""

    model: ModelConfig
    gpu: Gpu
    n_gpus: int
    micro_batch: int
    grad_accum: int
    zero: Zero | None = Zero()  # None: forward and backward alone, as model.bench measures
    recompute: str = "none"
    optimizer: str = "adamw"
    document_tokens: float = 1024  # a document's mean length; a row holds several

    @property
    def batch_tokens(self):
        return self.n_gpus * self.micro_batch * self.grad_accum * self.model.seq_len


@cache
def measured():
    return json.loads(MEASUREMENTS.read_text())


def constants(gpu):
    """The measured or assumed efficiencies for a GPU: those of every GPU, and above them its own."""
    found = measured()["constants"]
    own = next((values for start, values in found.items() if start != "all" and gpu.name.startswith(start)), {})
    return {name: entry["value"] for name, entry in (found["all"] | own).items()}


def layer_work(model, kind, document_tokens):
    """What one layer does for a token: {operation: (forward, backward)}, in FLOPs for "products" and "attention", in
    bytes of memory traffic for the others. Eager PyTorch with the fused kernels: every operation reads and writes."""
    d, d_inner, bc, heads, d_ff = (
        model.d_model, model.d_inner, model.n_groups * model.d_state, model.n_mamba_heads, model.d_ff,
    )  # fmt: skip
    norms = 2 if d_ff else 1
    work = {"norm": (4 * d * norms, 6 * d * norms)}
    if kind == "M":
        columns, conv = 2 * d_inner + 2 * bc + heads, d_inner + 2 * bc
        products = 2 * d * (columns + d_inner)
        work["conv"] = (4 * conv, 6 * conv)
        # forward: x twice and y, and three float32 states a chunk; backward: four kernels that read x and dy, dx
        states = 4 * d_inner * model.d_state / model.chunk_size
        work["scan"] = (6 * d_inner + 3 * states, 18 * d_inner + 4 * states)
        work["gated norm"] = (6 * d_inner, 10 * d_inner)
        # dt to float32 and softplus; backward: the gradients of what was split are joined again
        elementwise = (40 * heads, 4 * columns + 4 * conv + 40 * heads)
    else:
        d_kv = model.n_kv_heads * model.head_dim
        columns = (2 if model.attention_gate else 1) * d + 2 * d_kv
        products = 2 * d * (columns + d)
        scores = 2 * d * min(document_tokens, model.seq_len)  # the causal half
        work["attention"] = (scores, 2.5 * scores)  # five products for two (FlashAttention, arXiv:2205.14135)
        rotated = (d + d_kv) if model.positions == "rope" else 0
        gate = d if model.attention_gate else 0
        elementwise = (48 * rotated + 10 * gate, 60 * rotated + 22 * gate + 4 * columns)
    if d_ff:
        products += 2 * 3 * d * d_ff
        elementwise = (elementwise[0] + 10 * d_ff, elementwise[1] + 26 * d_ff)  # silu, product; gradients, joined
    work["products"] = (products, 2 * products)
    work["elementwise"] = (elementwise[0] + 6 * d * norms, elementwise[1] + 6 * d * norms)  # onto the residual stream
    return work


def weight_traffic(model, kind):
    """Bytes of one layer's weights that a micro-batch moves besides the products: joined forward (SplitLinear)."""
    n = layer_parameters(model, kind, "mixer") + (layer_parameters(model, kind, "mlp") if model.d_ff else 0)
    return 4 * 0.8 * n


def rate(operation, gpu, c):
    """FLOP/s or bytes/s of an operation on a GPU; c: its constants."""
    if operation in ("products", "attention"):
        return gpu.dense_tflops["bf16"] * 1e12 * c[operation]
    return gpu.bandwidth_gb_s * 1e9 * c[operation]


def micro_batch_time(setup, c):
    """{operation: seconds} on the GPU of a forward and backward pass over one micro-batch."""
    model, gpu, tokens = setup.model, setup.gpu, setup.micro_batch * setup.model.seq_len
    times = dict.fromkeys(("products", "attention", "scan", "conv", "gated norm", "norm", "elementwise", "loss"), 0.0)
    forward = FORWARD_TIMES[setup.recompute]
    for kind in sorted(set(model.layer_pattern)):
        n = model.layer_pattern.count(kind)
        for operation, (ahead, back) in layer_work(model, kind, setup.document_tokens).items():
            times[operation] += n * tokens * (forward * ahead + back) / rate(operation, gpu, c)
        times["elementwise"] += n * forward * weight_traffic(model, kind) / rate("elementwise", gpu, c)
    d, v = model.d_model, model.vocab_size
    chunks = math.ceil(tokens / 4096)  # model/fused.py adds the head's gradient up in float32, a chunk at a time
    times["loss"] = 6 * d * v * tokens / rate("products", gpu, c)
    times["loss"] += (6 * v * tokens + 12 * v * d * chunks) / rate("elementwise", gpu, c)
    return times


def launch_time(setup, c):
    """Seconds that Python needs to start a micro-batch's kernels: the least a micro-batch can take."""
    ms = {"M": c["launch_mamba_ms"], "A": c["launch_attention_ms"]}
    total = sum(ms[kind] for kind in setup.model.layer_pattern)
    if setup.recompute == "layer":
        total *= 1 + c["launch_again"]
    if setup.zero:
        hooks = c["launch_deepspeed_ms"] + (c["launch_stage3_ms"] if setup.zero.stage == 3 else 0)
        total += setup.model.n_layers * hooks
    return total / 1e3


def bus(gpu, n, c):
    """Bytes/s and GPU that a collective over n GPUs reaches: the slower of the link inside a node and all of the
    node's network cards together, as NCCL's rings cross a node's border once."""
    if n <= gpu.gpus_per_node:
        return gpu.link_gb_s * 1e9 * c["link"]
    return min(gpu.link_gb_s, gpu.gpus_per_node * gpu.network_gb_s) * 1e9 * c["link"]


def collective_time(gpu, n, volume, calls, c):
    """Seconds for a GPU to send `volume` bytes in `calls` collectives over n GPUs."""
    if n == 1:
        return 0.0
    nodes = math.ceil(n / gpu.gpus_per_node)
    latency = c["latency_us"] + c["latency_node_us"] * (nodes - 1)
    return volume / bus(gpu, n, c) + calls * latency / 1e6


def communication(setup, c):
    """Seconds of communication: a micro-batch's, and the optimizer step's. Volumes: ZeRO (arXiv:1910.02054, section
    7), with gradients in float32 (communication_data_type) and all-reduced at stages 0 to 2
    (use_multi_rank_bucket_allreduce), at stage 2 for every micro-batch; hpZ: ZeRO++ (arXiv:2306.10209)."""
    zero, n, p, gpu = setup.zero, setup.n_gpus, setup.model.n_parameters, setup.gpu
    if zero is None or n == 1:
        return 0.0, 0.0
    part, buckets = (n - 1) / n, math.ceil(p / zero.bucket)
    reduce = collective_time(gpu, n, 2 * part * 4 * p, buckets, c)
    gather = collective_time(gpu, n, part * 2 * p, buckets, c)
    if zero.stage == 0:
        return 0.0, reduce
    if zero.stage == 1:
        return 0.0, reduce + gather
    if zero.stage == 2:
        return reduce, gather
    calls = setup.model.n_layers * 3  # gathers of a layer's weights, bounded by the prefetch bucket
    scatter = collective_time(gpu, n, part * 4 * p, math.ceil(p / zero.bucket), c)
    ahead = collective_time(gpu, n, part * 2 * p, calls, c)
    group = min(zero.hpz, n) if zero.hpz > 1 else n
    back = collective_time(gpu, group, (group - 1) / group * 2 * p, calls, c)
    return ahead + back + scatter, 0.0


def optimizer_time(setup, c):
    """Seconds of the optimizer's step, without communication."""
    zero, p, gpu = setup.zero, setup.model.n_parameters / setup.n_gpus, setup.gpu
    if zero is None:
        return 0.0
    if zero.offload:
        return p / (c["cpu_parameters_per_us"] * 1e6)
    # norm in float64 20, clipping 8, AdamW 28, to bf16 6, zeroing the gradients 4
    seconds = 66 * p / rate("elementwise", gpu, c)
    if setup.optimizer == "muon":
        seconds += muon_flops(setup.model) / setup.n_gpus / rate("products", gpu, c)
    return seconds


def muon_flops(model):
    """Newton-Schulz (train/optim.py): five times x x^T, its square, and their product with x, for every matrix."""
    d, d_inner = model.d_model, model.d_inner
    bc, d_kv = model.n_groups * model.d_state, model.n_kv_heads * model.head_dim
    shapes = {
        "M": [(d_inner, d), (d_inner, d), (bc, d), (bc, d), (model.n_mamba_heads, d), (d_inner, d)],
        "A": [(d, d), (d_kv, d), (d_kv, d), (d, d)] + ([(d, d)] if model.attention_gate else []),
    }
    total = 0
    for kind in model.layer_pattern:
        for rows, columns in shapes[kind] + ([(model.d_ff, d)] * 3 if model.d_ff else []):
            r, s = min(rows, columns), max(rows, columns)
            total += 5 * (4 * r * r * s + 2 * r**3)
    return total


def step_time(setup):
    """{part: seconds} of one optimizer step. The sum is its wall time."""
    c, n = constants(setup.gpu), setup.n_gpus
    gpu_parts = micro_batch_time(setup, c)
    on_gpu = sum(gpu_parts.values())
    parts = {name: seconds * setup.grad_accum for name, seconds in gpu_parts.items()}
    if setup.zero:  # buckets filled, to float32, averaged, added up (stage_1_and_2.py)
        p = setup.model.n_parameters
        moved = 18 * p + 12 * p / n
        handled = moved / rate("elementwise", setup.gpu, c)
        if setup.zero.offload:
            handled += 4 * p / n / (setup.gpu.pcie_gb_s * 1e9 * c["link"])
        on_gpu += handled
        parts["gradients"] = handled * setup.grad_accum
    floor = launch_time(setup, c)
    if setup.zero and setup.zero.stage == 3:  # hooks around every module, which the GPU waits for
        on_gpu += setup.model.n_layers * c["launch_stage3_ms"] / 1e3
    busy = max(on_gpu, floor)
    per_micro, per_step = communication(setup, c)
    backward = busy * (2 / (2 + FORWARD_TIMES[setup.recompute]))
    window = busy if setup.zero and setup.zero.stage == 3 else backward
    overlap = c["overlap"] if setup.zero and setup.zero.overlap else 0.0
    exposed = max(per_micro - overlap * window, (1 - overlap) * per_micro)
    parts["waiting for Python"] = (busy - sum(gpu_parts.values())) * setup.grad_accum - parts.get("gradients", 0.0)
    parts["communication"] = exposed * setup.grad_accum + per_step
    parts["optimizer"] = optimizer_time(setup, c)
    if setup.zero:
        parts["between steps"] = c["between_steps_ms"] / 1e3
    nodes = math.ceil(n / setup.gpu.gpus_per_node)
    parts["slowest process"] = sum(parts.values()) * c["straggling"] * math.log2(nodes) if nodes > 1 else 0.0
    return parts


def tokens_per_s(setup):
    return setup.batch_tokens / sum(step_time(setup).values())
