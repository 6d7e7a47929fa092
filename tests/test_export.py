"""Weights to and from Hugging Face folders: parity with transformers' classes, the tokenizer, lm-eval, refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    GraniteMoeHybridConfig,
    Mamba2Config,
)

from curation.tokenizer import SEPARATOR, load_tokenizer
from model.config import PRESETS, ModelConfig
from model.export import export, join, main, own_sources
from model.generate import generate
from model.hybrid import HybridLM
from model.import_hf import import_folder, read_config
from model.import_hf import main as import_main
from model.stock import parameter_names, stock_class, turning_first
from model.tokenizer_files import SEPARATOR as SEPARATOR_HERE
from model.weights import load_checkpoint, write_weights

BASE = dataclasses.replace(PRESETS["tiny"], vocab_size=640)  # more than the tokenizer's 512 pieces
STOCK = {
    "hybrid": dict(layer_pattern="MAM"),
    "attention": dict(layer_pattern="AA"),
    "two groups, wide convolution": dict(layer_pattern="MA", n_groups=2, d_conv=3),
    "tied": dict(layer_pattern="MA", tied_embeddings=True),
    "mamba": dict(layer_pattern="MM", d_ff=0, tied_embeddings=True, n_heads=1, n_groups=2),
    "no positions": dict(layer_pattern="AM", positions="none"),
    "yarn": dict(layer_pattern="MA", rope_scaling="yarn", rope_factor=4.0, rope_original_seq_len=16),
    "linear": dict(layer_pattern="MA", rope_scaling="linear", rope_factor=4.0),
    "ntk": dict(layer_pattern="MA", rope_scaling="ntk", rope_factor=4.0),
    "multipliers": dict(
        layer_pattern="MA", embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5,
        logits_scaling=0.5,
    ),
}  # fmt: skip
OWN = {
    "gated": dict(layer_pattern="MAM", attention_gate=True),
    "gated, tied": dict(layer_pattern="MA", attention_gate=True, tied_embeddings=True),
    "alibi": dict(layer_pattern="AM", positions="alibi"),
    "norms": dict(layer_pattern="MA", qk_norm=True, embedding_norm=True),
    "half of the rotation": dict(layer_pattern="MA", rope_dim=8),
    "mamba with SwiGLU": dict(layer_pattern="MM"),
    "mamba with a norm": dict(layer_pattern="MM", d_ff=0, embedding_norm=True),
    "no SwiGLU": dict(layer_pattern="MA", d_ff=0),
}
SHAPES = STOCK | OWN


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of a folder before it runs it; by default the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def make_model(change, seed=0):
    torch.manual_seed(seed)
    model = HybridLM(dataclasses.replace(BASE, **change), kernels="torch").eval()
    with torch.no_grad():  # larger than at the start, so that a mistake shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif "norm" in name or name.endswith(".D"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save(model, folder, data):
    write_weights(
        folder, model.config, dict(model.named_parameters()), source="test", tokenizer=data / "tokenizer.model"
    )
    return folder


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, data, tmp_path_factory):
    """(name of the shape, our model, its checkpoint folder, the exported folder)"""
    folder, model = tmp_path_factory.mktemp("export"), make_model(SHAPES[request.param])
    checkpoint = save(model, folder / "checkpoint", data)
    export(load_checkpoint(checkpoint), folder / "hf")
    return request.param, model, checkpoint, folder / "hf"


def random_tokens(b, l):
    return torch.randint(1, 512, (b, l), generator=torch.Generator().manual_seed(l))


def test_stock_class_wherever_it_has_what_the_shape_needs(exported):
    name, _, _, folder = exported
    stock = name in STOCK
    assert type(load(folder)).__module__.startswith("transformers.models.") == stock
    assert bool(list(folder.glob("*.py"))) != stock


@torch.no_grad()
@pytest.mark.parametrize("l", [1, 2, 37])  # chunks are of 16
def test_logits_equal_ours(exported, l):
    _, model, _, folder = exported
    tokens = random_tokens(2, l)
    # float32 sums in another order; logits are about 2
    torch.testing.assert_close(load(folder)(tokens).logits, model(tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_equal_ours_token_by_token(exported):
    _, model, _, folder = exported
    theirs, tokens, cache, pieces = load(folder), random_tokens(2, 24), None, []
    cache_name = "cache_params" if theirs.config.model_type == "mamba2" else "past_key_values"
    for first, last in [(0, 19), *((i, i + 1) for i in range(19, 24))]:
        output = theirs(tokens[:, first:last], use_cache=True, **{cache_name: cache})
        cache = output[cache_name]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=0, atol=1e-5)


def test_gradients_equal_ours(exported):
    name, model, _, folder = exported
    theirs, tokens = load(folder), random_tokens(2, 33)
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    model.zero_grad()
    ours = model(tokens[:, :-1], targets=tokens[:, 1:])
    ours.backward()
    torch.testing.assert_close(loss, ours, rtol=0, atol=1e-5)
    gradients = {parameter: p.grad for parameter, p in model.named_parameters()}
    names = {f"model.{parameter}": (parameter,) for parameter in gradients}
    if name in STOCK:
        names = parameter_names(model.config, stock_class(model.config)[0])
    found = {parameter: p.grad for parameter, p in theirs.named_parameters()}
    assert set(found) == set(names)
    for parameter, parts in names.items():
        expected = join(parameter, [gradients[part] for part in parts])
        assert expected.abs().max() > 0
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found[parameter], expected, rtol=0, atol=atol, msg=parameter)


def test_greedy_generation_gives_our_tokens(exported):
    _, model, _, folder = exported
    theirs, prompt = load(folder), random_tokens(1, 9)
    ids = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    ours = list(generate(model, prompt[0].tolist(), 20, temperature=0, vocab_size=512, stop_ids=(0,)))
    made = ids[0, 9:].tolist()
    assert made[: len(ours)] == ours
    assert made[len(ours) :] in ([], [0])
    assert max(made) < 512  # ids that pad the head


@pytest.mark.parametrize("shape", ["hybrid", "gated", "alibi"])
def test_prompts_of_different_lengths_generate_as_they_do_alone(shape, data, tmp_path):
    model = make_model(SHAPES[shape])
    export(load_checkpoint(save(model, tmp_path / "checkpoint", data)), tmp_path / "hf")
    theirs, prompts = load(tmp_path / "hf"), [random_tokens(1, l)[0].tolist() for l in (5, 11, 5)]
    padded = torch.tensor([[0] * (11 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = theirs.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in zip(ids[:, 11:].tolist(), prompts, strict=True):
        ours = list(generate(model, prompt, 12, temperature=0, vocab_size=512, stop_ids=(0,)))
        assert row[: len(ours)] == ours
    with torch.no_grad():
        scores = theirs(padded, attention_mask=mask).logits
        torch.testing.assert_close(scores[0, 6:], model(torch.tensor(prompts[:1]))[0], rtol=0, atol=1e-5)


def test_round_trip_is_bit_exact(exported, tmp_path):
    name, model, checkpoint, folder = exported
    import_folder(folder, tmp_path / "back")
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "back")
    weights, again = before.tensors(), after.tensors()
    assert list(weights) == list(again)
    assert all(torch.equal(weights[parameter], again[parameter]) for parameter in weights)
    assert before.tokenizer_path.read_bytes() == after.tokenizer_path.read_bytes()
    if name != "ntk":  # that is a larger rope_theta there
        assert after.model_config == before.model_config
    tokens = random_tokens(1, 20)
    assert torch.equal(after.load_model(kernels="torch")(tokens), model(tokens)) or name == "ntk"


def test_large_exports_are_sharded_and_indexed(data, tmp_path):
    model = make_model(SHAPES["hybrid"])
    checkpoint = load_checkpoint(save(model, tmp_path / "checkpoint", data))
    export(checkpoint, tmp_path / "hf", shard_gb=5e-5)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * model.config.n_parameters
    tokens = random_tokens(1, 8)
    torch.testing.assert_close(load(tmp_path / "hf")(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    import_folder(tmp_path / "hf", tmp_path / "back")
    again = load_checkpoint(tmp_path / "back").tensors()
    assert all(torch.equal(weight, again[name]) for name, weight in checkpoint.tensors().items())


def test_bfloat16_export_is_half_the_size_and_says_so(data, tmp_path):
    model = make_model(SHAPES["hybrid"])
    export(load_checkpoint(save(model, tmp_path / "checkpoint", data)), tmp_path / "hf", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert (tmp_path / "hf/model.safetensors").stat().st_size < 2.2 * model.config.n_parameters


def test_own_code_is_the_networks_own_source():
    sources = own_sources()
    assert {"modeling_braid.py", "configuration_braid.py", "hybrid.py", "mamba2.py", "reference.py"} <= set(sources)
    assert not {"fused.py", "export.py"} & set(sources)
    for name, source in sources.items():
        compile(source, name, "exec")
        assert "from model" not in source


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizers(data, tmp_path_factory):
    """(ours, transformers')"""
    folder = tmp_path_factory.mktemp("tokenizer")
    export(load_checkpoint(save(make_model(SHAPES["hybrid"]), folder / "checkpoint", data)), folder / "hf")
    return load_tokenizer(data), AutoTokenizer.from_pretrained(folder / "hf", model_max_length=int(1e9))


TEXTS = [
    "def f(x):\n\tif x:\n        return 1234 + x\n\n\n",
    " leading and trailing \t\r\n",
    "é漢字かな Ελληνικά 😀👩\u200d💻\u2581\u00a0\0x",
    f"a literal {SEPARATOR} in text, <unk>, <0x0A> and <s>",
    SEPARATOR,
    " ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_the_same_ids_and_text(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == [ours.separator_id, *ids]  # every document begins with it
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_gives_the_same_ids_on_the_standard_library(tokenizers):
    ours, theirs = tokenizers
    texts = [path.read_text(errors="replace") for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:150]]
    assert sum(map(len, texts)) > 2_000_000
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode_batch(texts)


def test_text_becomes_the_separator_only_if_it_is_asked_to(tokenizers):
    ours, theirs = tokenizers
    assert SEPARATOR_HERE == SEPARATOR
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.separator_id
    assert ours.separator_id not in theirs(SEPARATOR, add_special_tokens=False)["input_ids"]
    asked = theirs(SEPARATOR, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert asked == [ours.separator_id]


def test_tokenizer_json_of_a_checkpoint_is_exported_with_the_same_ids(data, tmp_path):
    """As a run on a data folder with a published tokenizer leaves it: under the name tokenizer.model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = AddedToken(SEPARATOR, special=True, normalized=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=511, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([path.read_text() for path in Path(json.__file__).parent.glob("*.py")], trainer)
    library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    (tmp_path / "json").mkdir()
    library.save(str(tmp_path / "json/tokenizer.model"))
    checkpoint = load_checkpoint(save(make_model(SHAPES["hybrid"]), tmp_path / "checkpoint", tmp_path / "json"))
    export(checkpoint, tmp_path / "hf")
    ours = load_tokenizer(checkpoint.tokenizer_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", model_max_length=int(1e9))
    assert not (tmp_path / "hf/tokenizer.model").exists()
    assert theirs.bos_token_id == ours.separator_id == 0
    for text in [*TEXTS, "<tool_call> in text"]:
        assert theirs(text)["input_ids"] == [ours.separator_id, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(512, 640))


# ---- lm-eval


@pytest.mark.parametrize("shape", ["hybrid", "gated"])
def test_lm_evals_stock_model_gives_our_log_likelihoods(shape, data, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from eval.harness import HarnessLM

    model = make_model(SHAPES[shape])
    export(load_checkpoint(save(model, tmp_path / "checkpoint", data)), tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3, trust_remote_code=True)
    ours = HarnessLM(model, load_tokenizer(data), batch_tokens=256)
    pairs = [("The statement", " is executed"), ("", "An object"), ("if x:\n    ", "return x\n"), ("a b", " c d e")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (nats, greedy), (expected, also) in zip(
        theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests), strict=True
    ):
        assert abs(nats - expected) < 1e-4
        assert greedy == also


def test_a_model_whose_head_is_its_embedding_can_be_scored(data):
    from lm_eval.api.instance import Instance

    from eval.harness import HarnessLM

    model, tokenizer = make_model(SHAPES["tied"]), load_tokenizer(data)
    lm = HarnessLM(model, tokenizer, batch_tokens=256)
    ((nats, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("a b", " c"), 0)])
    context, ids = tokenizer.encode("a b"), tokenizer.encode(" c")
    with torch.no_grad():
        scores = model(torch.tensor([[0, *context, *ids]])).log_softmax(-1)[0, len(context) : -1]
    assert abs(nats - sum(row[i].item() for row, i in zip(scores, ids, strict=True))) < 1e-4


# ---- import of models that others trained


def rope(rope_type="default", rope_theta=1e4, **more):
    return {"rope_type": rope_type, "rope_theta": rope_theta, **more}


def granite(**change):
    return GraniteMoeHybridConfig(**dict(
        vocab_size=640, hidden_size=32, num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"],
        num_attention_heads=4, num_key_value_heads=2, shared_intermediate_size=48, num_local_experts=0,
        num_experts_per_tok=0, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16,
        mamba_chunk_size=16, max_position_embeddings=128, embedding_multiplier=12, attention_multiplier=0.2,
        residual_multiplier=0.22, logits_scaling=3, position_embedding_type="nope", tie_word_embeddings=True,
    ) | change)  # fmt: skip


def bamba(**change):
    return BambaConfig(**dict(
        vocab_size=640, hidden_size=32, num_hidden_layers=3, attn_layer_indices=[1], num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=16, mamba_chunk_size=16, max_position_embeddings=128,
    ) | change)  # fmt: skip


def mamba2(**change):
    return Mamba2Config(**dict(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=2,
        chunk_size=16,
    ) | change)  # fmt: skip


IMPORTED = {
    "granite": granite(),
    "granite, rotary": granite(
        position_embedding_type="rope", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "granite without attention": granite(layer_types=["mamba"] * 3, tie_word_embeddings=False),
    "mamba2": mamba2(),
    "bamba": bamba(),
    "bamba, tied, other theta": bamba(
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


def their_model(config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif "norm" in name or name.endswith((".D", "dt_bias", "A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("name", IMPORTED)
def test_imported_model_equals_the_original(name, tmp_path):
    theirs = their_model(IMPORTED[name])
    theirs.save_pretrained(tmp_path / "hf")
    config = import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert config.n_parameters == sum(p.numel() for p in theirs.parameters())
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    ours, tokens = checkpoint.load_model(kernels="torch"), random_tokens(2, 37)
    torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, rtol=0, atol=1e-4)
    theirs(tokens, labels=tokens, use_cache=False).loss.backward()
    ours(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    gradients = {parameter: p.grad for parameter, p in theirs.named_parameters()}
    found = {parameter: p.grad for parameter, p in ours.named_parameters()}
    for parameter, parts in parameter_names(config, theirs.config.model_type).items():
        expected = gradients[parameter]
        if config.rope_dim and parameter.endswith(("q_proj.weight", "k_proj.weight")):
            expected = turning_first(expected, config)
        whole = join(parameter, [found[part] for part in parts])
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(whole, expected, rtol=0, atol=atol, msg=parameter)
    assert not checkpoint.has_moments
    with pytest.raises(FileNotFoundError, match="has no tokenizer.model: its weights were imported"):
        _ = checkpoint.tokenizer_path


def test_configurations_as_they_are_published_are_understood(tmp_path):
    """The names and gaps of files that transformers 4 wrote for granite-4.0-h-1b and Bamba-9B, with fewer layers."""
    granite_4 = {
        "attention_multiplier": 0.015625, "embedding_multiplier": 12, "hidden_size": 2048, "intermediate_size": 8192,
        "layer_types": ["mamba", "mamba", "attention", "mamba"], "logits_scaling": 8, "mamba_d_state": 128,
        "mamba_n_heads": 64, "max_position_embeddings": 131072, "model_type": "granitemoehybrid",
        "num_attention_heads": 32, "num_experts_per_tok": 0, "num_hidden_layers": 4, "num_key_value_heads": 8,
        "num_local_experts": 0, "position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000, "shared_intermediate_size": 8192, "tie_word_embeddings": True,
        "vocab_size": 100352,
    }  # fmt: skip
    bamba_9b = {
        "attn_layer_indices": [1], "attn_rotary_emb": 64, "hidden_size": 4096, "intermediate_size": 14336,
        "mamba_d_state": 128, "model_type": "bamba", "num_attention_heads": 32, "num_hidden_layers": 3,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(granite_4))
    config, _ = read_config(tmp_path)
    assert (config.layer_pattern, config.positions, config.n_mamba_heads) == ("MMAM", "none", 64)
    assert (config.embedding_multiplier, config.attention_multiplier, config.logits_scaling) == (12, 1 / 64, 8)
    (tmp_path / "config.json").write_text(json.dumps(bamba_9b))
    config, _ = read_config(tmp_path)
    assert (config.layer_pattern, config.rope_dim, config.head_dim, config.rope_theta) == ("MAM", 64, 128, 10000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": 2}, "its num_local_experts is 2; our network has only 0"),
        ({"mamba_proj_bias": True}, "its mamba_proj_bias is True"),
        ({"time_step_limit": (0.0, 1.0)}, "its time_step_limit is (0.0, 1.0)"),
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ({"attention_bias": True}, "its attention_bias is True"),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "its rope_type is 'dynamic'",
        ),
    ],
)
def test_what_our_network_has_not_is_refused_by_name(change, words, tmp_path, capsys):
    config = granite(**change)
    config.save_pretrained(tmp_path / "hf")
    assert import_main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_other_models_are_refused(tmp_path, capsys):
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "hf")
    assert import_main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    assert "its model_type is 'llama'; import takes granitemoehybrid, bamba, mamba2" in capsys.readouterr().err
    assert import_main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none has no config.json; give the folder of a Hugging Face model\n" in capsys.readouterr().err


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path, capsys):
    theirs = their_model(granite())
    theirs.save_pretrained(tmp_path / "hf")
    for change, words in (
        ({"shared_intermediate_size": 32}, "shared_mlp.input_linear.weight has the shape [96, 32]"),
        (
            {"layer_types": ["attention", "attention", "mamba"]},
            "misses parameter model.layers.0.self_attn.k_proj.weight",
        ),
        ({"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}, "has the unknown parameter model.layers.2."),
    ):
        granite(**change).save_pretrained(tmp_path / "hf")
        assert import_main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "hf/model.safetensors").write_bytes(b"12345678901234567890")
    assert import_main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err


# ---- the command


def test_command_says_which_class_it_was_and_why(data, tmp_path, capsys):
    for shape, words in (
        ("hybrid", "stock class GraniteMoeHybridForCausalLM, which has all that this shape needs"),
        (
            "gated",
            "own code, load with trust_remote_code=True, because GraniteMoeHybridForCausalLM lacks the output gate",
        ),
    ):
        save(make_model(SHAPES[shape]), tmp_path / shape, data)
        assert main([str(tmp_path / shape), str(tmp_path / f"{shape}.hf")]) == 0
        assert words in capsys.readouterr().out
    card = (tmp_path / "gated.hf/README.md").read_text()
    assert "trust_remote_code=True" in card
    assert '| `layer_pattern` | "MAM" |' in card


def test_nothing_is_left_of_an_export_that_fails(data, tmp_path, capsys):
    checkpoint = save(make_model(SHAPES["hybrid"]), tmp_path / "checkpoint", data)
    (tmp_path / "full").mkdir()
    for arguments, words in (
        ([str(checkpoint), str(tmp_path / "full")], "full exists already; give a new folder"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "none does not exist; give a folder such as"),
        ([str(checkpoint), str(tmp_path / "out"), "--shard-gb", "0"], "--shard-gb 0.0: it must be positive"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.export.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(load_checkpoint(checkpoint), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "full"]


def test_weights_alone_cannot_be_resumed(data, tmp_path):
    from train.checkpoint import restore_optimizer

    checkpoint = load_checkpoint(save(make_model({}), tmp_path / "step_0000000", data))
    assert checkpoint.model_config == ModelConfig(**dataclasses.asdict(BASE))
    with pytest.raises(ValueError, match="holds weights alone .* so no run can go on from it"):
        restore_optimizer(None, checkpoint)
