"""The convolution of model/reference.py as two Triton kernels, each of which reads and writes every value once.

A program walks down the rows of a block of channels and keeps the last w - 1 of them in registers. The few programs
among whose rows a document begins take a slower path, with fewer rows at a time, lest it need more registers than the
other. b batch, l length, d channels, w width.
"""

import torch
import triton
import triton.language as tl

from model.launching import launch
from model.tiles import by_rows

# rows of a program, rows loaded at a time, such groups under way, channels, warps (H200)
FORWARD = {"ROWS": 32, "GROUP": 8, "STAGES": 1, "BLOCK_D": 256, "num_warps": 2}
BACKWARD = {"ROWS": 64, "GROUP": 4, "STAGES": 1, "BLOCK_D": 128, "num_warps": 1}


@torch.compiler.disable
def causal_conv1d(x, weight, bias, document_ids=None, initial_state=None):
    """See model/reference.py. The rows of x may lie apart, as in a wider tensor."""
    y = Convolution.apply(x, weight, bias, document_ids, initial_state)
    return y, last_inputs(x, initial_state, weight.shape[1])


def last_inputs(x, initial_state, width):
    """The last w - 1 inputs, (b, w - 1, d), from which a next call goes on."""
    if x.shape[1] < width - 1:
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        x = torch.cat([initial_state.to(x.dtype), x], dim=1)
    return x[:, x.shape[1] - width + 1 :]


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, document_ids, initial_state):
        ctx.save_for_backward(x, weight, bias, document_ids, initial_state)
        return conv_forward(x, weight, bias, document_ids, initial_state)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, document_ids, initial_state = ctx.saved_tensors
        dx, sums, dinitial = conv_backward(dy, x, weight, bias, document_ids, initial_state)
        return dx, sums[:-1].mT.to(weight.dtype), sums[-1].to(bias.dtype), None, dinitial


def conv_forward(x, weight, bias, document_ids=None, initial_state=None, config=FORWARD):
    """y of causal_conv1d, (b, l, d), contiguous."""
    b, l, d = x.shape
    x, ids, before = by_rows(x), contiguous(document_ids), contiguous(initial_state)
    y = torch.empty(b, l, d, device=x.device, dtype=x.dtype)
    grid = triton.cdiv(d, config["BLOCK_D"]), triton.cdiv(l, config["ROWS"]), b
    with torch.cuda.device_of(x):
        launch(
            _conv_forward_kernel, grid,
            x, weight.contiguous(), bias, ids, before, y, l, d, *x.stride()[:2],
            PACKED=ids is not None, CARRIED=before is not None, WIDTH=weight.shape[1], **config,
        )  # fmt: skip
    return y


def conv_backward(dy, x, weight, bias, document_ids=None, initial_state=None, dx=None, sums_out=None, config=BACKWARD):
    """Gradients of x, of weight by columns and of bias in one, (w + 1, d) in float32, and of initial_state (or None).

    dx (b, l, d), sums_out: where to put the first and the second, if given.
    """
    b, l, d = x.shape
    width = weight.shape[1]
    x, dy, ids, before = by_rows(x), by_rows(dy), contiguous(document_ids), contiguous(initial_state)
    if dx is None:
        dx = torch.empty(b, l, d, device=x.device, dtype=x.dtype)
    dbefore = None if before is None else torch.empty_like(before)
    blocks = triton.cdiv(l, config["ROWS"])
    sums = torch.empty(b, blocks, width + 1, d, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            _conv_backward_kernel, (triton.cdiv(d, config["BLOCK_D"]), blocks, b),
            dy, x, weight.contiguous(), bias, ids, before, dx, dbefore, sums, l, d,
            *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2],
            PACKED=ids is not None, CARRIED=before is not None, WIDTH=width, **config,
        )  # fmt: skip
    return dx, torch.sum(sums, (0, 1), out=sums_out), dbefore


def contiguous(x):
    return None if x is None else x.contiguous()


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to float32's rounding in six instructions, half of what a division takes."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _input(x_ptr, before_ptr, t, l, stride, d, channels, inside, CARRIED: tl.constexpr, WIDTH: tl.constexpr):
    """Row t: of x, or before it of the state; zero where there is none."""
    x = tl.load(x_ptr + t * stride + channels, mask=inside & (t >= 0) & (t < l), other=0.0).to(tl.float32)
    if CARRIED:
        row = before_ptr + (t + WIDTH - 1) * d
        x += tl.load(row + channels, mask=inside & (t < 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _begins(ids_ptr, first, l, GROUP: tl.constexpr):
    """Of GROUP rows from `first` on, which are the first of a document that is not the first."""
    begins = ()
    for i in tl.static_range(GROUP):
        t = first + i
        inside = (t > 0) & (t < l)
        before = tl.load(ids_ptr + t - 1, mask=inside, other=0)
        begins = begins + (tl.load(ids_ptr + t, mask=inside, other=0) != before,)
    return begins


@triton.jit
def _unless(condition, values, N: tl.constexpr):
    """Zeros in the place of N values where the condition holds."""
    kept = ()
    for i in tl.static_range(N):
        kept = kept + (tl.where(condition, 0.0, values[i]),)
    return kept


@triton.jit
def _weights(weight_ptr, channels, inside, WIDTH: tl.constexpr):
    """What each of the last WIDTH inputs counts, from the present one backwards."""
    weights = ()
    for back in tl.static_range(WIDTH):
        at = channels * WIDTH + (WIDTH - 1 - back)
        weights = weights + (tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _history(
    x_ptr, before_ptr, ids_ptr, first, l, stride, d, channels, inside, zero,
    PACKED: tl.constexpr, CARRIED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 inputs before row `first`, the nearest first; zero where another document ended after them."""
    history = (zero,) * (WIDTH - 1)
    if PACKED:
        begins = _begins(ids_ptr, first - (WIDTH - 1), l, WIDTH - 1)
    for i in tl.static_range(WIDTH - 1):
        t = first - (WIDTH - 1) + i
        if PACKED:
            history = _unless(begins[i], history, WIDTH - 1)
        now = _input(x_ptr, before_ptr, t, l, stride, d, channels, inside, CARRIED, WIDTH)
        history = (now,) + history[:-1]
    return history


@triton.jit
def _rows(ptr, first, l, stride, channels, inside, GROUP: tl.constexpr):
    """GROUP rows from `first` on, zero from row l on."""
    rows = ()
    for i in tl.static_range(GROUP):
        t = first + i
        rows = rows + (tl.load(ptr + t * stride + channels, mask=inside & (t < l), other=0.0),)
    return rows


@triton.jit
def _pre(taps, weights, bias, WIDTH: tl.constexpr):
    """What SiLU is taken of, from the present input and the WIDTH - 1 before."""
    pre = bias + weights[0] * taps[0]
    for back in tl.static_range(1, WIDTH):
        pre += weights[back] * taps[back]
    return pre


@triton.jit
def _changes(ids_ptr, first, end, l):
    """Whether a document begins in rows [first, end); ids grow along a row."""
    last = tl.minimum(end, l) - 1
    return tl.load(ids_ptr + tl.maximum(first - 1, 0)) != tl.load(ids_ptr + last)


@triton.jit
def _forward_rows(
    history, weights, bias, x_ptr, ids_ptr, y_ptr, first, l, d, x_stride, channels, inside,
    EDGES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of ROWS rows, among which documents may begin if EDGES."""
    for start in tl.range(0, ROWS, GROUP, num_stages=STAGES):
        rows = _rows(x_ptr, first + start, l, x_stride, channels, inside, GROUP)
        if EDGES:
            begins = _begins(ids_ptr, first + start, l, GROUP)
        for i in tl.static_range(GROUP):
            t = first + start + i
            if EDGES:
                history = _unless(begins[i], history, WIDTH - 1)
            taps = (rows[i].to(tl.float32),) + history
            pre = _pre(taps, weights, bias, WIDTH)
            tl.store(y_ptr + t * d + channels, pre * sigmoid(pre), mask=inside & (t < l))
            history = taps[:-1]


@triton.jit
def _conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, ids_ptr, before_ptr, y_ptr, l, d, x_stride_b, x_stride_l,
    PACKED: tl.constexpr, CARRIED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # y[t] = silu(pre[t]), pre[t] = bias + sum over k < WIDTH of weight[WIDTH - 1 - k] x[t - k]
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, b = tl.program_id(1).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    inside = channels < d
    x_ptr += b * x_stride_b
    y_ptr += b * l * d
    if PACKED:
        ids_ptr += b * l
    if CARRIED:
        before_ptr += b * (WIDTH - 1) * d
    weights = _weights(weight_ptr, channels, inside, WIDTH)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    history = _history(
        x_ptr, before_ptr, ids_ptr, first, l, x_stride_l, d, channels, inside, zero, PACKED, CARRIED, WIDTH
    )
    if PACKED and _changes(ids_ptr, first, first + ROWS, l):
        _forward_rows(
            history, weights, bias, x_ptr, ids_ptr, y_ptr, first, l, d, x_stride_l, channels, inside,
            True, WIDTH, ROWS, 4, 1,
        )  # fmt: skip
    else:
        _forward_rows(
            history, weights, bias, x_ptr, ids_ptr, y_ptr, first, l, d, x_stride_l, channels, inside,
            False, WIDTH, ROWS, GROUP, STAGES,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    value, dx_ptr, dbefore_ptr, t, own, l, stride, d, channels, inside, CARRIED: tl.constexpr, WIDTH: tl.constexpr
):
    """The gradient of row t, if it is in [own, l); of the state's rows, which are those before 0, too."""
    tl.store(dx_ptr + t * stride + channels, value, mask=inside & (t >= own) & (t >= 0) & (t < l))
    if CARRIED:
        row = dbefore_ptr + (t + WIDTH - 1) * d
        tl.store(row + channels, value, mask=inside & (t >= own) & (t < 0))


@triton.jit
def _walk(
    history, unfinished, dweights, dbias, document, weights, bias, zero,
    x_ptr, dy_ptr, ids_ptr, dx_ptr, dbefore_ptr, first, own, l, d, x_stride, dy_stride, dx_stride, channels, inside,
    COUNTED: tl.constexpr, EDGES: tl.constexpr, CARRIED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP rows of the backward pass. Returns what is carried from row to row: of the WIDTH - 1 rows before, nearest
    first, the inputs and the gradients as far as they go; the gradients of weight and bias, to which the rows add if
    COUNTED; and the row where the document began.
    """
    rows = _rows(x_ptr, first, l, x_stride, channels, inside, GROUP)
    drows = _rows(dy_ptr, first, l, dy_stride, channels, inside, GROUP)
    if EDGES:
        begins = _begins(ids_ptr, first, l, GROUP)
    for i in tl.static_range(GROUP):
        t = first + i
        if EDGES:
            history = _unless(begins[i], history, WIDTH - 1)
            document = tl.where(begins[i], t, document)
        taps = (rows[i].to(tl.float32),) + history
        pre = _pre(taps, weights, bias, WIDTH)
        gate = sigmoid(pre)
        dpre = drows[i].to(tl.float32) * (gate + pre * gate * (1.0 - gate))
        if COUNTED:
            dbias += dpre
        sums, dsums = (), ()
        for back in tl.static_range(WIDTH):
            reached = weights[back] * dpre
            if EDGES:
                reached = tl.where(t - back >= document, reached, 0.0)
            sums = sums + (((zero,) + unfinished)[back] + reached,)
            dsums = dsums + (dweights[back] + taps[back] * dpre if COUNTED else dweights[back],)
        _store_gradient(
            sums[WIDTH - 1], dx_ptr, dbefore_ptr, t - (WIDTH - 1), own, l, dx_stride, d, channels, inside,
            CARRIED, WIDTH,
        )  # fmt: skip
        history, unfinished, dweights = taps[:-1], sums[:-1], dsums
    return history, unfinished, dweights, dbias, document


@triton.jit
def _backward_rows(
    history, weights, bias, zero, x_ptr, dy_ptr, ids_ptr, dx_ptr, dbefore_ptr, first, l, d,
    x_stride, dy_stride, dx_stride, channels, inside, EDGES: tl.constexpr, CARRIED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS rows, among which documents may begin if EDGES. Returns those of weights and bias."""
    unfinished, dweights, dbias = (zero,) * (WIDTH - 1), (zero,) * WIDTH, zero
    document = first - WIDTH  # or before
    own = tl.where(first == 0, 1 - WIDTH, first)  # gradients of the rows before are another program's
    for start in tl.range(0, ROWS, GROUP, num_stages=STAGES):
        history, unfinished, dweights, dbias, document = _walk(
            history, unfinished, dweights, dbias, document, weights, bias, zero, x_ptr, dy_ptr, ids_ptr, dx_ptr,
            dbefore_ptr, first + start, own, l, d, x_stride, dy_stride, dx_stride, channels, inside,
            True, EDGES, CARRIED, WIDTH, GROUP,
        )  # fmt: skip
    _walk(
        history, unfinished, dweights, dbias, document, weights, bias, zero, x_ptr, dy_ptr, ids_ptr, dx_ptr,
        dbefore_ptr, first + ROWS, own, l, d, x_stride, dy_stride, dx_stride, channels, inside,
        False, EDGES, CARRIED, WIDTH, WIDTH - 1,
    )  # fmt: skip
    return dweights, dbias


@triton.jit
def _conv_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, ids_ptr, before_ptr, dx_ptr, dbefore_ptr, sums_ptr, l, d,
    dy_stride_b, dy_stride_l, x_stride_b, x_stride_l, dx_stride_b, dx_stride_l,
    PACKED: tl.constexpr, CARRIED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # dpre[t] = dy[t] silu'(pre[t]); dx[t] = sum over k < WIDTH of weight[WIDTH - 1 - k] dpre[t + k], in one document.
    # A gradient is whole WIDTH - 1 rows later, so a program walks that much further than its own rows.
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, b = tl.program_id(1).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    inside = channels < d
    dy_ptr += b * dy_stride_b
    x_ptr += b * x_stride_b
    dx_ptr += b * dx_stride_b
    if PACKED:
        ids_ptr += b * l
    if CARRIED:
        before_ptr += b * (WIDTH - 1) * d
        dbefore_ptr += b * (WIDTH - 1) * d
    weights = _weights(weight_ptr, channels, inside, WIDTH)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    history = _history(
        x_ptr, before_ptr, ids_ptr, first, l, x_stride_l, d, channels, inside, zero, PACKED, CARRIED, WIDTH
    )
    if PACKED and _changes(ids_ptr, first, first + ROWS + WIDTH - 1, l):
        dweights, dbias = _backward_rows(
            history, weights, bias, zero, x_ptr, dy_ptr, ids_ptr, dx_ptr, dbefore_ptr, first, l, d, x_stride_l,
            dy_stride_l, dx_stride_l, channels, inside, True, CARRIED, WIDTH, ROWS, 2, 1,
        )  # fmt: skip
    else:
        dweights, dbias = _backward_rows(
            history, weights, bias, zero, x_ptr, dy_ptr, ids_ptr, dx_ptr, dbefore_ptr, first, l, d, x_stride_l,
            dy_stride_l, dx_stride_l, channels, inside, False, CARRIED, WIDTH, ROWS, GROUP, STAGES,
        )  # fmt: skip
    sums_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * (WIDTH + 1) * d
    for back in tl.static_range(WIDTH):
        tl.store(sums_ptr + (WIDTH - 1 - back) * d + channels, dweights[back], mask=inside)
    tl.store(sums_ptr + WIDTH * d + channels, dbias, mask=inside)
