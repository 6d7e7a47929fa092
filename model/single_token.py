"""Triton kernels for one new token a row: products with a few rows, the Mamba-2 update, attention to a cache.

What model/decode.py replays from a CUDA graph. The plain twins, `products`, `mixer_step` and `attention_step`, are in
model/reference.py; model/fused.py gives these under the same names.
"""

import torch
import triton
import triton.language as tl

MAX_ROWS = 64  # the most tokens that `products` takes
MAX_SPLITS = 64  # pieces of a row's cache that are read side by side
PROGRAMS = 1024  # about so many at once keep every multiprocessor of a large GPU reading


def products(x, weights, block_n=None, block_k=None, num_warps=4, num_stages=3):
    """x (..., d_in), of at most MAX_ROWS rows, times the matrices (out, d_in), each read once."""
    rows = x.reshape(-1, x.shape[-1])
    n_rows, d_in = rows.shape
    if block_n is None:
        block_n, block_k = (4, 1024) if n_rows == 1 else (64, 128)
    widths = [weight.shape[0] for weight in weights]
    y = x.new_empty(n_rows, sum(widths))
    _products_kernel[(sum(triton.cdiv(width, block_n) for width in widths),)](
        rows, y, tuple(weights), tuple(widths), rows.stride(0), y.shape[1], n_rows, N_WEIGHTS=len(weights),
        ROWS=1 if n_rows == 1 else max(16, triton.next_power_of_2(n_rows)), D_IN=d_in, BLOCK_N=block_n,
        BLOCK_K=min(block_k, max(16, triton.next_power_of_2(d_in))), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[1])


@triton.jit
def _products_kernel(
    x_ptr, y_ptr, weights, widths, stride_x, stride_y, n_rows, N_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, D_IN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N rows of one of the matrices, and what all rows of x make of them."""
    block = tl.program_id(0)
    for i in tl.static_range(N_WEIGHTS):
        n_blocks = tl.cdiv(widths[i], BLOCK_N)
        if (block >= 0) & (block < n_blocks):
            _dot_rows(
                x_ptr, y_ptr, weights[i], block, widths[i], stride_x, stride_y, n_rows, ROWS, D_IN, BLOCK_N, BLOCK_K
            )
        block -= n_blocks
        y_ptr += widths[i]


@triton.jit
def _dot_rows(
    x_ptr, y_ptr, w_ptr, block, n, stride_x, stride_y, n_rows,
    ROWS: tl.constexpr, D_IN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS 1: a sum on the ordinary cores, which waits for memory all the same; from 16 on, tensor cores."""
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    x_ptr += row[:, None] * stride_x
    w_ptr += outs.to(tl.int64)[:, None] * D_IN
    x_mask, w_mask = (row < n_rows)[:, None], (outs < n)[:, None]
    if ROWS == 1:
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # added up once, at the end
        for start in tl.static_range(0, D_IN, BLOCK_K):
            at = (start + k)[None, :]
            x = tl.load(x_ptr + at, mask=at < D_IN, other=0.0)
            w = tl.load(w_ptr + at, mask=w_mask & (at < D_IN), other=0.0)
            total += w.to(tl.float32) * x.to(tl.float32)
        y = tl.sum(total, 1)[None, :]
    else:
        y = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(0, D_IN, BLOCK_K):
            at = (start + k)[None, :]
            x = tl.load(x_ptr + at, mask=x_mask & (at < D_IN), other=0.0)
            w = tl.load(w_ptr + at, mask=w_mask & (at < D_IN), other=0.0)
            y = tl.dot(x, tl.trans(w), y)
    y_mask = x_mask & (outs < n)[None, :]
    tl.store(y_ptr + row[:, None] * stride_y + outs[None, :], y.to(y_ptr.dtype.element_ty), mask=y_mask)


def mamba_step(xBC, dt, weight, bias, A_log, D, dt_bias, conv, ssm, lengths, block_p=None, num_warps=None):
    """What `mixer_step` has before its norm, in one kernel; the state is read once and written once."""
    b, h, n, p = ssm.shape
    if block_p is None:  # small where few rows leave multiprocessors without work
        block_p, num_warps = (16, 2) if b * h < PROGRAMS else (min(triton.next_power_of_2(p), 64), 4)
    bc = (xBC.shape[2] - h * p) // 2
    y = xBC.new_empty(b, 1, h * p)
    _mamba_step_kernel[(b * h, triton.cdiv(p, block_p))](
        xBC, dt, weight, bias, A_log, D, dt_bias, conv, ssm, lengths, y, xBC.stride(0), dt.stride(0), h, h * n // bc,
        xBC.shape[2], bc, WIDTH=weight.shape[1], N=n, P=p, BLOCK_N=triton.next_power_of_2(n), BLOCK_P=block_p,
        num_warps=num_warps,
    )  # fmt: skip
    return y


@triton.jit
def _mamba_step_kernel(
    xBC_ptr, dt_ptr, weight_ptr, bias_ptr, A_log_ptr, D_ptr, dt_bias_ptr, conv_ptr, ssm_ptr, lengths_ptr, y_ptr,
    stride_xBC, stride_dt, h, heads_per_group, channels, bc,
    WIDTH: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_P channels of one head of one row. Convolves the B and C that it shares once more.

    The newest input goes to the slot of the ring that no program reads.
    """
    b, head = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = head // heads_per_group
    length = tl.load(lengths_ptr + b)
    xBC_ptr += b * stride_xBC
    conv_ptr += b * WIDTH * channels
    newest = conv_ptr + (length % WIDTH) * channels

    at = head * P + p
    x, new = _convolve(xBC_ptr, weight_ptr, bias_ptr, conv_ptr, at, p < P, length, channels, WIDTH)
    tl.store(newest + at, new, mask=p < P)
    B_at = h * P + group * N + n
    C_at = B_at + bc
    B, new_B = _convolve(xBC_ptr, weight_ptr, bias_ptr, conv_ptr, B_at, n < N, length, channels, WIDTH)
    C, new_C = _convolve(xBC_ptr, weight_ptr, bias_ptr, conv_ptr, C_at, n < N, length, channels, WIDTH)
    first = (head % heads_per_group == 0) & (tl.program_id(1) == 0)
    tl.store(newest + B_at, new_B, mask=(n < N) & first)
    tl.store(newest + C_at, new_C, mask=(n < N) & first)

    dt = tl.load(dt_ptr + b * stride_dt + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    grown = tl.exp(tl.minimum(dt, 20.0))
    rounded = 1.0 + grown  # softplus is log(1 + grown): this is exact where the sum drops digits of a small step
    exact = tl.log(rounded) * (grown / tl.where(rounded == 1.0, 1.0, rounded - 1.0))
    dt = tl.where(dt > 20.0, dt, tl.where(rounded == 1.0, grown, exact))
    decay = tl.exp(-tl.exp(tl.load(A_log_ptr + head).to(tl.float32)) * dt)
    ssm_ptr += (b * h + head) * N * P + n[:, None] * P + p[None, :]
    inside = (n < N)[:, None] & (p < P)[None, :]
    state = decay * tl.load(ssm_ptr, mask=inside, other=0.0) + B[:, None] * (dt * x)[None, :]
    tl.store(ssm_ptr, state, mask=inside)
    y = tl.sum(C[:, None] * state, 0) + tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + b * h * P + at, y.to(y_ptr.dtype.element_ty), mask=p < P)


@triton.jit
def _convolve(xBC_ptr, weight_ptr, bias_ptr, conv_ptr, at, inside, length, channels, WIDTH: tl.constexpr):
    """The convolution's output after SiLU at some channels, rounded to its input's dtype, and that newest input."""
    new = tl.load(xBC_ptr + at, mask=inside, other=0.0)
    weight_ptr += at * WIDTH + WIDTH - 1
    total = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += new.to(tl.float32) * tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(1, WIDTH):
        slot = (length + WIDTH - back) % WIDTH
        earlier = tl.load(conv_ptr + slot * channels + at, mask=inside, other=0.0).to(tl.float32)
        total += earlier * tl.load(weight_ptr - back, mask=inside, other=0.0).to(tl.float32)
    return (total * tl.sigmoid(total)).to(new.dtype).to(tl.float32), new


def attention_step(
    q, k, v, keys, values, lengths, frequencies=None, magnitude=1.0, scale=None, slopes=None, block=None, num_warps=4
):
    """See model/reference.py. Three kernels: into the cache, over pieces of it side by side, the pieces together.

    What lies behind a row's length is not read, however large the buffers are.
    """
    b, _, h, p = q.shape
    capacity, n_kv = keys.shape[1:3]
    block_p = max(16, triton.next_power_of_2(p))
    if block is None:
        # 16 KB of keys; 8 KB where there are many programs, so that more run at once, and of float32 (spills)
        tile = 8192 if b * n_kv >= 128 or q.element_size() == 4 else 16384
        block = max(16, tile // (block_p * q.element_size()))
    splits = min(MAX_SPLITS, triton.cdiv(PROGRAMS, b * n_kv), triton.cdiv(capacity, block))
    split = max(block, triton.next_power_of_2(triton.cdiv(capacity, splits)))  # few values, so few compilations
    splits = triton.cdiv(capacity, split)
    y = q.new_empty(b, 1, h, p)
    rotated = q.new_empty(b, h, p)
    sums = torch.empty(b, h, splits, p, device=q.device, dtype=torch.float32)
    scales = torch.empty(2, b, h, splits, device=q.device, dtype=torch.float32)  # largest score, softmax denominator
    rotate = frequencies is not None
    _place_kernel[(b, h + n_kv)](
        q, k, v, keys, values, rotated, frequencies, lengths, q.stride(0), k.stride(0), v.stride(0), magnitude,
        capacity, H=h, K=n_kv, P=p, BLOCK=triton.next_power_of_2(p // 2), ROTATE=rotate, num_warps=1,
    )  # fmt: skip
    _pieces_kernel[(b * n_kv, splits)](
        rotated, keys, values, slopes, lengths, sums, scales[0], scales[1], p**-0.5 if scale is None else scale,
        capacity, splits, K=n_kv, G=h // n_kv, P=p, BLOCK_G=max(16, triton.next_power_of_2(h // n_kv)),
        BLOCK_P=block_p, BLOCK=block, SPLIT=split, SLOPES=slopes is not None, num_warps=num_warps, num_stages=3,
    )  # fmt: skip
    _join_kernel[(b * h,)](
        sums, scales[0], scales[1], lengths, y, h, split, splits,
        P=p, BLOCK_P=block_p, BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def _place_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, rotated_ptr, frequencies_ptr, lengths_ptr,
    stride_q, stride_k, stride_v, magnitude, capacity,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Each program turns one head's query or key by its position; keys and values go to their place in the cache."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths_ptr + b)
    i = tl.arange(0, BLOCK)
    inside = i < P // 2
    place = ((b * capacity + length) * K + head - H) * P
    if head < H:
        from_ptr, to_ptr = q_ptr + b * stride_q + head * P, rotated_ptr + (b * H + head) * P
    else:
        from_ptr, to_ptr = k_ptr + b * stride_k + (head - H) * P, keys_ptr + place
        v_ptr += b * stride_v + (head - H) * P
        tl.store(values_ptr + place + i, tl.load(v_ptr + i, mask=inside), mask=inside)
        tl.store(values_ptr + place + P // 2 + i, tl.load(v_ptr + P // 2 + i, mask=inside), mask=inside)
    first = tl.load(from_ptr + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(from_ptr + P // 2 + i, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        angle = length.to(tl.float32) * tl.load(frequencies_ptr + i, mask=inside, other=0.0)
        cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    tl.store(to_ptr + i, first.to(to_ptr.dtype.element_ty), mask=inside)
    tl.store(to_ptr + P // 2 + i, second.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pieces_kernel(
    q_ptr, keys_ptr, values_ptr, slopes_ptr, lengths_ptr, sums_ptr, largest_ptr, total_ptr, scale,
    capacity, splits, K: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Each program: the softmax sums of one key head's queries over SPLIT places of a row's cache."""
    b, head = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    piece = tl.program_id(1)
    length = tl.load(lengths_ptr + b) + 1  # with the new token
    begin = piece * SPLIT
    if begin < length:
        g, c = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
        queries = b * K * G + head * G + g
        q_mask = (g < G)[:, None] & (c < P)[None, :]
        q = tl.load(q_ptr + queries[:, None] * P + c[None, :], mask=q_mask, other=0.0)
        if SLOPES:
            slope = tl.load(slopes_ptr + head * G + g, mask=g < G, other=0.0)
        keys_ptr += (b * capacity * K + head) * P
        values_ptr += (b * capacity * K + head) * P
        largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        sums = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
        for start in range(0, SPLIT, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            offsets = at[:, None].to(tl.int64) * (K * P) + c[None, :]
            mask = (at < length)[:, None] & (c < P)[None, :]
            keys = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            if SLOPES:
                scores -= slope[:, None] * (length - 1 - at).to(tl.float32)[None, :]
            scores = tl.where((at < length)[None, :], scores, float("-inf"))
            above = tl.maximum(largest, tl.max(scores, 1))
            chances = tl.exp(scores - above[:, None])
            fade = tl.exp(largest - above)
            values = tl.load(values_ptr + offsets, mask=mask, other=0.0)
            sums = sums * fade[:, None] + tl.dot(chances.to(values.dtype), values, input_precision="ieee")
            total = total * fade + tl.sum(chances, 1)
            largest = above
        out = queries * splits + piece
        tl.store(sums_ptr + out[:, None] * P + c[None, :], sums, mask=q_mask)
        tl.store(largest_ptr + out, largest, mask=g < G)
        tl.store(total_ptr + out, total, mask=g < G)


@triton.jit
def _join_kernel(
    sums_ptr, largest_ptr, total_ptr, lengths_ptr, y_ptr, h, split, splits,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each program: one query head of one row, from the pieces that its length reaches."""
    query = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + query // h) + 1
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    used = s * split < length
    largest = tl.load(largest_ptr + query * splits + s, mask=used, other=float("-inf"))
    weight = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(total_ptr + query * splits + s, mask=used, other=0.0), 0)
    mask = used[:, None] & (c < P)[None, :]
    sums = tl.load(sums_ptr + (query * splits + s)[:, None] * P + c[None, :], mask=mask, other=0.0)
    y = tl.sum(weight[:, None] * sums, 0) / total
    tl.store(y_ptr + query * P + c, y.to(y_ptr.dtype.element_ty), mask=c < P)
