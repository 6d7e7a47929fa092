"""Each remembered operation with arguments for it, and what it is compared by; for tests with and without a GPU."""

import torch

from model import fp8_kernels, gating, mixer, norm, packed_attention, rotary
from model.layers import Packing

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
H, P, N, G = 2, 16, 16, 1
CHANNELS = H * P + 2 * G * N


class Drawn:
    """Random tensors of a dtype on a device, others for each seed; l: positions in a row."""

    def __init__(self, dtype, device="cpu", l=9, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.l = dtype, device, l

    def __call__(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def rows(self, n=1):
        return [self(2, self.l, 32) for _ in range(n)]

    def mixer(self):
        shapes = (1, self.l, H * P + CHANNELS + H), (CHANNELS, 4), (CHANNELS,), (H,), (H,), (H,), (H * P,)
        return [self(*shape) for shape in shapes]

    def documents(self, packed):
        ids = (torch.arange(self.l, device=self.device) // 4).int()
        return ids.expand(1, self.l).contiguous() if packed else None

    def backward_of_mixer(self, packed):
        inputs, ids = self.mixer(), self.documents(packed)
        _, _, *kept = mixer.mixer_forward.__wrapped__(*inputs, G, 1e-5, ids, None, None)
        return self(1, self.l, H * P), *inputs, *kept, ids, None, None

    def attention(self):
        sizes = (1, self.l, 4, 64), (1, self.l, 2, 64), (1, self.l, 2, 64)
        q, k, v = (self(*size, dtype=torch.bfloat16) for size in sizes)
        return q, k, v, Packing(self.documents(True)), 0.1, packed_attention.SMALL

    def backward_of_attention(self):
        q, k, v, packing, scale, plan = self.attention()
        y, lse = packed_attention.forward.__wrapped__(q, k, v, packing.positions, scale, plan)
        return self(*q.shape, dtype=torch.bfloat16), q, k, v, y, lse, packing.positions, packing.ends, scale, plan

    def scales(self, n=1):
        return [self(1, dtype=torch.float32)[0].abs() for _ in range(n)]


OPERATIONS = {
    "mixer": (mixer.mixer_forward, lambda draw: (*draw.mixer(), G, 1e-5, None, None, None)),
    "packed mixer": (mixer.mixer_forward, lambda draw: (*draw.mixer(), G, 1e-5, draw.documents(True), None, None)),
    "mixer backward": (mixer.mixer_backward, lambda draw: draw.backward_of_mixer(False)),
    "packed mixer backward": (mixer.mixer_backward, lambda draw: draw.backward_of_mixer(True)),
    "norm": (norm.norm_forward, lambda draw: (*draw.rows(2), draw(32), 1e-5, 0.5)),
    "first norm": (norm.norm_forward, lambda draw: (*draw.rows(), None, draw(32), 1e-5, 1.0)),
    "norm backward": (
        norm.norm_backward,
        lambda draw: (*draw.rows(), draw(32), draw(2 * draw.l, dtype=torch.float32).abs(), *draw.rows(2)),
    ),
    "swiglu": (gating.swiglu_forward, lambda draw: draw.rows()),
    "swiglu backward": (gating.swiglu_backward, lambda draw: (*draw.rows(), draw.rows()[0][..., :16])),
    "gate": (gating.gate_forward, lambda draw: draw.rows(2)),
    "gate backward": (gating.gate_backward, lambda draw: draw.rows(3)),
    "attention": (
        packed_attention.forward,
        lambda draw: [arg.positions if isinstance(arg, Packing) else arg for arg in draw.attention()],
    ),
    "attention backward": (packed_attention.backward, lambda draw: draw.backward_of_attention()),
    "rotation": (
        rotary.turn,
        lambda draw: (
            draw(2, draw.l, 2, 8), torch.arange(draw.l, device=draw.device)[None], draw(4, dtype=torch.float32), 1.0,
            False,
        ),
    ),
}  # fmt: skip
WITH_FP8 = {
    "cast of rows": (fp8_kernels.cast, lambda draw: (*draw.scales(2), E4M3, 0, draw(16, 32), draw(32, 32))),
    "cast of columns": (fp8_kernels.cast, lambda draw: (*draw.scales(2), E5M2, 1, draw(16, 32), draw(16, 16))),
    "swiglu in 8 bits": (fp8_kernels.swiglu, lambda draw: (draw(16, 32), *draw.scales(2), E4M3)),
    "swiglu backward in 8 bits": (
        fp8_kernels.swiglu_backward, lambda draw: (draw(16, 16), draw(16, 32), *draw.scales(3), E4M3, E5M2)
    ),
}  # fmt: skip


def assert_same_bits(got, want):
    """Bit for bit, laid out alike."""
    for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def copies(args):
    return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]


def assert_same_from_its_tape(name, dtype, device="cpu", l=9):
    """Taped for one draw of arguments and played for another, a second size in between."""
    function, make = (OPERATIONS | WITH_FP8)[name]
    function.tapes.clear()
    for seed, length in ((1, l), (2, l + 2), (3, l)):
        args = make(Drawn(dtype, device, length, seed))
        own, others = copies(args), copies(args)
        assert_same_bits(function(*own), function.__wrapped__(*others))
        written = [tuple(arg for arg in each if isinstance(arg, torch.Tensor)) for each in (own, others)]
        assert_same_bits(*written)
    assert function.tapes and all(tape.alike for tape in function.tapes.values())
