"""Products with a gate as Triton kernels, one pass forward and one backward: SwiGLU, and attention's output gate.

Bytes a token in bfloat16: SwiGLU of d_ff f, 6 f forward and 10 f backward; an output gate of width d, 6 d and 10 d.
"""

import torch
import triton
import triton.language as tl

from model.launching import launch, remembered
from model.tiles import in_rows

BLOCK, WARPS = 1024, 4  # columns of a row that a program multiplies: 8 a thread, a load of 128 bits in bfloat16


@torch.compiler.disable
def swiglu(gate_up):
    """See model/reference.py."""
    return SwiGLU.apply(gate_up)


@torch.compiler.disable
def sigmoid_gate(x, gate):
    """See model/reference.py. Both may be slices of wider tensors."""
    return SigmoidGate.apply(x, gate)


class SwiGLU(torch.autograd.Function):
    """Keeps gate_up alone, and writes one gradient for both of its halves."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, dy):
        return swiglu_backward(*ctx.saved_tensors, dy)


class SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return gate_forward(x, gate)

    @staticmethod
    def backward(ctx, dy):
        return gate_backward(*ctx.saved_tensors, dy)


@remembered
def swiglu_forward(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return multiply(up, gate, silu=True)


@remembered
def swiglu_backward(gate_up, dy):
    dgate_up = torch.empty(gate_up.shape, device=dy.device, dtype=gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    multiply_backward(up, gate, dy, dup, dgate, silu=True)
    return dgate_up


@remembered
def gate_forward(x, gate):
    return multiply(x, gate, silu=False)


@remembered
def gate_backward(x, gate, dy):
    dx, dgate = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (x, gate))
    multiply_backward(x, gate, dy, dx, dgate, silu=False)
    return dx, dgate


def multiply(x, gate, silu):
    """x * silu(gate) or x * sigmoid(gate)."""
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    by_row(_gating_forward_kernel, x, gate, y, silu=silu)
    return y


def multiply_backward(x, gate, dy, dx, dgate, silu):
    """Write the gradients of x and gate into dx and dgate, which may be slices."""
    by_row(_gating_backward_kernel, x, gate, dy, dx, dgate, silu=silu)


def by_row(kernel, *tensors, silu):
    """Launch a kernel over tensors of one shape, each by rows with a stride of its own."""
    rows = [in_rows(t) for t in tensors]
    n, d = rows[0].shape
    with torch.cuda.device_of(rows[0]):
        launch(
            kernel,
            (n * triton.cdiv(d, BLOCK),),
            *rows,
            d,
            *(t.stride(0) for t in rows),
            SILU=silu,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _place(d, BLOCK: tl.constexpr):
    """The row and the columns of this program."""
    blocks = tl.cdiv(d, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _gating_forward_kernel(
    x_ptr, gate_ptr, y_ptr, d, x_stride, gate_stride, y_stride, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x a(gate), a(g) = g sigmoid(g) or sigmoid(g)."""
    row, columns = _place(d, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < d).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < d).to(tl.float32)
    y = x * tl.sigmoid(gate)
    if SILU:
        y *= gate
    tl.store(y_ptr + row * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=columns < d)


@triton.jit
def _gating_backward_kernel(
    x_ptr, gate_ptr, dy_ptr, dx_ptr, dgate_ptr, d, x_stride, gate_stride, dy_stride, dx_stride, dgate_stride,
    SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy a(gate); dgate = dy x a'(gate), where with s = sigmoid(g) a' is s (1 - s), or s (1 + g (1 - s))."""
    row, columns = _place(d, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < d).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < d).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=columns < d).to(tl.float32)
    s = tl.sigmoid(gate)
    if SILU:
        activated, slope = gate * s, s * (1 + gate * (1 - s))
    else:
        activated, slope = s, s * (1 - s)
    dx, dgate = (dy * activated).to(dx_ptr.dtype.element_ty), (dy * x * slope).to(dgate_ptr.dtype.element_ty)
    tl.store(dx_ptr + row * dx_stride + columns, dx, mask=columns < d)
    tl.store(dgate_ptr + row * dgate_stride + columns, dgate, mask=columns < d)
