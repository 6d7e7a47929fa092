"""What a layer's operations are counted to keep and to hold, against the kernels in Triton's interpreter."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import interpreted  # noqa: F401 - before any kernel
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import fp8, fused, scan_backward
from model.config import get_preset
from model.fp8 import CURRENT_STEPS, use_fp8
from model.gating import sigmoid_gate, swiglu
from model.hybrid import Layer
from model.layers import Packing
from model.mixer import mixer
from model.norm import add_rms_norm, rms_norm
from model.rotary import rotary
from train.kept import layer_operations
from train.memory import layer_moments

TOKENS, D_MODEL = 64, 128
SMALL = 1024  # bytes that do not grow with the layer: document ids, rotation frequencies
LAYERS = {
    "mamba": {"layer_pattern": "M", "mamba_head_dim": 16},
    "mamba without SwiGLU": {"layer_pattern": "M", "d_ff": 0},
    "attention": {"layer_pattern": "A"},
    "gated attention": {"layer_pattern": "A", "attention_gate": True},
    "normed attention": {"layer_pattern": "A", "qk_norm": True},
}


OPS = SimpleNamespace(
    products=fused.products, mixer=mixer, add_rms_norm=add_rms_norm, rms_norm=rms_norm, swiglu=swiglu,
    sigmoid_gate=sigmoid_gate, rotary=rotary, attention=fused.attention,
)  # fmt: skip


def cast(scale, seen, dtype, dim, *parts):
    x = torch.cat([part.to(dtype) for part in parts], dim)
    return x, x.t().contiguous()


def swiglu_backward(dh, gate_up, scale_h, scale, seen, dtype, gradient_dtype):
    return dh.t().to(dtype).contiguous(), gate_up.to(gradient_dtype), gate_up.t().to(gradient_dtype).contiguous()


SILENT = SimpleNamespace(  # the kernels' results, without the arithmetic: those of a CPU work in float32
    cast=cast, swiglu=lambda gate_up, scale, seen, dtype: gate_up.chunk(2, -1)[0].to(dtype),
    swiglu_backward=swiglu_backward,
)  # fmt: skip


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were; each storage once."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.alive = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, storage, size):
        self.alive.discard(storage)
        self.now -= size


def layer_of(name, in_8_bits):
    shape = {"d_model": D_MODEL, "n_heads": 2, "n_kv_heads": 1, "d_ff": 96, "seq_len": TOKENS} | LAYERS[name]
    config = replace(get_preset("nano"), **shape)
    layer = Layer(config, config.layer_pattern, OPS).bfloat16().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if in_8_bits:
        use_fp8(layer).steps = CURRENT_STEPS  # from then on a factor is cast once
    operations = layer_operations(config, config.layer_pattern, fp8=in_8_bits)
    return layer, operations


def inputs():
    x, update = (torch.randn(1, TOKENS, D_MODEL, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    packing = Packing(torch.arange(TOKENS)[None] // 32)
    return x, update, packing


@pytest.mark.parametrize("in_8_bits", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_what_is_counted(name, in_8_bits):
    layer, operations = layer_of(name, in_8_bits)
    kept, own = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _ = layer(*inputs())
    counted = sum(o.keeps * TOKENS + o.copies for o in operations)
    assert 0 <= sum(kept.values()) - counted < SMALL


def let_go(parameter):
    parameter.grad = None
    gc.collect(1)  # what the interpreter's last kernel was given


@pytest.mark.parametrize("in_8_bits", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", ["mamba", "mamba without SwiGLU", "attention", "gated attention"])
def test_a_backward_pass_holds_what_is_counted(name, in_8_bits, monkeypatch):
    monkeypatch.setattr(scan_backward, "PROGRAMS", 0)  # as with many rows, whose programs need not share a group
    join = fused.joined
    monkeypatch.setattr(fused, "joined", lambda weights: (gc.collect(1), join(weights))[1])
    monkeypatch.setattr(fp8, "kernels_for", lambda x: SILENT)
    monkeypatch.setattr(fp8, "multiply", lambda a, b, *_: torch.zeros(len(a), len(b), dtype=torch.bfloat16))
    layer, operations = layer_of(name, in_8_bits)
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(let_go)
    x, update, packing = inputs()
    sum(layer(x, update, packing)).float().sum().backward()  # tapes what it does (model/launching.py)
    with Allocated([*layer.parameters(), x, update]) as allocated:
        loss = sum(layer(x, update, packing)).float().sum()
        gc.collect(1)
        loss.backward()
    moments = layer_moments(operations, TOKENS, 2, 2 * D_MODEL * TOKENS)
    most = max(alive + workspace for alive, workspace, _ in moments)
    if name.startswith("mamba"):
        config = layer.mixer.config
        most += 2 * 4 * config.d_inner * config.d_state  # gradients of a row's first and last state
    assert most == pytest.approx(allocated.most, rel=0.03)


def test_parameters_whose_gradients_come_are_all_of_a_layers():
    for name in LAYERS:
        for in_8_bits in (False, True):
            layer, operations = layer_of(name, in_8_bits)
            counted = sum(o.parameters for o in operations)
            assert counted == pytest.approx(sum(p.numel() for p in layer.parameters()), abs=2 * D_MODEL)
