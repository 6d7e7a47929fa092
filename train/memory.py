"""What a training step holds on a GPU, worked out from the code that will run. Needs no torch.

parts = peak_memory(model, world_size=8, micro_batch=2, zero=Zero(stage=2))  # {part: bytes} at a step's fullest moment
rows = largest_micro_batch(...)                                              # what `--micro-batch auto` takes

The numbers are those of torch.cuda.max_memory_allocated(): what PyTorch's autograd keeps of model/*.py with the fused
kernels, and what DeepSpeed 0.19.8 holds with the files of ds_configs/. ZeRO's shares are those of arXiv:1910.02054,
section 3, with float32 gradients; the rest is read from the code, and no constant is fitted to a measured step.
"""

from dataclasses import dataclass

GIB = 2**30
CHUNK_TOKENS = 4096  # rows of logits at a time, model/cross_entropy.py
CUBLAS_BYTES = 2 * 33 * 2**20  # a workspace of 32 MiB and some for each thread that multiplies: forward and backward
# Beyond what PyTorch allocates: CUDA's context and loaded kernels; NCCL's buffers with more than one process; and what
# the allocator reserves in vain. 0.7 GiB of 2.7 on `laptop_8gb` (BENCHMARKS.md) is the one measurement; 3 % assumed.
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
    )


def saved_by_mixer(model, kind, *, packed=True, element=2):
    """Bytes a token that autograd keeps of a layer's mixer and its norm, and bytes of its joined weights, kept beside.

    element: bytes of an activation. What a line adds is what the backward pass of its operation reads.
    """
    d, d_inner, bc, heads = model.d_model, model.d_inner, model.n_groups * model.d_state, model.n_mamba_heads
    per_token = saved_by_norm(model, element)
    if kind == "M":
        columns = 2 * d_inner + 2 * bc + heads
        per_token += element * columns  # in_proj's output: the convolution and the gated norm read it
        per_token += element * (d_inner + 2 * bc)  # the convolution's output: the scan's x, B, C
        per_token += 8 * heads  # dt in float32, before and after softplus
        per_token += 2 * element * d_inner + 4 * model.n_groups  # the scan's output, the gated norm's, its scales
        return per_token, element * d * columns
    d_kv = model.n_kv_heads * model.head_dim
    columns = (2 if model.attention_gate else 1) * d + 2 * d_kv
    per_token += element * columns  # in_proj's output: v and the gate are read in it
    per_token += element * (2 * d + d_kv) + 4 * model.n_heads  # rotated q and k; y, which out_proj reads; log-sums
    if model.positions == "rope" and packed:
        per_token += 8 * model.head_dim  # cosines and sines in float32, for q and for k
    if model.attention_gate:
        per_token += 2 * element * d  # the sigmoid, and its product with y
    if model.qk_norm:
        per_token += element * (d + d_kv)
    return per_token, element * d * columns


def saved_by_mlp(model, element=2):
    """The same of a layer's SwiGLU and its norm."""
    if not model.d_ff:
        return 0, 0
    per_token = saved_by_norm(model, element) + 4 * element * model.d_ff  # gate and up, silu(gate), their product
    return per_token, element * 2 * model.d_model * model.d_ff


def saved_by_norm(model, element):
    """RMSNorm's input, which is the residual stream, and its output, which the projection reads; a scale a row."""
    return 2 * element * model.d_model + 4


def mixer_workspace(model, kind, element):
    """Bytes a token that a mixer's backward pass holds at its fullest, beyond what it has freed by then."""
    if kind == "A":  # gradients of q, of k and v for every head, and of q summed in float32 (flash attention)
        return (3 * element + 4) * model.d_model
    states = 4 * model.d_inner * model.d_state // model.chunk_size  # a float32 state a chunk
    gradients = 3 * element * model.d_inner - 2 * element * model.d_inner  # of y, z and x; y and the norm's are gone
    return gradients + 4 * states + 8 * model.chunk_size * model.n_groups  # and C B^T with its gradient


def layer_parameters(model, kind, part):
    """Parameters of one layer's "mixer" or "mlp", with its norm."""
    if part == "mlp":
        return 3 * model.d_model * model.d_ff + model.d_model
    name = {"A": "attention", "M": "mamba"}[kind]
    return model.parameters_by_part[name] // model.layer_pattern.count(kind) + model.d_model


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


def peak_memory(model, *, world_size=1, micro_batch, zero=None, recompute="none", optimizer="adamw", packed=True):
    """{part: bytes} on each GPU at the fullest moment of a step: the parts' sum is max_memory_allocated.

    zero: a Zero, or None for a forward and backward pass in bfloat16 without DeepSpeed or optimizer (model.bench).
    packed: several documents a row.
    """
    moments = walk(
        model, world_size=world_size, micro_batch=micro_batch, zero=zero, recompute=recompute, optimizer=optimizer,
        packed=packed,
    )  # fmt: skip
    return max(moments, key=lambda parts: sum(parts.values()))


def standing(model, world_size, zero, optimizer):
    """{part: bytes} that stays on a GPU from step to step, and those that come with the first gradient."""
    p, n = model.n_parameters, world_size
    if zero is None:
        return {"weights": 2 * p}, {}
    if not zero.bf16:  # float32 alone: no second copy of the weights
        sharded = n if zero.stage else 1
        grads = p if zero.stage < 2 else p / n
        kept = {"weights": 4 * p, "optimizer states": optimizer_bytes(model, optimizer) / sharded}
        return kept | ({"float32 weights": 4 * p / n} if zero.stage else {}), {"gradients": 4 * grads}
    states = {"float32 weights": 4 * p / n, "optimizer states": optimizer_bytes(model, optimizer) / n}
    if zero.offload:
        return {"weights": 2 * p}, {}
    if zero.stage == 3:
        weights = 2 * p / n
        if zero.hpz > 1 and n > zero.hpz:
            weights += 2 * p / zero.hpz
        return {"weights": weights, **states, "gradients": 4 * p / n}, {}
    # stage 1 keeps every gradient in float32 until its step, stage 2 a process's own part
    return {"weights": 2 * p, **states}, {"gradients": 4 * p if zero.stage == 1 else 4 * p / n}


def walk(model, *, world_size, micro_batch, zero, recompute, optimizer, packed):
    """Yield {part: bytes} at the moments of a step that may be its fullest: the loss, each layer's backward pass from
    the last to the first, and the optimizer's step."""
    element = 4 if zero and not zero.bf16 else 2
    tokens, d, v = micro_batch * model.seq_len, model.d_model, model.vocab_size
    stream = element * d * tokens  # the residual stream
    kept, gradients = standing(model, world_size, zero, optimizer)
    kept = kept | {"workspace": CUBLAS_BYTES}
    mixers = {kind: saved_by_mixer(model, kind, packed=packed, element=element) for kind in set(model.layer_pattern)}
    mixers = {kind: per_token * tokens + joined for kind, (per_token, joined) in mixers.items()}
    per_token, joined = saved_by_mlp(model, element)
    mlp = per_token * tokens + joined
    held = [mixers[kind] + mlp if recompute == "none" else stream for kind in model.layer_pattern]
    first = tokens * (8 + 8 + 4 + 4) + (stream if model.embedding_norm else 0)  # tokens, targets, documents, positions
    gathered = 0.0
    largest = max(layer_parameters(model, kind, "mixer") for kind in mixers) + layer_parameters(model, "", "mlp")
    if zero and zero.stage == 3 and world_size > 1:
        gathered = 2 * min(model.n_parameters, zero.max_live + largest)
    if zero and zero.stage == 3:
        kept["buckets"] = bucket_bytes(zero)  # made once; stages 1 and 2 make theirs for each backward pass
    # The loss: the last norm's input and output, the gradient of its output; the head's gradient in float32 and, a
    # chunk at a time, in bfloat16; a chunk of logits (model/fused.py, CrossEntropy)
    loss = (4 + element) * v * d + element * min(tokens, CHUNK_TOKENS) * v + 3 * stream
    yield kept | gradients | {"activations": first + sum(held), "logits and loss": loss, "gathered weights": gathered}

    elements = 0 if model.tied_embeddings else v * d  # in the bucket
    growing = element * v * d  # gradients held whole, without DeepSpeed
    for i in reversed(range(model.n_layers)):
        kind = model.layer_pattern[i]
        passes = [("mixer", mixers[kind], mixer_workspace(model, kind, element) * tokens)]
        if model.d_ff:
            passes.insert(0, ("mlp", mixers[kind] + mlp, 2 * element * model.d_ff * tokens))
        for part, alive, workspace in passes:
            now = kept | gradients
            now["activations"] = first + sum(held[:i]) + alive
            now["workspace"] += workspace + 2 * stream  # the gradient of the layer's output and of the part's
            now["gathered weights"] = gathered
            n = layer_parameters(model, kind, part)
            if zero is None:
                now["gradients"] = growing
                growing += element * n
            else:
                now["buckets"] = bucket_bytes(zero)
                # the part's own activations and workspace are gone when its last gradient is there
                done = kept | gradients
                done["activations"] = first + sum(held[:i]) + (mixers[kind] if part == "mlp" else 0)
                done["workspace"] += 2 * stream + element * n  # its gradients, until they are in the bucket
                done["gathered weights"] = gathered
                full, elements = divmod(elements + n, zero.bucket)
                done["buckets"] = bucket_bytes(zero) + (sum_bytes(zero, zero.bucket) if full else 0)
                yield done
            yield now
    if zero is not None:
        last = min(elements + v * d, zero.bucket)  # the embedding's gradient comes last
        yield kept | gradients | {"buckets": bucket_bytes(zero) + sum_bytes(zero, last), "gathered weights": gathered}
    yield kept | gradients | step_workspace(model, world_size, zero, optimizer)


def bucket_bytes(zero):
    """Bytes of DeepSpeed's buckets in the backward pass (setup_buckets): two where they overlap."""
    if zero.stage == 0:
        return 0
    return bucket_element(zero) * zero.bucket * (2 if zero.overlap and zero.stage < 3 else 1)


def bucket_element(zero):
    return 2 if zero.bf16 and zero.stage > 1 else 4


def sum_bytes(zero, elements):
    """Bytes that summing a full bucket over the processes takes: it is laid end to end, and copied to float32."""
    if zero.stage == 0:
        return 0
    laid = bucket_element(zero) if zero.stage < 3 else 0
    return (laid + (4 if bucket_element(zero) == 2 else 0)) * elements


def step_workspace(model, world_size, zero, optimizer):
    """What the optimizer's step holds beside what stays: {part: bytes}."""
    p, n = model.n_parameters, world_size
    if zero is None or zero.offload:
        return {}
    own = 0.0
    if zero.stage == 1:
        own = 4 * p / n  # its part of the gradients, laid end to end
    elif zero.stage == 3:
        own = 4 * min(zero.sub_group, p / n)
    if optimizer == "muon":
        parts = model.parameters_by_part
        own += 4 * (parts["attention"] + parts["mamba"] + parts["mlp"]) / n  # the update
        own += 24 * model.d_model * max(model.d_ff, model.d_inner)  # Newton-Schulz on the largest matrix
    return {"step": own}


def memory_needed(parts, world_size):
    """Bytes that a GPU must have for peak_memory's parts, with what CUDA, NCCL and the allocator take beside them."""
    outside = CONTEXT_GIB + (NCCL_GIB if world_size > 1 else 0) + SLACK_GIB
    return sum(parts.values()) * (1 + SLACK_PART) + outside * GIB


def largest_micro_batch(model, *, batch_tokens, world_size, zero, recompute, optimizer, memory_gib):
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
            model, world_size=world_size, micro_batch=rows, zero=zero, recompute=recompute, optimizer=optimizer
        )
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
