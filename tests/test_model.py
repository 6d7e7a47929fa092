"""The network: the mixer against its recurrence, causality, documents that cannot see each other, learning."""

import copy
import dataclasses
import math
import pickle
import shutil

import pytest
import torch
from random_models import SHAPE, random_tokens, sharpened

from model import reference
from model.hybrid import HybridLM
from model.mamba2 import Mamba2
from model.reference import causal_conv1d, ssd, ssd_recurrence

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65]  # around the edges of chunks of 16
MIXERS = {
    "mamba": dataclasses.replace(SHAPE, layer_pattern="MM", n_groups=2),
    "attention": dataclasses.replace(SHAPE, layer_pattern="AA"),
    "gated attention": dataclasses.replace(SHAPE, layer_pattern="AA", attention_gate=True),
    "hybrid": dataclasses.replace(SHAPE, layer_pattern="MAM", attention_gate=True),
    "slopes": dataclasses.replace(SHAPE, layer_pattern="AA", positions="alibi", qk_norm=True),
    "no positions": dataclasses.replace(SHAPE, layer_pattern="MA", positions="none", embedding_norm=True),
    "no SwiGLU": dataclasses.replace(SHAPE, layer_pattern="MM", d_ff=0, tied_embeddings=True),
}


@pytest.fixture(params=MIXERS)
def model(request):
    return sharpened(MIXERS[request.param])


def scan_inputs(l, b=2, h=4, p=8, g=2, n=16):
    generator = torch.Generator().manual_seed(l)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    dt, A = draw(b, l, h).exp() / 4, -draw(h).exp()
    inputs = [draw(b, l, h, p), dt, A, draw(b, l, g, n), draw(b, l, g, n), draw(h)]
    return [t.requires_grad_() for t in inputs]


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_scan_equals_the_recurrence_with_gradients(l, packed):
    document_ids = torch.arange(l).div(7, rounding_mode="floor").expand(2, l) if packed else None
    start = None if packed else torch.randn(2, 4, 16, 8)
    results = []
    for scan, extra in ((ssd, (16,)), (ssd_recurrence, ())):
        inputs = scan_inputs(l)
        y, state = scan(*inputs, *extra, document_ids=document_ids, initial_state=start)
        (y.square().sum() + state.sum()).backward()
        results.append([y, state, *(t.grad for t in inputs)])
    for chunked, stepped in zip(*results, strict=True):
        # the same sums in another order, float32
        torch.testing.assert_close(chunked, stepped, rtol=2e-4, atol=2e-4 * stepped.abs().max().item())


def test_recurrence_is_the_equation_of_the_paper():
    x, dt, A, B, C, D = (t.detach().double() for t in scan_inputs(3, b=1, h=1, p=2, g=1, n=2))
    state = torch.zeros(2, 2, dtype=torch.float64)
    for t in range(3):
        state = math.exp(dt[0, t, 0] * A[0]) * state + dt[0, t, 0] * torch.outer(B[0, t, 0], x[0, t, 0])
        expected = C[0, t, 0] @ state + D[0] * x[0, t, 0]
        got = ssd_recurrence(x, dt, A, B, C, D)[0][0, t, 0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # ours accumulates in float32


def test_convolution_equals_torch_conv1d():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    conv = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :9].mT
    torch.testing.assert_close(causal_conv1d(x, weight, bias)[0], torch.nn.functional.silu(conv))


def test_mixer_equals_its_recurrence_token_by_token():
    torch.manual_seed(0)
    mixer = Mamba2(MIXERS["mamba"], reference)
    mixer.init_scan()
    for name, parameter in mixer.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    u = torch.randn(2, 37, SHAPE.d_model)
    state, stepped = {}, []
    for t in range(37):
        stepped.append(mixer(u[:, t : t + 1], state=state))
    torch.testing.assert_close(mixer(u), torch.cat(stepped, dim=1), rtol=1e-4, atol=1e-5)


def test_chunk_size_does_not_change_the_result():
    losses = []
    for chunk_size in (1, 8, 64, 256):
        torch.manual_seed(0)
        model = HybridLM(dataclasses.replace(MIXERS["mamba"], chunk_size=chunk_size))
        losses.append(model(random_tokens(2, 50), targets=random_tokens(2, 50, 1)).item())
    assert max(losses) - min(losses) < 1e-5


def test_a_token_changes_nothing_before_it(model):
    tokens = random_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 21] = (changed[0, 21] + 1) % SHAPE.vocab_size
    before, after = model(tokens), model(changed)
    # a product of other rows may be summed in another order, so equal to rounding; what follows differs by far more
    torch.testing.assert_close(before[:, :21], after[:, :21], rtol=0, atol=1e-6)
    assert (before[:, 21:] - after[:, 21:]).abs().max() > 1e-3


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("edge", [1, 15, 16, 17, 32])  # on and off chunk edges
def test_packed_document_cannot_see_its_neighbours(model, edge, recompute):
    model.recompute = recompute
    assert_middle_document_is_alone(model, edge)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_compiled_layers_keep_documents_apart(model):
    for layer in model.layers[:2]:  # a Mamba-2 and an attention layer: compiling takes its time
        layer.compile()
    assert_middle_document_is_alone(model, edge=17)


def assert_middle_document_is_alone(model, edge):
    l, end = 48, edge + 11
    document_ids = torch.zeros(1, l, dtype=torch.long)
    document_ids[:, edge:], document_ids[:, end:] = 1, 2
    outputs, gradients = [], []
    for seed in (1, 2):
        tokens = random_tokens(1, l, seed)
        tokens[:, edge:end] = random_tokens(1, l, 99)[:, edge:end]  # the middle document stays, its neighbours change
        embedded = []
        handle = model.embedding.register_forward_hook(
            lambda m, i, o, kept=embedded: kept.append(o) or o.retain_grad()
        )
        logits = model(tokens, document_ids=document_ids)
        handle.remove()
        logits[:, edge:end].square().sum().backward()
        outputs.append(logits[:, edge:end])
        gradients.append(embedded[0].grad)
    assert torch.equal(*outputs)
    assert torch.equal(gradients[0][:, edge:end], gradients[1][:, edge:end])
    for gradient in gradients:  # and nothing flows back to the neighbours
        assert gradient[:, :edge].eq(0).all()
        assert gradient[:, end:].eq(0).all()
        assert gradient[:, edge:end].ne(0).any()


def test_packed_loss_equals_one_document_at_a_time(model):
    lengths, start = [5, 16, 1, 27], 0
    tokens, targets = random_tokens(1, 49), random_tokens(1, 49, 1)
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(tokens, targets=targets, document_ids=document_ids).item()
    total = 0.0
    for length in lengths:
        piece = slice(start, start + length)
        total += model(tokens[:, piece], targets=targets[:, piece]).item() * length
        start += length
    assert abs(packed - total / 49) < 1e-5


def test_ignored_targets_do_not_count():
    model = HybridLM(SHAPE)
    tokens, targets = random_tokens(1, 12), random_tokens(1, 12, 1)
    half = targets.clone()
    half[:, 6:] = -100
    torch.testing.assert_close(model(tokens, targets=half), model(tokens[:, :6], targets=targets[:, :6]))


def test_a_few_steps_learn_a_repeated_sequence():
    torch.manual_seed(0)
    model = HybridLM(dataclasses.replace(SHAPE, attention_gate=True))
    tokens = random_tokens(1, 17).repeat(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@torch.no_grad()
def test_a_model_can_be_copied_and_pickled(model):
    tokens = random_tokens(1, 20)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens))
        assert twin.ops is model.ops
        twin.embedding.weight.zero_()
    assert model.embedding.weight.any()
