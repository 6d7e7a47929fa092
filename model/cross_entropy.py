"""The loss without all its logits: a few thousand tokens' at a time, over which a Triton kernel writes their gradient.

Beside three products, a chunk costs two passes over its logits and one over a float32 gradient of the weight.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from model.reference import IGNORED_TARGET

CHUNK_TOKENS = 4096  # rows of logits in memory at a time: 0.4 GiB in bfloat16 with 50,304 words
BLOCK, WARPS = 8192, 16  # logits of a row that a program reads at a time


@torch.compiler.disable
def cross_entropy(hidden, weight, targets, z_loss=0.0):
    """See model/reference.py. The logits exist for CHUNK_TOKENS tokens at a time and in hidden's dtype alone.

    Their gradient is written over them and multiplied out at once, in the forward pass.
    """
    return CrossEntropy.apply(hidden, weight, targets, z_loss, torch.is_grad_enabled())


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, with_gradients):
        count = (targets != IGNORED_TARGET).sum()
        losses = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
        if with_gradients:
            dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(hidden[rows], weight)
            with torch.cuda.device_of(hidden):
                _cross_entropy_kernel[(len(logits),)](
                    logits, targets[rows], count, losses[rows], logits.shape[1], logits.stride(0), IGNORED_TARGET,
                    z_loss, WITH_GRADIENTS=with_gradients, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
            if with_gradients:
                torch.mm(logits, weight, out=dhidden[rows])
                add_product(dweight, logits.T, hidden[rows], beta=int(start > 0))
            del logits  # or the next ones would lie beside them
        if with_gradients:
            ctx.save_for_backward(dhidden, dweight)
            ctx.dtype = weight.dtype
        return losses.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        rounded = torch.empty_like(dweight, dtype=ctx.dtype)
        return dhidden * dloss, torch.mul(dweight, dloss, out=rounded), None, None, None


def add_product(total, a, b, beta):
    """total = beta total + a b: products of bfloat16 are added up in float32 without a matrix beside it."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, count_ptr, losses_ptr, vocab, stride, ignored, z_loss,
    WITH_GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: its loss, and in place of its logits their gradient in the mean over count rows (all 0 if ignored).

    The gradient is softmax - one at the target, and of z_loss's term, z_loss log_total^2, 2 z_loss log_total softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counts = target != ignored
    # read before the reductions, which every warp waits for: later, another warp may have written over it
    at_target = tl.load(logits_ptr + target, mask=counts, other=0.0).to(tl.float32)
    # Eights of columns, each with a highest and a sum of its own: what a thread loads, it adds up without the others
    columns = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    highest, total = tl.full((BLOCK // 8,), -1e30, tl.float32), tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        highest = higher
    top = tl.max(highest)
    log_total = top + tl.log(tl.sum(total * tl.exp(highest - top)))
    tl.store(losses_ptr + row, tl.where(counts, log_total - at_target + z_loss * log_total * log_total, 0.0))
    if WITH_GRADIENTS:
        each = tl.where(counts, 1.0 / tl.load(count_ptr).to(tl.float32), 0.0)
        slope = each * (1.0 + 2.0 * z_loss * log_total)
        for start in range(0, vocab, BLOCK):
            column = start + columns
            x = tl.load(logits_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) * slope - tl.where(column == target, each, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < vocab)
