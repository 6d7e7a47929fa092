"""The operations of model/reference.py on fast GPU kernels, with the same names and signatures.

The Mamba-2 mixer runs on Triton kernels of ours (model/mixer.py and what it is made of); attention on cuDNN or
FlashAttention; the loss on a kernel of this file. torch.compile leaves a break in the graph around each autograd
function (torch.compiler.disable), so that compiled and eager models run the same kernels.
"""

import inspect

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import reference
from model.convolution import causal_conv1d  # noqa: F401
from model.gated_norm import gated_rms_norm  # noqa: F401
from model.mixer import mixer  # noqa: F401
from model.reference import IGNORED_TARGET
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
    f"packed documents on {'flash-attn' if flash_attn_varlen_func else 'torch.nn.attention.varlen'}"
)
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CHUNK_TOKENS = 4096  # rows of logits in memory at a time: 0.4 GiB in bfloat16 with 50,304 words


def rms_norm(x, weight, eps):
    """See model/reference.py. PyTorch's own kernel, which sums in float32 without a float32 copy of x."""
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)


def attention(q, k, v, mask=None, *, packing=None, scale=None, slopes=None):
    """See model/reference.py, whose PyTorch attention also runs here where no faster kernel applies: in float32, with
    a mask or a cache, and with slopes unless flash-attn is installed."""
    b, l = q.shape[:2]
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not half or mask is not None or l != k.shape[1] or (slopes is not None and not flash_attn_varlen_func):
        return reference.attention(q, k, v, mask, packing=packing, scale=scale, slopes=slopes)
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


@torch.compiler.disable
def cross_entropy(hidden, weight, targets, z_loss=0.0):
    """See model/reference.py. The logits exist for CHUNK_TOKENS tokens at a time and in hidden's dtype alone.

    Their gradient is written over them and multiplied out at once, in the forward pass.
    """
    return CrossEntropy.apply(hidden, weight, targets, z_loss, torch.is_grad_enabled())


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, with_gradients):
        losses = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
        if with_gradients:
            dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(hidden[rows], weight)
            with torch.cuda.device(hidden.device):
                _cross_entropy_kernel[(len(logits),)](
                    logits, targets[rows], losses[rows], logits.shape[1], logits.stride(0), IGNORED_TARGET, z_loss,
                    WITH_GRADIENTS=with_gradients, BLOCK=4096, num_warps=8,
                )  # fmt: skip
            if with_gradients:
                dhidden[rows] = logits @ weight
                dweight += logits.T @ hidden[rows]
            del logits  # or the next ones would lie beside them
        count = (targets != IGNORED_TARGET).sum()
        if with_gradients:
            ctx.save_for_backward(dhidden, dweight.to(weight.dtype), count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight, count = ctx.saved_tensors
        each = dloss / count
        return dhidden * each.to(dhidden.dtype), dweight * each.to(dweight.dtype), None, None, None


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    vocab,
    stride,
    ignored,
    z_loss,
    WITH_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: its loss, and in place of its logits their gradient (all 0 if ignored).

    The gradient is softmax - one at the target, and of z_loss's term, z_loss log_total^2, 2 z_loss log_total softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counts = target != ignored
    # read before the reductions, which every warp waits for: later, another warp may have written over it
    at_target = tl.load(logits_ptr + target, mask=counts, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    highest, total = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(losses_ptr + row, tl.where(counts, log_total - at_target + z_loss * log_total * log_total, 0.0))
    if WITH_GRADIENTS:
        for start in range(0, vocab, BLOCK):
            column = start + columns
            x = tl.load(logits_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) * (1.0 + 2.0 * z_loss * log_total) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits_ptr + column, tl.where(counts, gradient, 0.0), mask=column < vocab)
