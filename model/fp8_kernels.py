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

from model.launching import launch, remembered

# rows and columns of a program's tile, and warps; chosen on an H200
CAST = dict(ROWS=128, COLUMNS=128, num_warps=8)
SWIGLU = dict(ROWS=16, COLUMNS=256, num_warps=4)
SWIGLU_BACKWARD = dict(ROWS=64, COLUMNS=64, num_warps=4)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on the CPU, for tests
WORD = """{{
.reg .b16 low, high;
cvt.rn.satfinite.{0}x2.f32 low, $2, $1;
cvt.rn.satfinite.{0}x2.f32 high, $4, $3;
mov.b32 $0, {{low, high}};
}}"""
E4M3_WORD, E5M2_WORD = tl.constexpr(WORD.format("e4m3")), tl.constexpr(WORD.format("e5m2"))
ANY_ALIGNMENT = ["scale_ptr", "seen_ptr"]  # or each product would compile its own


@triton.jit
def _scaled(x, scale):
    """x * scale, and NaN where x is not finite."""
    return x * scale + x * 0.0


@triton.jit
def _raise(seen_ptr, most):
    tl.atomic_max(seen_ptr.to(tl.pointer_type(tl.int32)), tl.max(most).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _byte(y, dtype: tl.constexpr, i: tl.constexpr):
    """An 8-bit float as byte i of a 32-bit word."""
    return y.to(dtype).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)


@triton.jit
def _words(ys, dtype: tl.constexpr):
    """Four tensors as 8-bit floats side by side in 32-bit words, the first in the lowest byte.

    In PTX, since ptxas 12.8 reads the stack pointer's bits in place of some bytes if an 8-bit float is stored and
    shifted.
    """
    if INTERPRETED:
        words = _byte(ys[0], dtype, 0) | _byte(ys[1], dtype, 1) | _byte(ys[2], dtype, 2) | _byte(ys[3], dtype, 3)
    elif dtype == tl.float8e5:
        words = tl.inline_asm_elementwise(E5M2_WORD, "=r,f,f,f,f", ys, dtype=tl.int32, is_pure=True, pack=1)
    else:
        words = tl.inline_asm_elementwise(E4M3_WORD, "=r,f,f,f,f", ys, dtype=tl.int32, is_pure=True, pack=1)
    return words


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
    row = (first + tl.arange(0, ROWS // 4) * 4).to(tl.int64)[:, None]  # the first of each four
    inside = (row < n_rows) & (columns < n_columns)[None, :]
    xs = ()  # all of them are under way before the first store, which no load may overtake
    for i in tl.static_range(4):
        xs += (tl.load(x_ptr + (row + i) * stride_x + columns[None, :], mask=inside, other=0.0),)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    most = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.float32)
    ys = ()
    for i in tl.static_range(4):
        x = xs[i].to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        y = _scaled(x, scale)
        tl.store(out_ptr + (row + i) * stride_out + columns[None, :], y.to(dtype), mask=inside)
        ys += (y,)
    _store_turned(turned_ptr, _words(ys, dtype), first, columns, n_rows, n_columns, stride_turned, ROWS)
    _raise(seen_ptr, most)


@remembered
def cast(scale, seen, dtype, dim, *parts):
    """The parts (n, m), rows at any stride, joined along dim, by rows and by columns: (n, m) and (m, n) of that dtype.

    n is a multiple of 16. scale, seen: float32, one element each.
    """
    shape = list(parts[0].shape)
    widths = [part.shape[dim] for part in parts]
    shape[dim] = sum(widths)
    out, turned = (torch.empty(size, dtype=dtype, device=seen.device) for size in (shape, shape[::-1]))
    with torch.cuda.device_of(seen):
        for x, there, turned_there in zip(parts, out.split(widths, dim), turned.split(widths, 1 - dim), strict=True):
            launch(
                _cast_kernel, grid(x, CAST),
                x, there, turned_there, scale, seen, *x.shape, x.stride(0), there.stride(0), turned_there.stride(0),
                **CAST,
            )  # fmt: skip
    return out, turned


def grid(x, tile):
    """Programs of that tile over x; those of a row are neighbours."""
    return triton.cdiv(x.shape[1], tile["COLUMNS"]), triton.cdiv(x.shape[0], tile["ROWS"])


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


@remembered
def swiglu(gate_up, scale, seen, dtype):
    """gate_up (n, 2 f), gate first, contiguous -> (n, f) of an 8-bit dtype: silu(gate) * up."""
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=dtype, device=gate_up.device)
    with torch.cuda.device_of(out):
        launch(_swiglu_kernel, grid(out, SWIGLU), gate_up, out, scale, seen, *out.shape, **SWIGLU)
    return out


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "seen_ptr", "h_scale_ptr"])
def _swiglu_backward_kernel(
    dh_ptr, gate_up_ptr, h_turned_ptr, out_ptr, turned_ptr, h_scale_ptr, scale_ptr, seen_ptr, n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate): dgate = dh up s (1 + gate (1 - s)), dup = dh gate s; and h = gate s up once more."""
    first = tl.program_id(1) * ROWS
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale, h_scale = tl.load(scale_ptr), tl.load(h_scale_ptr)
    row = (first + tl.arange(0, ROWS // 4) * 4).to(tl.int64)[:, None]
    inside = (row < n_rows) & (columns < n_columns)[None, :]
    dhs, gates, ups = (), (), ()
    for i in tl.static_range(4):
        at = (row + i) * (2 * n_columns) + columns[None, :]
        dhs += (tl.load(dh_ptr + (row + i) * n_columns + columns[None, :], mask=inside, other=0.0),)
        gates += (tl.load(gate_up_ptr + at, mask=inside, other=0.0),)
        ups += (tl.load(gate_up_ptr + at + n_columns, mask=inside, other=0.0),)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    most = tl.zeros((ROWS // 4, COLUMNS), dtype=tl.float32)
    hs, dgates, dups = (), (), ()
    for i in tl.static_range(4):
        dh, gate, up = dhs[i].to(tl.float32), gates[i].to(tl.float32), ups[i].to(tl.float32)
        at = (row + i) * (2 * n_columns) + columns[None, :]
        s = tl.sigmoid(gate)
        silu = gate * s
        dgate = dh * up * (s + silu * (1.0 - s))
        dup = dh * silu
        most = tl.maximum(most, tl.maximum(tl.abs(dgate), tl.abs(dup)))
        dgate, dup = _scaled(dgate, scale), _scaled(dup, scale)
        tl.store(out_ptr + at, dgate.to(dtype), mask=inside)
        tl.store(out_ptr + at + n_columns, dup.to(dtype), mask=inside)
        hs += (_scaled(silu * up, h_scale),)
        dgates += (dgate,)
        dups += (dup,)
    _store_turned(turned_ptr, _words(dgates, dtype), first, columns, n_rows, n_columns, n_rows, ROWS)
    turned_ptr += n_columns.to(tl.int64) * n_rows
    _store_turned(turned_ptr, _words(dups, dtype), first, columns, n_rows, n_columns, n_rows, ROWS)
    h_words = _words(hs, h_turned_ptr.dtype.element_ty)
    _store_turned(h_turned_ptr, h_words, first, columns, n_rows, n_columns, n_rows, ROWS)
    _raise(seen_ptr, most)


@remembered
def swiglu_backward(dh, gate_up, h_scale, scale, seen, h_dtype, dtype):
    """dh (n, f), gate_up (n, 2 f) -> h_turned (f, n), as swiglu's; d gate_up, (n, 2 f), and turned, (2 f, n).

    h_scale: what swiglu took as its scale. All contiguous; n is a multiple of 16.
    """
    h_turned = torch.empty(dh.shape[::-1], dtype=h_dtype, device=dh.device)
    out, turned = (torch.empty(size, dtype=dtype, device=dh.device) for size in (gate_up.shape, gate_up.shape[::-1]))
    with torch.cuda.device_of(dh):
        launch(
            _swiglu_backward_kernel, grid(dh, SWIGLU_BACKWARD),
            dh, gate_up, h_turned, out, turned, h_scale, scale, seen, *dh.shape, **SWIGLU_BACKWARD,
        )  # fmt: skip
    return h_turned, out, turned
