"""The gated norm of model/reference.py as two Triton kernels, each of which reads and writes every value once.

A program takes whole groups of channels of some rows into registers.
"""

import torch
import triton
import triton.language as tl

from model.convolution import sigmoid
from model.launching import launch
from model.tiles import in_rows

# rows of a tile, for a group of 4096 channels, tiles of a program, how many of them are under way, warps (H200)
FORWARD = {"BLOCK_R": 1, "TILES": 1, "num_warps": 16}
BACKWARD = {"BLOCK_R": 1, "TILES": 64, "STAGES": 3, "num_warps": 8}
CHANNELS = 4096
PROGRAMS = 512  # as many, at least, before one takes several tiles


@torch.compiler.disable
def gated_rms_norm(x, z, weight, n_groups, eps):
    """See model/reference.py. The rows of x and of z may lie apart, as in a wider tensor."""
    return GatedNorm.apply(x, z, weight, n_groups, eps)


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, n_groups, eps):
        y, scales = norm_forward(x, z, weight, n_groups, eps)
        ctx.save_for_backward(x, z, weight, scales)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dz, dweight = norm_backward(dy, *ctx.saved_tensors)
        return dx, dz, dweight.to(ctx.saved_tensors[2].dtype), None, None


def norm_forward(x, z, weight, n_groups, eps, config=FORWARD):
    """y, in z's dtype, and what each group of a row was multiplied by, (b, l, g) in float32."""
    (b, l, d), g = x.shape, n_groups
    x, z = in_rows(x), in_rows(z)
    y = torch.empty(b, l, d, device=x.device, dtype=z.dtype)
    scales = torch.empty(b, l, g, device=x.device, dtype=torch.float32)
    config = fitting(config, b * l, d // g, x.element_size())
    grid = triton.cdiv(b * l, config["BLOCK_R"] * config["TILES"]), g
    with torch.cuda.device_of(x):
        launch(
            _gated_norm_forward_kernel, grid,
            x, z, weight, y, scales, b * l, d // g, x.stride(0), z.stride(0), eps, **config,
        )  # fmt: skip
    return y, scales


def norm_backward(dy, x, z, weight, scales, dz=None, dweight=None, config=BACKWARD):
    """Gradients of x, of z and, in float32, of weight.

    dz (b, l, d), whose rows may lie apart, and dweight: where to put the second and the third, if given.
    """
    (b, l, d), g = x.shape, scales.shape[-1]
    dx = torch.empty(b, l, d, device=x.device, dtype=x.dtype)
    if dz is None:
        dz = torch.empty(b, l, d, device=z.device, dtype=z.dtype)
    dy, x, z, dz_rows = in_rows(dy), in_rows(x), in_rows(z), dz.flatten(0, 1)
    config = fitting(config, b * l, d // g, x.element_size())
    programs = triton.cdiv(b * l, config["BLOCK_R"] * config["TILES"])
    dweights = torch.empty(programs, d, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            _gated_norm_backward_kernel, (programs, g),
            dy, x, z, weight, scales, dx, dz_rows, dweights, b * l, d // g,
            dy.stride(0), x.stride(0), z.stride(0), dz_rows.stride(0), **config,
        )  # fmt: skip
    return dx, dz, torch.sum(dweights, 0, out=dweight)


def fitting(config, n, group, element):
    """A config for n rows, in groups of so many channels of `element` bytes: as many values of a tile, and of a warp,
    where it can be, fewer tiles where programs would be few, and those under way in 48 KiB of shared memory."""
    block = triton.next_power_of_2(group)
    rows = max(config["BLOCK_R"] * CHANNELS // block, 1)
    config = {**config, "BLOCK_R": rows, "BLOCK_D": block}
    config["TILES"] = min(config["TILES"], triton.next_power_of_2(triton.cdiv(n, rows * PROGRAMS)))
    config["num_warps"] = min(config["num_warps"] * max(block // CHANNELS, 1), 32)
    if "STAGES" in config:
        config["STAGES"] = min(config["STAGES"], 1 + 48 * 1024 // (3 * rows * block * element))
    return config


@triton.jit
def _gated_norm_forward_kernel(
    x_ptr, z_ptr, weight_ptr, y_ptr, scales_ptr, n, d, x_stride, z_stride, eps,
    BLOCK_R: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # gated = x silu(z); y = gated scale weight, scale = 1 / sqrt(mean gated^2 + eps); d channels in each of the groups
    group, groups = tl.program_id(1), tl.num_programs(1)
    within = tl.arange(0, BLOCK_D)[None, :]
    channels = group * d + within
    weight = tl.load(weight_ptr + channels, mask=within < d, other=0.0).to(tl.float32)
    for tile in range(TILES):
        rows = ((tl.program_id(0) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        mask = (rows < n) & (within < d)
        x = tl.load(x_ptr + rows * x_stride + channels, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + rows * z_stride + channels, mask=mask, other=0.0).to(tl.float32)
        gated = x * (z * sigmoid(z))
        scale = tl.rsqrt(tl.sum(gated * gated, axis=1, keep_dims=True) / d + eps)
        tl.store(y_ptr + rows * (groups * d) + channels, gated * scale * weight, mask=mask)
        tl.store(scales_ptr + rows * groups + group, scale, mask=rows < n)


@triton.jit
def _gated_norm_backward_kernel(
    dy_ptr, x_ptr, z_ptr, weight_ptr, scales_ptr, dx_ptr, dz_ptr, dweights_ptr, n, d,
    dy_stride, x_stride, z_stride, dz_stride,
    BLOCK_R: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # With normed = gated scale: dgated = scale (dy weight - normed mean(dy weight normed)), and on to x and z
    group, groups = tl.program_id(1), tl.num_programs(1)
    within = tl.arange(0, BLOCK_D)[None, :]
    channels = group * d + within
    weight = tl.load(weight_ptr + channels, mask=within < d, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        rows = ((tl.program_id(0) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        mask = (rows < n) & (within < d)
        dy = tl.load(dy_ptr + rows * dy_stride + channels, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + channels, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + rows * z_stride + channels, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + rows * groups + group, mask=rows < n, other=0.0)
        gate = sigmoid(z)
        silu = z * gate
        normed = x * silu * scale
        dweight += dy * normed
        dnormed = dy * weight
        along = tl.sum(dnormed * normed, axis=1, keep_dims=True) / d
        dgated = scale * (dnormed - normed * along)
        tl.store(dx_ptr + rows * (groups * d) + channels, dgated * silu, mask=mask)
        dz = dgated * x * (gate + silu * (1.0 - gate))
        tl.store(dz_ptr + rows * dz_stride + channels, dz, mask=mask)
    at = dweights_ptr + tl.program_id(0).to(tl.int64) * (groups * d) + group * d + tl.arange(0, BLOCK_D)
    tl.store(at, tl.sum(dweight, axis=0), mask=tl.arange(0, BLOCK_D) < d)
