"""How long a training step takes: matrix products at a measured part of the peak, everything else by its bytes.

times = step_time(setup)      # {part: seconds} of one optimizer step

A roofline (Williams et al., CACM 52, 2009): the efficiencies of products and of each kernel are measured, or assumed,
one by one; launch/measurements.json holds them and says where each comes from.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from model.config import ModelConfig
from train.hardware import Gpu
from train.kept import STATES_EVERY, in_8_bits, layer_operations
from train.memory import Zero

MEASUREMENTS = Path(__file__).with_name("measurements.json")

FORWARD_TIMES = {"none": 1, "layer": 2}  # how often the layers' forward pass runs
WEIGHTS = {"M": 13, "A": 6}  # tensors of a mixer and its norm, each with a hook of DeepSpeed's; a SwiGLU's are 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to run a model: what memory and time follow from."""

    model: ModelConfig
    gpu: Gpu
    n_gpus: int
    micro_batch: int
    grad_accum: int
    zero: Zero = Zero()
    recompute: str = "none"
    optimizer: str = "adamw"
    fp8: bool = False
    others: bool = False  # kernels as other trainers have them, whose published figures the model is held against
    document_tokens: float = 1024  # a document's mean length; a row holds several

    @property
    def batch_tokens(self):
        return self.n_gpus * self.micro_batch * self.grad_accum * self.model.seq_len


@cache
def measured():
    return json.loads(MEASUREMENTS.read_text())


def constants(gpu, others=False):
    """The measured or assumed efficiencies for a GPU: those of every GPU, and above them its own; with others, above
    both those of other trainers' kernels."""
    found = measured()["constants"]
    own = next((values for start, values in found.items() if start != "all" and gpu.name.startswith(start)), {})
    entries = found["all"] | own | (found["others"] if others else {})
    return {name: entry["value"] for name, entry in entries.items()}


def layer_work(model, kind, document_tokens, fp8, c):
    """What one layer does for a token: {operation: (forward, backward)}, in FLOPs for products and attention, in bytes
    of memory traffic for the others: a kernel of model/ reads and writes each of its tensors once, in bfloat16.

    c: constants().
    """
    d, d_inner, bc, d_ff = model.d_model, model.d_inner, model.n_groups * model.d_state, model.d_ff
    norms = 2 if d_ff else 1
    work = {"norms": (8 * d * norms, 8 * d * norms)}
    casts = []  # of products in 8 bits: width of the input, of the output
    if kind == "M":
        columns, conv = 2 * d_inner + 2 * bc + model.n_mamba_heads, model.d_conv_channels
        products = 2 * d * (columns + d_inner)
        work["convolution"] = (4 * conv, 6 * conv)
        states = 2 * d_inner * model.d_state / STATES_EVERY
        # forward reads x, B, C and writes y; of the backward pass's three kernels, the first writes the states, the
        # second their gradients, and the third reads both
        work["scan"] = (4 * d_inner + 4 * bc, 10 * d_inner + 16 * bc + 4 * states)
        work["gated norm"] = (6 * d_inner, 10 * d_inner)
        elementwise = (0, 0)
        if in_8_bits(fp8, d, d_inner, bc, model.n_mamba_heads):
            casts += [d, columns]
        if in_8_bits(fp8, d, d_inner):
            casts += [d_inner, d]
    else:
        d_kv = model.n_kv_heads * model.head_dim
        columns = (2 if model.attention_gate else 1) * d + 2 * d_kv
        products = 2 * d * (columns + d)
        # the causal half, and what a document costs besides, whatever its length
        scores = 2 * d * (min(document_tokens, model.seq_len) + c["document_tokens"])
        work["attention"] = (scores, 2.5 * scores)  # five products for two (arXiv:2205.14135)
        turned = 4 * (d + d_kv) if model.positions == "rope" else 0
        gate = d if model.attention_gate else 0
        in_8 = in_8_bits(fp8, d, d_kv)
        elementwise = (turned + 6 * gate, turned + 10 * gate + (0 if in_8 else 4 * columns))  # laid side by side
        casts += [d, columns, d, d] if in_8 else []
    if d_ff:
        products += 2 * 3 * d * d_ff
        in_8 = in_8_bits(fp8, d, d_ff)
        ahead, back = (5, 11) if in_8 else (6, 10)  # what is written in 8 bits is written twice
        elementwise = (elementwise[0] + ahead * d_ff, elementwise[1] + back * d_ff)
        casts += [d, d] if in_8 else []
    work["products, fp8" if casts else "products"] = (products, 2 * products)
    inputs, outputs = sum(casts[0::2]), sum(casts[1::2])  # the inputs forward, the outputs' gradients backward
    work["element-wise"] = (elementwise[0] + 4 * inputs, elementwise[1] + 4 * outputs)
    return work


def rate(operation, gpu, c):
    """FLOP/s or bytes/s of an operation on a GPU; c: its constants."""
    if operation == "products, fp8":
        return gpu.dense_tflops["fp8"] * 1e12 * c[operation]
    if operation in ("products", "attention"):
        return gpu.dense_tflops["bf16"] * 1e12 * c[operation]
    return gpu.bandwidth_gb_s * 1e9 * c[operation]


def micro_batch_time(setup, c):
    """{operation: seconds} on the GPU of a forward and backward pass over one micro-batch."""
    model, gpu, tokens = setup.model, setup.gpu, setup.micro_batch * setup.model.seq_len
    times, forward = Counter(), FORWARD_TIMES[setup.recompute]
    for kind in sorted(set(model.layer_pattern)):
        n = model.layer_pattern.count(kind)
        for operation, (ahead, back) in layer_work(model, kind, setup.document_tokens, setup.fp8, c).items():
            seconds = n * tokens * (forward * ahead + back) / rate(operation, gpu, c)
            if operation == "scan":  # a program walks through a row's head; the last of them leave the GPU half empty
                seconds *= 1 + c["scan_programs"] / (setup.micro_batch * model.n_mamba_heads)
            times[operation] += seconds
        weights = sum(operation.copies for operation in layer_operations(model, kind, fp8=setup.fp8))
        times["element-wise"] += n * forward * 4 * weights / rate("element-wise", gpu, c)  # cast and turned
    d, v = model.d_model, model.vocab_size
    times["loss"] = 6 * d * v * tokens / rate("products", gpu, c)
    times["loss"] += 6 * v * tokens / rate("element-wise", gpu, c)  # logits, read twice, and their gradient
    return dict(times)


def launch_time(setup, c):
    """Seconds that Python needs to start a micro-batch's kernels, which it does while they run."""
    model, ms = setup.model, {"M": c["launch_mamba_ms"], "A": c["launch_attention_ms"]}
    total = sum(ms[kind] for kind in model.layer_pattern) + setup.fp8 * model.n_layers * c["launch_fp8_ms"]
    if setup.recompute == "layer":
        total *= 1 + c["launch_again"]
    weights = sum(WEIGHTS[kind] + (4 if model.d_ff else 0) for kind in model.layer_pattern)
    return (total + weights * c[f"hook_stage{setup.zero.stage}_ms"]) / 1e3


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
    if n == 1:
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


def gradient_time(setup, c):
    """Seconds that DeepSpeed takes of the GPU for a micro-batch's gradients, without communication.

    Bytes a parameter, read and written (train/traffic.py). Stage 1: added up in float32 10. Stages 2 and 3: into the
    bucket in float32 6, of a process's own part added 12. Offloaded, DeepSpeed's own way: into the bucket 4, divided
    4, laid end to end 4, to float32 6 and back 6, of a process's own part added 12 and back into the bucket 6.
    """
    whole, own = {0: (12, 0), 1: (10, 0), 2: (6, 12), 3: (6, 12)}[setup.zero.stage]
    if setup.zero.offload:
        whole, own = 24, 18
    p = setup.model.n_parameters
    return (whole * p + own * p / setup.n_gpus) / rate("gradients", setup.gpu, c)


def optimizer_time(setup, c):
    """Seconds of the optimizer's step, without communication."""
    zero, p, gpu, model = setup.zero, setup.model.n_parameters / setup.n_gpus, setup.gpu, setup.model
    if zero.offload:
        return p / (c["cpu_parameters_per_us"] * 1e6) + 4 * p / (gpu.pcie_gb_s * 1e9 * c["link"])
    # norm in float64 20, clipping 8, AdamW 28, to bf16 6, zeroing the gradients 4
    seconds = 66 * p / rate("optimizer", gpu, c)
    if setup.optimizer == "adamw8bit":  # 16 bytes and not 28, but its kernel works more than it reads
        seconds += 16 * p / rate("adamw8bit", gpu, c) - 28 * p / rate("optimizer", gpu, c)
    if setup.optimizer == "muon":
        flops, moved = muon_work(model)
        work = flops / rate("products", gpu, c) + moved / rate("optimizer", gpu, c)
        seconds += c["muon"] * work / setup.n_gpus
    return seconds


def muon_work(model):
    """(FLOPs, bytes) of Muon's step beside AdamW's (train/optim.py). Newton-Schulz takes five times x x^T (r, r), its
    square, and their product with x (r, s); the rest reads and writes x 12 and x x^T 14 bytes each time, and in
    float32 the momentum, the update, its norm and its copies 88 bytes, where AdamW has 28."""
    d, d_inner = model.d_model, model.d_inner
    bc, d_kv = model.n_groups * model.d_state, model.n_kv_heads * model.head_dim
    shapes = {
        "M": [(d_inner, d), (d_inner, d), (bc, d), (bc, d), (model.n_mamba_heads, d), (d_inner, d)],
        "A": [(d, d), (d_kv, d), (d_kv, d), (d, d)] + ([(d, d)] if model.attention_gate else []),
    }
    flops = moved = 0
    for kind in model.layer_pattern:
        for rows, columns in shapes[kind] + ([(model.d_ff, d)] * 3 if model.d_ff else []):
            r, s = min(rows, columns), max(rows, columns)
            flops += 5 * (4 * r * r * s + 2 * r**3)
            moved += 5 * (12 * r * s + 14 * r * r) + (88 - 28) * r * s
    return flops, moved


def step_time(setup):
    """{part: seconds} of one optimizer step. The sum is its wall time."""
    c, n, zero = constants(setup.gpu, setup.others), setup.n_gpus, setup.zero
    gpu_parts = micro_batch_time(setup, c)
    gpu_parts["gradients"] = gradient_time(setup, c)
    on_gpu, floor = sum(gpu_parts.values()), launch_time(setup, c)
    parts = {name: seconds * setup.grad_accum for name, seconds in gpu_parts.items()}
    busy = (on_gpu**4 + floor**4) ** 0.25  # the larger of the two; more where neither is, as they do not keep step
    parts["waiting for Python"] = (busy - on_gpu + c["between_ms"] / 1e3) * setup.grad_accum
    per_micro, per_step = communication(setup, c)
    window = busy if zero.stage == 3 else busy * (2 / (2 + FORWARD_TIMES[setup.recompute]))  # the backward pass
    overlap = c["overlap"] if zero.overlap else 0.0
    exposed = max(per_micro - overlap * window, (1 - overlap) * per_micro)
    parts["communication"] = exposed * setup.grad_accum + per_step
    parts["optimizer"] = optimizer_time(setup, c)
    nodes = math.ceil(n / setup.gpu.gpus_per_node)
    parts["slowest process"] = sum(parts.values()) * c["straggling"] * math.log2(nodes) if nodes > 1 else 0.0
    return parts


def tokens_per_s(setup):
    return setup.batch_tokens / sum(step_time(setup).values())
