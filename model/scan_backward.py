"""The backward pass of the Mamba-2 scan (model/reference.py's ssd) in three Triton kernels.

Dimensions as in model/reference.py. A row is cut into blocks of BLOCK tokens, no longer than the chunks at whose
starts the forward pass kept the state; a block in mid-chunk works out its own. In a block, with masks as in
reference.ssd, L_kq = exp(cum_q - cum_k) for k <= q, and S (p, n) the state that enters:

    y_q = sum_k L_kq (B_k C_q) dt_k x_k + in_q S C_q + D x_q        S' = whole S + sum_k out_k dt_k x_k B_k^T

_scan_backward_states_kernel walks each head's blocks from the last to the first with dS, the gradient of S, in
registers:
    dS = whole dS' + sum_q in_q dy_q C_q^T
_scan_backward_blocks_kernel takes a block of all heads that share B and C, so that x, dy, S and dS' come from memory
once:
    dx_k = dt_k (sum_q L_kq (B_k C_q) dy_q + out_k dS' B_k) + D dy_k
    dB_k = sum_q G_kq C_q + sum_h out_k dt_k dS'^T x_k        with G_kq = sum_h L_kq dt_k (x_k dy_q)
    dC_q = sum_k G_kq B_k + sum_h in_q S^T dy_q
_scan_backward_decays_kernel gathers the gradient of each log decay. What passes through the decay at t: pairs
k < t <= q, the entering state on its way to q >= t, tokens k < t on their way to the leaving state, and the state that
crosses the block. The pairs are sums over rows less sums over columns of one float32 tile, added up from the
document's end.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.launching import launch
from model.tiles import has_copy_engine, load_tile, store_tile, tiles

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["l", "h", "n_blocks", "heads_of_group", "heads_of_program"]  # see model/scan.py


def scan_backward(
    dy, dlast, x, steps, cum, B, C, D, document_ids, entering, dx_out=None, dB_out=None, dC_out=None, dD_out=None
):
    """The gradients of the scan, from dy (b, l, h, p) and that of the last state, (b, h, p, n) or None.

    x (b, l, h, p), B, C (b, l, g, n), and the *_out that take their gradients: rows of any stride, channels side by
    side. steps (dt) and cum (dt * A, summed up from the start of the chunk or document): float32 (b, h, c, q).
    entering (b, c, h, p, n): the state at each chunk's start, in x's dtype. document_ids (b, l) or None.
    Returns dx, dlog (b, l, h), that of dt * A, dsteps (b, l, h), that of dt where it scales x, dB, dC, dD (h,) and
    dinitial (b, h, p, n); all float32 but dx, dB and dC. Sums are in a fixed order: the same bits each time.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    chunk, padded_l = cum.shape[3], cum.shape[2] * cum.shape[3]
    chosen = plan(b, l, h, p, g, n, chunk, x.dtype, x.device)
    block, block_n, tiles_p = chosen.block, max(16, triton.next_power_of_2(n)), triton.cdiv(p, chosen.block_p)
    n_blocks = triton.cdiv(l, block)
    new = partial(torch.empty, device=x.device, dtype=torch.float32)
    dx, dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if out is None else out
        for t, out in ((x, dx_out), (B, dB_out), (C, dC_out))
    )
    dstates = new(b, n_blocks, h, p, n, dtype=x.dtype)
    sums, reached = new(b, h, tiles_p, n_blocks, 4, block), new(b, h, tiles_p, n_blocks, block)
    kept, own, dinitial = new(b, h, tiles_p, n_blocks), new(b, n_blocks, g, block), new(b, h, p, n)
    dlog, dsteps, dD = new(b, l, h), new(b, l, h), new(b * n_blocks, h)
    # Programs that share a block leave their sums of dB and dC to add up.
    dBs = dB[None] if chosen.splits == 1 else new(chosen.splits, *dB.shape)
    dCs = new(2 * chosen.splits, *dC.shape)
    dy, entering = dy.contiguous(), entering.contiguous()
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    if dlast is not None:
        dlast = dlast.float().contiguous()
    settings = dict(CHUNK=chunk, BLOCK=block, PACKED=document_ids is not None)
    products = dict(P=p, N=n, BLOCK_P=chosen.block_p, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32")
    with torch.cuda.device_of(x):
        # (b, h, l, p) and the like, in tiles of the last two
        split = partial(tiles, copies=chosen.copies)
        x_in, dy_in, dx_out = (split(t.transpose(1, 2), block, chosen.block_p) for t in (x, dy, dx))
        B_in, C_in = (split(t.transpose(1, 2), block, block_n) for t in (B, C))
        entering_in, dstates_in = (split(t.flatten(0, 1), chosen.block_p, block_n) for t in (entering, dstates))
        (steps_in, _), cum_in = (split(t.view(b, h, -1, block), 1, block) for t in (steps, cum))
        narrow = chosen.states_block_n
        launch(
            _scan_backward_states_kernel, (b * h * triton.cdiv(n, narrow), tiles_p),
            *dy_in, *split(C.transpose(1, 2), block, narrow), *cum_in,
            *split(dstates.flatten(0, 1), chosen.block_p, narrow), dlast, cum, document_ids, dinitial,
            l, h, n_blocks, padded_l, h // g, BLOCK_N=narrow, LAST=dlast is not None, STAGES=chosen.states_stages,
            num_warps=chosen.states_warps, **settings, **products,
        )  # fmt: skip
        launch(
            _scan_backward_blocks_kernel, (2 * b * n_blocks, g, chosen.splits),
            *x_in, *dy_in, *B_in, *C_in, *entering_in, *dstates_in, steps_in, *cum_in, *dx_out,
            steps, cum, D, document_ids, dBs, dCs, own, sums, reached, kept,
            l, h, n_blocks, padded_l, h // g, h // g // chosen.splits, *dBs.stride()[:4], *dCs.stride()[:4],
            BLOCK_N=block_n, STAGES=chosen.stages, num_warps=chosen.warps, **settings, **products,
        )  # fmt: skip
        block_h = min(16, triton.next_power_of_2(h))
        launch(
            _scan_backward_decays_kernel, (b * n_blocks, triton.cdiv(h, block_h)),
            sums, reached, kept, own, steps, cum, document_ids, dlog, dsteps, dD,
            l, h, g, n_blocks, padded_l, TILES=tiles_p, BLOCK_H=block_h, **settings,
        )  # fmt: skip
    if chosen.splits > 1:
        dB.copy_(dBs.sum(0))
    if len(dCs) == 2:
        torch.add(*dCs, out=dC)  # rounded as it is written: one pass
    else:
        dC.copy_(dCs.sum(0))
    return dx, dlog, dsteps, dB, dC, torch.sum(dD, 0, out=dD_out), dinitial


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
    copies: bool  # by the copy engine


PROGRAMS = 132  # at the least, where the shape allows it: the multiprocessors of an H200


def plan(b, l, h, p, g, n, chunk, dtype, device):
    """A Launch for a shape, within the GPU's shared memory."""
    memory = 232448
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if dtype.itemsize == 2:
        block, block_p, warps = (64, 64, 4) if n <= 128 else (64, 32, 8)
        stages = 3 if memory > 200_000 else 2 if memory > 150_000 or chunk <= block else 1
    else:
        block, block_p, warps, stages = 64 if n <= 128 else 32, 32, 8, 1
        if memory < 150_000:
            block //= 2
    block, block_p = min(block, chunk), min(block_p, max(16, triton.next_power_of_2(p)))
    splits = 1
    while splits * 2 * b * g * triton.cdiv(l, block) <= PROGRAMS and h // g % (2 * splits) == 0:
        splits *= 2
    states_block_n = max(16, min(64, triton.next_power_of_2(n)))
    while states_block_n > 16 and b * h * triton.cdiv(p, block_p) * n // states_block_n < 2 * PROGRAMS:
        states_block_n //= 2
    states_stages = 3 if dtype.itemsize == 2 else 2
    copies = has_copy_engine(device) and l > block  # a row of one block has nothing to fetch ahead
    return Launch(block, block_p, warps, stages, splits, states_block_n, 4, states_stages, copies)


@triton.jit
def _base(cum_ptr, start, CHUNK: tl.constexpr):
    """What the decays have summed up to before a block: cum begins anew at each chunk, not at each block."""
    return tl.load(cum_ptr + start - 1, mask=start % CHUNK > 0, other=0.0)


@triton.jit
def _exp(x):
    """Of a sum of log decays, at most 0 where it counts; elsewhere, where a zero takes it, a finite number."""
    return tl.exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def _add(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit(do_not_specialize=SIZES)
def _scan_backward_states_kernel(
    dy_in, dy_strides, C_in, C_strides, cum_in, cum_strides, dstates_out, dstates_strides,
    dlast_ptr, cum_ptr, ids_ptr, dinitial_ptr, l, h, n_blocks, padded_l, heads_of_group,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_P x BLOCK_N of a head's state. Stores the gradient of the state that leaves each block."""
    PARTS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours, so that the cache holds what they share
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    b, head = row // h, row % h
    group, channel = head // heads_of_group, tl.program_id(1) * BLOCK_P
    q = tl.arange(0, BLOCK)
    p, n = channel + tl.arange(0, BLOCK_P), part * BLOCK_N + tl.arange(0, BLOCK_N)
    cum_ptr += row.to(tl.int64) * padded_l
    if PACKED:
        ids_ptr += b.to(tl.int64) * l
    at = row.to(tl.int64) * P * N + p[:, None] * N + n[None, :]
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    dstate = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if LAST:
        dstate = tl.load(dlast_ptr + at, mask=state_mask, other=0.0)
    for i in tl.range(0, n_blocks, num_stages=STAGES):
        block = n_blocks - 1 - i
        start = block * BLOCK
        end = tl.minimum(start + BLOCK, l) - 1
        # Each load stands where its value is first wanted: earlier, it would hold registers.
        store_tile(
            dstates_out, dstates_strides, b * n_blocks + block, head, channel, part * BLOCK_N, P, N,
            dstate.to(dy_in.dtype if dy_strides is None else dy_in.dtype.element_ty), BLOCK_P, BLOCK_N,
        )  # fmt: skip
        base = _base(cum_ptr, start, CHUNK)
        cum = load_tile(cum_in, cum_strides, b, head, block, 0, n_blocks, BLOCK, 1, BLOCK).reshape(BLOCK)
        reach_in, whole = _exp(cum - base), _exp(tl.load(cum_ptr + end) - base)
        if PACKED:
            before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
            ids = tl.load(ids_ptr + start + q, mask=start + q < l, other=-1)
            reach_in = tl.where(ids == before, reach_in, 0.0)
            whole = tl.where(tl.load(ids_ptr + end) == before, whole, 0.0)
        dy = load_tile(dy_in, dy_strides, b, head, start, channel, l, P, BLOCK, BLOCK_P)
        fed = (tl.trans(dy) * reach_in[None, :]).to(dy.dtype)
        C = load_tile(C_in, C_strides, b, group, start, part * BLOCK_N, l, N, BLOCK, BLOCK_N)
        dstate = tl.dot(fed, C, dstate * whole, input_precision=PRECISION)
    tl.store(dinitial_ptr + at, dstate, mask=state_mask)


@triton.jit(do_not_specialize=SIZES)
def _scan_backward_blocks_kernel(
    x_in, x_strides, dy_in, dy_strides, B_in, B_strides, C_in, C_strides, entering_in, entering_strides,
    dstates_in, dstates_strides, steps_in, cum_in, cum_strides, dx_out, dx_strides,
    steps_ptr, cum_ptr, D_ptr, ids_ptr, dB_ptr, dC_ptr,
    own_ptr, sums_ptr, reached_ptr, kept_ptr, l, h, n_blocks, padded_l, heads_of_group, heads_of_program,
    dB_stride_s, dB_stride_b, dB_stride_l, dB_stride_g, dC_stride_s, dC_stride_b, dC_stride_l, dC_stride_g,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: a block of tokens, over heads_of_program heads of a group, each in tiles of BLOCK_P channels.

    Of two neighbours one takes what the tokens gave, to each other and to the leaving state, and the other what they
    took from the entering state: registers hold one sum over heads each, and the cache the inputs of both.
    Tiles of pairs are (k, q). sums: fed, x dS' B; product, x dy; before and after, the pairs' sums over q and over k.
    reached: dy S C in; kept: S dS'; own: B C of a token with itself.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    side, of_block = tl.program_id(0) % 2, tl.program_id(0) // 2
    b, block = of_block // n_blocks, of_block % n_blocks
    group, split = tl.program_id(1), tl.program_id(2)
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, l) - 1
    k, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    inside = start + k < l
    row = b.to(tl.int64)
    n_mask = inside[:, None] & (n < N)[None, :]
    first = group * heads_of_group + split * heads_of_program
    dC_ptr += row * dC_stride_b + start.to(tl.int64) * dC_stride_l + group * dC_stride_g
    if PACKED:
        ids_ptr += row * l
    # In the loops each load stands where its value is first wanted: earlier, it would hold registers.
    if side == 0:
        B = load_tile(B_in, B_strides, b, group, start, 0, l, N, BLOCK, BLOCK_N)
        C = load_tile(C_in, C_strides, b, group, start, 0, l, N, BLOCK, BLOCK_N)
        apart = k[:, None] > k[None, :]
        leaves = inside
        if PACKED:
            ids = tl.load(ids_ptr + start + k, mask=inside, other=-1)
            apart = apart | (ids[:, None] != ids[None, :])
            leaves = ids == tl.load(ids_ptr + end)
        # No decay acts on a token's product with itself: kept apart, its rounding stays out of the decay's gradient.
        later = tl.dot(B, tl.trans(C), input_precision=PRECISION)
        later = tl.where(apart | (k[:, None] == k[None, :]), 0.0, later)
        own = tl.sum(B.to(tl.float32) * C.to(tl.float32), 1)
        if split == 0:
            tl.store(own_ptr + ((row * n_blocks + block) * tl.num_programs(1) + group) * BLOCK + k, own)
        dpairs = tl.zeros((BLOCK, BLOCK), tl.float32)
        dB = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        for i in tl.range(0, heads_of_program * TILES, num_stages=STAGES):
            head = first + i // TILES
            channel = i % TILES * BLOCK_P
            to = (((row * h + head) * TILES + i % TILES) * n_blocks + block) * (4 * BLOCK) + k
            cum = load_tile(cum_in, cum_strides, b, head, block, 0, n_blocks, BLOCK, 1, BLOCK).reshape(BLOCK)
            steps = load_tile(steps_in, cum_strides, b, head, block, 0, n_blocks, BLOCK, 1, BLOCK).reshape(BLOCK)
            last = tl.load(cum_ptr + (row * h + head) * padded_l + end + 0 * k)
            reach_out = tl.where(leaves, _exp(last - cum), 0.0)
            dstate = load_tile(
                dstates_in, dstates_strides, b * n_blocks + block, head, channel, 0, P, N, BLOCK_P, BLOCK_N
            )
            x = load_tile(x_in, x_strides, b, head, start, channel, l, P, BLOCK, BLOCK_P)
            dB += tl.dot(x, dstate, input_precision=PRECISION) * (steps * reach_out)[:, None]
            dx = tl.dot(B, tl.trans(dstate), input_precision=PRECISION)
            dy = load_tile(dy_in, dy_strides, b, head, start, channel, l, P, BLOCK, BLOCK_P)
            xs, dys = x.to(tl.float32), dy.to(tl.float32)
            fed, product = tl.reduce((dx * xs, xs * dys), 1, _add)
            tl.store(sums_ptr + to, fed)
            tl.store(sums_ptr + to + BLOCK, product)
            D = tl.load(D_ptr + head).to(tl.float32)
            dx = dx * (steps * reach_out)[:, None] + dys * (D + own * steps)[:, None]
            bits = cum * LOG2E
            decay = tl.exp2(tl.minimum(bits[None, :] - bits[:, None], 0.0))  # as _exp, with fewer products
            dx = tl.dot((later * decay * steps[:, None]).to(dy.dtype), dy, dx, input_precision=PRECISION)
            store_tile(dx_out, dx_strides, b, head, start, channel, l, P, dx.to(dy.dtype), BLOCK, BLOCK_P)
            pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay
            dpairs += pairs * steps[:, None]
            pairs *= later
            tl.store(sums_ptr + to + 2 * BLOCK, tl.sum(pairs, 1))
            tl.store(sums_ptr + to + 3 * BLOCK, tl.sum(pairs * steps[:, None], 0))
        dpairs = tl.where(apart, 0.0, dpairs).to(B.dtype)
        C = load_tile(C_in, C_strides, b, group, start, 0, l, N, BLOCK, BLOCK_N)  # again: it made room in the loop
        dB = tl.dot(dpairs, C, dB, input_precision=PRECISION)
        dC = tl.dot(tl.trans(dpairs), B, input_precision=PRECISION)
        dB_ptr += split * dB_stride_s + row * dB_stride_b + start.to(tl.int64) * dB_stride_l + group * dB_stride_g
        tl.store(dB_ptr + (k[:, None] * dB_stride_l + n[None, :]), dB.to(dB_ptr.dtype.element_ty), mask=n_mask)
        tl.store(dC_ptr + split * 2 * dC_stride_s + (k[:, None] * dC_stride_l + n[None, :]), dC, mask=n_mask)
    else:
        chunk = start // CHUNK
        C = load_tile(C_in, C_strides, b, group, start, 0, l, N, BLOCK, BLOCK_N)
        enters = inside
        if PACKED:
            before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
            enters = tl.load(ids_ptr + start + k, mask=inside, other=-1) == before
        dC = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        for i in tl.range(0, heads_of_program * TILES, num_stages=STAGES):
            head = first + i // TILES
            channel = i % TILES * BLOCK_P
            state = load_tile(
                entering_in,
                entering_strides,
                b * (padded_l // CHUNK) + chunk,
                head,
                channel,
                0,
                P,
                N,
                BLOCK_P,
                BLOCK_N,
            )
            head_cum_ptr = cum_ptr + (row * h + head) * padded_l
            if CHUNK > BLOCK:
                head_steps_ptr = steps_ptr + (row * h + head) * padded_l
                advanced = state.to(tl.float32)
                for j in tl.static_range(CHUNK // BLOCK - 1):
                    at = chunk * CHUNK + j * BLOCK
                    goes = at < start  # a block of the chunk before this one
                    last = tl.load(head_cum_ptr + at + BLOCK - 1, mask=goes, other=0.0)
                    feeds = _exp(last - tl.load(head_cum_ptr + at + k, mask=goes & (k >= 0), other=0.0))
                    feeds *= tl.load(head_steps_ptr + at + k, mask=goes & (k >= 0), other=0.0)
                    whole = _exp(last - _base(head_cum_ptr, at, CHUNK))
                    if PACKED:
                        id = tl.load(ids_ptr + tl.minimum(at + BLOCK - 1, start))
                        ids = tl.load(ids_ptr + at + k, mask=goes & (k >= 0), other=-1)
                        feeds = tl.where(ids == id, feeds, 0.0)
                        whole = tl.where(tl.load(ids_ptr + tl.maximum(at - 1, 0)) == id, whole, 0.0)
                    x = load_tile(x_in, x_strides, b, head, at, channel, l, P, BLOCK, BLOCK_P)
                    fed = (tl.trans(x) * feeds[None, :]).to(C.dtype)
                    B = load_tile(B_in, B_strides, b, group, at, 0, l, N, BLOCK, BLOCK_N)
                    advanced = tl.dot(fed, B, advanced * tl.where(goes, whole, 1.0), input_precision=PRECISION)
                state = advanced.to(C.dtype)
            dstate = load_tile(
                dstates_in, dstates_strides, b * n_blocks + block, head, channel, 0, P, N, BLOCK_P, BLOCK_N
            )
            to = ((row * h + head) * TILES + i % TILES) * n_blocks + block
            tl.store(kept_ptr + to, tl.sum(state.to(tl.float32) * dstate.to(tl.float32)))
            cum = load_tile(cum_in, cum_strides, b, head, block, 0, n_blocks, BLOCK, 1, BLOCK).reshape(BLOCK)
            if CHUNK > BLOCK:
                cum -= _base(head_cum_ptr, start, CHUNK)
            reach_in = tl.where(enters, _exp(cum), 0.0)
            dy = load_tile(dy_in, dy_strides, b, head, start, channel, l, P, BLOCK, BLOCK_P)
            dC += tl.dot(dy, state, input_precision=PRECISION) * reach_in[:, None]
            taken = tl.dot(C, tl.trans(state), input_precision=PRECISION)
            tl.store(reached_ptr + to * BLOCK + k, tl.sum(taken * dy.to(tl.float32), 1) * reach_in)
        tl.store(dC_ptr + (split * 2 + 1) * dC_stride_s + (k[:, None] * dC_stride_l + n[None, :]), dC, mask=n_mask)


@triton.jit
def _join(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def _scan_backward_decays_kernel(
    sums_ptr, reached_ptr, kept_ptr, own_ptr, steps_ptr, cum_ptr, ids_ptr, dlog_ptr, dsteps_ptr, dD_ptr,
    l, h, g, n_blocks, padded_l, TILES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A program: a block of tokens, BLOCK_H heads."""
    b, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    heads, q = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, l) - 1
    inside = start + q < l
    mask = (heads < h)[:, None] & inside[None, :]
    before = mask & (q > 0)[None, :]  # there is a token before this one in the block
    cum_ptr += (b * h + heads) * padded_l
    steps_ptr += (b * h + heads) * padded_l + start
    steps = tl.load(steps_ptr[:, None] + q[None, :], mask=mask, other=0.0)
    last = tl.load(cum_ptr + end, mask=heads < h, other=0.0)
    reach_out = _exp(last[:, None] - tl.load((cum_ptr + start)[:, None] + q[None, :], mask=mask, other=0.0))
    gives = _exp(last[:, None] - tl.load((cum_ptr + start)[:, None] + q[None, :] - 1, mask=before, other=0.0))
    gives *= tl.load(steps_ptr[:, None] + q[None, :] - 1, mask=before, other=0.0)  # the token before, to what leaves
    if PACKED:
        ids_ptr += b * l
        id, last_id = tl.load(ids_ptr + start + q, mask=inside, other=-1), tl.load(ids_ptr + end)
        reach_out = tl.where((id == last_id)[None, :], reach_out, 0.0)
        id_before = tl.load(ids_ptr + start + q - 1, mask=inside & (q > 0), other=-1)
        gives = tl.where((id_before == last_id)[None, :], gives, 0.0)
    crossing = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    leaving = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    dsteps = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    product = tl.zeros((BLOCK_H, BLOCK), tl.float32)
    kept = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.static_range(TILES):
        at = ((b * h + heads) * TILES + tile) * n_blocks + block
        kept += tl.load(kept_ptr + at, mask=heads < h, other=0.0)
        crossing += tl.load(reached_ptr + at[:, None] * BLOCK + q[None, :], mask=mask, other=0.0)
        at = at[:, None] * (4 * BLOCK) + q[None, :]
        leaving += tl.load(sums_ptr + at - 1, mask=before, other=0.0) * gives
        dsteps += tl.load(sums_ptr + at, mask=mask, other=0.0) * reach_out
        product += tl.load(sums_ptr + at + BLOCK, mask=mask, other=0.0)
        columns = tl.load(sums_ptr + at + 2 * BLOCK, mask=mask, other=0.0)
        dsteps += columns
        crossing += tl.load(sums_ptr + at + 3 * BLOCK, mask=mask, other=0.0) - steps * columns
    own_ptr += (b * n_blocks + block) * g * BLOCK
    dsteps += product * tl.load(own_ptr + (heads // (h // g))[:, None] * BLOCK + q[None, :], mask=mask, other=0.0)
    base = tl.load(cum_ptr + start - 1, mask=(heads < h) & (start % CHUNK > 0), other=0.0)
    kept *= _exp(last - base)
    if PACKED:
        after = tl.load(ids_ptr + start + q + 1, mask=start + q < end, other=-1)
        ends = tl.broadcast_to((id != after).to(tl.int32)[None, :], (BLOCK_H, BLOCK))
        _, crossing = tl.associative_scan((ends, crossing), 1, _join, reverse=True)
        kept = tl.where(tl.load(ids_ptr + tl.maximum(start - 1, 0)) == last_id, kept, 0.0)
    else:
        crossing = tl.cumsum(crossing, 1, reverse=True)
    out = (b * l + start + q)[None, :] * h + heads[:, None]
    tl.store(dlog_ptr + out, crossing + tl.cumsum(leaving, 1) + kept[:, None], mask=mask)
    tl.store(dsteps_ptr + out, dsteps, mask=mask)
    tl.store(dD_ptr + (b * n_blocks + block) * h + heads, tl.sum(product, 1), mask=heads < h)
