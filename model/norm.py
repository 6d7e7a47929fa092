"""RMSNorm as Triton kernels: one pass over memory forward and one backward, residual additions within them.

Bytes a token at width d in bfloat16: 8 d forward (4 d without an addition), 8 d backward (6 d).
"""

import torch
import triton
import triton.language as tl

from model.launching import launch, remembered
from model.tiles import by_rows

TILE = 2048  # elements that a program holds at a time: one row, or several short ones
PER_THREAD = 16  # of them
PROGRAMS_PER_SM = 2  # of the backward kernel, each with a part of the weight's gradient
AHEAD, AHEAD_BYTES = 2, 48 * 1024  # long rows that it fetches before their turn, if no more bytes than these


@torch.compiler.disable
def rms_norm(x, weight, eps):
    """See model/reference.py. x may be a slice of a wider tensor."""
    return Norm.apply(x, None, weight, eps, 1.0)[1]


@torch.compiler.disable
def add_rms_norm(x, update, weight, eps, multiplier=1.0):
    """See model/reference.py."""
    return Norm.apply(x, update, weight, eps, multiplier)


class Norm(torch.autograd.Function):
    """x + multiplier * update and the norm of that; keeps the sum, and 1 / rms of each row."""

    @staticmethod
    def forward(ctx, x, update, weight, eps, multiplier):
        ctx.set_materialize_grads(False)
        total, y, scales = norm_forward(x, update, weight, eps, multiplier)
        ctx.save_for_backward(total, weight, scales)
        ctx.multiplier = multiplier
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        total, weight, scales = ctx.saved_tensors
        dx, dweight = (dtotal, None) if dy is None else norm_backward(total, weight, scales, dy, dtotal)
        dupdate = None
        if ctx.needs_input_grad[1]:
            dupdate = dx if ctx.multiplier == 1 else dx * ctx.multiplier
        return dx, dupdate, dweight, None, None


@remembered
def norm_forward(x, update, weight, eps, multiplier):
    """The sum, its norm, and 1 / rms of each row."""
    rows = as_rows(x)
    n, d = rows.shape[0] * rows.shape[1], x.shape[-1]
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    scales = torch.empty(n, device=x.device, dtype=torch.float32)
    total = x if update is None else torch.empty_like(y)
    added = None if update is None else flat(update)
    tile = tile_of(d)
    with torch.cuda.device_of(x):
        launch(
            _norm_forward_kernel, (triton.cdiv(n, tile["ROWS"]),),
            rows, added, weight, total, y, scales, n, rows.shape[1], d, eps, multiplier, *rows.stride()[:2],
            0 if added is None else added.stride(0), ADD=update is not None, **tile,
        )  # fmt: skip
    return total, y, scales


@remembered
def norm_backward(x, weight, scales, dy, dtotal):
    """Gradients of x, dtotal (if any) added, and of the weight."""
    rows, dy = as_rows(x), flat(dy)
    n, d = dy.shape
    dtotal = None if dtotal is None else flat(dtotal)
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    tile = tile_of(d)
    ahead = min(AHEAD, AHEAD_BYTES // (3 * tile["COLUMNS"] * x.element_size())) if tile["ROWS"] == 1 else 0
    programs = min(PROGRAMS_PER_SM * multiprocessors(x.device), triton.cdiv(n, tile["ROWS"]))
    dweights = torch.empty(programs, d, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            _norm_backward_kernel, (programs,),
            rows, weight, scales, dy, dtotal, dx, dweights, n, rows.shape[1], d, *rows.stride()[:2], dy.stride(0),
            0 if dtotal is None else dtotal.stride(0), ADD=dtotal is not None, STAGES=ahead + 1, **tile,
        )  # fmt: skip
    return dx, dweights.sum(0).to(weight.dtype)


def as_rows(x):
    """x as (outer, inner, d), a view where it can be one: heads in a slice of a product are rows of two strides."""
    return by_rows(x).reshape(-1, x.shape[-2] if x.dim() > 3 else 1, x.shape[-1])


def flat(x):
    """x as (rows, d)."""
    return as_rows(x).flatten(0, 1)


def tile_of(d):
    """The part of the rows that a program holds, and its warps."""
    columns = triton.next_power_of_2(d)
    rows = max(TILE // columns, 1)
    return dict(ROWS=rows, COLUMNS=columns, num_warps=min(max(rows * columns // (32 * PER_THREAD), 1), 16))


def multiprocessors(device):
    """How many run side by side; 1 for Triton's interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _norm_forward_kernel(
    x_ptr, update_ptr, weight_ptr, total_ptr, y_ptr, scales_ptr, n, inner, d, eps, multiplier,
    x_outer, x_inner, update_stride, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = s w / rms(s), with s = x + multiplier update, rounded to its dtype, or s = x."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    row, mask = rows.to(tl.int64)[:, None], (rows < n)[:, None] & (columns < d)
    at = (rows // inner).to(tl.int64)[:, None] * x_outer + (rows % inner).to(tl.int64)[:, None] * x_inner
    x = tl.load(x_ptr + at + columns, mask=mask, other=0.0)
    if ADD:
        update = tl.load(update_ptr + row * update_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + multiplier * update.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * d + columns, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + columns, (x * scale[:, None] * weight).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + rows, scale, mask=rows < n)


@triton.jit
def _norm_backward_kernel(
    x_ptr, weight_ptr, scales_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweights_ptr, n, inner, d,
    x_outer, x_inner, dy_stride, dtotal_stride,
    ADD: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With h = x / rms and g = w dy: dx = (g - h mean(h g)) / rms, plus dtotal; dweight = sum over rows of h dy."""
    columns = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        row, mask = rows.to(tl.int64)[:, None], (rows < n)[:, None] & (columns < d)
        at = (rows // inner).to(tl.int64)[:, None] * x_outer + (rows % inner).to(tl.int64)[:, None] * x_inner
        x = tl.load(x_ptr + at + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            dtotal = tl.load(dtotal_ptr + row * dtotal_stride + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + rows, mask=rows < n, other=0.0)[:, None]
        x = x * scale
        dweight += x * dy
        dy = dy * weight
        dx = (dy - x * (tl.sum(x * dy, axis=1)[:, None] / d)) * scale
        if ADD:
            dx += dtotal
        tl.store(dx_ptr + row * d + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dweight = tl.sum(dweight, axis=0)[None, :]
    tl.store(dweights_ptr + tl.program_id(0) * d + columns, dweight, mask=columns < d)
