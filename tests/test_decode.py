"""The decoder of fixed tensors against HybridLM.step, logit by logit; on the CPU it runs without a graph."""

import pytest
import torch
from random_models import SHAPE, random_tokens
from test_generate import PROMPTS, SHAPES, build

from model.decode import ROOM, Decoder, has_hooks
from model.generate import prefill


@pytest.fixture(params=SHAPES)
def model(request):
    return build(**SHAPES[request.param])


def follow(model, decoder, state, n_tokens, seed=0):
    """Steps of the decoder and of the model with the same tokens, compared. Returns the model's state."""
    n_rows = decoder.n_rows
    for t in range(n_tokens):
        tokens = random_tokens(n_rows, 1, seed=seed + t)
        logits, state = model.step(tokens, state)
        torch.testing.assert_close(decoder.step(tokens[:, 0]), logits[:, 0], rtol=0, atol=1e-5)
    return state


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "unequal"])
def test_each_step_equals_that_of_the_model(model, prompts):
    _, state = prefill(model, prompts)
    decoder = Decoder(model)
    decoder.start(state)
    follow(model, decoder, state, 12)


@torch.no_grad()
def test_rows_may_start_from_nothing(model):
    decoder = Decoder(model)
    decoder.start(n_rows=3)
    follow(model, decoder, model.new_state(), 6)
    decoder.start(n_rows=3)  # of what was written before, nothing is left
    follow(model, decoder, model.new_state(), 6, seed=9)


@torch.no_grad()
def test_the_state_that_it_starts_from_stays_and_can_be_started_from_again():
    model = build(layer_pattern="MA")
    _, state = prefill(model, PROMPTS)
    decoder, outputs = Decoder(model), []
    for _ in range(2):
        decoder.start(state)
        outputs.append(torch.stack([decoder.step(random_tokens(5, 1, seed=t)[:, 0]) for t in range(6)]))
    assert torch.equal(*outputs)
    _, other = prefill(model, PROMPTS[::-1])
    decoder.start(other)
    follow(model, decoder, other, 6)


@torch.no_grad()
def test_a_cache_that_is_full_grows(model):
    _, state = prefill(model, [PROMPTS[4], list(range(ROOM - 3))])
    decoder = Decoder(model)
    decoder.start(state, room=1)
    assert decoder.capacity == ROOM
    follow(model, decoder, state, 8)
    assert decoder.capacity == (2 * ROOM if "A" in model.config.layer_pattern else ROOM)


@torch.no_grad()
def test_rows_can_be_left_out_and_put_in_another_order(model):
    _, state = prefill(model, PROMPTS)
    decoder = Decoder(model)
    decoder.start(state)
    state = follow(model, decoder, state, 3)
    rows = [4, 1]
    decoder.take(rows)
    follow(model, decoder, model.take_rows(state, rows), 5, seed=3)


@torch.no_grad()
def test_logits_may_be_made_by_another_head():
    model = build(layer_pattern="MA")
    _, state = prefill(model, PROMPTS)
    decoder, plain = (
        Decoder(model, logits=lambda hidden: hidden.double() @ model.head_weight.double().T),
        Decoder(model),
    )
    for each in (decoder, plain):
        each.start(state)
    tokens = torch.arange(5)
    logits = decoder.step(tokens)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), plain.step(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weights_that_have_moved_are_found_at_the_next_start():
    model = build(layer_pattern="MA")
    decoder = Decoder(model)
    decoder.start(prefill(model, PROMPTS)[1])
    model.double().float()
    first, capacity = decoder.addresses, decoder.capacity
    _, state = prefill(model, PROMPTS)
    decoder.start(state)
    assert decoder.addresses != first and decoder.capacity == capacity
    follow(model, decoder, state, 3)


@torch.no_grad()
def test_half_precision_stays_near():
    model = build(**SHAPES["hybrid"]).bfloat16()
    _, state = prefill(model, PROMPTS)
    decoder = Decoder(model)
    decoder.start(state)
    tokens = torch.arange(5)
    want = model.step(tokens[:, None], state)[0][:, 0]
    torch.testing.assert_close(decoder.step(tokens), want, rtol=0, atol=0.02 * want.abs().max().item())
    assert SHAPE.d_conv == 4 and decoder.state[0]["conv"].dtype == torch.bfloat16


def test_hooks_of_a_module_are_seen():
    model = build(layer_pattern="MA")
    assert not has_hooks(model)
    handle = model.layers[1].mixer.out_proj.register_forward_pre_hook(lambda module, inputs: None)
    assert has_hooks(model)
    handle.remove()
    model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    assert has_hooks(model)
