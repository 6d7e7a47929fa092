"""The Mamba-2 scan as Triton kernels: model/reference.py's ssd, with the state kept on the chip.

A program takes a head (or a part of its channels) and walks through the row, chunk by chunk, with the head's state in
registers: x, B, C and the decays are read once, y is written once, and no state but the last goes to memory. Documents
appear as `first` (b, c, q): the place in the chunk where the position's document begins, -1 if it began before.

The forward pass keeps its inputs alone. The backward pass (model/scan_backward.py) first has the walk done again, for
the states that enter its chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.launching import launch
from model.scan_backward import scan_backward
from model.tiles import has_copy_engine, load_tile, store_tile, tiles

BACKWARD_CHUNK = 64  # positions between two states that the backward pass starts from
PRECISION = tl.constexpr("tf32x3")  # float32 factors in three TF32 parts each: products near float32
LOG2E = tl.constexpr(1.4426950408889634)
# Numbers of which Triton makes no kernel of their own where they are 1: it would unroll the walk of one chunk,
# and ptxas 12.8, which comes with Triton 3.6, then has tensor cores read the wrong shared memory.
SIZES = ["l", "h", "heads_of_group", "n_chunks"]


@torch.compiler.disable
def ssd(x, dt, A, B, C, D, chunk_size, document_ids=None, initial_state=None):
    """See model/reference.py. chunk_size has no effect: the kernels have their own. p and n: multiples of 8."""
    return Scan.apply(x, dt.float(), A.float(), B, C, D.float(), document_ids, initial_state)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, document_ids, initial_state):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, document_ids, initial_state)
        return scan(x, dt, A, B, C, D, document_ids, initial_state)

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, document_ids, initial_state = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        steps, cum = decays(dt, A, BACKWARD_CHUNK, document_ids)
        entering = entering_states(x, B, steps, cum, document_ids, initial_state)
        dx, dlog, dsteps, dB, dC, dD, dinitial = scan_backward(
            dy.contiguous(), None if dlast is None else dlast.mT, x, steps, cum, B, C, D, document_ids, entering
        )
        ddt, dA = dlog * A + dsteps, (dlog * dt).sum(dim=(0, 1))
        return dx, ddt, dA, dB, dC, dD, None, None if initial_state is None else dinitial.mT


def scan(x, dt, A, B, C, D, document_ids=None, initial_state=None, plan=None, first=None, dt_bias=None):
    """reference.ssd without gradients. dt, A, dt_bias: as decays takes them. first: document_starts, if at hand."""
    b, l, h, p = x.shape
    n = B.shape[-1]
    plan = plan or plan_for(x, n)
    chunk, block_p, block_n = plan.chunk, plan.block_p, padded(n)
    keys, cum = decays(dt, A, chunk, document_ids, dt_bias, keys=True)
    first = document_starts(document_ids, chunk, first)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = torch.empty(b, h, n, p, device=x.device, dtype=torch.float32)
    x_in, x_strides = tiles(x.transpose(1, 2), chunk, block_p, plan.copies)
    y_out, y_strides = tiles(y.transpose(1, 2), chunk, block_p, plan.copies)
    B_in, B_strides = tiles(B.transpose(1, 2), chunk, block_n, plan.copies)
    C_in, C_strides = tiles(C.transpose(1, 2), chunk, block_n, plan.copies)
    (keys_in, chunk_strides), (cum_in, _) = (tiles(t, 1, chunk, plan.copies) for t in (keys, cum))
    first_in, first_strides = (None, None) if first is None else tiles(first[:, None], 1, chunk, plan.copies)
    with torch.cuda.device_of(x):
        launch(
            _scan_kernel, (b * h, triton.cdiv(p, block_p)),
            x_in, B_in, C_in, y_out, keys_in, cum_in, first_in,
            x_strides, B_strides, C_strides, y_strides, chunk_strides, first_strides,
            D.contiguous(), cum, first, contiguous_float(initial_state), last, l, h, h // B.shape[2], keys.shape[2],
            P=p, N=n, Q=chunk, BLOCK_P=block_p, BLOCK_N=block_n, STAGES=plan.stages,
            DTYPE=getattr(tl, str(x.dtype).removeprefix("torch.")), num_warps=plan.warps,
        )  # fmt: skip
    return y, last


def entering_states(x, B, steps, cum, document_ids=None, initial_state=None, plan=None, first=None):
    """The state at the start of each chunk of `decays`, (b, c, h, p, n) in x's dtype. first: as scan's."""
    b, l, h, p = x.shape
    n, (n_chunks, chunk) = B.shape[-1], steps.shape[2:]
    plan = plan or plan_for(x, n, chunk)
    block_p, block_n = plan.block_p, padded(n)
    first = document_starts(document_ids, chunk, first)
    entering = torch.empty(b, n_chunks, h, p, n, device=x.device, dtype=x.dtype)
    x_in, x_strides = tiles(x.transpose(1, 2), chunk, block_p, plan.copies)
    B_in, B_strides = tiles(B.transpose(1, 2), chunk, block_n, plan.copies)
    entering_out, entering_strides = tiles(entering.flatten(0, 1), block_p, block_n, plan.copies)
    (steps_in, chunk_strides), (cum_in, _) = (tiles(t, 1, chunk, plan.copies) for t in (steps, cum))
    with torch.cuda.device_of(x):
        launch(
            _scan_entering_kernel, (b * h, triton.cdiv(p, block_p)),
            x_in, B_in, entering_out, steps_in, cum_in, x_strides, B_strides, entering_strides, chunk_strides,
            cum, first, contiguous_float(initial_state), l, h, h // B.shape[2], n_chunks,
            P=p, N=n, Q=chunk, BLOCK_P=block_p, BLOCK_N=block_n, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return entering


class Plan(NamedTuple):
    """How a walk runs: positions of a chunk, channels of a program, its warps and its chunks under way."""

    chunk: int
    block_p: int
    warps: int = 4
    stages: int = 2
    copies: bool = True  # by the copy engine, into much shared memory


def plan_for(x, n, chunk=None):
    """chunk: of the states that the backward pass starts from; the forward pass has its own. Found on an H200."""
    b, _, h, p = x.shape
    half = x.element_size() == 2
    # The part of a state that a program's registers hold beside the rest
    block_p = min(padded(p), max(16, (8192 if half else 4096 if chunk is None else 2048) // padded(n)))
    processors, memory = 132, 227 * 1024
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        processors, memory = properties.multi_processor_count, properties.shared_memory_per_block_optin
    copies = has_copy_engine(x.device) and memory > 160 * 1024
    # Rows of few heads: smaller parts of them, as long as each has a multiprocessor, and its memory, to itself
    while block_p > (32 if chunk is None else 64) and 2 * b * h * triton.cdiv(p, block_p) <= processors:
        block_p //= 2
    alone = b * h * triton.cdiv(p, block_p) <= processors
    stages = 3 if half and copies and (chunk is not None or (alone and n <= 128)) else 2
    return Plan(chunk or (64 if half else 16), block_p, 4 if half and copies else 8, stages, copies=copies)


def padded(size):
    """The block of a dimension: a power of two, and no less than tensor cores take."""
    return max(triton.next_power_of_2(size), 16)


def contiguous_float(tensor):
    return None if tensor is None else tensor.float().contiguous()


def decays(dt, A, chunk, document_ids, dt_bias=None, keys=False):
    """dt (b, l, h) in chunks, (b, h, c, q), and dt * A summed up from the start of its chunk or document, likewise.

    dt_bias (h,): the step sizes are softplus(dt + dt_bias), and the rates are -exp(A); None: dt and A as they are.
    The positions that fill up the last chunk have dt = 0. keys: the sums as powers of two, and for dt those sums less
    log2(dt), so that 2^(cum_i - key_j) is the decay from j to i times dt_j.
    """
    b, l, h = dt.shape
    n_chunks, block_h = triton.cdiv(l, chunk), min(16, triton.next_power_of_2(h))
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    steps = torch.empty(b, h, n_chunks, chunk, device=dt.device, dtype=torch.float32)
    cum = torch.empty_like(steps)
    with torch.cuda.device_of(dt):
        launch(
            _scan_decays_kernel, (b * n_chunks, triton.cdiv(h, block_h)),
            dt, A, dt_bias, document_ids, steps, cum, l, h, n_chunks, chunk, *dt.stride(),
            PACKED=document_ids is not None, KEYS=keys, BLOCK_H=block_h, BLOCK_Q=triton.next_power_of_2(chunk),
        )  # fmt: skip
    return steps, cum


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to float32's rounding for small results too."""
    small = tl.exp(-tl.abs(x))
    sum = 1.0 + small
    rounded = tl.maximum(sum - 1.0, 1e-9)  # what of `small` the sum has kept
    return tl.maximum(x, 0.0) + tl.where(sum == 1.0, small, tl.log(sum) * (small / rounded))


@triton.jit
def _join(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def _scan_decays_kernel(
    dt_ptr, A_ptr, bias_ptr, ids_ptr, steps_ptr, cum_ptr, l, h, n_chunks, chunk_size, stride_b, stride_l, stride_h,
    PACKED: tl.constexpr, KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    b, c = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q = tl.arange(0, BLOCK_Q)
    at = c * chunk_size + q
    inside = (q < chunk_size) & (at < l)
    dt_ptr += b.to(tl.int64) * stride_b
    is_dt = inside[None, :] & (heads[:, None] < h)
    dt_ptr += at.to(tl.int64)[None, :] * stride_l + heads[:, None] * stride_h
    dt = tl.load(dt_ptr, mask=is_dt, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + heads, mask=heads < h, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + heads, mask=heads < h, other=0.0).to(tl.float32)[:, None]
        dt = tl.where(is_dt, _softplus(dt), 0.0)
        A = -tl.exp(A)
    log_decay = dt * A[:, None]
    if PACKED:
        ids_ptr += b.to(tl.int64) * l
        here = tl.load(ids_ptr + at, mask=inside, other=0)
        before = tl.load(ids_ptr + at - 1, mask=inside & (q > 0), other=0)
        begins = ((here != before) & inside & (q > 0)).to(tl.int32)
        begins = tl.broadcast_to(begins[None, :], (BLOCK_H, BLOCK_Q))
        _, cum = tl.associative_scan((begins, log_decay), 1, _join)
    else:
        cum = tl.cumsum(log_decay, 1)
    if KEYS:
        cum *= LOG2E
        dt = tl.where(dt > 0, cum - tl.log2(tl.where(dt > 0, dt, 1.0)), float("inf"))
    out = ((b * h + heads[:, None]).to(tl.int64) * n_chunks + c) * chunk_size + q[None, :]
    mask = (heads[:, None] < h) & (q[None, :] < chunk_size)
    tl.store(steps_ptr + out, dt, mask=mask)
    tl.store(cum_ptr + out, cum, mask=mask)


def document_starts(document_ids, chunk, first=None):
    """The place in its chunk where each position's document begins, (b, c, q) int32; -1: before the chunk.

    What fills up the last chunk belongs to the last document. None if the rows are one document each.
    first: those of chunks of some length, which are returned if it is this one.
    """
    if document_ids is None or (first is not None and first.shape[-1] == chunk):
        return first
    b, l = document_ids.shape
    n_chunks = triton.cdiv(l, chunk)
    first = torch.empty(b, n_chunks, chunk, device=document_ids.device, dtype=torch.int32)
    with torch.cuda.device_of(first):
        launch(
            _scan_starts_kernel, (b * n_chunks,), document_ids.contiguous(), first, l, n_chunks, Q=chunk, num_warps=1
        )
    return first


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _scan_starts_kernel(ids_ptr, first_ptr, l, n_chunks, Q: tl.constexpr):
    b, c = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    q = tl.arange(0, Q)
    at = c * Q + q
    ids_ptr += b.to(tl.int64) * l
    begins = (at > 0) & (at < l)  # the row's first document may have a state from before
    here, before = tl.load(ids_ptr + at, mask=begins, other=0), tl.load(ids_ptr + at - 1, mask=begins, other=0)
    first = tl.associative_scan(tl.where(here != before, q, -1), 0, _later)
    tl.store(first_ptr + tl.program_id(0).to(tl.int64) * Q + q, first)


@triton.jit
def _at_end(c, Q: tl.constexpr, cum_ptr, first_ptr):
    """cum and first of the last position of chunk c."""
    first = -1
    if first_ptr is not None:
        first = tl.load(first_ptr + c * Q + Q - 1)
    return tl.load(cum_ptr + c * Q + Q - 1), first


@triton.jit(do_not_specialize=SIZES)
def _scan_kernel(
    x_in, B_in, C_in, y_out, keys_in, cum_in, first_in,
    x_strides, B_strides, C_strides, y_strides, chunk_strides, first_strides,
    D_ptr, cum_ptr, first_ptr, initial_ptr, last_ptr, l, h, heads_of_group, n_chunks,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With 2^cum_i the decay from the chunk's (or the document's) start to i, key_j = cum_j - log2(dt_j), and S the
    state (n, p) that enters:

    y_i = 2^cum_i C_i S + sum over j <= i of 2^(cum_i - key_j) (C_i . B_j) x_j + D x_i
    S <- 2^cum_last S + sum over j of 2^(cum_last - key_j) B_j x_j^T

    where each sum and each S is of one document. What is not, is replaced by 0 or multiplied by 2^-inf, exactly 0.
    """
    b, head = tl.program_id(0) // h, tl.program_id(0) % h
    group, channel = head // heads_of_group, tl.program_id(1) * BLOCK_P
    row = tl.program_id(0).to(tl.int64)
    n, q = tl.arange(0, BLOCK_N), tl.arange(0, Q)
    causal = q[:, None] >= q[None, :]
    D = tl.load(D_ptr + head).to(tl.float32)
    cum_ptr += row * n_chunks * Q
    if first_ptr is not None:
        first_ptr += b.to(tl.int64) * n_chunks * Q
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if initial_ptr is not None:
        p = channel + tl.arange(0, BLOCK_P)
        at = initial_ptr + row * N * P + n[:, None] * P + p[None, :]
        state = tl.load(at, mask=(n[:, None] < N) & (p[None, :] < P), other=0.0)
    # What is one number for a chunk is read a chunk ahead: the loop's pipeline would take barriers for it.
    cum_next, first_next = _at_end(0, Q, cum_ptr, first_ptr)
    # Each load stands where its value is first wanted: earlier, it would hold registers that the products need.
    for c in tl.range(0, n_chunks, num_stages=STAGES):
        start, cum_last, last_first = c * Q, cum_next, first_next
        cum_next, first_next = _at_end(tl.minimum(c + 1, n_chunks - 1), Q, cum_ptr, first_ptr)
        entering = state.to(DTYPE)
        C = load_tile(C_in, C_strides, b, group, start, 0, l, N, Q, BLOCK_N)
        B = load_tile(B_in, B_strides, b, group, start, 0, l, N, Q, BLOCK_N)
        y = tl.dot(C, entering, input_precision=PRECISION)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        cum = load_tile(cum_in, chunk_strides, b, head, c, 0, n_chunks, Q, 1, Q).reshape(Q)
        keys = load_tile(keys_in, chunk_strides, b, head, c, 0, n_chunks, Q, 1, Q).reshape(Q)
        decay_in, decay_out, decay_chunk = cum, cum_last - keys, cum_last
        if first_ptr is not None:
            first = load_tile(first_in, first_strides, b, 0, c, 0, n_chunks, Q, 1, Q).reshape(Q)
            decay_in = tl.where(first < 0, decay_in, -float("inf"))
            decay_out = tl.where(q >= last_first, decay_out, -float("inf"))
            decay_chunk = tl.where(last_first < 0, decay_chunk, -float("inf"))
        y *= tl.exp2(decay_in)[:, None]
        scores *= tl.exp2(tl.where(causal, cum[:, None] - keys[None, :], -float("inf")))
        if first_ptr is not None:  # noqa: SIM102  # settled when the kernel is compiled; the next, at each chunk
            if last_first >= 0:  # a document begins in it: few do
                scores = tl.where(q[None, :] >= first[:, None], scores, 0.0)
        x = load_tile(x_in, x_strides, b, head, start, channel, l, P, Q, BLOCK_P)
        y = tl.dot(scores.to(DTYPE), x, y, input_precision=PRECISION)
        y += D * x
        store_tile(y_out, y_strides, b, head, start, channel, l, P, y.to(DTYPE), Q, BLOCK_P)
        fed = (x * tl.exp2(decay_out)[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(B), fed, state * tl.exp2(decay_chunk), input_precision=PRECISION)
    p = channel + tl.arange(0, BLOCK_P)
    at = last_ptr + row * N * P + n[:, None] * P + p[None, :]
    tl.store(at, state, mask=(n[:, None] < N) & (p[None, :] < P))


@triton.jit(do_not_specialize=SIZES)
def _scan_entering_kernel(
    x_in, B_in, entering, steps_in, cum_in, x_strides, B_strides, entering_strides, chunk_strides,
    cum_ptr, first_ptr, initial_ptr, l, h, heads_of_group, n_chunks,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """S of _scan_kernel, with p and n the other way round, written down before each chunk."""
    b, head = tl.program_id(0) // h, tl.program_id(0) % h
    group, channel = head // heads_of_group, tl.program_id(1) * BLOCK_P
    row = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    cum_ptr += row * n_chunks * Q
    if first_ptr is not None:
        first_ptr += b.to(tl.int64) * n_chunks * Q
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        p, n = channel + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
        at = initial_ptr + row * N * P + n[None, :] * P + p[:, None]
        state = tl.load(at, mask=(n[None, :] < N) & (p[:, None] < P), other=0.0)
    cum_next, first_next = _at_end(0, Q, cum_ptr, first_ptr)
    for c in tl.range(0, n_chunks, num_stages=STAGES):
        start, cum_last, last_first = c * Q, cum_next, first_next
        cum_next, first_next = _at_end(tl.minimum(c + 1, n_chunks - 1), Q, cum_ptr, first_ptr)
        cum = load_tile(cum_in, chunk_strides, b, head, c, 0, n_chunks, Q, 1, Q).reshape(Q)
        steps = load_tile(steps_in, chunk_strides, b, head, c, 0, n_chunks, Q, 1, Q).reshape(Q)
        decay_out, decay_chunk = (cum_last - cum) * LOG2E, cum_last * LOG2E
        if first_ptr is not None:
            decay_out = tl.where(q >= last_first, decay_out, -float("inf"))
            decay_chunk = tl.where(last_first < 0, decay_chunk, -float("inf"))
        x = load_tile(x_in, x_strides, b, head, start, channel, l, P, Q, BLOCK_P)
        fed = (x * (steps * tl.exp2(decay_out))[:, None]).to(x.dtype)
        store_tile(
            entering, entering_strides, b * n_chunks + c, head, channel, 0, P, N, state.to(x.dtype), BLOCK_P, BLOCK_N
        )
        B = load_tile(B_in, B_strides, b, group, start, 0, l, N, Q, BLOCK_N)
        state = tl.dot(tl.trans(fed), B, state * tl.exp2(decay_chunk), input_precision=PRECISION)
