"""What both kinds of layer are made of: where documents lie, products, norm, SwiGLU.

A product's `fp8`, where model/fp8.py has set one, is how it runs in training.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn


class Packing:
    """Where the documents packed into each row lie; made once a forward pass and read by every layer.

    document_ids, positions (b, l), int32: the document, counted from 0 in each row, and the place in it, of each
    position. What only some operations need is worked out when the first of them asks.
    """

    def __init__(self, document_ids):
        """document_ids (b, l): any numbers; a document begins where the number changes."""
        index = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32)
        self.starts = torch.ones_like(document_ids, dtype=torch.bool)
        self.starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.document_ids = self.starts.cumsum(dim=1, dtype=torch.int32) - 1
        self.positions = index - (index * self.starts).cummax(dim=1).values

    @cached_property
    def mask(self):
        """(b, 1, l, l), True where a position may look at another: earlier in its document, or itself."""
        ids = self.document_ids
        return (ids[:, :, None] == ids[:, None, :]).tril().unsqueeze(1)

    @cached_property
    def ends(self):
        """(b, l) int32: the place in the row that follows the last of each position's document."""
        l = self.starts.shape[1]
        index = torch.arange(1, l + 1, device=self.starts.device, dtype=torch.int32)
        last = F.pad(self.starts[:, 1:], (0, 1), value=True)
        return torch.where(last, index, l).flip(1).cummin(dim=1).values.flip(1)

    @cached_property
    def cu_seqlens(self):
        """(documents + 1,) int32: where each document begins in the rows laid end to end, and where the last ends.

        Waits for the GPU, since the number of documents is a shape.
        """
        begins = self.starts.flatten().nonzero().flatten()
        return F.pad(begins, (0, 1), value=self.starts.numel()).int()


def as_one(weights):
    """The matrices (n, k) as one, by rows, where they lie behind each other in memory; None elsewhere.

    ZeRO-1 and 2 lay all of a group's parameters so, in their order; ZeRO-3 those that it gathers (train/traffic.py).
    """
    first, n, end = weights[0], 0, weights[0].data_ptr()
    if end % 16:
        return None  # a product's kernel would be another
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return None
        n, end = n + weight.shape[0], end + weight.nbytes
    memory = first.untyped_storage()
    if end > memory.data_ptr() + memory.nbytes():
        return None  # neighbours by chance
    return first.detach().as_strided((n, first.shape[1]), (first.shape[1], 1))


class Linear(nn.Linear):
    """A bias-free linear map."""

    fp8 = None

    def __init__(self, d_in, d_out, ops):
        super().__init__(d_in, d_out, bias=False)
        self.ops = ops

    def forward(self, x):
        if self.fp8 and self.training and self.fp8.takes(x):
            return self.fp8(x, [self.weight])
        return self.ops.products(x, [self.weight])


class SplitLinear(nn.Module):
    """Several bias-free linear maps of one input as one product.

    Each keeps a weight of its own, (out, d_in), so that an optimizer that works on whole matrices sees the matrices
    that the mathematics has (queries and keys, B and C ...). Returns the outputs in the order of `widths`.
    """

    fp8 = None

    def __init__(self, d_in, widths, ops):
        super().__init__()
        self.widths, self.ops = dict(widths), ops
        for name, width in self.widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(width, d_in)))

    def forward(self, x, split=None):
        """split: other widths to return the outputs in, where neighbours are to stay together; (): all as they lie."""
        weights = [getattr(self, name) for name in self.widths]
        if split is None:
            split = tuple(self.widths.values())
        if self.fp8 and self.training and self.fp8.takes(x):
            return self.fp8(x, weights, split)
        product = self.ops.products(x, weights)
        return product.split(split, dim=-1) if split else product


class FixedState(dict):
    """A layer's decoding state in tensors that stay where they are: a step of one token changes them (decode.py)."""


class RMSNorm(nn.Module):
    def __init__(self, d, eps, ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps, self.ops = eps, ops

    def forward(self, x):
        return self.ops.rms_norm(x, self.weight, self.eps)


class AddNorm(RMSNorm):
    """The norm in front of a mixer, a SwiGLU or the head: it first adds what the one before wrote to the stream."""

    def __init__(self, d, eps, ops, multiplier):
        super().__init__(d, eps, ops)
        self.multiplier = multiplier

    def forward(self, x, update):
        """x + multiplier * update, and its norm. update None: nothing was written yet."""
        return self.ops.add_rms_norm(x, update, self.weight, self.eps, self.multiplier)


class SwiGLU(nn.Module):
    """out_proj(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    fp8 = None

    def __init__(self, d_model, d_ff, ops):
        super().__init__()
        self.ops = ops
        self.in_proj = SplitLinear(d_model, {"gate": d_ff, "up": d_ff}, ops)
        self.out_proj = Linear(d_ff, d_model, ops)

    def forward(self, x):
        if self.fp8 and self.training and self.fp8.takes(x):
            return self.fp8(x, self.in_proj.gate, self.in_proj.up, self.out_proj.weight)
        return self.out_proj(self.ops.swiglu(self.in_proj(x, split=())))
