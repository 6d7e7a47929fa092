"""Triton kernels that write 8-bit floats: by rows for one product, by columns for another, in one pass.

On Hopper an 8-bit product reads both factors along the dimension that it sums over, so what one product reads by rows
another reads by columns. Each kernel reads its input once, multiplies by `scale`, writes what is asked for, and raises
`seen` to the largest magnitude before the scale; both are one float32 on the GPU. Floats that are not negative sort as
their bits do, so that maximum is one of integers: whatever the order, the same.

What is beyond a format's range becomes its largest number, by the GPU's own conversion; what is not finite becomes
NaN, so that it still reaches the gradient's norm. The same functions in plain PyTorch are in model/fp8_reference.py.
"""

import torch
import triton
import triton.language as tl

# of the tile that a program casts, 4 warps; chosen on an H200
CAST_TILE = (128, 64)
SWIGLU_TILE = (4, 1024)
SWIGLU_BACKWARD_TILE = (64, 64)
WARPS = 4
ANY_ALIGNMENT = ["scale_ptr", "seen_ptr"]  # or each product would compile its own


@triton.jit
def _scaled(x, scale):
    """x * scale, and NaN where x is not finite."""
    return x * scale + x * 0.0


@triton.jit
def _raise(seen_ptr, most):
    tl.atomic_max(seen_ptr.to(tl.pointer_type(tl.int32)), tl.max(most).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _byte(y, i: tl.constexpr):
    """An 8-bit float as byte i of a 32-bit word."""
    return y.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)


@triton.jit
def _store_turned(turned_ptr, packed, first_row, columns, n_rows, n_columns, stride, ROWS: tl.constexpr):
    """Words of four neighbouring rows (rows / 4, columns), as columns. What is turned are words, not bytes."""
    words = first_row // 4 + tl.arange(0, ROWS // 4)
    at = columns.to(tl.int64)[:, None] * (stride // 4) + words[None, :]
    inside = (columns < n_columns)[:, None] & (words < n_rows // 4)[None, :]
    tl.store(turned_ptr.to(tl.pointer_type(tl.int32)) + at, tl.trans(packed), mask=inside)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _cast_kernel(
    x_ptr, out_ptr, turned_ptr, scale_ptr, seen_ptr, n_rows, n_columns, stride_x, stride_out, stride_turned,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (rows, columns) and turned (columns, rows) = x * scale."""
    first = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(scale_ptr)
    most = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.float32)
    packed = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.int32)
    for i in tl.static_range(4):
        row = (first + tl.arange(0, ROWS // 4) * 4 + i).to(tl.int64)[:, None]
        inside = (row < n_rows) & (columns < n_columns)[None, :]
        x = tl.load(x_ptr + row * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        y = _scaled(x, scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_out + columns[None, :], y, mask=inside)
        packed |= _byte(y, i)
    _store_turned(turned_ptr, packed, first, columns, n_rows, n_columns, stride_turned, ROWS)
    _raise(seen_ptr, most)


def cast(x, out, turned, scale, seen):
    """x (n, m), rows at any stride -> out (n, m) and turned (m, n), of one 8-bit dtype; n is a multiple of 16.

    scale, seen: float32, one element each.
    """
    n_rows, n_columns = x.shape
    rows, columns = CAST_TILE
    with torch.cuda.device_of(x):
        _cast_kernel[(triton.cdiv(n_columns, columns), triton.cdiv(n_rows, rows))](
            x, out, turned, scale, seen, n_rows, n_columns, x.stride(0), out.stride(0), turned.stride(0),
            ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _swiglu_kernel(
    gate_up_ptr, out_ptr, scale_ptr, seen_ptr, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out = silu(gate) * up * scale."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n_rows) & (column < n_columns)
    at = gate_up_ptr + row * (2 * n_columns) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + n_columns, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    y = _scaled(h, tl.load(scale_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * n_columns + column, y, mask=inside)
    _raise(seen_ptr, tl.abs(h))


def swiglu(gate_up, out, scale, seen):
    """gate_up (n, 2 f), gate first -> out (n, f), of an 8-bit dtype: silu(gate) * up; all of them contiguous."""
    n_rows, n_columns = out.shape
    rows, columns = SWIGLU_TILE
    with torch.cuda.device_of(out):
        _swiglu_kernel[(triton.cdiv(n_columns, columns), triton.cdiv(n_rows, rows))](
            gate_up, out, scale, seen, n_rows, n_columns, ROWS=rows, COLUMNS=columns, num_warps=WARPS
        )


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "seen_ptr", "h_scale_ptr"])
def _swiglu_backward_kernel(
    dh_ptr, gate_up_ptr, h_turned_ptr, out_ptr, turned_ptr, h_scale_ptr, scale_ptr, seen_ptr, n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate): dgate = dh up s (1 + gate (1 - s)), dup = dh gate s; and h = gate s up once more."""
    first = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale, h_scale = tl.load(scale_ptr), tl.load(h_scale_ptr)
    most = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.float32)
    hs = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.int32)
    dgates = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.int32)
    dups = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.int32)
    for i in tl.static_range(4):
        row = (first + tl.arange(0, ROWS // 4) * 4 + i).to(tl.int64)[:, None]
        inside = (row < n_rows) & (columns < n_columns)[None, :]
        at = row * (2 * n_columns) + columns[None, :]
        dh = tl.load(dh_ptr + row * n_columns + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + n_columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        dgate = dh * up * (s + silu * (1.0 - s))
        dup = dh * silu
        most = tl.maximum(most, tl.maximum(tl.abs(dgate), tl.abs(dup)))
        dgate = _scaled(dgate, scale).to(out_ptr.dtype.element_ty)
        dup = _scaled(dup, scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, dgate, mask=inside)
        tl.store(out_ptr + at + n_columns, dup, mask=inside)
        dgates |= _byte(dgate, i)
        dups |= _byte(dup, i)
        hs |= _byte(_scaled(silu * up, h_scale).to(h_turned_ptr.dtype.element_ty), i)
    _store_turned(turned_ptr, dgates, first, columns, n_rows, n_columns, n_rows, ROWS)
    turned_ptr += n_columns.to(tl.int64) * n_rows
    _store_turned(turned_ptr, dups, first, columns, n_rows, n_columns, n_rows, ROWS)
    _store_turned(h_turned_ptr, hs, first, columns, n_rows, n_columns, n_rows, ROWS)
    _raise(seen_ptr, most)


def swiglu_backward(dh, gate_up, h_turned, out, turned, h_scale, scale, seen):
    """dh (n, f), gate_up (n, 2 f) -> d gate_up: out (n, 2 f) and turned (2 f, n); and h_turned (f, n), as swiglu's.

    h_scale: what swiglu took as its scale. All contiguous; n is a multiple of 16.
    """
    n_rows, n_columns = dh.shape
    rows, columns = SWIGLU_BACKWARD_TILE
    with torch.cuda.device_of(dh):
        _swiglu_backward_kernel[(triton.cdiv(n_columns, columns), triton.cdiv(n_rows, rows))](
            dh, gate_up, h_turned, out, turned, h_scale, scale, seen, n_rows, n_columns,
            ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
