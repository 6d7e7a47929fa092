"""What lies between the two projections of a Mamba-2 mixer, as one operation on the kernels of convolution.py,
scan.py, scan_backward.py and gated_norm.py.

Every kernel reads its inputs where in_proj left them and writes their gradients side by side into one tensor, so that
nothing is cut apart or put together again.
"""

import torch
import triton
import triton.language as tl

from model.convolution import conv_backward, conv_forward, last_inputs, sigmoid
from model.gated_norm import norm_backward, norm_forward
from model.launching import launch, remembered
from model.scan import BACKWARD_CHUNK, _softplus, decays, document_starts, entering_states, scan
from model.scan_backward import scan_backward
from model.tiles import in_rows

BLOCK_T = 64  # rows of a program


@torch.compiler.disable
def mixer(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, chunk_size, eps,
    document_ids=None, conv_state=None, ssm_state=None,
):  # fmt: skip
    """See model/reference.py. chunk_size has no effect: the kernels have their own. No gradient passes the states."""
    y, ssm_state = Mixer.apply(
        zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, eps,
        document_ids, conv_state, ssm_state,
    )  # fmt: skip
    _, xBC, _ = zxbcdt.detach().split(widths(conv_weight, A_log, norm_weight), dim=-1)
    return y, last_inputs(xBC, conv_state, conv_weight.shape[1]), ssm_state


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, eps,
        document_ids, conv_state, ssm_state,
    ):  # fmt: skip
        weights = conv_weight, conv_bias, A_log, D, dt_bias, norm_weight
        normed, last, *kept = mixer_forward(zxbcdt, *weights, n_groups, eps, document_ids, conv_state, ssm_state)
        ctx.save_for_backward(zxbcdt, *weights, *kept, document_ids, conv_state, ssm_state)
        ctx.mark_non_differentiable(last)
        return normed, last

    @staticmethod
    def backward(ctx, dnormed, _):
        return *mixer_backward(dnormed, *ctx.saved_tensors), None, None, None, None, None


@remembered
def mixer_forward(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, eps, document_ids, conv_state, ssm_state
):
    """What mixer returns but the convolution's inputs, and what mixer_backward takes: fed, y, scales and first."""
    z, xBC, dt = zxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
    fed = conv_forward(xBC, conv_weight, conv_bias, document_ids, conv_state)
    x, B, C = by_head(fed, A_log, norm_weight, n_groups)
    first = document_starts(document_ids, BACKWARD_CHUNK)
    y, last = scan(x, dt, A_log, B, C, D, document_ids, ssm_state, first=first, dt_bias=dt_bias)
    y = y.flatten(2)
    normed, scales = norm_forward(y, z, norm_weight, n_groups, eps)
    return normed, last, fed, y, scales, first


@remembered
def mixer_backward(
    dnormed, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, fed, y, scales, first,
    document_ids, conv_state, ssm_state,
):  # fmt: skip
    """The gradients of zxbcdt and of the six weights."""
    weights = conv_weight, conv_bias, A_log, D, dt_bias, norm_weight
    n_groups, (channels, width), h = scales.shape[-1], conv_weight.shape, A_log.numel()
    sizes = [(width + 1) * channels, norm_weight.numel(), h, 2 * h]
    sums = torch.empty(sum(sizes), device=zxbcdt.device, dtype=torch.float32)
    of_conv, of_norm, of_D, of_rates = sums.split(sizes)
    dzxbcdt = torch.empty(zxbcdt.shape, device=zxbcdt.device, dtype=zxbcdt.dtype)
    z, xBC, dt_before = zxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
    dz, dxBC, ddt_before = dzxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
    dy, _, _ = norm_backward(dnormed, y, z, norm_weight, scales, dz=dz, dweight=of_norm)

    dfed = torch.empty_like(fed)
    x, B, C = by_head(fed, A_log, norm_weight, n_groups)
    dx, dB, dC = by_head(dfed, A_log, norm_weight, n_groups)
    steps, cum = decays(dt_before, A_log, BACKWARD_CHUNK, document_ids, dt_bias)
    entering = entering_states(x, B, steps, cum, document_ids, ssm_state, first=first)
    _, dlog, dsteps, *_ = scan_backward(
        dy.view(x.shape), None, x, steps, cum, B, C, D, document_ids, entering, dx, dB, dC, of_D
    )
    of_conv = of_conv.view(width + 1, channels)
    conv_backward(dfed, xBC, conv_weight, conv_bias, document_ids, conv_state, dx=dxBC, sums_out=of_conv)
    rates_backward(dlog, dsteps, dt_before, dt_bias, A_log, ddt_before, of_rates.view(2, h))
    if all(weight.dtype == conv_weight.dtype for weight in weights):
        sums = sums.to(conv_weight.dtype)  # all at once
    of_conv, *others = sums.split([*sizes[:3], h, h])
    dconv_weight, dconv_bias = of_conv.view(width + 1, channels).split([width, 1])
    dnorm_weight, dD, ddt_bias, dA_log = others
    gradients = dconv_weight.mT, dconv_bias[0], dA_log, dD, ddt_bias, dnorm_weight
    return dzxbcdt, *(gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True))


def widths(conv_weight, A_log, norm_weight):
    """Columns of z, of x, B and C, and of dt."""
    return [norm_weight.numel(), conv_weight.shape[0], A_log.numel()]


def by_head(xBC, A_log, norm_weight, n_groups):
    """x (b, l, h, p), B and C (b, l, g, n), as they lie in xBC."""
    bc = (xBC.shape[-1] - norm_weight.numel()) // 2
    parts = xBC.split([norm_weight.numel(), bc, bc], dim=-1)
    return [part.unflatten(-1, (n, -1)) for part, n in zip(parts, (A_log.numel(), n_groups, n_groups), strict=True)]


def rates_backward(dlog, dsteps, dt, dt_bias, A_log, ddt, sums_out):
    """From the gradients of step size * rate and of the step size alone, (b, l, h), write those of dt, dt_bias, A_log.

    ddt (b, l, h): where that of dt goes; sums_out (2, h), float32: where the others go.
    """
    (b, l, h), programs = dt.shape, triton.cdiv(dt.shape[:2].numel(), BLOCK_T)
    dt, ddt = in_rows(dt), ddt.flatten(0, 1)
    sums = torch.empty(programs, 2, h, device=dt.device, dtype=torch.float32)
    with torch.cuda.device_of(dt):
        launch(
            _scan_rates_backward_kernel, (programs,),
            dlog, dsteps, dt, dt_bias, A_log, ddt, sums, b * l, h, dt.stride(0), ddt.stride(0),
            BLOCK_T, triton.next_power_of_2(h),
        )  # fmt: skip
    torch.sum(sums, 0, out=sums_out)


@triton.jit
def _scan_rates_backward_kernel(
    dlog_ptr, dsteps_ptr, dt_ptr, bias_ptr, A_log_ptr, ddt_ptr, sums_ptr, n, h, stride, ddt_stride,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t, heads = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_H)
    mask = (t < n) & (heads < h)
    dlog = tl.load(dlog_ptr + t * h + heads, mask=mask, other=0.0)
    dsteps = tl.load(dsteps_ptr + t * h + heads, mask=mask, other=0.0)
    dt = tl.load(dt_ptr + t * stride + heads, mask=mask, other=0.0).to(tl.float32)
    dt += tl.load(bias_ptr + heads, mask=heads < h, other=0.0).to(tl.float32)
    A = -tl.exp(tl.load(A_log_ptr + heads, mask=heads < h, other=0.0).to(tl.float32))
    ddt = (dlog * A + dsteps) * sigmoid(dt)
    tl.store(ddt_ptr + t * ddt_stride + heads, ddt, mask=mask)
    sums_ptr += tl.program_id(0) * 2 * h + heads
    tl.store(sums_ptr, tl.sum(ddt, axis=0), mask=heads < h)
    tl.store(sums_ptr + h, tl.sum(dlog * _softplus(dt), axis=0) * A, mask=heads < h)
