"""Rotary positions as a Triton kernel: one pass forward, and the same backward by the negative angle.

Bytes a channel in bfloat16: 4, each way.
"""

import torch
import triton
import triton.language as tl

from model.launching import launch, remembered
from model.tiles import by_rows

HEADS, WARPS = 16, 1  # heads of a token that a program turns: its angles are worked out once for all of them


@torch.compiler.disable
def rotary(x, positions, frequencies, magnitude=1.0):
    """See model/reference.py. x may be a slice of a wider tensor."""
    return Rotary.apply(x, positions, frequencies, magnitude)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, frequencies, magnitude):
        ctx.save_for_backward(positions, frequencies)
        ctx.magnitude = magnitude
        return turn(x, positions, frequencies, magnitude, False)

    @staticmethod
    def backward(ctx, dy):
        return turn(dy, *ctx.saved_tensors, ctx.magnitude, True), None, None, None


@remembered
def turn(x, positions, frequencies, magnitude, BACKWARD):
    """x (b, l, h, p), rotated forth or back."""
    b, l, h, p = x.shape
    x = by_rows(x)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    heads = min(HEADS, triton.next_power_of_2(h))
    with torch.cuda.device_of(x):
        launch(
            _rotary_kernel, (b * l, triton.cdiv(h, heads)),
            x, positions, frequencies, y, l, h, p // 2, magnitude, *x.stride()[:3], *positions.expand(b, l).stride(),
            BACKWARD=BACKWARD, HEADS=heads, PAIRS=triton.next_power_of_2(p // 2), num_warps=WARPS,
        )  # fmt: skip
    return y


@triton.jit
def _rotary_kernel(
    x_ptr, positions_ptr, frequencies_ptr, y_ptr, l, h, pairs, magnitude, x_b, x_l, x_h, positions_b, positions_l,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Channels i and i + pairs, (u, v), become (u cos - v sin, v cos + u sin) of the angle position frequency_i."""
    token = tl.program_id(0)
    b, t = (token // l).to(tl.int64), token % l
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    mask = (head < h) & (pair < pairs)
    position = tl.load(positions_ptr + b * positions_b + t * positions_l).to(tl.float32)
    angle = position * tl.load(frequencies_ptr + pair, mask=pair < pairs, other=0.0)
    cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    if BACKWARD:
        sin = -sin
    x_ptr += b * x_b + t.to(tl.int64) * x_l
    u = tl.load(x_ptr + head * x_h + pair, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x_ptr + head * x_h + pair + pairs, mask=mask, other=0.0).to(tl.float32)
    y_ptr += token.to(tl.int64) * h * pairs * 2
    tl.store(y_ptr + head * pairs * 2 + pair, (u * cos - v * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + head * pairs * 2 + pair + pairs, (v * cos + u * sin).to(y_ptr.dtype.element_ty), mask=mask)
