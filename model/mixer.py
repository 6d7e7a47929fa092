"""What lies between the two projections of a Mamba-2 mixer, as one operation on the kernels of convolution.py,
scan.py, scan_backward.py and gated_norm.py.

Every kernel reads its inputs where in_proj left them and writes their gradients side by side into one tensor, so that
nothing is cut apart or put together again. The backward pass works the convolution's output out anew.
"""

import torch
import torch.nn.functional as F

from model.convolution import conv_backward, conv_forward, last_inputs
from model.gated_norm import norm_backward, norm_forward
from model.scan import BACKWARD_CHUNK, decays, entering_states, scan
from model.scan_backward import scan_backward


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
        z, xBC, dt = zxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
        fed = conv_forward(xBC, conv_weight, conv_bias, document_ids, conv_state)
        x, B, C = by_head(fed, A_log, norm_weight, n_groups)
        dt, A = step_sizes(dt, dt_bias), -A_log.float().exp()
        y, last = scan(x, dt, A, B, C, D.float(), document_ids, ssm_state)
        y = y.flatten(2)
        normed, scales = norm_forward(y, z, norm_weight, n_groups, eps)
        weights = conv_weight, conv_bias, A_log, D, dt_bias, norm_weight
        ctx.save_for_backward(zxbcdt, *weights, y, scales, document_ids, conv_state, ssm_state)
        ctx.mark_non_differentiable(last)
        return normed, last

    @staticmethod
    def backward(ctx, dnormed, _):
        zxbcdt, *weights, y, scales, document_ids, conv_state, ssm_state = ctx.saved_tensors
        conv_weight, conv_bias, A_log, D, dt_bias, norm_weight = weights
        n_groups = scales.shape[-1]
        dzxbcdt = torch.empty_like(zxbcdt)
        z, xBC, dt_before = zxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
        dz, dxBC, ddt_before = dzxbcdt.split(widths(conv_weight, A_log, norm_weight), dim=-1)
        dy, _, dnorm_weight = norm_backward(dnormed, y, z, norm_weight, scales, dz=dz)

        fed = conv_forward(xBC, conv_weight, conv_bias, document_ids, conv_state)
        dfed = torch.empty_like(fed)
        x, B, C = by_head(fed, A_log, norm_weight, n_groups)
        dx, dB, dC = by_head(dfed, A_log, norm_weight, n_groups)
        dt, A = step_sizes(dt_before, dt_bias), -A_log.float().exp()
        steps, cum = decays(dt, A, BACKWARD_CHUNK, document_ids)
        entering = entering_states(x, B, steps, cum, document_ids, ssm_state)
        _, dlog, dsteps, _, _, dD, _ = scan_backward(
            dy.view(x.shape), None, x, steps, cum, A, B, C, D.float(), document_ids, entering, dx, dB, dC
        )
        _, dconv_weight, dconv_bias, _ = conv_backward(
            dfed, xBC, conv_weight, conv_bias, document_ids, conv_state, dx=dxBC
        )
        # log = dt A with dt = softplus(dt_before + dt_bias) and A = -exp(A_log)
        ddt = (dlog * A + dsteps) * torch.sigmoid(dt_before.float() + dt_bias.float())
        ddt_before.copy_(ddt)
        dA_log = (dlog * dt).sum(dim=(0, 1)) * A
        gradients = dconv_weight, dconv_bias, dA_log, dD, ddt.sum(dim=(0, 1)), dnorm_weight
        gradients = [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]
        return dzxbcdt, *gradients, None, None, None, None, None


def widths(conv_weight, A_log, norm_weight):
    """Columns of z, of x, B and C, and of dt."""
    return [norm_weight.numel(), conv_weight.shape[0], A_log.numel()]


def by_head(xBC, A_log, norm_weight, n_groups):
    """x (b, l, h, p), B and C (b, l, g, n), as they lie in xBC."""
    bc = (xBC.shape[-1] - norm_weight.numel()) // 2
    parts = xBC.split([norm_weight.numel(), bc, bc], dim=-1)
    return [part.unflatten(-1, (n, -1)) for part, n in zip(parts, (A_log.numel(), n_groups, n_groups), strict=True)]


def step_sizes(dt, dt_bias):
    return F.softplus(dt.float() + dt_bias.float())
