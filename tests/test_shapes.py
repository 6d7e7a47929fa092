"""Shapes: every size and option counts what the module has, starts as the papers say, and acts or is refused."""

import dataclasses
import json
import math

import pytest
import torch
from launching import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from launch.estimate import main as launch
from model.attention import alibi_slopes, rope_frequencies
from model.config import PRESETS, ModelConfig, get_preset, place_attention
from model.hybrid import HybridLM
from model.reference import attention
from train.config import SIZE_DEFAULTS, TrainConfig, make_plan

SHAPE = PRESETS["tiny"]
OPTIONS = {
    "gate": dict(attention_gate=True),
    "QK norm": dict(qk_norm=True),
    "linear": dict(rope_scaling="linear", rope_factor=4.0),
    "half of the rotation": dict(rope_dim=8),
    "NTK": dict(rope_scaling="ntk", rope_factor=4.0),
    "YaRN": dict(rope_scaling="yarn", rope_factor=4.0, rope_original_seq_len=64),
    "ALiBi": dict(positions="alibi"),
    "NoPE": dict(positions="none"),
    "tied": dict(tied_embeddings=True),
    "embedding norm": dict(embedding_norm=True),
    "zero start": dict(zero_init_output=True),
    "wide Mamba heads": dict(mamba_head_dim=32),
    "groups": dict(n_groups=2),
    "no SwiGLU": dict(d_ff=0),
    "embedding multiplier": dict(embedding_multiplier=12.0),
    "attention multiplier": dict(attention_multiplier=0.015625),
    "residual multiplier": dict(residual_multiplier=0.22),
    "logits scaling": dict(logits_scaling=8.0),
    "all that go together": dict(
        attention_gate=True, qk_norm=True, rope_scaling="yarn", rope_factor=2.0, rope_original_seq_len=64, n_groups=2,
        tied_embeddings=True, embedding_norm=True, zero_init_output=True, residual_multiplier=0.5, logits_scaling=2.0,
    ),
}  # fmt: skip
OPTION_FIELDS = {name for options in OPTIONS.values() for name in options}
PATTERN = "MAMA"
COUNTED = ("attention_projections", "mamba_projections", "mlp", "head")  # what is a product of torch's own


def shaped(**options):
    return dataclasses.replace(SHAPE, **{"layer_pattern": PATTERN} | options)


def build(config, seed=0, scale=1.0):
    torch.manual_seed(seed)
    model = HybridLM(config, kernels="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def random_tokens(b, l, seed=0):
    return torch.randint(0, SHAPE.vocab_size, (b, l), generator=torch.Generator().manual_seed(seed))


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in HybridLM(config, kernels="torch").parameters())


@pytest.mark.parametrize("size", PRESETS)
def test_parameter_formula_equals_the_module(size):
    assert count(PRESETS[size]) == PRESETS[size].n_parameters


@pytest.mark.parametrize("option", OPTIONS)
def test_parameter_formula_follows_every_option(option):
    config = shaped(**OPTIONS[option])
    assert count(config) == config.n_parameters


@pytest.mark.parametrize(
    "config",
    [*(shaped(**options) for options in OPTIONS.values()), *(shaped(layer_pattern=p) for p in ("M", "A", "MMA"))],
    ids=[*OPTIONS, "M", "A", "MMA"],
)
def test_flop_formula_equals_torchs_count_of_the_matrix_products(config, monkeypatch):
    monkeypatch.setattr("model.reference.ONEDNN", False)  # whose products the counter does not know
    config = dataclasses.replace(config, seq_len=32)
    model, tokens = build(config), torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in by_operation.items() if operation.__name__.startswith(("mm", "addmm")))
    expected = sum(config.flops_per_token_by_part[part] for part in COUNTED) * tokens.numel()
    assert products == expected


@pytest.mark.parametrize("size", PRESETS)
def test_flop_formula_of_every_size_equals_torchs_count(size):
    """On the meta device: shapes alone, so that 13B costs nothing. Two layers of each kind that the size has."""
    kinds = sorted(set(PRESETS[size].layer_pattern)) * 2
    config = dataclasses.replace(PRESETS[size], layer_pattern="".join(kinds), seq_len=64, chunk_size=64)
    with torch.device("meta"):
        model, tokens = HybridLM(config, kernels="torch"), torch.zeros(1, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in by_operation.items() if operation.__name__.startswith(("mm", "addmm")))
    assert 3 * products == sum(config.flops_per_token_by_part[part] for part in COUNTED) * 64


@pytest.mark.parametrize("size", [size for size in PRESETS if "A" in PRESETS[size].layer_pattern])
def test_attention_flops_are_half_of_torchs_count_which_is_not_causal(size):
    config = dataclasses.replace(PRESETS[size], layer_pattern="AA", seq_len=64)
    with torch.device("meta"):
        model, tokens = HybridLM(config, kernels="torch"), torch.zeros(1, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert 3 * products == 2 * config.flops_per_token_by_part["attention_scores"] * 64


@pytest.mark.parametrize(("size", "billions"), [("1.3B", 1.44), ("2.7B", 2.56), ("6.7B", 5.96), ("13B", 10.66)])
def test_real_sizes_are_within_one_percent_of_their_counts(size, billions):
    assert abs(PRESETS[size].n_parameters / 1e9 / billions - 1) < 0.01


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("32M-gated", 32), ("125M-gated", 125), ("350M-gated", 350), ("760M-gated", 760), ("1.3B-gated", 1439),
        ("lab", 324), ("50M", 50), ("100M", 100), ("150M", 150),
        ("mamba-130M", 129), ("mamba-370M", 368), ("mamba-1.3B", 1344),
    ],
)  # fmt: skip
def test_the_other_sizes_are_within_two_percent_of_their_counts(size, millions):
    assert abs(PRESETS[size].n_parameters / 1e6 / millions - 1) < 0.02


def test_sizes_have_the_shapes_that_the_systems_they_come_from_had():
    gated, lab, small = PRESETS["1.3B-gated"], PRESETS["lab"], PRESETS["100M"]
    assert (gated.layer_pattern, gated.d_model, gated.n_heads, gated.n_kv_heads) == ("MMMA" * 6, 2048, 16, 4)
    assert (gated.seq_len, gated.tied_embeddings) == (4096, False)
    assert gated.attention_gate
    assert gated.embedding_norm
    assert gated.zero_init_output
    assert (lab.d_model, lab.n_layers, lab.n_heads, lab.d_state, lab.seq_len) == (1024, 16, 16, 48, 512)
    assert (small.layer_pattern, small.d_model, small.vocab_size, small.seq_len) == ("MMMMMAAA", 512, 32000, 1024)
    assert (PRESETS["50M"].d_model, PRESETS["50M"].n_layers) == (384, 6)
    assert (PRESETS["150M"].d_model, PRESETS["150M"].n_layers) == (768, 12)
    for size in ("1.3B", "2.7B", "6.7B", "13B"):
        assert (PRESETS[size].head_dim, PRESETS[size].seq_len) == (128, 8192)
    for size, preset in PRESETS.items():
        assert ("A" in preset.layer_pattern) != size.startswith("mamba")


def test_every_size_has_its_training_defaults():
    assert list(SIZE_DEFAULTS) == list(PRESETS)
    for size, defaults in SIZE_DEFAULTS.items():
        assert defaults["batch_tokens"] % (PRESETS[size].seq_len * defaults["micro_batch"]) == 0, size


def test_attention_is_placed_first_last_and_evenly_between():
    assert place_attention(8, first=1, middle=1, last=1) == "AMMMAMMA"
    pattern = place_attention(40, first=2, middle=5, last=3)
    assert pattern.startswith("AAM")
    assert pattern.endswith("MAAA")
    middle = [i for i, kind in enumerate(pattern[2:-3]) if kind == "A"]
    assert {b - a for a, b in zip(middle, middle[1:], strict=False)} == {7}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_pattern": "MXA"}, "M (Mamba-2) and A (attention)"),
        ({"layer_pattern": ""}, "M (Mamba-2) and A (attention)"),
        ({"n_heads": 3}, "d_model is not a multiple of n_heads: 32 and 3"),
        ({"n_kv_heads": 0}, "n_heads is not a multiple of n_kv_heads: 2 and 0"),
        ({"mamba_head_dim": 48}, "mamba_head_dim: 64 and 48"),
        ({"n_groups": 3}, "the number of Mamba heads is not a multiple of n_groups: 4 and 3"),
        ({"d_ff": -1}, "d_ff -1 is negative"),
        ({"positions": "sine"}, "positions 'sine' is unknown; choose one of rope, alibi, none"),
        ({"rope_scaling": "NTK"}, "rope_scaling 'NTK' is unknown; choose one of none, linear, ntk, yarn"),
        ({"rope_scaling": "linear"}, "needs a rope_factor above 1, not 1.0"),
        ({"rope_factor": 2.0}, "rope_factor 2.0 needs a rope_scaling: linear, ntk, yarn"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "'yarn' needs it"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "rope_original_seq_len": 64}, "nothing else reads it"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original_seq_len": 0}, "0 is not positive"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "n_heads": 16, "n_kv_heads": 1}, "heads of 4 channels or more"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "positions": "alibi"}, "needs positions 'rope', not 'alibi'"),
        ({"rope_scaling": "linear", "rope_factor": 2.0, "positions": "none"}, "needs positions 'rope', not 'none'"),
        ({"rope_dim": 7}, "rope_dim 7 is not an even number below the head width 16"),
        ({"rope_dim": 8, "positions": "alibi"}, "rope_dim 8 needs positions 'rope', not 'alibi'"),
        ({"rope_dim": 8, "rope_scaling": "linear", "rope_factor": 2.0}, "leave out rope_dim"),
        ({"layer_pattern": "MM", "attention_gate": True}, "attention_gate True acts on attention layers"),
        ({"layer_pattern": "MM", "qk_norm": True}, "qk_norm True acts on attention layers"),
        (
            {"layer_pattern": "MM", "positions": "none"},
            "positions 'none' acts on attention layers, and the layer pattern 'MM' has none",
        ),
        ({"layer_pattern": "MM", "attention_multiplier": 0.1}, "attention_multiplier 0.1 acts on attention layers"),
        ({"embedding_norm": True, "embedding_multiplier": 2.0}, "embedding_multiplier 2.0 does nothing"),
        ({"logits_scaling": 0.0}, "logits_scaling 0.0 is not positive"),
        ({"rope_theta": 5e5, "positions": "none"}, "rope_theta 500000.0 needs positions 'rope', not 'none'"),
        ({"rope_theta": 5e5, "layer_pattern": "MM"}, "rope_theta 500000.0 acts on attention layers"),
        ({"rope_theta": -1.0}, "rope_theta -1.0 is not positive"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**{**dataclasses.asdict(SHAPE), **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown size '1.5B'; choose one of tiny, nano"):
        get_preset("1.5B")


def test_a_pattern_or_a_context_given_replaces_the_sizes_own(capsys):
    assert get_preset("lab", layer_pattern="MMMMMMMMMM").n_layers == 10
    longer = get_preset("1.3B", seq_len=32768, rope_scaling="yarn")
    assert (longer.rope_factor, longer.rope_original_seq_len, longer.seq_len) == (4.0, 8192, 32768)
    assert get_preset("nano", seq_len=512, rope_scaling="ntk").rope_factor == 2.0
    assert launch(["--size", "lab", "--layer-pattern", "MA", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_pattern"] == "MA"
    with pytest.raises(ValueError, match="'MXM' is not a string of M"):
        get_preset("lab", layer_pattern="MXM")
    with pytest.raises(ValueError, match="^--rope-scaling ntk stretches .* give a --seq-len above that$"):
        get_preset("nano", rope_scaling="ntk")
    with pytest.raises(ValueError, match="give a --seq-len above that, not 256"):
        get_preset("nano", seq_len=256, rope_scaling="yarn")
    with pytest.raises(ValueError, match="--rope-scaling 'yarnn' is unknown; choose one of linear, ntk, yarn"):
        get_preset("nano", rope_scaling="yarnn")
    with pytest.raises(ValueError, match="seq_len 0 is too small"):
        get_preset("nano", seq_len=0)


def test_pattern_context_and_scaling_are_flags_of_a_run(capsys):
    config = TrainConfig(size="tiny", data="d", run="r", layer_pattern="MMA", seq_len=128, rope_scaling="linear")
    model = make_plan(config, vocab_size=500, n_tokens=10**6, world_size=1).model
    assert (model.layer_pattern, model.seq_len, model.rope_scaling, model.rope_factor) == ("MMA", 128, "linear", 2.0)
    with pytest.raises(ValueError, match="'MAN' is not a string of M"):
        make_plan(dataclasses.replace(config, layer_pattern="MAN"), vocab_size=500, n_tokens=10**6, world_size=1)
    assert launch(["--size", "lab", "--layer-pattern", "MMMA", "--seq-len", "1024"]) == 0
    assert "lab: MMMA, sequences of 1,024 tokens" in capsys.readouterr().out
    assert launch(["--size", "nano-gated", "--layer-pattern", "MM"]) == 2
    assert capsys.readouterr().err.startswith("error: attention_gate True acts on attention layers")


def test_readme_shows_the_true_counts():
    readme = (ROOT / "model/README.md").read_text()
    for size, config in PRESETS.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{size}` |"))
        n = config.n_parameters
        assert row.split(" | ")[1] == (f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M")
        assert f"| {config.seq_len:,} |" in row
    for field in dataclasses.fields(ModelConfig):
        if field.name in OPTION_FIELDS:
            assert f"`{field.name}`" in readme, field.name


# what the options do


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_logits(option):
    tokens = random_tokens(1, 40)
    plain = build(shaped(), scale=4.0)(tokens)
    other = build(shaped(**OPTIONS[option]), scale=4.0)(tokens)
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
@pytest.mark.parametrize(("p", "theta", "original", "factor"), [(64, 1e4, 2048, 4.0), (128, 5e5, 8192, 16.0)])
def test_rotary_frequencies_equal_those_of_transformers(scaling, p, theta, original, factor):
    parameters = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = original
    if scaling == "none":
        parameters = {"rope_type": "linear", "rope_theta": theta, "factor": 1.0}
    theirs = LlamaConfig(
        hidden_size=2 * p, num_attention_heads=2, rope_parameters=parameters,
        max_position_embeddings=int(original * factor),
    )  # fmt: skip
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"))
    ours = ModelConfig(
        d_model=2 * p, layer_pattern="A", n_heads=2, n_kv_heads=2, d_ff=64, seq_len=int(original * factor),
        rope_theta=theta, rope_scaling=scaling, rope_factor=1.0 if scaling == "none" else factor,
        rope_original_seq_len=original if scaling == "yarn" else None,
    )  # fmt: skip
    got, length = rope_frequencies(ours, torch.device("cpu"))
    torch.testing.assert_close(got, frequencies, rtol=1e-6, atol=0)
    assert length == magnitude


def test_ntk_scaling_is_what_transformers_calls_dynamic_once_the_context_is_full():
    """Theirs grows with the text: at s tokens the base is raised by f s / L - (f - 1). Ours is that at one s."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    theirs = LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters=parameters, max_position_embeddings=2048
    )
    s = 2048 * (1 + 3 / 4)  # where 4 s / 2048 - 3 is 4
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=int(s))
    ours = dataclasses.replace(SHAPE, d_model=128, rope_scaling="ntk", rope_factor=4.0)
    got, _ = rope_frequencies(ours, torch.device("cpu"))
    torch.testing.assert_close(got, frequencies, rtol=1e-6, atol=0)
    plain, _ = rope_frequencies(dataclasses.replace(SHAPE, d_model=128), torch.device("cpu"))
    assert got[0] == plain[0]  # the fastest angle stays; the slowest turns four times slower
    torch.testing.assert_close(got[-1], plain[-1] / 4)


def test_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8, "cpu"), 2.0 ** -torch.arange(1.0, 9.0))
    torch.testing.assert_close(alibi_slopes(1, "cpu"), torch.tensor([2.0**-8]))
    # the authors' code for 12: the 8 of a power of two, then every other of the 16
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12, "cpu"), torch.tensor(expected))
    for n_heads in range(1, 41):
        assert alibi_slopes(n_heads, "cpu").shape == (n_heads,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_are_subtracted_from_the_scores(dtype):
    q, k, v = (torch.randn(1, 600, heads, 8).to(dtype) for heads in (4, 2, 2))
    slopes = alibi_slopes(4, "cpu")
    got = attention(q, k, v, slopes=slopes)
    distance = (torch.arange(600)[:, None] - torch.arange(600)).float()
    for head in range(4):
        scores = q[0, :, head].float() @ k[0, :, head // 2].float().T / 8**0.5 - slopes[head] * distance
        expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v[0, :, head // 2].float()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # of bfloat16's own output
        torch.testing.assert_close(got[0, :, head].float(), expected, rtol=tolerance, atol=tolerance)


def test_slopes_tell_distant_neighbours_apart_in_bfloat16():
    """bfloat16 has 300 and 302, but not 301."""
    q, k, v = (torch.zeros(1, 400, 1, 2, dtype=torch.bfloat16) for _ in range(3))
    v[0, 98, 0, 0], v[0, 99, 0, 1] = 1, 1
    q[..., 0], k[..., 0], k[0, [98, 99], 0, 0] = 1, -1e4, 0  # nobody looks at the others
    got = attention(q, k, v, slopes=torch.ones(1))[0, 399, 0]
    torch.testing.assert_close(got.float(), torch.tensor([-301.0, -300.0]).softmax(-1), rtol=0, atol=1e-2)


@torch.no_grad()
def test_without_positions_attention_sees_a_set():
    model = build(shaped(layer_pattern="A", positions="none"), scale=4.0)
    tokens = random_tokens(1, 20)
    shuffled = tokens.clone()
    shuffled[0, :19] = tokens[0, :19].flip(0)
    torch.testing.assert_close(model(tokens)[0, -1], model(shuffled)[0, -1], rtol=1e-4, atol=1e-5)
    rotary = build(shaped(layer_pattern="A"), scale=4.0)
    assert (rotary(tokens)[0, -1] - rotary(shuffled)[0, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_multipliers_do_what_they_say():
    tokens, plain = random_tokens(1, 20), build(shaped())
    scaled = build(shaped(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5))
    with torch.no_grad():  # the same function, with the factors moved into the weights
        plain.embedding.weight.mul_(3.0)
        plain.head.weight.div_(2.0)
        for layer in plain.layers:
            layer.mixer.out_proj.weight.mul_(0.5)
            layer.mlp.out_proj.weight.mul_(0.5)
    torch.testing.assert_close(plain(tokens), scaled(tokens), rtol=1e-5, atol=1e-6)
    sharper = build(shaped(attention_multiplier=4 * SHAPE.head_dim**-0.5))
    plain = build(shaped())
    with torch.no_grad():
        for layer in plain.layers[1::2]:
            layer.mixer.in_proj.q.mul_(4.0)
    torch.testing.assert_close(plain(tokens), sharper(tokens), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys():
    model, tokens = build(shaped(qk_norm=True), scale=4.0), random_tokens(1, 20)
    before = model(tokens)
    for layer in model.layers[1::2]:
        layer.mixer.in_proj.q.mul_(3.0)
        layer.mixer.in_proj.k.mul_(5.0)
    torch.testing.assert_close(before, model(tokens), rtol=1e-3, atol=1e-3)  # but for eps


def test_tied_embeddings_are_one_parameter():
    model = build(shaped(tied_embeddings=True))
    assert "head.weight" not in model.state_dict()
    assert model.head_weight is model.embedding.weight
    model(random_tokens(1, 8), targets=random_tokens(1, 8, 1)).backward()
    assert (model.embedding.weight.grad.abs().sum(1) > 0).all()  # as a head, every row takes part


# the start


def test_start_values_are_those_of_the_papers():
    config = dataclasses.replace(SHAPE, d_model=256, n_heads=4, mamba_head_dim=8, layer_pattern="MMMA")
    model = build(config)
    mixer = model.layers[0].mixer
    dt, A = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert dt.min() >= 0.00099
    assert dt.max() <= 0.101
    assert A.min() >= 1
    assert A.max() <= 16
    # 64 heads: log-uniform steps have their median near 0.01, uniform rates near 8.5
    assert 0.004 < dt.median() < 0.025
    assert 6 < A.median() < 11
    assert mixer.D.eq(1).all()
    for parameter in (model.norm.weight, model.layers[3].mixer_norm.weight, mixer.norm_weight):
        assert parameter.eq(1).all()
    assert abs(model.layers[3].mixer.in_proj.q.std().item() / 0.02 - 1) < 0.05
    for layer in model.layers:
        for projection in (layer.mixer.out_proj, layer.mlp.out_proj):
            assert abs(projection.weight.std().item() / (0.02 / math.sqrt(8)) - 1) < 0.05
    loss = model(random_tokens(4, 64), targets=random_tokens(4, 64, 1)).item()
    assert abs(loss - math.log(config.vocab_size)) < 0.1  # it knows nothing yet


def test_without_swiglu_each_layer_writes_once_and_starts_larger():
    model = build(dataclasses.replace(SHAPE, d_model=256, n_heads=4, layer_pattern="MMMM", d_ff=0))
    std = model.layers[0].mixer.out_proj.weight.std().item()
    assert abs(std / (0.02 / math.sqrt(4)) - 1) < 0.05


def test_zero_start_makes_every_layer_the_identity_and_still_learns():
    model = build(shaped(zero_init_output=True, embedding_norm=True))
    x = torch.randn(1, 9, SHAPE.d_model)
    for layer in model.layers:
        stream, update = layer(x)
        assert torch.equal(stream + update, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the first step moves the output projections, the second all that is before them
        optimizer.zero_grad()
        model(random_tokens(2, 16), targets=random_tokens(2, 16, 1)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# precision: what must stay exact is computed in float32 under a bfloat16 engine, which stores it in bfloat16

SCAN = ("A_log", "dt_bias", ".D")


def rounded(model, names):
    """A copy whose parameters that `names` picks are rounded to bfloat16 and kept in float32."""
    copy = build(model.config)
    weights = {n: p.bfloat16().float() if names(n) else p for n, p in model.state_dict().items()}
    copy.load_state_dict(weights)
    return copy


def random_hybrid(**options):
    """Norm weights and D off 1, matrices larger than at the start: each rounding shows."""
    model = build(shaped(d_model=64, vocab_size=256, **options), scale=3.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".D"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("l", [1, 40])  # the recurrence and the scan
def test_precise_parameters_are_computed_in_float32_whatever_they_are_stored_in(l):
    model = random_hybrid(qk_norm=True, embedding_norm=True).bfloat16()
    tokens = torch.randint(0, 256, (2, l))
    stored_low = model(tokens)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(SCAN):
            parameter.data = parameter.data.float()  # the same numbers, now also kept in float32
    assert torch.equal(stored_low, model(tokens))


@torch.no_grad()
def test_bf16_storage_of_scan_parameters_costs_less_than_that_of_the_matrices():
    """A decay rate is off by 0.8 % at most, a step by 1.6 %: another constant, not an error that grows."""
    model, tokens = random_hybrid(), torch.randint(0, 256, (2, 512))
    exact = model(tokens)

    def drift(other):
        return ((other(tokens).float() - exact).std() / exact.std()).item()

    scan = drift(rounded(model, lambda name: name.endswith(SCAN)))
    matrices = drift(rounded(model, lambda name: not name.endswith(SCAN) and "norm" not in name))
    assert 0 < scan < matrices / 1.5
    engine = rounded(model, lambda name: True).bfloat16()
    low = drift(engine)
    for name, parameter in engine.named_parameters():
        if name.endswith(SCAN):
            parameter.data = model.get_parameter(name).data.clone()  # float32, unrounded
    assert abs(drift(engine) / low - 1) < 0.1  # keeping them apart in float32 would buy next to nothing
    A_log, dt = torch.linspace(0, math.log(16), 9999), torch.logspace(-3, -1, 9999)
    dt_bias = dt + torch.log(-torch.expm1(-dt))
    assert ((A_log.bfloat16().float() - A_log).exp() - 1).abs().max() < 0.008
    assert (torch.nn.functional.softplus(dt_bias.bfloat16().float()) / dt - 1).abs().max() < 0.016


@torch.no_grad()
def test_bf16_drift_does_not_grow_along_the_sequence():
    low = random_hybrid(layer_pattern="MM").bfloat16()
    exact = rounded(low, lambda name: True)  # the same numbers, computed in float32
    tokens = torch.randint(0, 256, (2, 2048))
    error = (low(tokens) - exact(tokens)).square().mean((0, 2)).sqrt()
    assert error[-256:].mean() < 1.25 * error[:256].mean()
