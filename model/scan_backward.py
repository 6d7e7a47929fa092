"""The backward pass of the Mamba-2 scan (model/reference.py's ssd) in three Triton kernels.

Dimensions as in model/reference.py. A row is cut into blocks of BLOCK tokens, no longer than the chunks at whose starts
the forward pass kept the state; a block in mid-chunk works out its own. In a block, with masks as in reference.ssd,
L_kq = exp(cum_q - cum_k) for k <= q, and S (p, n) the state that enters:

    y_q = sum_k L_kq (B_k C_q) dt_k x_k + in_q S C_q + D x_q        S' = whole S + sum_k out_k dt_k x_k B_k^T

_scan_backward_states_kernel walks each head's blocks from the last to the first with dS, the gradient of S, in registers:
    dS = whole dS' + sum_q in_q dy_q C_q^T
_scan_backward_blocks_kernel takes a block of all heads that share B and C, so that x, dy, S and dS' are read once:
    dx_k = dt_k (sum_q L_kq (B_k C_q) dy_q + out_k dS' B_k) + D dy_k
    dB_k = sum_q G_kq C_q + sum_h out_k dt_k dS'^T x_k        with G_kq = sum_h L_kq dt_k (x_k dy_q)
    dC_q = sum_k G_kq B_k + sum_h in_q S^T dy_q
_scan_backward_decays_kernel gathers the gradient of each log decay. What passes through the decay at t: pairs k < t <= q, the entering
state on its way to q >= t, tokens k < t on their way to the leaving state, and the state that crosses the block. The
pairs are sums over rows less sums over columns of one float32 tile, added up from the end of the document.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


def scan_backward(dy, dlast, x, steps, cum, A, B, C, D, document_ids, entering, dx_out=None, dB_out=None, dC_out=None):
    """The gradients of the scan, from dy (b, l, h, p), contiguous, and that of the last state, (b, h, p, n) or None.

    x (b, l, h, p), B, C (b, l, g, n), and the *_out that take their gradients: rows of any stride, channels side by
    side. steps (dt) and cum (dt * A, summed up from the start of the chunk or document): float32 (b, h, c, q).
    entering (b, c, h, p, n): the state at each chunk's start, in x's dtype. document_ids (b, l) or None.
    Returns dx, dlog (b, l, h), that of dt * A, dsteps (b, l, h), that of dt where it scales x, dB, dC, dD (h,) and
    dinitial (b, h, p, n); all float32 but dx, dB and dC. Sums are in a fixed order: the same bits each time.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    chunk, padded_l = cum.shape[3], cum.shape[2] * cum.shape[3]
    launch = plan(b, l, h, p, g, n, chunk, x.dtype, x.device)
    block, block_n, tiles = launch.block, max(16, triton.next_power_of_2(n)), triton.cdiv(p, launch.block_p)
    n_blocks = triton.cdiv(l, block)
    new = partial(torch.empty, device=x.device, dtype=torch.float32)
    dx, dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if out is None else out
        for t, out in ((x, dx_out), (B, dB_out), (C, dC_out))
    )
    dstates = new(b, n_blocks, h, p, n, dtype=x.dtype)
    after, before, fed, product = new(4, b, h, tiles, n_blocks, block)
    kept, own, dinitial = new(b, h, tiles, n_blocks), new(b, n_blocks, g, block), new(b, h, p, n)
    later = new(b, n_blocks, g, block, block, dtype=x.dtype)
    dlog, dsteps, dD = new(b, l, h), new(b, l, h), new(b * n_blocks, h)
    # Heads split over programs leave as many sums of dB and dC to add up.
    sums = [t[None] if launch.splits == 1 else new(launch.splits, *t.shape) for t in (dB, dC)]
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    if dlast is not None:
        dlast = dlast.float().contiguous()
    settings = dict(CHUNK=chunk, BLOCK=block, PACKED=document_ids is not None)
    products = dict(P=p, N=n, BLOCK_P=launch.block_p, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32")
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _scan_backward_pairs_kernel[(b * n_blocks, g)](
            B, C, document_ids, later, own, l, n_blocks, *B.stride()[:3], *C.stride()[:3], N=n, BLOCK=block,
            BLOCK_N=block_n, PACKED=settings["PACKED"], PRECISION=products["PRECISION"],
        )  # fmt: skip
        _scan_backward_states_kernel[(b * h, tiles, triton.cdiv(n, launch.states_block_n))](
            dy, dlast, cum, C, document_ids, dstates, dinitial, l, h, n_blocks, padded_l, h // g, *C.stride()[:3],
            BLOCK_N=launch.states_block_n, LAST=dlast is not None, STAGES=launch.states_stages,
            num_warps=launch.states_warps, **settings, **products,
        )  # fmt: skip
        _scan_backward_blocks_kernel[(b * n_blocks, g, launch.splits)](
            dy, x, B, C, steps, cum, D, document_ids, entering.contiguous(), dstates, dx, *sums,
            later, own, after, before, fed, product, kept, l, h, n_blocks, padded_l, h // g, h // g // launch.splits,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dx.stride()[:3], *sums[0].stride()[:4],
            *sums[1].stride()[:4], BLOCK_N=block_n, STAGES=launch.stages, num_warps=launch.warps,
            **settings, **products,
        )  # fmt: skip
        block_h = min(32, triton.next_power_of_2(h))
        _scan_backward_decays_kernel[(b * n_blocks, triton.cdiv(h, block_h))](
            after, before, fed, product, kept, own, steps, cum, document_ids, dlog, dsteps, dD,
            l, h, g, n_blocks, padded_l, TILES=tiles, BLOCK_H=block_h, **settings,
        )  # fmt: skip
    if launch.splits > 1:
        dB.copy_(sums[0].sum(0))
        dC.copy_(sums[1].sum(0))
    return dx, dlog, dsteps, dB, dC, dD.sum(0), dinitial


class Launch(NamedTuple):
    """How the kernels are started: tokens of a block, channels and warps of a program, loads under way."""

    block: int
    block_p: int
    warps: int
    stages: int
    splits: int  # of a group's heads over programs
    states_block_n: int
    states_warps: int
    states_stages: int


PROGRAMS = 132  # about one for each multiprocessor; found on an H200, and no number of it changes a result's meaning


def plan(b, l, h, p, g, n, chunk, dtype, device):
    """A Launch for a shape, within the GPU's shared memory."""
    size, block_n = dtype.itemsize, max(16, triton.next_power_of_2(n))
    block = min(chunk, 64 if size == 2 and n <= 128 else 32 if size == 2 or n <= 128 else 16)
    block_p = max(16, min(64, triton.next_power_of_2(p)))
    memory = 232448
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    stage = 2 * block_p * (block + block_n) * size  # x, dy, both states
    if chunk > block:
        stage += block * (block_p + block_n) * size
    fixed = 2 * block * block_n * size + 24 * 1024
    stages = max(1, min(3, (memory - fixed) // stage))
    splits = 1
    while splits * 2 * b * g * triton.cdiv(l, block) <= PROGRAMS and h // g % (2 * splits) == 0:
        splits *= 2
    states_block_n = block_n
    while states_block_n > 16 and b * h * triton.cdiv(p, block_p) * block_n // states_block_n < 2 * PROGRAMS:
        states_block_n //= 2
    return Launch(block, block_p, 8, stages, splits, states_block_n, 4, 3 if size == 2 else 2)


@triton.jit
def _tile(ptr, row, column, stride, mask):
    return tl.load(ptr + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _base(cum_ptr, start, CHUNK: tl.constexpr):
    """What the decays have summed up to before a block: cum begins anew at each chunk, not at each block."""
    return tl.load(cum_ptr + start - 1, mask=start % CHUNK > 0, other=0.0)


@triton.jit
def _exp(x):
    """Of a sum of log decays, which is at most 0 where it counts; elsewhere, where a zero takes it, a finite number."""
    return tl.exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def _add(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def _scan_backward_states_kernel(
    dy_ptr, dlast_ptr, cum_ptr, C_ptr, ids_ptr, dstates_ptr, dinitial_ptr,
    l, h, n_blocks, padded_l, heads_of_group, C_stride_b, C_stride_l, C_stride_g,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_P x BLOCK_N of a head's state. Stores the gradient of the state that leaves each block."""
    b, head = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = tl.arange(0, BLOCK)
    dy_ptr += (b * l * h + head) * P
    C_ptr += b * C_stride_b + head // heads_of_group * C_stride_g
    cum_ptr += (b * h + head) * padded_l
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    tile = p[:, None] * N + n[None, :]
    if PACKED:
        ids_ptr += b * l
    if LAST:
        dstate = tl.load(dlast_ptr + (b * h + head) * P * N + tile, mask=state_mask, other=0.0)
    else:
        dstate = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for i in tl.range(0, n_blocks, num_stages=STAGES):
        block = n_blocks - 1 - i
        start = block * BLOCK
        end = tl.minimum(start + BLOCK, l) - 1
        inside = start + q < l
        to = dstates_ptr + ((b * n_blocks + block) * h + head) * P * N
        tl.store(to + tile, dstate.to(dstates_ptr.dtype.element_ty), mask=state_mask)
        dy = _tile(dy_ptr + start.to(tl.int64) * (h * P), q, p, h * P, inside[:, None] & (p < P)[None, :])
        C = _tile(C_ptr + start.to(tl.int64) * C_stride_l, q, n, C_stride_l, inside[:, None] & (n < N)[None, :])
        base = _base(cum_ptr, start, CHUNK)
        reach_in = _exp(tl.load(cum_ptr + start + q, mask=inside, other=0.0) - base)
        whole = _exp(tl.load(cum_ptr + end) - base)
        if PACKED:
            before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
            reach_in = tl.where(tl.load(ids_ptr + start + q, mask=inside, other=-1) == before, reach_in, 0.0)
            whole = tl.where(tl.load(ids_ptr + end) == before, whole, 0.0)
        dys = (tl.trans(dy) * reach_in[None, :]).to(C.dtype)
        dstate = tl.dot(dys, C, dstate * whole, input_precision=PRECISION)
    tl.store(dinitial_ptr + (b * h + head) * P * N + tile, dstate, mask=state_mask)


@triton.jit
def _scan_backward_pairs_kernel(
    B_ptr, C_ptr, ids_ptr, later_ptr, own_ptr, l, n_blocks, B_stride_b, B_stride_l, B_stride_g,
    C_stride_b, C_stride_l, C_stride_g, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: the products B C of a block and a group, (k, q). Those of a token with itself, on which no decay acts,
    are kept apart, so that their rounding stays out of the decays' gradients."""
    b, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    group = tl.program_id(1)
    k, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    start = block * BLOCK
    inside = start + k < l
    mask = inside[:, None] & (n < N)[None, :]
    B = _tile(B_ptr + b * B_stride_b + start.to(tl.int64) * B_stride_l + group * B_stride_g, k, n, B_stride_l, mask)
    C = _tile(C_ptr + b * C_stride_b + start.to(tl.int64) * C_stride_l + group * C_stride_g, k, n, C_stride_l, mask)
    unseen = k[:, None] >= k[None, :]
    if PACKED:
        ids = tl.load(ids_ptr + b * l + start + k, mask=inside, other=-1)
        unseen = unseen | (ids[:, None] != ids[None, :])
    later = tl.where(unseen, 0.0, tl.dot(B, tl.trans(C), input_precision=PRECISION))
    to = (b * n_blocks + block) * tl.num_programs(1) + group
    tl.store(later_ptr + to * BLOCK * BLOCK + (k[:, None] * BLOCK + k[None, :]), later.to(later_ptr.dtype.element_ty))
    tl.store(own_ptr + to * BLOCK + k, tl.sum(B.to(tl.float32) * C.to(tl.float32), 1))


@triton.jit
def _scan_backward_blocks_kernel(
    dy_ptr, x_ptr, B_ptr, C_ptr, steps_ptr, cum_ptr, D_ptr, ids_ptr, entering_ptr, dstates_ptr,
    dx_ptr, dB_ptr, dC_ptr, later_ptr, own_ptr, after_ptr, before_ptr, fed_ptr, product_ptr, kept_ptr,
    l, h, n_blocks, padded_l, heads_of_group, heads_of_program,
    x_stride_b, x_stride_l, x_stride_h, B_stride_b, B_stride_l, B_stride_g, C_stride_b, C_stride_l, C_stride_g,
    dx_stride_b, dx_stride_l, dx_stride_h, dB_stride_s, dB_stride_b, dB_stride_l, dB_stride_g,
    dC_stride_s, dC_stride_b, dC_stride_l, dC_stride_g,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: a block of tokens, over heads_of_program heads of a group, each in tiles of BLOCK_P channels.

    Tiles of pairs are (k, q). after and before: the pairs' sums over k, with what the entering state gives, and over
    q; fed: x dS' B out; product: x dy; kept: S dS'; own: B C of a token with itself.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    b, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    group, split = tl.program_id(1), tl.program_id(2)
    start = block * BLOCK
    chunk, end = start // CHUNK, tl.minimum(start + BLOCK, l) - 1
    k, p, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = start + k < l
    x_ptr += b * x_stride_b + start.to(tl.int64) * x_stride_l
    dx_ptr += b * dx_stride_b + start.to(tl.int64) * dx_stride_l
    dy_ptr += (b * l + start) * (h * P)
    B_ptr += b * B_stride_b + start.to(tl.int64) * B_stride_l + group * B_stride_g
    C_ptr += b * C_stride_b + start.to(tl.int64) * C_stride_l + group * C_stride_g
    n_mask = inside[:, None] & (n < N)[None, :]
    B, C = _tile(B_ptr, k, n, B_stride_l, n_mask), _tile(C_ptr, k, n, C_stride_l, n_mask)
    enters, leaves = inside, inside
    if PACKED:
        ids_ptr += b * l
        ids = tl.load(ids_ptr + start + k, mask=inside, other=-1)
        enters = ids == tl.load(ids_ptr + tl.maximum(start - 1, 0))
        leaves = ids == tl.load(ids_ptr + end)
    of_block = (b * n_blocks + block) * tl.num_programs(1) + group
    later_ptr += of_block * BLOCK * BLOCK
    own = tl.load(own_ptr + of_block * BLOCK + k)
    dpairs = tl.zeros((BLOCK, BLOCK), tl.float32)
    dB = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    dC = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for i in tl.range(0, heads_of_program * TILES, num_stages=STAGES):
        head = group * heads_of_group + split * heads_of_program + i // TILES
        channel = i % TILES * BLOCK_P
        p_mask = inside[:, None] & (p < P - channel)[None, :]
        x = _tile(x_ptr + head * x_stride_h + channel, k, p, x_stride_l, p_mask)
        dy = _tile(dy_ptr + head * P + channel, k, p, h * P, p_mask)
        head_steps_ptr = steps_ptr + (b * h + head) * padded_l
        head_cum_ptr = cum_ptr + (b * h + head) * padded_l
        steps = tl.load(head_steps_ptr + start + k, mask=inside, other=0.0)
        cum = tl.load(head_cum_ptr + start + k, mask=inside, other=0.0)
        reach_in = tl.where(enters, _exp(cum - _base(head_cum_ptr, start, CHUNK)), 0.0)
        reach_out = tl.where(leaves, _exp(tl.load(head_cum_ptr + end + 0 * k) - cum), 0.0)
        state_mask = (p < P - channel)[:, None] & (n < N)[None, :]
        from_ptr = dstates_ptr + (((b * n_blocks + block) * h + head) * P + channel) * N
        dstate = _tile(from_ptr, p, n, N, state_mask)
        from_ptr = entering_ptr + (((b * (padded_l // CHUNK) + chunk) * h + head) * P + channel) * N
        state = _tile(from_ptr, p, n, N, state_mask)
        if CHUNK > BLOCK:
            advanced = state.to(tl.float32)
            for j in tl.static_range(CHUNK // BLOCK - 1):
                at = chunk * CHUNK + j * BLOCK
                goes = at < start  # a block of the chunk before this one
                back = at - start + k
                mask = goes & (k >= 0)
                earlier_x = _tile(
                    x_ptr + head * x_stride_h + channel,
                    back,
                    p,
                    x_stride_l,
                    mask[:, None] & (p < P - channel)[None, :],
                )
                earlier_B = _tile(B_ptr, back, n, B_stride_l, mask[:, None] & (n < N)[None, :])
                last = tl.load(head_cum_ptr + at + BLOCK - 1, mask=goes, other=0.0)
                feeds = _exp(last - tl.load(head_cum_ptr + at + k, mask=mask, other=0.0))
                feeds *= tl.load(head_steps_ptr + at + k, mask=mask, other=0.0)
                whole = _exp(last - _base(head_cum_ptr, at, CHUNK))
                if PACKED:
                    id = tl.load(ids_ptr + tl.minimum(at + BLOCK - 1, start))
                    feeds = tl.where(tl.load(ids_ptr + at + k, mask=mask, other=-1) == id, feeds, 0.0)
                    whole = tl.where(tl.load(ids_ptr + tl.maximum(at - 1, 0)) == id, whole, 0.0)
                earlier_x = (tl.trans(earlier_x) * feeds[None, :]).to(B.dtype)
                whole = tl.where(goes, whole, 1.0)
                advanced = tl.dot(earlier_x, earlier_B, advanced * whole, input_precision=PRECISION)
            state = advanced.to(B.dtype)

        # What shared memory holds is used at once and let go: the sums over heads leave few registers.
        to = ((b * h + head) * TILES + i % TILES) * n_blocks + block
        tl.store(kept_ptr + to, tl.sum(state.to(tl.float32) * dstate.to(tl.float32)))
        to = to * BLOCK + k
        xs, dys = x.to(tl.float32), dy.to(tl.float32)
        dB = tl.dot((xs * (steps * reach_out)[:, None]).to(x.dtype), dstate, dB, input_precision=PRECISION)
        dC = tl.dot((dys * reach_in[:, None]).to(dy.dtype), state, dC, input_precision=PRECISION)

        # read again for each head, from the cache
        later = tl.load(later_ptr + (k[:, None] * BLOCK + k[None, :])).to(tl.float32)
        bits = cum * LOG2E
        decay = tl.exp2(tl.minimum(bits[None, :] - bits[:, None], 0.0))  # as _exp, with fewer products
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay
        dpairs += pairs * steps[:, None]
        pairs *= later
        tl.store(before_ptr + to, tl.sum(pairs, 1))
        after = tl.sum(pairs * steps[:, None], 0)

        dx = tl.dot((later * decay).to(dy.dtype), dy, input_precision=PRECISION) * steps[:, None]
        reached = tl.dot(C, tl.trans(state), input_precision=PRECISION) * dys
        dleft = tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * reach_out[:, None]
        reached, fed, product = tl.reduce((reached, dleft * xs, xs * dys), 1, _add)
        tl.store(after_ptr + to, after + reached * reach_in)
        tl.store(fed_ptr + to, fed)
        tl.store(product_ptr + to, product)
        dx += dleft * steps[:, None] + dys * (tl.load(D_ptr + head) + own * steps)[:, None]
        to = dx_ptr + head * dx_stride_h + channel + (k[:, None] * dx_stride_l + p[None, :])
        tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=p_mask)
    apart = k[:, None] > k[None, :]
    if PACKED:
        apart = apart | (ids[:, None] != ids[None, :])
    dpairs = tl.where(apart, 0.0, dpairs).to(B.dtype)
    dB = tl.dot(dpairs, C, dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(dpairs), B, dC, input_precision=PRECISION)
    dB_ptr += split * dB_stride_s + b * dB_stride_b + start.to(tl.int64) * dB_stride_l + group * dB_stride_g
    dC_ptr += split * dC_stride_s + b * dC_stride_b + start.to(tl.int64) * dC_stride_l + group * dC_stride_g
    tl.store(dB_ptr + (k[:, None] * dB_stride_l + n[None, :]), dB.to(dB_ptr.dtype.element_ty), mask=n_mask)
    tl.store(dC_ptr + (k[:, None] * dC_stride_l + n[None, :]), dC.to(dC_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _join(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def _scan_backward_decays_kernel(
    after_ptr, before_ptr, fed_ptr, product_ptr, kept_ptr, own_ptr, steps_ptr, cum_ptr, ids_ptr,
    dlog_ptr, dsteps_ptr, dD_ptr, l, h, g, n_blocks, padded_l, TILES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: a block of tokens, BLOCK_H heads."""
    b, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    heads, q = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, l) - 1
    inside = start + q < l
    mask = (heads < h)[:, None] & inside[None, :]
    behind = mask & (q > 0)[None, :]
    cum_ptr += (b * h + heads) * padded_l
    steps_ptr += (b * h + heads) * padded_l + start
    steps = tl.load(steps_ptr[:, None] + q[None, :], mask=mask, other=0.0)
    steps_behind = tl.load(steps_ptr[:, None] + q[None, :] - 1, mask=behind, other=0.0)
    crossing = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    leaving = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    dsteps = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    product = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    kept = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.static_range(TILES):
        at = ((b * h + heads) * TILES + tile) * n_blocks + block
        kept += tl.load(kept_ptr + at, mask=heads < h, other=0.0)
        at = at[:, None] * BLOCK + q[None, :]
        before = tl.load(before_ptr + at, mask=mask, other=0.0)
        crossing += tl.load(after_ptr + at, mask=mask, other=0.0) - steps * before
        leaving += tl.load(fed_ptr + at - 1, mask=behind, other=0.0) * steps_behind
        dsteps += before + tl.load(fed_ptr + at, mask=mask, other=0.0)
        product += tl.load(product_ptr + at, mask=mask, other=0.0)
    own_ptr += (b * n_blocks + block) * g * BLOCK
    dsteps += product * tl.load(own_ptr + (heads // (h // g))[:, None] * BLOCK + q[None, :], mask=mask, other=0.0)
    base = tl.load(cum_ptr + start - 1, mask=(heads < h) & (start % CHUNK > 0), other=0.0)
    kept *= _exp(tl.load(cum_ptr + end, mask=heads < h, other=0.0) - base)
    if PACKED:
        ids_ptr += b * l
        id = tl.load(ids_ptr + start + q, mask=inside, other=-1)
        after = tl.load(ids_ptr + start + q + 1, mask=start + q < end, other=-1)
        ends = tl.broadcast_to((id != after).to(tl.int32)[None, :], (BLOCK_H, BLOCK))
        _, crossing = tl.associative_scan((ends, crossing), 1, _join, reverse=True)
        kept = tl.where(tl.load(ids_ptr + tl.maximum(start - 1, 0)) == tl.load(ids_ptr + end), kept, 0.0)
    else:
        crossing = tl.cumsum(crossing, 1, reverse=True)
    out = (b * l + start + q)[None, :] * h + heads[:, None]
    tl.store(dlog_ptr + out, crossing + tl.cumsum(leaving, 1) + kept[:, None], mask=mask)
    tl.store(dsteps_ptr + out, dsteps, mask=mask)
    tl.store(dD_ptr + (b * n_blocks + block) * h + heads, tl.sum(product, 1), mask=heads < h)
