"""The attention mixer: grouped queries, positions as a rotation, a slope or not at all, and an optional gate."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from model.layers import FixedState, Linear, RMSNorm, SplitLinear

YARN_FAST, YARN_SLOW = 32, 1  # turns within the original context: above, an angle is kept; below, it is interpolated


class Attention(nn.Module):
    """Causal self-attention (b, l, d) -> (b, l, d) that stays within documents.

    The gate (arXiv:2505.06708, "G1") is a sigmoid of the layer's input, one value a channel, multiplied onto the
    heads' outputs: a head can say nothing without attending to a sink. qk_norm is RMSNorm over each head's channels
    (arXiv:2302.05442, with RMSNorm as in OLMo 2 and Qwen 3), before the rotation.
    """

    def __init__(self, config, ops):
        super().__init__()
        self.config, self.ops = config, ops
        d_kv = config.n_kv_heads * config.head_dim
        widths = {"q": config.d_model, "k": d_kv, "v": d_kv}
        if config.attention_gate:
            widths["gate"] = config.d_model
        self.in_proj = SplitLinear(config.d_model, widths, ops)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.out_proj = Linear(config.d_model, config.d_model, ops)

    def forward(self, x, packing=None, state=None):
        """state: {} before the first token; keeps "cache", a KVCache of the tokens so far.

        With "lengths" (b,) in it, a row is so long, and padded behind: the cache is that of the row's own tokens.
        """
        config = self.config
        q, k, v, *gate = self.in_proj(x)
        q, k, v = (rearrange(t, "b l (h p) -> b l h p", p=config.head_dim) for t in (q, k, v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(state, FixedState):
            y = self.ops.attention_step(q, k, v, **state, scale=config.attention_multiplier)
        else:
            y = self.attend(q, k, v, packing, state)
        y = rearrange(y, "b l h p -> b l (h p)")
        return self.out_proj(self.ops.sigmoid_gate(y, *gate) if gate else y)

    def attend(self, q, k, v, packing, state):
        """Positions, then attention to the row's tokens so far: q (b, l, h, p); k, v (b, l, k, p) -> (b, l, h, p)."""
        config, l = self.config, q.shape[1]
        lengths = None if state is None else state.pop("lengths", None)
        cache = None if state is None else state.get("cache", KVCache())
        mask = None
        if config.positions == "rope":
            if packing is not None:
                positions = packing.positions
            else:
                positions = torch.arange(l, device=q.device)[None]
                positions = positions if cache is None else cache.positions(positions)
            angles = rope_frequencies(config, q.device)
            q, k = (self.ops.rotary(t, positions, *angles) for t in (q, k))
        if cache is not None:
            state["cache"] = cache = cache.append(k, v)
            k, v, mask = cache.keys, cache.values, cache.mask(l)
        if lengths is not None:
            state["cache"] = cache.drop(l - lengths)
        slopes = alibi_slopes(config.n_heads, q.device) if config.positions == "alibi" else None
        return self.ops.attention(q, k, v, mask, packing=packing, scale=config.attention_multiplier, slopes=slopes)


class KVCache:
    """The keys and values (b, m, k, p) of the m tokens so far, at the front of a buffer that doubles when it is full.

    Nothing changes a cache: append returns another. Both may share the buffer: the first to append writes behind what
    all of them read; a second one, which would overwrite that, takes a copy.
    start (b,): where each row begins, if rows are padded on the left to one length; None: all at 0.
    """

    def __init__(self, buffer=None, length=0, start=None):
        self.buffer, self.length, self.start = buffer, length, start

    @classmethod
    def stack(cls, caches, rows):
        """One cache of the rows of several, in the order of `rows`; shorter ones are padded on the left."""
        if len(caches) == 1:
            return caches[0]
        length = max(cache.length for cache in caches)
        front = [length - cache.length for cache in caches]
        kept = [cache.buffer.tensor[:, :, : cache.length] for cache in caches]
        padded = [F.pad(t, (0, 0, 0, 0, n, 0)) for t, n in zip(kept, front, strict=True)]
        start = [torch.full((t.shape[1],), n, device=t.device) for t, n in zip(kept, front, strict=True)]
        return cls(_Buffer(torch.cat(padded, dim=1)[:, rows]), length, torch.cat(start)[rows])

    def take(self, rows):
        """The cache of these rows (indices), in this order; a row may come several times."""
        start = None if self.start is None else self.start[rows]
        return KVCache(_Buffer(self.buffer.tensor[:, rows, : self.length]), self.length, start)

    def drop(self, n):
        """The cache without the last n (b,) tokens of each row: the others move up to the end."""
        places = torch.arange(self.length, device=n.device) - n[:, None]
        rows = torch.arange(len(n), device=n.device)[:, None]
        start = n if self.start is None else self.start + n
        return KVCache(_Buffer(self.buffer.tensor[:, rows, places.clamp(min=0)]), self.length, start)

    @property
    def keys(self):
        return self.buffer.tensor[0, :, : self.length]

    @property
    def values(self):
        return self.buffer.tensor[1, :, : self.length]

    def append(self, k, v):
        """The cache with the keys and values (b, l, k, p) of the next l tokens."""
        b, l, *head = k.shape
        buffer, end = self.buffer, self.length + l
        if buffer is None or buffer.used > self.length or end > buffer.tensor.shape[2]:
            tensor = k.new_empty(2, b, max(end, 2 * self.length), *head)
            if self.length:
                tensor[:, :, : self.length] = buffer.tensor[:, :, : self.length]
            buffer = _Buffer(tensor)
        buffer.tensor[0, :, self.length : end], buffer.tensor[1, :, self.length : end] = k, v
        buffer.used = end
        return KVCache(buffer, end, self.start)

    def positions(self, offsets):
        """The places in their rows, (b or 1, l), of the tokens that come `offsets` (1, l) after the last one."""
        return offsets + self.length - (0 if self.start is None else self.start[:, None])

    def mask(self, l):
        """(b, 1, l, m): where the last l tokens may look; None if that is everything up to themselves."""
        if self.start is None:
            return None
        key = torch.arange(self.length, device=self.start.device)
        causal = key <= key[-l:, None]
        return causal & (key >= self.start[:, None, None, None])


class _Buffer:
    def __init__(self, tensor):
        self.tensor, self.used = tensor, tensor.shape[2]  # (2, b, capacity, k, p), and how much of it is written


@lru_cache  # a pass asks for them once a layer
@torch.inference_mode(False)
def rope_frequencies(config, device):
    """Turns of each pair of channels a position, (p / 2,) in radians and float32, and what multiplies the rotated.

    Longer contexts: "linear" slows every angle by the factor (arXiv:2306.15595); "ntk" raises the base, so that the
    slowest angle is slowed by the factor and the fastest is not (bloc97's NTK-aware scaling, in arXiv:2309.00071,
    section 3.1); "yarn" slows what turns less than once in the original context, keeps what turns more than 32 times,
    and lengthens queries and keys by 0.1 ln(factor) + 1 (arXiv:2309.00071, sections 3.2 to 3.4).
    """
    p, base, factor = config.rope_dim or config.head_dim, config.rope_theta, config.rope_factor
    if config.rope_scaling == "ntk":
        base *= factor ** (p / (p - 2))
    frequencies = base ** (-torch.arange(0, p, 2, device=device, dtype=torch.float32) / p)
    if config.rope_dim:
        frequencies = F.pad(frequencies, (0, (config.head_dim - p) // 2))  # the other pairs stand still
    if config.rope_scaling == "linear":
        return frequencies / factor, 1.0
    if config.rope_scaling != "yarn":
        return frequencies, 1.0

    def pair_that_turns(times):
        return p * math.log(config.rope_original_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))

    # rounded outwards, as the authors' code and transformers do
    first, last = max(math.floor(pair_that_turns(YARN_FAST)), 0), min(math.ceil(pair_that_turns(YARN_SLOW)), p - 1)
    pairs = torch.arange(p // 2, device=device, dtype=torch.float32)
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / factor * slowed, 0.1 * math.log(factor) + 1


def alibi_slopes(n_heads, device):
    """What each head subtracts from a score for each position of distance, (h,) in float32 (arXiv:2108.12409).

    A geometric row from 2^(-8/n) to 2^-8 for a power of two n; other numbers take the rest from every other slope of
    the next power, as the authors' code does.
    """
    power = 1 << (n_heads.bit_length() - 1)

    def row(n):
        return 2 ** (-8 / n * torch.arange(1, n + 1, device=device, dtype=torch.float32))

    return torch.cat([row(power), row(2 * power)[::2][: n_heads - power]])
