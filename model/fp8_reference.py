"""The functions of model/fp8_kernels.py in plain PyTorch: the truth that they are tested against."""

import torch
import torch.nn.functional as F


def to_8_bits(x, dtype, scale):
    """x * scale, at most the dtype's largest magnitude; NaN where x is not finite."""
    most = torch.finfo(dtype).max
    scaled = (x.float() * scale).clamp(-most, most)
    return torch.where(x.isfinite(), scaled, torch.nan).to(dtype)


def raise_to(seen, x):
    """Raise `seen` to the largest magnitude of x; what is NaN does not count."""
    seen.copy_(torch.maximum(seen, x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).max()))


def cast(x, out, turned, scale, seen):
    """See model/fp8_kernels.py."""
    out.copy_(to_8_bits(x, out.dtype, scale))
    turned.copy_(out.t())
    raise_to(seen, x)


def swiglu(gate_up, out, scale, seen):
    """See model/fp8_kernels.py."""
    gate, up = gate_up.float().chunk(2, dim=1)
    h = F.silu(gate) * up
    out.copy_(to_8_bits(h, out.dtype, scale))
    raise_to(seen, h)


def swiglu_backward(dh, gate_up, h_turned, out, turned, h_scale, scale, seen):
    """See model/fp8_kernels.py."""
    gate, up = gate_up.float().chunk(2, dim=1)
    s, dh = gate.sigmoid(), dh.float()
    silu = gate * s
    dgate_up = torch.cat([dh * up * (s + silu * (1 - s)), dh * silu], dim=1)
    h_turned.copy_(to_8_bits(silu * up, h_turned.dtype, h_scale).t())
    cast(dgate_up, out, turned, scale, seen)
