"""Muon under ZeRO is the Muon of a single process: same updates, momentum and gradient norm; and runs resume."""

import json
import shutil

import pytest
import torch
from launching import launch
from muon_cases import CONFIG, LR, MODEL, MUON_LR, STEPS, batch, rate

from model.hybrid import HybridLM
from model.weights import load_checkpoint
from train.optim import is_muon, make_optimizer, orthogonalized
from train.run_dir import RunDir, read_metrics

# what Muon may step: the matrices of the layers, each by itself
MATRICES = {
    f"layers.0.mixer.in_proj.{part}" for part in ("z", "x", "B", "C", "dt")
} | {
    f"layers.1.mixer.in_proj.{part}" for part in ("q", "k", "v", "gate")
} | {
    f"layers.{i}.{part}" for i in (0, 1)
    for part in ("mixer.out_proj.weight", "mlp.in_proj.gate", "mlp.in_proj.up", "mlp.out_proj.weight")
}  # fmt: skip


def test_muon_steps_the_matrices_of_the_layers_and_nothing_else():
    model = HybridLM(MODEL)
    assert {name for name, p in model.named_parameters() if is_muon(name, p.shape)} == MATRICES
    muon, head, rest = make_optimizer(model, CONFIG).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in muon["params"]} == MATRICES
    assert [names[p] for p in head["params"]] == ["head.weight"]
    assert (muon["weight_decay"], head["weight_decay"], rest["weight_decay"]) == (0.1, 0.1, 0.0)
    assert len(muon["params"]) + 1 + len(rest["params"]) == len(names)


@pytest.mark.parametrize("shape", [(64, 64), (16, 96), (96, 16)])
def test_orthogonalized_matrix_has_the_directions_of_the_svd_and_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalized(matrix) @ v.T
    large = s > 0.05 * s.max()  # Newton-Schulz has not lifted the smallest ones yet
    assert ((inner.diagonal()[large] > 0.6) & (inner.diagonal()[large] < 1.25)).all()
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-4


def reference():
    """[(weights, momenta, gradient norm)] after each step: plain PyTorch on whole matrices, in float32."""
    torch.manual_seed(CONFIG.seed)
    model = HybridLM(MODEL, kernels="torch")
    weights = dict(model.named_parameters())
    momenta = {name: torch.zeros_like(weights[name]) for name in MATRICES}
    plain = [p for name, p in weights.items() if name not in MATRICES and name != "head.weight"]
    adamw = torch.optim.AdamW(
        [{"params": [weights["head.weight"]], "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    after = []
    for step in range(1, STEPS + 1):
        tokens = batch(step)
        model.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in adamw.param_groups:
            group["lr"] = LR * rate(step)
        adamw.step()
        lr = MUON_LR * rate(step)
        with torch.no_grad():
            for name in MATRICES:
                weight, gradient = weights[name], weights[name].grad
                momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
                x = 0.9 * momenta[name] + 0.1 * gradient  # Nesterov
                x = x / x.norm()
                for _ in range(5):
                    x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
                weight.copy_(weight * (1 - lr * 0.1) - lr * 0.2 * max(weight.shape) ** 0.5 * x)
        after.append(({n: w.detach().clone() for n, w in weights.items()}, dict(momenta), norm.item()))
    return after


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{number of processes: folder of tests/muon_cases.py}; each goes on from checkpoints of the one before too."""
    folder, found, earlier = tmp_path_factory.mktemp("muon"), {}, []
    for processes in (4, 2, 1):
        found[processes] = folder / str(processes)
        done = launch(found[processes], *earlier, processes=processes, program="tests/muon_cases.py")
        assert done.returncode == 0, done.stderr[-3000:]
        earlier = [str(found[processes] / f"stage{stage}_accum1" / "step_0000002") for stage in (2, 3, 1)]
    return found


def error(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_update_equals_a_single_process_in_float32(cases, processes):
    torch.manual_seed(CONFIG.seed)
    start = {name: p.detach() for name, p in HybridLM(MODEL, kernels="torch").named_parameters()}
    expected = reference()
    for stage in (0, 1, 2, 3):
        for grad_accum in (1, 4):
            before, expected_before = start, start
            for step, (weights, momenta, norm) in enumerate(expected, start=1):
                path = cases[processes] / f"stage{stage}_accum{grad_accum}" / f"step_{step:07d}"
                checkpoint = load_checkpoint(path)
                found = checkpoint.tensors()
                assert checkpoint.run["grad_norm"] == pytest.approx(norm, rel=1e-4)
                assert norm > 2 * CONFIG.clip  # or clipping would not be tested
                for name, weight in weights.items():
                    change = error(found[name] - before[name], weight - expected_before[name])
                    assert change < 1e-3, (path, name)
                for name, momentum in checkpoint.tensors("momentum_buffer").items():
                    assert error(momentum, momenta[name]) < 1e-3, (path, name)
                assert checkpoint.tensors("momentum_buffer").keys() == MATRICES
                before, expected_before = found, weights


@pytest.mark.parametrize("processes", [1, 2])
def test_step_after_a_change_of_processes_and_stage_is_that_of_an_unbroken_run(cases, processes):
    weights = reference()[-1][0]
    for i in range(3):
        found = load_checkpoint(cases[processes] / f"from_{i}" / f"step_{STEPS:07d}").tensors()
        for name, weight in weights.items():
            assert error(found[name], weight) < 1e-5, (i, name)


def test_resumed_run_has_the_losses_and_weights_of_an_unbroken_one_bit_for_bit(data, tmp_path):
    flags = ["--size", "tiny", "--steps", 8, "--eval-every", 0, "--data", data, "--optimizer", "muon"]
    flags += ["--muon-lr", 0.01, "--schedule", "wsd", "--decay-steps", 3]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run, *more in ((whole, "--save-every", 4), (broken, "--resume")):
        done = launch(*flags, "--run", run, *more, processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        if run == whole:  # as if it had been killed after its first checkpoint
            shutil.copytree(whole, broken)
            shutil.rmtree(RunDir(broken).checkpoint(8))
    rows = [
        [(r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(run / "metrics.jsonl")] for run in (whole, broken)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 8
    one, other = (load_checkpoint(RunDir(run).checkpoint(8)) for run in (whole, broken))
    assert json.loads((whole / "config.json").read_text())["plan"]["muon_lr"] == 0.01
    for kind in ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer"):
        tensors = one.tensors(kind)
        assert tensors
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors(kind)[name]), (kind, name)
