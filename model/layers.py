"""What both kinds of layer are made of: where documents lie, fused products, norm, SwiGLU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.reference import rms_norm


@dataclass(frozen=True)
class Packing:
    """Where the documents packed into each row lie; worked out once a forward pass and read by every layer.

    document_ids, positions (b, l): the document, and the place in it, of each position; mask (b, 1, l, l): True where
    a position may look at another.
    """

    document_ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, document_ids):
        l = document_ids.shape[1]
        index = torch.arange(l, device=document_ids.device)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        positions = index - (index * starts).cummax(dim=1).values
        same = document_ids[:, :, None] == document_ids[:, None, :]
        return cls(document_ids, positions, (same & (index[:, None] >= index)).unsqueeze(1))


class SplitLinear(nn.Module):
    """Several bias-free linear maps of one input as one product.

    Each keeps a weight of its own, (out, d_in), so that an optimizer that works on whole matrices sees the matrices
    that the mathematics has (queries and keys, B and C ...). Returns the outputs in the order of `widths`.
    """

    def __init__(self, d_in, widths):
        super().__init__()
        self.widths = dict(widths)
        for name, width in self.widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(width, d_in)))

    def forward(self, x):
        weight = torch.cat([getattr(self, name) for name in self.widths])
        return F.linear(x, weight).split(list(self.widths.values()), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.in_proj = SplitLinear(d_model, {"gate": d_ff, "up": d_ff})
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        gate, up = self.in_proj(x)
        return self.out_proj(F.silu(gate) * up)
