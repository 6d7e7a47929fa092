"""The attention mixer: grouped queries, rotary positions, and an optional sigmoid gate on the output."""

import torch
from einops import rearrange
from torch import nn

from model.layers import SplitLinear
from model.reference import attention, rotary


class Attention(nn.Module):
    """Causal self-attention (b, l, d) -> (b, l, d) that stays within documents.

    The gate (arXiv:2505.06708, "G1") is a sigmoid of the layer's input, one value a channel, multiplied onto the
    heads' outputs: a head can say nothing without attending to a sink.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        d_kv = config.n_kv_heads * config.head_dim
        widths = {"q": config.d_model, "k": d_kv, "v": d_kv}
        if config.attention_gate:
            widths["gate"] = config.d_model
        self.in_proj = SplitLinear(config.d_model, widths)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x, packing=None, state=None):
        """state: {} before the first token; keeps "k" and "v", (b, positions so far, kv heads, head_dim)."""
        q, k, v, *gate = self.in_proj(x)
        q, k, v = (rearrange(t, "b l (h p) -> b l h p", p=self.head_dim) for t in (q, k, v))
        past = state["k"].shape[1] if state else 0
        if packing is not None:
            positions = packing.positions
        else:
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        if state is not None:
            if past:
                k, v = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
            state.update(k=k, v=v)
        y = rearrange(attention(q, k, v, None if packing is None else packing.mask), "b l h p -> b l (h p)")
        return self.out_proj(y * gate[0].sigmoid() if gate else y)
