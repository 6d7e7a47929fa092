"""The operations of model/reference.py on fast GPU kernels, with the same names and signatures.

The mixer, norms, gates, rotation, loss and attention within packed documents run on Triton kernels of ours, a file
each; other attention on cuDNN or FlashAttention. torch.compile leaves a break in the graph around each autograd
function (torch.compiler.disable), so that compiled and eager models run the same kernels.
"""

import inspect

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import reference, single_token
from model.convolution import causal_conv1d  # noqa: F401
from model.cross_entropy import cross_entropy  # noqa: F401
from model.gated_norm import gated_rms_norm
from model.gating import sigmoid_gate, swiglu  # noqa: F401
from model.layers import as_one
from model.mixer import mixer  # noqa: F401
from model.norm import add_rms_norm, rms_norm  # noqa: F401
from model.packed_attention import packed_attention, takes
from model.rotary import rotary  # noqa: F401
from model.scan import ssd  # noqa: F401

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
    from torch.nn.attention.varlen import varlen_attn

    # causal, with fewer key/value heads than query heads; torch 2.10 to 2.13 spell it differently
    VARLEN = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    VARLEN = {name: value for name, value in VARLEN.items() if name in inspect.signature(varlen_attn).parameters}

ABOUT = (
    f"Triton {triton.__version__}, attention on cuDNN, "
    f"packed documents on Triton from Hopper on, else {'flash-attn' if flash_attn_varlen_func else 'varlen_attn'}"
)
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q, k, v, start=None, *, packing=None, scale=None, slopes=None):
    """See model/reference.py, whose PyTorch attention also runs here where no faster kernel applies: in float32, with
    slopes unless flash-attn is installed, and for gradients through a cache or slopes behind one."""
    b, l = q.shape[:2]
    half, cached = q.dtype in (torch.bfloat16, torch.float16), l != k.shape[1] or start is not None
    if half and slopes is None and packing is None and not torch.is_grad_enabled():
        return attention_forward(q, k, v, start, scale)
    if not half or cached or (slopes is not None and not flash_attn_varlen_func):
        return reference.attention(q, k, v, start, packing=packing, scale=scale, slopes=slopes)
    if packing is not None and slopes is None and takes(q, k):
        return packed_attention(q, k, v, packing, scale)
    if slopes is None and (packing is None or packing.cu_seqlens.numel() == b + 1):  # one document a row
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(ATTENTION, set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2)
    if packing is None:
        cu_seqlens = torch.arange(0, (b + 1) * l, l, device=q.device, dtype=torch.int32)
    else:
        cu_seqlens = packing.cu_seqlens
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    where = (cu_seqlens, cu_seqlens, l, l)  # no document is longer than a row
    if flash_attn_varlen_func:
        y = flash_attn_varlen_func(*rows, *where, softmax_scale=scale, causal=True, alibi_slopes=slopes)
    else:
        y = varlen_attn(*rows, *where, scale=scale, **VARLEN)
    return y.unflatten(0, (b, l))


class SplitProduct(torch.autograd.Function):
    """x times several matrices. The weights are kept as they are: joined, they would be kept twice."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return F.linear(x, joined(weights))

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dy, rows = dy.flatten(0, -2), x.flatten(0, -2)
        dx = (dy @ joined(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        dweights = [None] * len(weights)
        if any(ctx.needs_input_grad[1:]):
            dweights = (dy.t() @ rows).split([weight.shape[0] for weight in weights])
        return dx, *dweights


def joined(weights):
    one = as_one(weights)
    return torch.cat(weights) if one is None else one


def attention_forward(q, k, v, start, scale):
    """`attention` without gradients, behind a cache or not: k, v (b, m, k, p), from start (b,) on in each row.

    PyTorch's own FlashAttention, whose causal mask ends with the last key. cuDNN is as fast, but works out a plan for
    each new shape, for 46 ms and more (H200), and in scoring hardly a shape comes twice.
    """
    b, l, m, apart = *q.shape[:2], k.shape[1], k.stride(0) // k.stride(1)  # rows of a cache lie apart by its room
    keys, values = (t.as_strided(((b - 1) * apart + m, *t.shape[2:]), t.stride()[1:]) for t in (k, v))
    begins = torch.arange(b + 1, device=q.device, dtype=torch.int32)
    at, used = begins * apart, torch.full((b,), m, device=q.device, dtype=torch.int32)
    if start is not None:
        at[:-1] += start
        used -= start
    y, *_ = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1), keys, values, begins * l, at, l, m, 0.0, True, False,
        scale=scale, window_size_left=-1, window_size_right=0, seqused_k=used,
    )  # fmt: skip
    return y.unflatten(0, (b, l))


def mixer_step(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, eps, conv, ssm, lengths
):  # fmt: skip
    """See model/reference.py."""
    with torch.cuda.device(zxbcdt.device):
        z, xBC, dt = zxbcdt.split([norm_weight.numel(), conv_weight.shape[0], A_log.numel()], dim=-1)
        y = single_token.mamba_step(xBC, dt, conv_weight, conv_bias, A_log, D, dt_bias, conv, ssm, lengths)
        return gated_rms_norm(y, z, norm_weight, n_groups, eps)


def attention_step(q, k, v, keys, values, lengths, frequencies=None, magnitude=1.0, scale=None, slopes=None):
    """See model/reference.py."""
    with torch.cuda.device(q.device):
        return single_token.attention_step(q, k, v, keys, values, lengths, frequencies, magnitude, scale, slopes)


def products(x, weights):
    """See model/reference.py. A kernel of ours for one token, and for a few where weights would have to be joined."""
    n_rows, half = x.shape[:-1].numel(), x.dtype in (torch.bfloat16, torch.float16)
    ours = n_rows == 1 or (half and len(weights) > 1 and n_rows <= single_token.MAX_ROWS)
    if torch.is_grad_enabled() and len(weights) > 1 and not torch.compiler.is_compiling():
        return SplitProduct.apply(x, *weights)
    if torch.is_grad_enabled() or not ours:
        return reference.products(x, weights)
    with torch.cuda.device(x.device):
        return single_token.products(x, weights)
