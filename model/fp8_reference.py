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


def cast(scale, seen, dtype, dim, *parts):
    """See model/fp8_kernels.py."""
    x = torch.cat(parts, dim)
    out = to_8_bits(x, dtype, scale)
    raise_to(seen, x)
    return out, out.t().contiguous()


def swiglu(gate_up, scale, seen, dtype):
    """See model/fp8_kernels.py."""
    gate, up = gate_up.float().chunk(2, dim=1)
    h = F.silu(gate) * up
    raise_to(seen, h)
    return to_8_bits(h, dtype, scale)


def swiglu_backward(dh, gate_up, h_scale, scale, seen, h_dtype, dtype):
    """See model/fp8_kernels.py."""
    gate, up = gate_up.float().chunk(2, dim=1)
    s, dh = gate.sigmoid(), dh.float()
    silu = gate * s
    dgate_up = torch.cat([dh * up * (s + silu * (1 - s)), dh * silu], dim=1)
    h_turned = to_8_bits(silu * up, h_dtype, h_scale).t().contiguous()
    return h_turned, *cast(scale, seen, dtype, 1, dgate_up)
