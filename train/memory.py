"""What a training step holds on a GPU, worked out from the code that will run. Needs no torch.

parts = peak_memory(model, world_size=8, micro_batch=2, zero=Zero(stage=2))  # {part: bytes} at a step's fullest moment
rows = largest_micro_batch(...)                                              # what `--micro-batch auto` takes

The numbers are those of torch.cuda.max_memory_allocated(): what PyTorch's autograd keeps of model/*.py with the fused
kernels, and what DeepSpeed 0.19.8 holds with the files of ds_configs/. ZeRO's shares are those of arXiv:1910.02054,
section 3, with float32 gradients; the rest is read from the code, and no constant is fitted to a measured step.
"""

from dataclasses import dataclass
from typing import NamedTuple

from train.kept import layer_operations

GIB = 2**30
CHUNK_TOKENS = 4096  # rows of logits at a time, model/cross_entropy.py
INPUTS = 8 + 8 + 8 + 9  # bytes a token: tokens, targets, document ids, and what model.layers.Packing makes of them
CUBLAS_BYTES = 2 * 33 * 2**20  # a workspace of 32 MiB and some for each thread that multiplies: forward and backward
# Beyond what PyTorch allocates: CUDA's context and loaded kernels; NCCL's buffers with more than one process; and what
# the allocator reserves in vain, which is assumed: H200s had 2 to 8 GiB of it at peaks of 31 to 132 GiB, by
# reserved_gib of launch/measurements.json, but where memory is short it gives most of that back.
CONTEXT_GIB, NCCL_GIB, SLACK_GIB, SLACK_PART = 0.5, 0.7, 0.7, 0.03


@dataclass(frozen=True, kw_only=True)
class Zero:
    """How DeepSpeed arranges memory: what ds_configs/*.json say."""

    # fmt: off
    stage: int = 2
    bf16: bool = True
    overlap: bool = True
    bucket: int = 200_000_000     # elements reduced at a time
    offload: bool = False         # optimizer states on the CPU
    hpz: int = 1                  # processes that hold a second copy of the weights among them
    sub_group: int = 10**9        # stage 3: elements stepped at a time
    max_live: int = 10**9         # stage 3: gathered weights kept
    ahead: int = 25 * 10**7       # stage 3: weights gathered at once, ahead of use
    # fmt: on


def zero_of(settings):
    """The Zero of a ds_configs JSON, given as a dict."""
    zero = settings["zero_optimization"]
    stage, default = zero["stage"], Zero()
    return Zero(
        stage=stage,
        bf16=bool(settings.get("bf16", {}).get("enabled")),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        hpz=zero.get("zero_hpz_partition_size", 1),
        sub_group=int(zero.get("sub_group_size", default.sub_group)),
        max_live=int(zero.get("stage3_max_live_parameters", default.max_live)),
        ahead=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
    )


def optimizer_bytes(model, optimizer):
    """Bytes of the optimizer's states over all processes (train/optim.py)."""
    parts = model.parameters_by_part
    matrices = parts["attention"] + parts["mamba"] + parts["mlp"]  # their vectors are too few to matter
    rest = model.n_parameters - matrices
    if optimizer == "adamw8bit":  # two bytes and two scales a block of 256; embedding and norms in float32
        return (matrices + parts["head"]) * (2 + 8 / 256) + (rest - parts["head"]) * 8
    if optimizer == "muon":
        return matrices * 4 + rest * 8
    return model.n_parameters * 8


class Moment(NamedTuple):
    """Bytes on a GPU at one moment of a step, by what they are."""

    weights: float
    float32_weights: float
    optimizer_states: float
    gradients: float
    gathered_weights: float = 0
    buckets: float = 0
    activations: float = 0
    workspace: float = 0
    logits_and_loss: float = 0
    step: float = 0


def peak_memory(model, *, world_size=1, micro_batch, zero, recompute="none", optimizer="adamw", fp8=False):
    """{part: bytes} on each GPU at the fullest moment of a step: the parts' sum is max_memory_allocated.

    A step is counted as one of several micro-batches, whose gradients are added up.
    """
    element = 2 if zero.bf16 else 4
    backward = backward_moments(model, micro_batch=micro_batch, recompute=recompute, element=element, fp8=fp8)
    fullest = max(step_moments(model, world_size, zero, optimizer, backward), key=sum)
    return {name.replace("_", " "): size for name, size in fullest._asdict().items()}


def backward_moments(model, *, micro_batch, recompute="none", element=2, fp8=False):
    """Yield (activations, workspace, logits and loss: bytes; parameters whose gradient has just come, which the
    workspace counts) at the moments of a forward and backward pass that may be the fullest: the loss, and before and
    after each operation of each layer, from the last to the first."""
    tokens, head = micro_batch * model.seq_len, model.vocab_size * model.d_model
    stream, gradient = element * model.d_model * tokens, element * head  # the residual stream; of the head's weight
    tied = gradient if model.tied_embeddings else 0  # waits for the embedding's
    inputs = INPUTS * tokens + (stream + 4 * tokens if model.embedding_norm else 0)
    passes = {}
    for kind in set(model.layer_pattern):
        operations = layer_operations(model, kind, element=element, fp8=fp8)
        passes[kind] = layer_moments(operations, tokens, element, stream)
    held = [passes[kind][0][0] if recompute == "none" else stream for kind in model.layer_pattern]

    # The last norm keeps its input; its output and that output's gradient are there, the head's gradient in float32,
    # and a chunk of logits. Then both gradients are multiplied by the loss's own.
    before = inputs + sum(held)
    norm = before + stream + 4 * tokens
    yield norm, CUBLAS_BYTES + stream, stream + 4 * head + element * min(tokens, CHUNK_TOKENS) * model.vocab_size, 0
    yield norm, CUBLAS_BYTES + stream, stream + 4 * head + gradient, 0
    yield norm, CUBLAS_BYTES + stream + gradient, 0, 0 if tied else head
    yield norm, CUBLAS_BYTES + 2 * stream + tied, 0, 0
    for i, kind in reversed(list(enumerate(model.layer_pattern))):
        before -= held[i]
        for alive, workspace, parameters in passes[kind]:
            yield before + alive, CUBLAS_BYTES + workspace + tied, 0, parameters
    yield inputs, CUBLAS_BYTES + stream + gradient + tied, 0, head


def layer_moments(operations, tokens, element, stream):
    """[(bytes kept of the layer, workspace, parameters whose gradient has just come)] of a layer's backward pass."""
    moments, alive = [], sum(o.keeps * tokens + o.copies for o in operations)
    for i, o in reversed(list(enumerate(operations))):
        gradient = element * o.parameters
        moments.append((alive, (o.takes + o.gives + o.work) * tokens + gradient, 0))
        alive -= o.keeps * tokens + o.copies
        waiting = operations[i - 1].takes * tokens if i else stream
        moments.append((alive, waiting + gradient, o.parameters))
    return moments


def standing(model, world_size, zero, optimizer):
    """The Moment between two micro-batches."""
    p, n, states = model.n_parameters, world_size, optimizer_bytes(model, optimizer)
    if not zero.bf16:  # float32 alone: a second copy of the weights only where ZeRO steps a part of them
        shared = n if zero.stage else 1
        return Moment(4 * p, 4 * p / n if zero.stage else 0, states / shared, 4 * p / (n if zero.stage > 1 else 1))
    if zero.offload:  # but gradients are added up on the GPU
        return Moment(2 * p, 0, 0, 4 * p / n)
    weights = 2 * p
    if zero.stage == 3:
        weights = 2 * p / n + (2 * p / zero.hpz if zero.hpz > 1 and n > zero.hpz else 0)
    return Moment(weights, 4 * p / n, states / n, 4 * p if zero.stage == 1 else 4 * p / n)


def step_moments(model, world_size, zero, optimizer, backward):
    """Yield the Moments of a step's last micro-batch, of which `backward` are backward_moments(), and the last one.

    Gradients are added up in float32: at stages 2 and 3 a process's own part of them, summed over the processes a
    bucket at a time; at stage 1 all of them, each as it comes (DeepSpeed 0.19.8, bf16_optimizer.py).
    """
    n = world_size
    between = standing(model, n, zero, optimizer)
    bucket = bucket_size(zero, model)
    in_buckets = bucket_element(zero) * bucket * (2 if zero.overlap and zero.stage == 2 else 1)
    if zero.stage == 3:
        layer = max(sum(o.parameters for o in layer_operations(model, kind)) for kind in set(model.layer_pattern))
        # what was gathered at once is freed at once, when the last of it has been used
        gathered = 2 * min(model.n_parameters, zero.max_live + layer + zero.ahead) if n > 1 else 0
        between = between._replace(gathered_weights=gathered, buckets=in_buckets)
    stays, buckets, filled = between[:5], between.buckets, 0  # stage 2 makes its buckets for each backward pass
    for activations, workspace, loss, parameters in backward:
        if parameters and zero.stage > 1:
            buckets = in_buckets
            if filled + parameters > bucket:
                yield Moment(*stays, buckets + sum_bytes(zero, filled), activations, workspace, loss)
                filled = 0
            filled += parameters
        yield Moment(*stays, buckets, activations, workspace, loss)
    yield Moment(*stays, buckets + sum_bytes(zero, filled))
    # DeepSpeed takes each gradient's norm in float64
    step = 0 if zero.offload else 8 * model.largest_parameter + step_workspace(model, n, zero, optimizer)
    yield standing(model, n, zero, optimizer)._replace(step=step)


def bucket_size(zero, model):
    """Elements that DeepSpeed reduces at a time: what its JSON says, in stages 1 and 2 at least the largest weight.

    There DeepSpeed 0.19.8 reduces a gradient that is larger than the bucket where it lies, on a stream of its own, and
    frees it at once: what the backward pass goes on with may overwrite it.
    """
    return max(zero.bucket, model.largest_parameter) if zero.stage in (1, 2) else zero.bucket


def bucket_element(zero):
    """Bytes of an element in DeepSpeed's buckets, of which stage 2 has two where they overlap."""
    return 2 if zero.bf16 and zero.offload and zero.stage == 2 else 4


def sum_bytes(zero, elements):
    """Bytes that summing a bucket over the processes takes beside it: none where train/traffic.py sums it as it lies,
    but for a weight of stage 3 that is larger than the bucket; else DeepSpeed lays it end to end and, if it is in
    bfloat16, puts it in float32."""
    if zero.stage == 3:
        return 4 * elements if elements > zero.bucket else 0
    if zero.bf16 and not zero.offload:
        return 0
    return (6 if bucket_element(zero) == 2 else 4) * elements


def step_workspace(model, world_size, zero, optimizer):
    """Bytes that the optimizer's own step holds beside what stays."""
    p, n = model.n_parameters, world_size
    own = 4 * min(zero.sub_group, p / n) if zero.stage == 3 else 0
    if optimizer == "muon":
        parts = model.parameters_by_part
        own += 4 * (parts["attention"] + parts["mamba"] + parts["mlp"]) / n  # the update
        own += 24 * model.d_model * max(model.d_ff, model.d_inner)  # Newton-Schulz on the largest matrix
    return own


def memory_needed(parts, world_size):
    """Bytes that a GPU must have for peak_memory's parts, with what CUDA, NCCL and the allocator take beside them."""
    outside = CONTEXT_GIB + (NCCL_GIB if world_size > 1 else 0) + SLACK_GIB
    return sum(parts.values()) * (1 + SLACK_PART) + outside * GIB


def largest_micro_batch(model, *, batch_tokens, world_size, zero, recompute, optimizer, memory_gib, fp8=False):
    """The most rows a micro-batch can have on GPUs of memory_gib, among those that divide the batch.

    Raises ValueError, in one line, if not even one row fits.
    """
    per_process, rest = divmod(batch_tokens, world_size * model.seq_len)
    if rest:
        return 1  # make_plan refuses such a batch, whatever the micro-batch
    best = needed = 0
    for rows in range(1, per_process + 1):
        if per_process % rows:
            continue
        parts = peak_memory(
            model, world_size=world_size, micro_batch=rows, zero=zero, recompute=recompute, optimizer=optimizer,
            fp8=fp8,
        )  # fmt: skip
        needed = memory_needed(parts, world_size) / GIB
        if needed > memory_gib:
            break
        best = rows
    if not best:
        raise ValueError(
            f"--micro-batch auto: one sequence of {model.seq_len:,} tokens needs {needed:.1f} GiB on each of "
            f"{world_size} GPUs, which have {memory_gib:.1f}: {needed - memory_gib:.1f} too few; "
            "`python launch/estimate.py` says what would make it fit"
        )
    return best
