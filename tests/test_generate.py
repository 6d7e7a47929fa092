"""Decoding: the recurrent state and the cache against the forward pass, batches against single prompts, sampling."""

import dataclasses
import json

import pytest
import torch
from random_models import SHAPE, random_tokens, sharpened
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.attention import KVCache
from model.bench_decode import BENCH, same_size, stock_model
from model.bench_decode import main as bench
from model.config import PRESETS
from model.decode import Decoder
from model.generate import Sampling, generate, generate_batch, pick, prefill, probabilities
from model.hybrid import HybridLM

SHAPES = {
    "mamba": dict(layer_pattern="MM", n_groups=2),
    "attention": dict(layer_pattern="AA"),
    "hybrid": dict(layer_pattern="MAM", attention_gate=True, qk_norm=True),
    "scaled": dict(
        layer_pattern="AM", rope_scaling="yarn", rope_factor=2.0, rope_original_seq_len=64, embedding_multiplier=2.0,
        residual_multiplier=0.5, logits_scaling=0.5, attention_multiplier=0.1,
    ),
    "slopes": dict(layer_pattern="MA", positions="alibi", embedding_norm=True),
    "no positions": dict(layer_pattern="MA", positions="none", tied_embeddings=True, d_ff=0),
}  # fmt: skip
PROMPTS = [[5, 6, 7], [9] * 20, [1], [4, 3, 2], list(range(40))]  # around chunk edges, two of one length


@pytest.fixture(params=SHAPES)
def model(request):
    return build(**SHAPES[request.param])


def build(**options):
    return sharpened(dataclasses.replace(SHAPE, **options), kernels="torch").eval()


@torch.no_grad()
def test_decoding_equals_the_forward_pass(model):
    tokens = random_tokens(2, 40)
    whole = model(tokens)
    state, pieces = model.new_state(), []
    for first, last in [(0, 7), (7, 8), (8, 9), (9, 26), (26, 27), (27, 40)]:  # prompts and single tokens
        logits, state = model.step(tokens[:, first:last], state)
        pieces.append(logits)
    torch.testing.assert_close(whole, torch.cat(pieces, dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_prefix_can_be_continued_in_two_ways(model):
    prefix, one, other = random_tokens(1, 10), random_tokens(1, 5, 1), random_tokens(1, 5, 2)
    _, state = model.step(prefix, model.new_state())
    first, continued = model.step(one, state)
    model.step(other, state)
    again, _ = model.step(one, state)
    assert torch.equal(first, again)
    longer = model.step(prefix, continued)[0]
    _, elsewhere = model.step(one, state)
    assert torch.equal(longer, model.step(prefix, elsewhere)[0])


@torch.no_grad()
def test_last_gives_the_logits_of_the_last_token(model):
    tokens = random_tokens(2, 9)
    torch.testing.assert_close(
        model.step(tokens, model.new_state(), last=True)[0], model(tokens)[:, -1:], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_batch_of_unequal_prompts_equals_one_prompt_at_a_time(model):
    logits, state = prefill(model, PROMPTS)
    alone = [prefill(model, [prompt]) for prompt in PROMPTS]
    for t in range(12):
        for i, (single, _) in enumerate(alone):
            torch.testing.assert_close(logits[i], single[0], rtol=0, atol=1e-5)
        tokens = random_tokens(len(PROMPTS), 1, seed=t)
        logits, state = (r[:, -1] if isinstance(r, torch.Tensor) else r for r in model.step(tokens, state))
        alone = [model.step(tokens[i : i + 1], s) for i, (_, s) in enumerate(alone)]
        alone = [(logits_alone[:, -1], s) for logits_alone, s in alone]


@torch.no_grad()
def test_what_a_row_is_padded_with_changes_nothing(model):
    """The padding of the cache is filled with other numbers: the logits are the same to the last bit."""
    tokens, outputs = random_tokens(len(PROMPTS), 3), []
    for filling in (0.0, 1e3):
        _, state = prefill(model, PROMPTS)
        for layer in state:
            if "cache" in layer:
                cache = layer["cache"]
                for row, start in enumerate(cache.start.tolist()):
                    cache.buffer.tensor[:, row, :start] = filling
        outputs.append(model.step(tokens, state)[0])
    assert torch.equal(*outputs)


def test_generated_batch_equals_single_prompts(model):
    for settings in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)):
        batch = generate_batch(model, PROMPTS, 12, seed=3, **settings)
        for i, (prompt, ids) in enumerate(zip(PROMPTS, batch, strict=True)):
            assert ids == list(generate(model, prompt, 12, seed=3 + i, **settings))


def test_a_row_of_a_batch_ends_alone():
    model = build(layer_pattern="MA")
    whole = generate_batch(model, PROMPTS, 12, temperature=0)
    stop = whole[0][2]
    for ids, cut in zip(whole, generate_batch(model, PROMPTS, 12, temperature=0, stop_ids=(stop,)), strict=True):
        assert cut == (ids[: ids.index(stop)] if stop in ids else ids)
    assert generate_batch(model, [], 5) == []


def test_state_of_mamba_layers_does_not_grow_and_the_cache_holds_what_it_must():
    model = build(layer_pattern="MA")
    sizes = []
    for n in (8, 64):
        with torch.no_grad():
            _, state = model.step(random_tokens(1, n), model.new_state())
        sizes.append(sum(t.numel() for t in state[0].values()))
        assert state[1]["cache"].keys.shape == (1, n, 1, 16)
    assert sizes[0] == sizes[1]


def test_cache_doubles_its_buffer_and_shares_it_until_two_would_write():
    k = torch.randn(1, 5, 1, 2)
    first = KVCache().append(k, k)
    grown = first.append(k[:, :1], k[:, :1])  # full: a buffer of twice the length
    assert grown.buffer.tensor.shape[2] == 10
    one = grown.append(k[:, :1], k[:, :1])
    assert one.buffer is grown.buffer
    other = grown.append(k[:, 1:2], k[:, 1:2])  # its place is taken: a copy
    assert other.buffer is not grown.buffer
    assert torch.equal(one.keys[:, 6], k[:, 0])
    assert torch.equal(other.keys[:, 6], k[:, 1])
    assert torch.equal(one.keys[:, :6], other.values[:, :6])


def test_one_decoder_serves_many_texts(model):
    decoder = Decoder(model)
    for settings in (dict(temperature=0), dict(temperature=0.9, seed=3)):
        for prompt in PROMPTS:
            again = list(generate(model, prompt, 6, decoder=decoder, **settings))
            assert again == list(generate(model, prompt, 6, **settings))


def test_ids_are_drawn_as_often_as_their_chances_say():
    chances = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]]).expand(1000, 6)
    draws = torch.arange(1000, dtype=torch.float64) / 1000
    assert pick(chances, draws).bincount(minlength=6).tolist() == [0, 200, 0, 500, 300, 0]
    assert pick(3 * chances[:1], draws[:1].fill_(1 - 2**-53)).tolist() == [4]


def test_greedy_generation_follows_the_forward_pass(model):
    tokens = [5, 6, 7]
    for token in generate(model, [5, 6, 7], 10, temperature=0):
        assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
        tokens.append(token)


def test_generation_is_repeatable_and_ends_at_a_stop_token():
    torch.manual_seed(0)
    model = HybridLM(SHAPE).eval()
    first = list(generate(model, [1, 2, 3], 20, seed=7))
    assert first == list(generate(model, [1, 2, 3], 20, seed=7))
    assert first != list(generate(model, [1, 2, 3], 20, seed=8))
    assert len(first) == 20
    assert list(generate(model, [1, 2, 3], 20, seed=7, stop_ids=(first[4],))) == first[: first.index(first[4])]
    assert max(generate(model, [1], 50, temperature=5.0, vocab_size=9)) == 8
    assert max(generate(model, [11], 50, temperature=5.0, vocab_size=9, repetition_penalty=2.0)) == 8
    assert list(generate(model, [1], 0)) == []
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(model, [], 5))


def test_repetition_penalty_counts_the_prompt_and_what_is_written():
    ids = list(generate(build(layer_pattern="MA"), [1, 2], 60, temperature=0, repetition_penalty=1e9))
    assert len({1, 2, *ids}) == 62


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"top_p": 0.0}, "top_p 0.0 is out of range; allowed: 0 < top_p <= 1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_k": -1}, "top_k -1"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(setting, words):
    with pytest.raises(ValueError) as caught:
        next(generate(HybridLM(SHAPE), [1], 5, **setting))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def chances(logits, **settings):
    return probabilities(torch.tensor([logits]), Sampling(**settings))[0]


def test_choice_keeps_to_top_k_top_p_and_min_p():
    logits = [2.0, 1.0, 0.0, -1.0]  # probabilities 0.64, 0.24, 0.09, 0.03
    assert chances(logits, temperature=0).tolist() == [1, 0, 0, 0]
    assert chances(logits, temperature=2.0, top_k=2).gt(0).tolist() == [True, True, False, False]
    assert chances(logits, temperature=1.0, top_p=0.7).gt(0).tolist() == [True, True, False, False]
    assert chances(logits, temperature=1.0, min_p=0.1).gt(0).tolist() == [True, True, True, False]  # 0.09 > 0.064
    assert chances(logits, temperature=5.0, top_k=9).gt(0).all()
    torch.testing.assert_close(chances(logits, temperature=0.5), torch.tensor([logits])[0].mul(2).softmax(-1))
    for settings in (dict(top_k=3), dict(top_p=0.8), dict(min_p=0.2)):
        torch.testing.assert_close(chances(logits, **settings).sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.7),
        dict(temperature=1.0, top_k=20),
        dict(temperature=1.3, top_p=0.8),
        dict(temperature=0.9, min_p=0.1),
        dict(temperature=1.0, repetition_penalty=1.3),
        dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    ],
    ids=str,
)
def test_probabilities_equal_those_of_transformers(settings):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 200, generator=generator) * 3
    history = torch.randint(0, 200, (4, 30), generator=generator)
    sampling = Sampling(**settings)
    theirs = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(history, logits.clone())
    theirs = TemperatureLogitsWarper(sampling.temperature)(history, theirs)
    if sampling.top_k:
        theirs = TopKLogitsWarper(sampling.top_k)(history, theirs)
    if sampling.top_p < 1:
        theirs = TopPLogitsWarper(sampling.top_p)(history, theirs)
    if sampling.min_p:
        theirs = MinPLogitsWarper(sampling.min_p)(history, theirs)
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter_(1, history, True)
    torch.testing.assert_close(probabilities(logits, sampling, seen), theirs.softmax(-1), rtol=1e-5, atol=1e-7)


def test_benchmark_compares_models_of_one_size_and_shows_the_state(capsys):
    for config in (BENCH, PRESETS["1.3B"], PRESETS["nano-gated"]):
        counts = [shape.n_parameters for shape in same_size(config).values()]
        assert max(counts) / min(counts) < 1.01
    arguments = ["--size", "tiny", "--new-tokens", "2", "--device", "cpu", "--batch", "1", "2"]
    assert bench([*arguments, "--contexts", "8", "32", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    state = {(row["model"], row["context"]): row["state_bytes"] for row in rows}  # of a row, whatever the batch
    assert len(rows) == 2 * 2 * 3
    assert state["Mamba-2", 8] == state["Mamba-2", 32]
    assert state["attention", 32] == 4 * state["attention", 8]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert bench([*arguments, "--contexts", "8"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert bench(["--size", "mamba-130M"]) == 2
    assert "is no hybrid" in capsys.readouterr().err


def test_benchmark_sets_ours_beside_transformers_own_class(capsys):
    config = dataclasses.replace(PRESETS["tiny"], tied_embeddings=True)
    for model in (build(layer_pattern="MAM"), sharpened(config, kernels="torch").eval()):
        tokens = random_tokens(2, 20)
        with torch.no_grad():
            torch.testing.assert_close(stock_model(model)(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    arguments = ["--new-tokens", "3", "--device", "cpu", "--contexts", "--peer-context", "8", "--peer"]
    assert bench(["--size", "tiny", *arguments, "eager", "--batch", "1", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["batch"], row["mode"]) for row in rows] == [(1, "ours"), (1, "eager"), (3, "ours"), (3, "eager")]
    assert rows[1]["ratio"] == rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    assert bench(["--size", "tiny", *arguments]) == 0
    assert "theirs, compiled" in capsys.readouterr().out
    assert bench(["--size", "nano-gated", *arguments]) == 2
    assert "lacks the output gate of attention" in capsys.readouterr().err
