"""The choice of kernels, and what their two versions share; no GPU needed."""

import ast
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from launching import ROOT

from model import ops, reference
from model.config import PRESETS
from model.hybrid import HybridLM
from model.layers import Packing


@pytest.fixture
def forget(monkeypatch):
    """As in a new process: nothing was announced."""
    monkeypatch.delenv("RANK", raising=False)
    ops.announce.cache_clear()
    yield
    ops.announce.cache_clear()


def signatures(path):
    """{function of a file: its parameters with defaults}, read without importing it, with what it takes from ours."""
    tree = ast.parse(path.read_text())
    found = {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("model."):
            elsewhere = signatures(ROOT / f"{node.module.replace('.', '/')}.py")
            found |= {alias.name: elsewhere[alias.name] for alias in node.names if alias.name in elsewhere}
    return found


def test_both_versions_have_the_same_functions_with_the_same_signatures():
    plain, fused = signatures(ROOT / "model/reference.py"), signatures(ROOT / "model/fused.py")
    called = {
        node.attr
        for file in ("hybrid", "layers", "mamba2", "attention")
        for node in ast.walk(ast.parse((ROOT / f"model/{file}.py").read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("ops", "self.ops")
    }
    assert {"mixer", "add_rms_norm", "swiglu", "sigmoid_gate", "rotary", "attention", "cross_entropy"} <= called
    for name in called | {"causal_conv1d", "ssd", "gated_rms_norm"}:
        assert fused[name] == plain[name], name


def test_auto_is_torch_without_a_gpu_and_says_so_once(forget, capsys):
    assert ops.load_ops("auto") is reference
    assert ops.load_ops("auto") is reference
    assert capsys.readouterr().err == "kernels: torch (no CUDA GPU is visible)\n"


def test_only_rank_0_announces_the_kernels(forget, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ops.load_ops("torch")
    assert capsys.readouterr().err == ""


def test_fused_without_its_packages_names_the_package_and_the_pip_line(monkeypatch):
    present = {"triton": False}
    monkeypatch.setattr(ops, "find_spec", lambda package: present[package] or None)
    with pytest.raises(ImportError) as error:
        ops.load_ops("fused")
    assert str(error.value) == (
        "--kernels fused cannot run: triton is not installed: "
        "pip install triton, which PyTorch for GPUs brings along; or choose --kernels torch"
    )


def test_auto_with_a_gpu_but_a_broken_package_says_what_is_wrong(forget, capsys, monkeypatch):
    def broken(module):
        if module == "model.fused":
            raise ImportError("libtriton.so: undefined symbol\nand more")
        return reference

    monkeypatch.setattr(ops, "find_spec", lambda package: True)
    monkeypatch.setattr(ops, "import_module", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.load_ops("auto") is reference
    said = capsys.readouterr().err
    assert (
        said.startswith("kernels: torch (libtriton.so: undefined symbol: reinstall it for this PyTorch")
        and said.count("\n") == 1
    )


def test_unknown_kernels_and_recomputation_are_refused():
    with pytest.raises(ValueError, match="'triton' is unknown; choose one of auto, torch, fused"):
        HybridLM(PRESETS["tiny"], kernels="triton")
    with pytest.raises(ValueError, match="'all' is unknown; choose one of none, layer"):
        HybridLM(PRESETS["tiny"], recompute="all")


def test_training_with_kernels_that_are_missing_ends_with_one_line_and_exit_code_2(data, tmp_path):
    command = ["train/launch.py", "--size", "tiny", "--data", data, "--run", tmp_path / "run", "--kernels", "fused"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "kernels" in line]
    assert len(lines) == 1 and lines[0].startswith("error: --kernels fused cannot run: ")
    assert not (tmp_path / "run").exists()


def test_cross_entropy_is_torchs_with_its_gradients():
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    targets[::3] = reference.IGNORED_TARGET
    loss = reference.cross_entropy(hidden, weight, targets)
    kept = targets >= 0
    logits = hidden[kept] @ weight.T
    expected = F.cross_entropy(logits, targets[kept])
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(t, [hidden, weight]) for t in (loss, expected)), strict=True):
        torch.testing.assert_close(got, want)
    probabilities = logits.softmax(-1)
    by_hand = (probabilities - F.one_hot(targets[kept], 30)).T @ hidden[kept] / kept.sum()
    torch.testing.assert_close(
        torch.autograd.grad(reference.cross_entropy(hidden, weight, targets), weight)[0], by_hand
    )


def test_z_loss_adds_the_mean_square_of_log_z_over_the_targets_that_count():
    hidden, weight = torch.randn(20, 8), torch.randn(30, 8)
    targets = torch.randint(0, 30, (20,))
    targets[::3] = reference.IGNORED_TARGET
    log_z = (hidden[targets >= 0] @ weight.T).exp().sum(-1).log()
    expected = reference.cross_entropy(hidden, weight, targets) + 0.01 * (log_z**2).mean()
    torch.testing.assert_close(reference.cross_entropy(hidden, weight, targets, z_loss=0.01), expected)


def test_z_loss_is_part_of_the_training_loss_and_of_no_other():
    tokens = torch.randint(0, 512, (2, 40))
    plain, other = (HybridLM(PRESETS["tiny"], z_loss=z_loss) for z_loss in (0.0, 0.01))
    other.load_state_dict(plain.state_dict())
    assert other(tokens, targets=tokens) > plain(tokens, targets=tokens) + 0.1
    assert torch.equal(other.eval()(tokens, targets=tokens), plain.eval()(tokens, targets=tokens))


def test_recomputing_layers_changes_no_bit():
    tokens = torch.randint(0, 512, (2, 40))
    ids = (torch.arange(40) // 15).expand(2, -1)
    gradients = []
    for recompute in ("none", "layer"):
        torch.manual_seed(0)
        model = HybridLM(PRESETS["tiny"], recompute=recompute)
        loss = model(tokens, targets=tokens, document_ids=ids)
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputing_layers_keeps_only_their_inputs():
    def kept_bytes(recompute):
        model, total = HybridLM(PRESETS["tiny"], recompute=recompute), 0

        def count(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        tokens = torch.randint(0, 512, (2, 64))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.hidden(tokens)
        return total

    assert kept_bytes("layer") < kept_bytes("none") / 10


def test_packing_counts_documents_from_0_and_finds_their_edges():
    packing = Packing(torch.tensor([[7, 7, 2, 2, 7], [5, 6, 6, 6, 6]]))
    assert packing.document_ids.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]
    assert packing.positions.tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 3]]
    assert packing.cu_seqlens.tolist() == [0, 2, 4, 5, 6, 10]
    assert packing.ends.tolist() == [[2, 2, 4, 4, 5], [1, 5, 5, 5, 5]]
    assert packing.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert packing.document_ids.dtype == packing.cu_seqlens.dtype == packing.ends.dtype == torch.int32


def test_convolution_with_a_state_and_documents_shows_the_state_to_the_first_alone():
    x, weight, bias, start = torch.randn(1, 5, 6), torch.randn(6, 4), torch.randn(6), torch.randn(1, 3, 6)
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    got, _ = reference.causal_conv1d(x, weight, bias, ids, start)
    first, _ = reference.causal_conv1d(x[:, :2], weight, bias, None, start)
    second, _ = reference.causal_conv1d(x[:, 2:], weight, bias)
    torch.testing.assert_close(got, torch.cat([first, second], dim=1))


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (3, 1)])
@pytest.mark.parametrize("n", [1, 24])
def test_products_and_their_gradients_are_pytorchs(shape, n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(*shape, 40, generator=generator)[..., ::2].requires_grad_()  # strided, as a slice of a product is
    weight = torch.randn(n, 20, generator=generator).requires_grad_()
    dy = torch.randn(*shape, n, generator=generator)
    for function in (reference.linear, F.linear):
        y = function(x, weight)
        found = y, *torch.autograd.grad(y, (x, weight), dy)
        if function is reference.linear:
            ours = found
    for got, want in zip(ours, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
