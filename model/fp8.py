"""Training with the layers' matrix products in 8-bit floats (arXiv:2209.05433).

y = x W^T takes x and W as e4m3 (three bits of mantissa, to 448); dx = dy W and dW = dy^T x take dy as e5m2 (two bits,
to 57344). The sums are float32 and the results of x's dtype. Each factor is multiplied by a power of two that brings
its largest magnitude near the format's, and the product is divided by them again.

A scale comes from the optimizer steps before, so that a factor is read once: cast, turned and measured in one pass
(model/fp8_kernels.py). Within a step no scale changes, and all ranks have the same: what a sequence is rounded to does
not depend on where it is worked on, and recomputing a layer gives the same numbers. The first CURRENT_STEPS steps,
in which magnitudes change fast, measure each factor first and take the scale from that.

Weights stay as they are, and so do checkpoints: only a module in training mode works in 8 bits.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.config import FP8_MULTIPLE
from model.layers import Linear, SplitLinear, SwiGLU, as_one

ROLES = ("x", "weight", "dy")
DTYPE = {"x": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "dy": torch.float8_e5m2}
# How much larger than the largest of before a value may be: beyond, it is cut. A power of two costs no precision as
# long as small values stay above the format's smallest, and e5m2 has range to spare.
HEADROOM = {"x": 2.0, "weight": 2.0, "dy": 4.0}
# Weights that start at zero, and the gradients behind them, grow three- and twofold in a warm-up's first steps, and by
# less than HEADROOM from then on.
CURRENT_STEPS = 4
FORGET = 0.9  # a step; a spike is forgotten by half in seven
# Whether the tensor cores add up in fewer bits than float32, which is faster: the sums of the forward pass are short,
# those of dW as long as a micro-batch has tokens.
FAST_SUM = {"y": True, "dx": True, "dW": False}


def why_not_fp8():
    """What 8-bit products lack here, in one line; None if nothing. Without a GPU they are worked out in float32."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        name = torch.cuda.get_device_name()
        return f"{name} has no 8-bit products (capability {capability[0]}.{capability[1]}, and they need 8.9)"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def use_fp8(model):
    """Let the layers' products of a model run in 8 bits; returns their Scales. Raises ValueError if none can.

    Embedding, head, convolutions and norms are not among them. A product with a width that is no multiple of 16, which
    the tensor cores need, is left as it is.
    """
    modules = [m for m in model.modules() if isinstance(m, Linear | SplitLinear)]
    fitting = [m for m in modules if not any(n % FP8_MULTIPLE for w in m.parameters() for n in w.shape)]
    if not fitting:
        raise ValueError(
            f"--fp8 has no product to run: each of {len(modules)} has a width that is no multiple of {FP8_MULTIPLE}"
        )
    scales = Scales(len(fitting), len(modules))
    for index, module in enumerate(fitting):
        module.fp8 = Site(scales, index)
    for module in model.modules():
        if isinstance(module, SwiGLU) and module.in_proj.fp8 and module.out_proj.fp8:
            module.fp8 = FusedSwiGLU(module.in_proj.fp8, module.out_proj.fp8)
    return scales


class Scales:
    """What each factor of each product is multiplied by: one power of two for its x, its weight and its dy.

    largest (products, 3): the largest magnitude in the optimizer steps before, forgotten by a tenth a step.
    seen (products, 3): that of this step so far, on this rank.
    """

    def __init__(self, n_products, n_all):
        self.n_products, self.n_all, self.steps = n_products, n_all, 0
        self._put(torch.zeros(n_products, len(ROLES)), torch.zeros(n_products, len(ROLES)))

    def _put(self, largest, seen):
        most = [torch.finfo(DTYPE[role]).max / HEADROOM[role] for role in ROLES]
        self.most = torch.tensor(most, device=largest.device)
        self.largest, self.seen = largest, seen
        # each number at an address of 16 bytes, or cuBLASLt refuses it
        self.scale, self.inverse = torch.ones(2, *largest.shape, 4, device=largest.device)[..., 0]
        self._set()
        # single numbers, as the kernels take them; they follow the tensors
        self.places = [
            {role: tuple(t[i, r] for t in (self.scale, self.inverse, self.seen)) for r, role in enumerate(ROLES)}
            for i in range(self.n_products)
        ]

    def _set(self):
        self.scale.copy_(power_of_two(self.largest, self.most))
        self.inverse.copy_(1 / self.scale)

    def place(self, index, role, device):
        """(scale, its inverse, seen) of a factor, on the device that the model is on by now."""
        if self.seen.device != device:
            self._put(self.largest.to(device), self.seen.to(device))
        return self.places[index][role]

    @property
    def current(self):
        """Whether scales are still taken from the factors themselves."""
        return self.steps < CURRENT_STEPS

    @torch.no_grad()
    def end_step(self):
        """Make this step's magnitudes count from the next on. All ranks call it, after each optimizer step."""
        seen = torch.where(self.seen.isfinite(), self.seen, 0)
        if dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        self.largest.mul_(FORGET)
        torch.maximum(self.largest, seen, out=self.largest)
        self._set()
        self.seen.zero_()
        self.steps += 1

    def state(self):
        """For the checkpoint: a resumed run rounds as an unbroken one."""
        return {"steps": self.steps, "largest": self.largest.tolist()}

    def load(self, state):
        """state: what state() gave, of the checkpoint a run goes on from."""
        self.steps = state["steps"]
        largest = torch.tensor(state["largest"], device=self.largest.device)
        self._put(largest, torch.zeros_like(largest))


def power_of_two(largest, most):
    """The largest power of two that brings `largest` to `most` or below, float32; 1 for 0."""
    ratio = (most / largest).clamp(2.0**-100, 2.0**100)
    power = (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return torch.where(largest > 0, power, 1.0)


class Site:
    """One product of a model, forward and backward, with its scales."""

    def __init__(self, scales, index):
        self.scales, self.index = scales, index

    def takes(self, x):
        """Whether the product of x (..., d_in) can be in 8 bits: a token that is decoded cannot."""
        return x.numel() // x.shape[-1] % FP8_MULTIPLE == 0

    @torch.compiler.disable
    def __call__(self, x, weights, split=()):
        """x (..., d_in) times each of the weights (width, d_in): (..., widths), or parts of it, `split` wide."""
        y = Product.apply(x, self, split or (sum(map(len, weights)),), *weights)
        return y if split else y[0]

    def scaled(self, role, device, write):
        """What write(scale, seen) makes of this factor in 8 bits, the scale and its inverse."""
        scale, inverse, seen = self.scales.place(self.index, role, device)
        if self.scales.current:
            largest = torch.zeros_like(seen)
            write(scale, largest)  # to learn the largest
            scale = power_of_two(largest, self.scales.most[ROLES.index(role)])
            inverse = 1 / scale
        return write(scale, seen), scale, inverse

    def cast(self, role, parts, dim):
        """The 2-d `parts`, joined along dim, in 8 bits: (n, m), its transpose (m, n), and the scale's inverse."""
        kernels = kernels_for(parts[0])
        (out, turned), _, inverse = self.scaled(
            role, parts[0].device, lambda scale, seen: kernels.cast(scale, seen, DTYPE[role], dim, *parts)
        )
        return out, turned, inverse

    def cast_weights(self, weights):
        """cast, of matrices by rows."""
        one = as_one(weights)
        return self.cast("weight", weights if one is None else [one], dim=0)


def kernels_for(x):
    return import_module("model.fp8_kernels" if x.is_cuda else "model.fp8_reference")


def multiply(a, b, inverse_a, inverse_b, dtype, fast):
    """a (n, k) b (m, k)^T, both in 8 bits, times the inverses of their scales: (n, m) in dtype."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, out_dtype=dtype, use_fast_accum=fast)
    return exact_product(a, b, inverse_a, inverse_b, dtype)


def exact_product(a, b, inverse_a, inverse_b, dtype, fast=False):
    """multiply's twin, in float32."""
    return (F.linear(a.float(), b.float()) * (inverse_a * inverse_b)).to(dtype)


def as_rows(x):
    """(..., m) -> (n, m), rows at any stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class Product(torch.autograd.Function):
    """Of x and the transposes, weights joined by rows. What is kept are x and W by columns, in 8 bits."""

    @staticmethod
    def forward(ctx, x, site, split, *weights):
        ctx.set_materialize_grads(False)
        x8, x_turned, inverse_x = site.cast("x", [as_rows(x)], dim=0)
        weight8, weight_turned, inverse_weight = site.cast_weights(weights)
        y = multiply(x8, weight8, inverse_x, inverse_weight, x.dtype, FAST_SUM["y"])
        ctx.save_for_backward(x_turned, weight_turned)
        ctx.site, ctx.split, ctx.shape, ctx.dtype = site, split, x.shape, x.dtype
        ctx.inverses, ctx.widths = (inverse_x, inverse_weight), [len(weight) for weight in weights]
        return y.view(*x.shape[:-1], -1).split(split, dim=-1)

    @staticmethod
    def backward(ctx, *dys):
        x_turned, weight_turned = ctx.saved_tensors
        inverse_x, inverse_weight = ctx.inverses
        n = x_turned.shape[1]
        parts = [
            torch.zeros(n, width, dtype=ctx.dtype, device=x_turned.device) if dy is None else as_rows(dy)
            for dy, width in zip(dys, ctx.split, strict=True)
        ]
        dy8, dy_turned, inverse = ctx.site.cast("dy", parts, dim=1)
        dx = multiply(dy8, weight_turned, inverse, inverse_weight, ctx.dtype, FAST_SUM["dx"])
        dweight = multiply(dy_turned, x_turned, inverse, inverse_x, ctx.dtype, FAST_SUM["dW"])
        return dx.view(ctx.shape), None, None, *dweight.split(ctx.widths)


class FusedSwiGLU:
    """A SwiGLU whose both products are in 8 bits: what lies between them is written in 8 bits by the same kernel."""

    def __init__(self, inner, outer):
        self.inner, self.outer = inner, outer

    def takes(self, x):
        return self.inner.takes(x)

    @torch.compiler.disable
    def __call__(self, x, gate, up, down):
        """x (..., d); gate, up (f, d) and down (d, f) -> (..., d)."""
        return SwiGLUProduct.apply(x, self.inner, self.outer, gate, up, down)


class SwiGLUProduct(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)). The product of gate and up is kept; h is worked out again from it."""

    @staticmethod
    def forward(ctx, x, inner, outer, gate, up, down):
        kernels = kernels_for(x)
        x8, x_turned, inverse_x = inner.cast("x", [as_rows(x)], dim=0)
        in8, in_turned, inverse_in = inner.cast_weights([gate, up])
        gate_up = multiply(x8, in8, inverse_x, inverse_in, x.dtype, FAST_SUM["y"])
        h8, scale_h, inverse_h = outer.scaled("x", x.device, lambda *to: kernels.swiglu(gate_up, *to, DTYPE["x"]))
        out8, out_turned, inverse_out = outer.cast("weight", [down], dim=0)
        y = multiply(h8, out8, inverse_h, inverse_out, x.dtype, FAST_SUM["y"])
        ctx.save_for_backward(x_turned, in_turned, gate_up, out_turned)
        ctx.sites, ctx.shape, ctx.dtype = (inner, outer), x.shape, x.dtype
        ctx.scales = inverse_x, inverse_in, scale_h, inverse_h, inverse_out
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x_turned, in_turned, gate_up, out_turned = ctx.saved_tensors
        inverse_x, inverse_in, scale_h, inverse_h, inverse_out = ctx.scales
        (inner, outer), dtype = ctx.sites, ctx.dtype
        kernels = kernels_for(dy)
        dy8, dy_turned, inverse = outer.cast("dy", [as_rows(dy)], dim=1)
        dh = multiply(dy8, out_turned, inverse, inverse_out, dtype, FAST_SUM["dx"])

        def write(scale, seen):
            return kernels.swiglu_backward(dh, gate_up, scale_h, scale, seen, DTYPE["x"], DTYPE["dy"])

        (h_turned, d8, d_turned), _, inverse_d = inner.scaled("dy", dy.device, write)
        ddown = multiply(dy_turned, h_turned, inverse, inverse_h, dtype, FAST_SUM["dW"])
        dx = multiply(d8, in_turned, inverse_d, inverse_in, dtype, FAST_SUM["dx"])
        dgate, dup = multiply(d_turned, x_turned, inverse_d, inverse_x, dtype, FAST_SUM["dW"]).chunk(2)
        return dx.view(ctx.shape), None, None, dgate, dup, ddown
