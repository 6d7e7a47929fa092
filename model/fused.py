"""The operations of model/reference.py on fast GPU kernels, with the same names and signatures.

The scan, the convolution and the gated norm run on the kernels of mamba-ssm and causal-conv1d, which model/ops.py
checks for; attention on cuDNN or FlashAttention; the loss on a kernel of this file. torch.compile leaves a break in
the graph around each autograd function of ours and theirs (torch.compiler.disable), so that compiled and eager models
run the same kernels.
"""

import importlib.util
import inspect
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import reference, single_token
from model.reference import IGNORED_TARGET, ssd_recurrence  # noqa: F401  # one position leaves nothing to fuse

# mamba_ssm's __init__ imports Mamba-1's CUDA extension, which its wheel lacks: without it, take the package bare.
try:
    import mamba_ssm  # noqa: F401
except ImportError:
    sys.modules["mamba_ssm"] = importlib.util.module_from_spec(importlib.util.find_spec("mamba_ssm"))

from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_bwd_kernel, _layer_norm_fwd
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import (
    _chunk_scan_bwd_dC,
    _chunk_scan_bwd_dcb,
    _chunk_scan_bwd_ddAcs_stable,
    _chunk_scan_bwd_dstates,
    _chunk_scan_fwd,
)
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_state_bwd_db, _chunk_state_fwd
from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx
from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_bwd, _state_passing_fwd

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
    from torch.nn.attention.varlen import varlen_attn

    # causal, with fewer key/value heads than query heads; torch 2.10 to 2.13 spell it differently
    VARLEN = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    VARLEN = {name: value for name, value in VARLEN.items() if name in inspect.signature(varlen_attn).parameters}

ABOUT = (
    f"mamba-ssm {version('mamba-ssm')}, causal-conv1d {version('causal-conv1d')}, attention on cuDNN, "
    f"packed documents on {'flash-attn' if flash_attn_varlen_func else 'torch.nn.attention.varlen'}"
)
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CHUNK_TOKENS = 4096  # rows of logits in memory at a time: 0.4 GiB in bfloat16 with 50,304 words
PROGRAMS_PER_SM = 8  # of the gated norm's backward kernel

# Products of float32 stay near float32: by default Triton would round the factors to TF32's ten bits.
triton.knobs.language.fp32_default = "tf32x3"


@torch.compiler.disable
def causal_conv1d(x, weight, bias, document_ids=None, initial_state=None):
    """See model/reference.py. d must be a multiple of 8, w from 2 to 4."""
    l, width = x.shape[1], weight.shape[1]
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:  # the kernel reads channels in eights
        x = x.contiguous()
    before = initial_state
    if before is not None:
        before = before.to(x.dtype).contiguous().mT
    y = causal_conv1d_fn(x.mT, weight, bias, seq_idx=document_ids, initial_states=before, activation="silu").mT
    if l >= width - 1:
        return y, x[:, l - width + 1 :]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return y, torch.cat([initial_state, x], dim=1)[:, l:]


@torch.compiler.disable
def ssd(x, dt, A, B, C, D, chunk_size, document_ids=None, initial_state=None):
    """See model/reference.py."""
    return Scan.apply(x, dt.float(), A.float(), B, C, D.float(), chunk_size, document_ids, initial_state)


class Scan(torch.autograd.Function):
    """mamba_ssm's chunked scan, kernel by kernel, on decays that begin anew at each document.

    Its own cumulative sum runs on through a chunk; what is masked is zero all the same, but the differences that
    remain carry the rounding of the documents before. Everything behind that sum masks by document and then adds
    exact zeros, forward and backward. States are (b, c, h, p, n) here, n and p the other way round than outside.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, chunk_size, document_ids, initial_state):
        ctx.set_materialize_grads(False)
        if initial_state is not None:
            initial_state = rearrange(initial_state.float(), "b h n p -> b h (p n)").contiguous()
        ctx.save_for_backward(x, dt, A, B, C, D, document_ids, initial_state)
        ctx.chunk_size = chunk_size
        packed = dict(seq_idx=document_ids)
        steps, cum = decays(dt, A, chunk_size, document_ids)
        states = _chunk_state_fwd(B, x, steps, cum, states_in_fp32=True, **packed)
        entering, last = _state_passing_fwd(
            states.flatten(3), cum[..., -1], initial_state, chunk_size=chunk_size, out_dtype=C.dtype, **packed
        )
        CB = _bmm_chunk_fwd(C, B, chunk_size, output_dtype=torch.float32, **packed)
        y, _ = _chunk_scan_fwd(CB, x, steps, cum, C, entering.view(states.shape), D=D, **packed)
        return y, rearrange(last, "b h (p n) -> b h n p", p=x.shape[-1])

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, document_ids, initial_state = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        if dlast is not None:
            dlast = rearrange(dlast.float(), "b h n p -> b h (p n)").contiguous()
        packed, g = dict(seq_idx=document_ids), B.shape[2]
        # What enters each chunk, once more, in float32
        steps, cum = decays(dt, A, ctx.chunk_size, document_ids)
        CB = _bmm_chunk_fwd(C, B, ctx.chunk_size, output_dtype=torch.float32, **packed)
        states = _chunk_state_fwd(B, x, steps, cum, states_in_fp32=True, **packed)
        shape = states.shape
        entering, _ = _state_passing_fwd(
            states.flatten(3), cum[..., -1], initial_state, chunk_size=ctx.chunk_size, **packed
        )
        # Back through the chunks' states
        dentering = _chunk_scan_bwd_dstates(C, cum, dy, dtype=torch.float32, **packed)
        dstates, dcum_chunk, dinitial, entering = _state_passing_bwd(
            entering, cum[..., -1], dentering.flatten(3), dfinal_states=dlast, chunk_size=ctx.chunk_size,
            has_initial_states=initial_state is not None, dstates_dtype=x.dtype, states_dtype=x.dtype, **packed,
        )  # fmt: skip
        dstates, entering = dstates.view(shape), entering.view(shape)
        # Back through each chunk
        dx, dsteps, dD = _chunk_scan_chunk_state_bwd_dx(x, steps, cum, B, CB, dy, dstates, D=D, **packed)
        dB_states, dlog_next = _chunk_state_bwd_db(x, steps, cum, dstates, B=B, ngroups=g, **packed)
        dC_states, dcum = _chunk_scan_bwd_dC(entering.to(x.dtype), cum, dy, C=C, ngroups=g, **packed)
        dCB = _chunk_scan_bwd_dcb(x, steps, cum, dy, ngroups=g, **packed).to(CB.dtype)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        _bmm_chunk_bwd(C, dCB, residual=dB_states, out=dB)
        _bmm_chunk_bwd(B, dCB.mT, residual=dC_states, out=dC)
        # Back through the cumulative sum. dcum is zero beyond the document that enters the chunk, so a plain sum from
        # the chunk's end carries nothing from one document into another.
        dcum[..., -1] += dcum_chunk
        dlog = dcum.flip(-1).cumsum(-1).flip(-1) + dlog_next + _chunk_scan_bwd_ddAcs_stable(x, steps, cum, dy, CB)
        dlog, dsteps = (rearrange(t, "b h c q -> b (c q) h")[:, : x.shape[1]] for t in (dlog, dsteps))
        ddt, dA = dlog * A + dsteps, (dlog * dt).sum(dim=(0, 1))
        if dinitial is not None:
            dinitial = rearrange(dinitial.float(), "b h (p n) -> b h n p", p=x.shape[-1])
        return dx, ddt, dA, dB, dC, dD, None, None, dinitial


def decays(dt, A, chunk_size, document_ids):
    """dt (b, l, h) in chunks, (b, h, c, q), and dt * A summed up from the start of its chunk or document, likewise.

    The positions that fill up the last chunk have dt = 0.
    """
    b, l, h = dt.shape
    n_chunks, block_h = triton.cdiv(l, chunk_size), min(16, triton.next_power_of_2(h))
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    steps = torch.empty(b, h, n_chunks, chunk_size, device=dt.device, dtype=torch.float32)
    cum = torch.empty_like(steps)
    with torch.cuda.device(dt.device):
        _decays_kernel[(b * n_chunks, triton.cdiv(h, block_h))](
            dt, A, document_ids, steps, cum, l, h, n_chunks, chunk_size, *dt.stride(),
            PACKED=document_ids is not None, BLOCK_H=block_h, BLOCK_Q=triton.next_power_of_2(chunk_size),
        )  # fmt: skip
    return steps, cum


@triton.jit
def _join(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def _decays_kernel(
    dt_ptr, A_ptr, ids_ptr, steps_ptr, cum_ptr, l, h, n_chunks, chunk_size, stride_b, stride_l, stride_h,
    PACKED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    b, c = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q = tl.arange(0, BLOCK_Q)
    at = c * chunk_size + q
    inside = (q < chunk_size) & (at < l)
    dt_ptr += b.to(tl.int64) * stride_b
    dt = tl.load(
        dt_ptr + at[None, :] * stride_l + heads[:, None] * stride_h,
        mask=inside[None, :] & (heads[:, None] < h),
        other=0.0,
    )
    log_decay = dt * tl.load(A_ptr + heads, mask=heads < h, other=0.0)[:, None]
    if PACKED:
        ids_ptr += b.to(tl.int64) * l
        here = tl.load(ids_ptr + at, mask=inside, other=0)
        before = tl.load(ids_ptr + at - 1, mask=inside & (q > 0), other=0)
        begins = ((here != before) & inside & (q > 0)).to(tl.int32)
        begins = tl.broadcast_to(begins[None, :], (BLOCK_H, BLOCK_Q))
        _, cum = tl.associative_scan((begins, log_decay), 1, _join)
    else:
        cum = tl.cumsum(log_decay, 1)
    out = ((b * h + heads[:, None]).to(tl.int64) * n_chunks + c) * chunk_size + q[None, :]
    mask = (heads[:, None] < h) & (q[None, :] < chunk_size)
    tl.store(steps_ptr + out, dt, mask=mask)
    tl.store(cum_ptr + out, cum, mask=mask)


def rms_norm(x, weight, eps):
    """See model/reference.py. PyTorch's own kernel, which sums in float32 without a float32 copy of x."""
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)


@torch.compiler.disable
def gated_rms_norm(x, z, weight, n_groups, eps):
    """See model/reference.py."""
    return GatedNorm.apply(x, z, weight, n_groups, eps)


class GatedNorm(torch.autograd.Function):
    """mamba_ssm's norm of x * silu(z), with its backward kernel spread over more programs.

    Its own launch gives each multiprocessor one program, which waits for memory row by row.
    """

    @staticmethod
    def forward(ctx, x, z, weight, n_groups, eps):
        d = x.shape[-1]
        rows, gate = x.reshape(-1, d), z.reshape(-1, d)
        y, _, scales = _layer_norm_fwd(
            rows, weight, None, eps, z=gate, group_size=d // n_groups, norm_before_gate=False, is_rms_norm=True
        )
        ctx.save_for_backward(rows, gate, weight, scales)
        ctx.settings = n_groups, eps, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, scales = ctx.saved_tensors
        n_groups, eps, shape = ctx.settings
        n, d = x.shape
        dy = dy.reshape(n, d).contiguous()
        dx, dz = torch.empty_like(x), torch.empty_like(z)
        most = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
        rows = triton.cdiv(n, most)  # of a program
        programs = triton.cdiv(n, rows)
        dweights = torch.empty(programs, d, device=x.device, dtype=torch.float32)
        block = triton.next_power_of_2(d // n_groups)
        with torch.cuda.device(x.device):
            _layer_norm_bwd_kernel[(programs, n_groups)](
                x, weight, None, z, None, dy, dx, dweights, None, dz, None, scales,
                x.stride(0), z.stride(0), 0, dy.stride(0), dx.stride(0), dz.stride(0), d, 0,
                n, d // n_groups, eps, rows, BLOCK_N=block,
                NORM_BEFORE_GATE=False, IS_RMS_NORM=True, num_warps=min(max(block // 256, 1), 8),
            )  # fmt: skip
        return dx.view(shape), dz.view(shape), dweights.sum(0).to(weight.dtype), None, None


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


def mamba_step(xBC, dt, weight, bias, A_log, D, dt_bias, conv, ssm, lengths):
    """See model/reference.py."""
    with torch.cuda.device(xBC.device):
        return single_token.mamba_step(xBC, dt, weight, bias, A_log, D, dt_bias, conv, ssm, lengths)


def attention_step(q, k, v, keys, values, lengths, frequencies=None, magnitude=1.0, scale=None, slopes=None):
    """See model/reference.py."""
    with torch.cuda.device(q.device):
        return single_token.attention_step(q, k, v, keys, values, lengths, frequencies, magnitude, scale, slopes)


def linear(x, weights):
    """See model/reference.py. A kernel of ours for a token or a few, or where weights would have to be joined."""
    n_rows, half = x.shape[:-1].numel(), x.dtype in (torch.bfloat16, torch.float16)
    most = single_token.LINEAR_ROWS if half and len(weights) > 1 else single_token.FEW_ROWS
    if torch.is_grad_enabled() or n_rows > most:
        return reference.linear(x, weights)
    with torch.cuda.device(x.device):
        return single_token.linear(x, weights)


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
