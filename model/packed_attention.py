"""Causal attention that stays within documents as Triton kernels: model/reference.py's attention of whole rows.

A program takes a tile of queries, neighbouring positions of several heads that share their keys, and walks over the
keys from where the document of its first position begins to its last position: what lies outside is never read, and a
mask is worked out only where a tile touches the diagonal or the start of a document. With S = scale q k^T:

    y_i = sum over j of P_ij v_j,  P_ij = exp(S_ij - lse_i)      j <= i in i's document, lse_i = log sum exp(S_ij)
    dS_ij = P_ij (dy_i . v_j - delta_i),  delta_i = dy_i . y_i
    dq_i = scale sum over j of dS_ij k_j     dk_j = scale sum over i of dS_ij q_i     dv_j = sum over i of P_ij dy_i

dq is a second walk over the keys, dk and dv are one of a tile of keys over the queries, through the documents that it
touches: two products of five are done twice, and each sum has one program and one order, so that gradients repeat
themselves bit for bit. Sums are in float32, factors of products in the inputs' dtype. Exponents are powers of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.launching import launch, remembered
from model.tiles import by_rows, has_copy_engine, load_tile, store_tile, tiles

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)  # below any score; finite, so that a row without a key so far gives 0 and not NaN
SIZES = ["l", "h", "heads_of_key"]  # see model/scan.py


class Tile(NamedTuple):
    """How a kernel runs: a tile's queries (positions times heads) and keys, its warps, its loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int
    heads: int = 4  # of those that share a key, how many a tile of queries holds, at most


class Plan(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile


HOPPER = Plan(Tile(128, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2))  # two programs a multiprocessor: H200
SMALL = Plan(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2))  # within 100 KB


def plan_for(device):
    """The tiles for a GPU, by its shared memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if memory < 200_000:
            return SMALL
    return HOPPER


def takes(q, k):
    """Whether these kernels run attention of q (b, l, h, p) to k (b, m, k, p): whole rows, on Hopper and newer."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] in (64, 128) and q.shape[1] == k.shape[1] and has_copy_engine(q.device)


@torch.compiler.disable
def packed_attention(q, k, v, packing=None, scale=None, plan=None):
    """q (b, l, h, p), k and v (b, l, k, p), rows of any stride; p 64 or 128; scale above 0. Returns (b, l, h, p).

    packing: a layers.Packing; None: a document a row.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return PackedAttention.apply(q, k, v, packing, scale, plan or plan_for(q.device))


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, packing, scale, plan):
        q, k, v = (by_rows(t) for t in (q, k, v))
        y, lse = forward(q, k, v, None if packing is None else packing.positions, scale, plan)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.packing, ctx.scale, ctx.plan = packing, scale, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        positions, ends = (None, None) if ctx.packing is None else (ctx.packing.positions, ctx.packing.ends)
        return *backward(dy, q, k, v, y, lse, positions, ends, ctx.scale, ctx.plan), None, None, None


@remembered
def forward(q, k, v, positions, scale, plan):
    """y, and log2 of the softmax's denominators (b, h, l) in float32."""
    b, l, h, p = q.shape
    tile = plan.forward
    heads, rows = shape_of(tile, h // k.shape[2])
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(b, h, l, device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        launch(
            _packed_attention_kernel, (triton.cdiv(l, rows), h // heads, b),
            *query_tiles(q, rows, heads, copies=False), *key_tiles(k, tile.keys), *key_tiles(v, tile.keys),
            *query_tiles(y, rows, heads), positions, lse,
            l, h, h // k.shape[2], scale * LOG2E,
            P=p, HEADS=heads, ROWS=rows, KEYS=tile.keys, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return y, lse


@remembered
def backward(dy, q, k, v, y, lse, positions, ends, scale, plan):
    """The gradients of q, k and v."""
    dy = dy.contiguous()
    dq, delta = backward_queries(dy, q, k, v, y, lse, positions, scale, plan)
    return dq, *backward_keys(dy, q, k, v, lse, delta, ends, scale, plan)


def backward_queries(dy, q, k, v, y, lse, positions, scale, plan):
    """The gradient of q, and delta (b, h, l) in float32."""
    b, l, h, p = q.shape
    tile = plan.dq
    heads, rows = shape_of(tile, h // k.shape[2])
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        launch(
            _packed_attention_dq_kernel, (triton.cdiv(l, rows), h // heads, b),
            *query_tiles(q, rows, heads, copies=False), *key_tiles(k, tile.keys), *key_tiles(v, tile.keys),
            *query_tiles(y, rows, heads, copies=False), *query_tiles(dy, rows, heads, copies=False),
            *query_tiles(dq, rows, heads),
            positions, lse, delta, l, h, h // k.shape[2], scale * LOG2E, scale,
            P=p, HEADS=heads, ROWS=rows, KEYS=tile.keys, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return dq, delta


def backward_keys(dy, q, k, v, lse, delta, ends, scale, plan):
    """The gradients of k and v."""
    b, l, h, p = q.shape
    tile = plan.dkv
    heads, rows = shape_of(tile, h // k.shape[2])
    dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    lse_in, delta_in = (tiles(t[:, None], heads, rows, has_copy_engine(q.device)) for t in (lse, delta))
    with torch.cuda.device_of(q):
        launch(
            _packed_attention_dkv_kernel, (triton.cdiv(l, tile.keys), k.shape[2], b),
            *query_tiles(q, rows, heads), *key_tiles(k, tile.keys), *key_tiles(v, tile.keys),
            *query_tiles(dy, rows, heads), *key_tiles(dk, tile.keys), *key_tiles(dv, tile.keys),
            lse_in[0], *delta_in, ends,
            l, h, h // k.shape[2], scale * LOG2E, scale,
            P=p, HEADS=heads, ROWS=rows, KEYS=tile.keys, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return dk, dv


def shape_of(tile, group):
    """How many heads of the `group` that shares a key a tile of queries holds, and of how many positions."""
    heads = min(group & -group, tile.heads)  # a power of two that divides their number
    return heads, tile.queries // heads


def query_tiles(x, rows, heads, copies=True):
    """x (b, l, h, p) in tiles of `rows` positions of `heads` heads.

    copies=False, by pointers: what is loaded once and multiplied in a loop. If the copy engine brings several heads,
    Triton 3.6 keeps them in registers, and ptxas before 13.3 gives these away in the loop that goes on reading them:
    only the first keys met the right queries (triton-lang/triton#11781).
    """
    return tiles(x.transpose(1, 2), rows, x.shape[-1], copies and has_copy_engine(x.device), heads)


def key_tiles(x, keys):
    return tiles(x.transpose(1, 2), keys, x.shape[-1], has_copy_engine(x.device))


@triton.jit(do_not_specialize=SIZES)
def _packed_attention_kernel(
    q_in, q_strides, k_in, k_strides, v_in, v_strides, y_out, y_strides, positions_ptr, lse_ptr,
    l, h, heads_of_key, scale,
    P: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scale: times log2(e). A tile's rows are ROWS positions of one head after another."""
    b, head, key_head, start, end, row, at = _queries(l, heads_of_key, HEADS, ROWS)
    first, last_first, begins = _documents(positions_ptr, b, l, start, end, at)
    q = load_tile(q_in, q_strides, b, head, start, 0, l, P, ROWS, P, HEADS)
    largest = tl.full((HEADS * ROWS,), LOWEST, tl.float32)
    total = tl.zeros((HEADS * ROWS,), tl.float32)
    y = tl.zeros((HEADS * ROWS, P), tl.float32)
    for key in tl.range(first, end, KEYS, num_stages=STAGES):
        k = load_tile(k_in, k_strides, b, key_head, key, 0, l, P, KEYS, P)
        scores = tl.dot(q, tl.trans(k))
        if (key < last_first) | (key + KEYS > start + 1):
            seen = _seen(key + tl.arange(0, KEYS), at, begins)
            scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        shares = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(shares, 1)
        largest = larger
        v = load_tile(v_in, v_strides, b, key_head, key, 0, l, P, KEYS, P)
        y = tl.dot(shares.to(v.dtype), v, y * shrink[:, None])
    y = (y * (1 / total)[:, None]).to(q.dtype)
    store_tile(y_out, y_strides, b, head, start, 0, l, P, y, ROWS, P, HEADS)
    to = (b.to(tl.int64) * h + head + row // ROWS) * l + at
    tl.store(lse_ptr + to, largest + tl.log2(total), mask=at < l)


@triton.jit(do_not_specialize=SIZES)
def _packed_attention_dq_kernel(
    q_in, q_strides, k_in, k_strides, v_in, v_strides, y_in, y_strides, dy_in, dy_strides, dq_out, dq_strides,
    positions_ptr, lse_ptr, delta_ptr, l, h, heads_of_key, scale, dscale,
    P: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, head, key_head, start, end, row, at = _queries(l, heads_of_key, HEADS, ROWS)
    first, last_first, begins = _documents(positions_ptr, b, l, start, end, at)
    dy = load_tile(dy_in, dy_strides, b, head, start, 0, l, P, ROWS, P, HEADS)
    y = load_tile(y_in, y_strides, b, head, start, 0, l, P, ROWS, P, HEADS)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    to = (b.to(tl.int64) * h + head + row // ROWS) * l + at
    tl.store(delta_ptr + to, delta, mask=at < l)
    lse = tl.load(lse_ptr + to, mask=at < l, other=0.0)
    q = load_tile(q_in, q_strides, b, head, start, 0, l, P, ROWS, P, HEADS)
    dq = tl.zeros((HEADS * ROWS, P), tl.float32)
    for key in tl.range(first, end, KEYS, num_stages=STAGES):
        k = load_tile(k_in, k_strides, b, key_head, key, 0, l, P, KEYS, P)
        v = load_tile(v_in, v_strides, b, key_head, key, 0, l, P, KEYS, P)
        scores, dshares = tl.dot(q, tl.trans(k)), tl.dot(dy, tl.trans(v))
        shares = tl.exp2(scores * scale - lse[:, None])
        if (key < last_first) | (key + KEYS > start + 1):
            seen = _seen(key + tl.arange(0, KEYS), at, begins)
            shares = tl.where(seen, shares, 0.0)
        dq = tl.dot((shares * (dshares - delta[:, None])).to(k.dtype), k, dq)
    store_tile(dq_out, dq_strides, b, head, start, 0, l, P, (dq * dscale).to(q.dtype), ROWS, P, HEADS)


@triton.jit(do_not_specialize=SIZES)
def _packed_attention_dkv_kernel(
    q_in, q_strides, k_in, k_strides, v_in, v_strides, dy_in, dy_strides, dk_out, dk_strides, dv_out, dv_strides,
    lse_in, delta_in, sum_strides, ends_ptr, l, h, heads_of_key, scale, dscale,
    P: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of scores are (key, query). Queries: from the diagonal to the end of the last key's document."""
    key_head, b = tl.program_id(1), tl.program_id(2)
    start = tl.program_id(0) * KEYS
    keys, row = start + tl.arange(0, KEYS), tl.arange(0, HEADS * ROWS)
    ends, first_end, end = keys * 0 + l, l, l  # of the document of each key, of the first and of the last
    if ends_ptr is not None:
        ends_ptr += b.to(tl.int64) * l
        ends = tl.load(ends_ptr + keys, mask=keys < l, other=l)
        first_end, end = tl.load(ends_ptr + start), tl.load(ends_ptr + tl.minimum(start + KEYS, l) - 1)
    k = load_tile(k_in, k_strides, b, key_head, start, 0, l, P, KEYS, P)
    v = load_tile(v_in, v_strides, b, key_head, start, 0, l, P, KEYS, P)
    dk = tl.zeros((KEYS, P), tl.float32)
    dv = tl.zeros((KEYS, P), tl.float32)
    parts = heads_of_key // HEADS
    for i in tl.range(0, tl.cdiv(end - start, ROWS) * parts, num_stages=STAGES):
        head, first = key_head * heads_of_key + i % parts * HEADS, start + i // parts * ROWS
        q = load_tile(q_in, q_strides, b, head, first, 0, l, P, ROWS, P, HEADS)
        scores = tl.dot(k, tl.trans(q))
        dy = load_tile(dy_in, dy_strides, b, head, first, 0, l, P, ROWS, P, HEADS)
        dshares = tl.dot(v, tl.trans(dy))
        lse = load_tile(lse_in, sum_strides, b, 0, head, first, h, l, HEADS, ROWS).reshape(HEADS * ROWS)
        shares = tl.exp2(scores * scale - lse[None, :])
        if (first < start + KEYS - 1) | (first + ROWS > first_end):
            at = first + row % ROWS
            seen = (keys[:, None] <= at[None, :]) & (at[None, :] < ends[:, None])
            shares = tl.where(seen, shares, 0.0)
        dv = tl.dot(shares.to(dy.dtype), dy, dv)
        delta = load_tile(delta_in, sum_strides, b, 0, head, first, h, l, HEADS, ROWS).reshape(HEADS * ROWS)
        dk = tl.dot((shares * (dshares - delta[None, :])).to(q.dtype), q, dk)
    store_tile(dk_out, dk_strides, b, key_head, start, 0, l, P, (dk * dscale).to(k.dtype), KEYS, P)
    store_tile(dv_out, dv_strides, b, key_head, start, 0, l, P, dv.to(k.dtype), KEYS, P)


@triton.jit
def _queries(l, heads_of_key, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """What a program works on, the longest tiles first: its row of the batch, first head and that head's keys' head,
    first position and end; of each query, its row in the tile and its position."""
    tile, part, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, start = part * HEADS, tile * ROWS
    key_head = head // heads_of_key
    row = tl.arange(0, HEADS * ROWS)
    at = start + row % ROWS
    return b, head, key_head, start, tl.minimum(start + ROWS, l), row, at


@triton.jit
def _seen(keys, at, begins):
    """(query, key): whether a query at `at`, whose document begins at `begins`, looks at a key."""
    return (keys[None, :] <= at[:, None]) & (keys[None, :] >= begins[:, None])


@triton.jit
def _documents(positions_ptr, b, l, start, end, at):
    """Where the documents begin of position `start`, of end - 1, and of each of `at`."""
    first, last_first, begins = 0, 0, at * 0
    if positions_ptr is not None:
        positions_ptr += b.to(tl.int64) * l
        first = start - tl.load(positions_ptr + start)
        last_first = end - 1 - tl.load(positions_ptr + end - 1)
        begins = at - tl.load(positions_ptr + at, mask=at < l, other=l)
    return first, last_first, begins
