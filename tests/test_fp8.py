"""8-bit products: what they compute, where their scales come from, and that a run with them goes on bit for bit."""

import math
import shutil
from copy import deepcopy

import pytest
import torch
from launching import launch
from test_run import numbers, stage_config

from model import fp8, reference
from model.config import PRESETS, ModelConfig
from model.fp8 import CURRENT_STEPS, FORGET, Scales, Site, power_of_two
from model.hybrid import HybridLM
from model.layers import SplitLinear
from train.config import TrainConfig, make_plan
from train.run_dir import RunDir, read_metrics

SHAPE = ModelConfig(
    d_model=64, layer_pattern="MA", n_heads=4, n_kv_heads=2, d_ff=96, seq_len=32, vocab_size=128,
    d_state=16, mamba_head_dim=8, chunk_size=16, attention_gate=True,
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_model(fp8=True, recompute="none", config=SHAPE):
    torch.manual_seed(0)
    model = HybridLM(config, kernels="torch", recompute=recompute, fp8=fp8)
    with torch.no_grad():  # larger than at the start, so that an error shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.train()


def backward(model, seed=0):
    """Loss and the gradient of each parameter, of two random sequences."""
    tokens = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def linear(weights, d_in, steps=CURRENT_STEPS):
    """A SplitLinear of these weights whose product is in 8 bits, of a model that has taken that many steps."""
    module = SplitLinear(d_in, {str(i): len(weight) for i, weight in enumerate(weights)}, reference)
    module.load_state_dict({str(i): weight for i, weight in enumerate(weights)})
    scales = Scales(1, 1)
    scales.steps = steps
    module.fp8 = Site(scales, 0)
    return module, scales


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("steps", [0, CURRENT_STEPS])
def test_small_whole_numbers_are_multiplied_exactly(steps):
    x, dy = (torch.randint(-2, 3, (32, n), generator=torch.Generator().manual_seed(n)).float() for n in (16, 48))
    weights = [torch.randint(-2, 3, (n, 16), generator=torch.Generator().manual_seed(n)).float() for n in (16, 32)]
    module, _ = linear(weights, 16, steps)
    x.requires_grad_()
    for parts in ([16, 32], [48], [8, 24, 16]):  # whatever the outputs are split into
        y = module(x.view(2, 16, 16), split=parts)
        assert torch.equal(torch.cat(y, dim=-1).view(32, 48), x @ torch.cat(weights).T)
        got = torch.autograd.grad(y, [x, *module.parameters()], dy.view(2, 16, 48).split(parts, dim=-1))
        for mine, want in zip(got, [dy @ torch.cat(weights), *(dy.T @ x).split([16, 32])], strict=True):
            assert torch.equal(mine, want)
    assert torch.equal(module(x, split=()), x @ torch.cat(weights).T)


def test_products_are_near_those_in_float32():
    weights = [draw(32, 64) / 8, draw(64, 64)]
    module, scales = linear(weights, 64)
    x, dy = draw(128, 64, seed=1).requires_grad_(), draw(128, 96, seed=2) * 1e-6  # e5m2's smallest is 1.5e-5
    for _ in range(2):  # the second time with scales of the first
        y = torch.cat(module(x), dim=-1)
        dx, *dweights = torch.autograd.grad(y, [x, *module.parameters()], dy)
        scales.end_step()
    assert distance(y, x @ torch.cat(weights).T) < 0.05  # two factors of three bits: 2.6 % each, at random
    assert distance(dx, dy @ torch.cat(weights)) < 0.08  # two bits: 5.2 %
    assert distance(torch.cat(dweights), dy.T @ x) < 0.08


def test_an_output_that_nothing_uses_has_a_gradient_of_zero():
    module, _ = linear([draw(16, 32), draw(32, 32)], 32)
    x = draw(16, 32).requires_grad_()
    module(x)[1].sum().backward()
    assert not module.get_parameter("0").grad.any() and module.get_parameter("1").grad.any()
    assert x.grad.any()


def test_scale_is_the_power_of_two_below_the_ratio():
    largest = torch.tensor([0.0, 1.0, 224.0, 225.0, 3e-30, torch.inf])
    assert power_of_two(largest, 448.0).tolist()[:4] == [1.0, 256.0, 2.0, 1.0]
    assert power_of_two(largest, 448.0)[4:].tolist() == [2.0**100, 2.0**-100]


def test_scales_follow_the_steps_before_and_forget_them_slowly():
    module, scales = linear([torch.ones(16, 16)], 16)
    x = torch.zeros(16, 16)
    x[3, 4] = -100.0
    module(x)
    assert scales.scale[0].tolist() == [1.0, 1.0, 1.0]  # within a step nothing changes
    scales.end_step()
    assert scales.largest[0].tolist() == [100.0, 1.0, 0.0]
    assert scales.scale[0].tolist() == [2.0, 128.0, 1.0]  # 448 / 2 / 100, 448 / 2 / 1
    assert not scales.seen.any()
    x[3, 4] = 1.0
    module(x)
    module(x / 2)
    scales.end_step()
    assert scales.largest[0].tolist() == [torch.tensor(100.0).mul(FORGET).item(), 1.0, 0.0]
    scales.seen[0] = torch.tensor([torch.inf, 1.0, torch.nan])
    scales.end_step()
    assert scales.largest[0, 0] < 100 and scales.largest.isfinite().all()


def test_scales_lie_where_cublaslt_reads_them():
    scales = Scales(3, 3)
    assert not any(
        number.data_ptr() % 16 for roles in scales.places for s, i, _ in roles.values() for number in (s, i)
    )


def test_first_steps_scale_by_the_factors_themselves():
    module, scales = linear([draw(16, 32)], 32, steps=0)
    x = draw(16, 32)
    assert torch.equal(module(x * 2.0**-20)[0] * 2.0**20, module(x)[0])
    scales.steps = CURRENT_STEPS
    assert not module(x * 2.0**-20)[0].any()  # with a scale of 1 nothing of it is left


def test_what_outgrows_its_scale_is_cut_and_stays_finite():
    module, scales = linear([torch.eye(16)], 16)
    scales.load({"steps": CURRENT_STEPS, "largest": [[1.0, 1.0, 1.0]]})
    y = module(torch.full((16, 16), 1e4))[0]
    assert y.unique().tolist() == [448 / 128]  # beyond twice the largest; the scale, a power of two, leaves more


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, CURRENT_STEPS])
def test_what_is_not_a_number_reaches_every_gradient(steps, bad):
    model = make_model()
    model.scales.steps = steps

    def poisoned(gradient):
        gradient = gradient.clone()
        gradient[0, 5, 3] = bad
        return gradient

    model.layers[-1].mlp.register_forward_hook(lambda module, given, y: y.register_hook(poisoned) and None)
    gradients = backward(model)
    assert gradients[0].isfinite()
    for name, gradient in zip(dict(model.named_parameters()), gradients[1:], strict=True):
        if name.startswith("layers.") and "norm" not in name:
            assert not gradient.isfinite().all(), name
    model.scales.end_step()
    assert model.scales.scale.isfinite().all()


@pytest.mark.parametrize("steps", [0, CURRENT_STEPS])
def test_a_model_in_8_bits_is_near_itself_without(steps):
    model, plain = make_model(), make_model(fp8=False)
    if steps:
        backward(model)
        model.scales.end_step()
        model.scales.steps = steps
    assert model.scales.n_products == 8 and model.scales.n_all == 8
    assert model.state_dict().keys() == plain.state_dict().keys()
    got, want = backward(model), backward(plain)
    assert abs(got[0] - want[0]) < 0.01 * want[0]
    whole = [torch.cat([g.flatten() for g in gradients[1:]]) for gradients in (got, want)]
    assert 0.01 < distance(*whole) < 0.15


def test_fused_swiglu_is_its_parts():
    module = make_model().layers[0].mlp
    apart = deepcopy(module)
    apart.fp8 = None
    x = draw(2, 32, 64)
    results = []
    for mlp in (module, apart):
        inputs = [x.clone().requires_grad_(), *mlp.parameters()]
        y = mlp(inputs[0])
        results.append([y, *torch.autograd.grad(y, inputs, draw(2, 32, 64, seed=1))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("steps", [0, CURRENT_STEPS])
def test_recomputation_changes_no_bit(steps):
    results = []
    for recompute in ("none", "layer"):
        model = make_model(recompute=recompute)
        backward(model)
        model.scales.end_step()
        model.scales.steps = steps
        results.append([*backward(model, seed=1), model.scales.seen])
    for whole, again in zip(*results, strict=True):
        assert torch.equal(whole, again)


def test_micro_batches_of_a_step_share_their_scales():
    model = make_model()
    model.scales.steps = CURRENT_STEPS
    backward(model)
    model.scales.end_step()
    one = backward(model, seed=1)
    backward(model, seed=2)
    for first, again in zip(one, backward(model, seed=1), strict=True):
        assert torch.equal(first, again)


def test_evaluation_and_decoding_are_those_of_the_plain_model():
    model, plain = make_model().eval(), make_model(fp8=False).eval()
    tokens = torch.arange(64).view(2, 32)
    assert torch.equal(model(tokens), plain(tokens))
    steps = [network.step(tokens[:, :1], network.new_state())[0] for network in (model, plain)]
    assert torch.equal(*steps)
    assert not model.scales.seen.any()


def test_products_whose_tokens_or_widths_do_not_fit_are_left_as_they_are():
    model, plain = make_model(), make_model(fp8=False)
    tokens = torch.arange(30).view(2, 15)
    assert torch.equal(model(tokens), plain(tokens))
    scales = HybridLM(PRESETS["nano"], kernels="torch", fp8=True).scales
    assert (scales.n_products, scales.n_all) == (20, 24)  # dt of four Mamba layers has a width of 8
    odd = ModelConfig(
        d_model=24, layer_pattern="A", n_heads=2, n_kv_heads=1, d_ff=24, seq_len=32, vocab_size=128, d_state=16,
        mamba_head_dim=8, chunk_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="that is no multiple of 16"):
        HybridLM(odd, kernels="torch", fp8=True)


def test_a_state_that_was_saved_goes_on_as_it_was():
    model = make_model()
    for seed in range(3):
        backward(model, seed)
        model.scales.end_step()
    other = make_model()
    other.scales.load(model.scales.state())
    assert torch.equal(other.scales.scale, model.scales.scale) and other.scales.steps == 3
    for scales in (model.scales, other.scales):
        scales.steps = CURRENT_STEPS
    for one, same in zip(backward(model, 5), backward(other, 5), strict=True):
        assert torch.equal(one, same)


def test_gpu_without_8_bit_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert "NVIDIA A100 has no 8-bit products (capability 8.0" in fp8.why_not_fp8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp8, "find_spec", lambda package: package)
    assert fp8.why_not_fp8() is None


def test_micro_batch_that_no_product_takes_is_refused():
    config = TrainConfig(
        size="tiny", data="unused", run="unused", fp8=True, seq_len=60, micro_batch=1, batch_tokens=60
    )
    with pytest.raises(ValueError, match="multiple of 16 tokens, not 1 x 60"):
        make_plan(config, vocab_size=512, n_tokens=100_000, world_size=1)


# ---- runs

FLAGS = ["--size", "tiny", "--fp8", "--steps", 8, "--save-every", 6, "--eval-every", 0, "--lr", 1e-2]


def train(data, run, *flags, processes=2):
    result = launch(*FLAGS, "--data", data, "--run", run, *flags, processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return numbers(read_metrics(run / "metrics.jsonl")), result.stderr


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("fp8") / "whole"
    return run, *train(data, run)


def test_resumed_run_has_the_losses_of_an_unbroken_one_bit_for_bit(data, whole, tmp_path):
    run, rows, said = whole
    assert "fp8: 7 of the layers' 8 matrix products are in 8 bits, worked out in float32" in said
    assert rows[-1]["loss"] < rows[0]["loss"]
    run = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(RunDir(run).checkpoint(8))  # as if it had ended after step 6, with scales of the steps before
    assert train(data, run, "--resume")[0] == rows


def test_run_under_zero_3_computes_the_same(data, whole, tmp_path):
    rows, _ = train(data, tmp_path / "run", "--ds-config", stage_config(tmp_path, 3), "--stop-after", 6)
    for row, other in zip(rows, whole[1], strict=False):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
