"""Gradients summed and weights gathered with fewer copies: what DeepSpeed's own way gives."""

import json
from types import SimpleNamespace

import pytest
import torch
from launching import launch
from traffic_worker import WAYS

from train.traffic import add_up_without_copies


@pytest.mark.parametrize("processes", WAYS)
def test_a_step_is_that_of_deepspeed(data, tmp_path, processes):
    out = tmp_path / "results"
    result = launch(data, out, processes=processes, program="tests/traffic_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(processes):
        results = json.loads(out.with_suffix(f".{rank}.json").read_text())
        for way in WAYS[processes]:
            file = way.removeprefix("DeepSpeed's ").split(",")[0]
            got, theirs = results[way], results[f"DeepSpeed's {file}"]
            assert got["replaced"] == (got is not theirs)
            for what in ("losses", "norms"):
                # three processes: DeepSpeed's stage 2 divides by three in bf16, its stage 3 before the sum
                if processes == 3:
                    assert got[what] == pytest.approx(theirs[what], rel=2e-3 if file == "zero2" else 1e-5)
                else:
                    assert got[what] == theirs[what]


def test_stage_1_adds_gradients_up_as_a_float32_copy_of_them_would():
    sums = torch.randn(40, 24)
    parameter = torch.nn.Parameter(torch.zeros(40, 24, dtype=torch.bfloat16))
    parameter.grad = torch.randn(40, 24).bfloat16()
    expected = sums + parameter.grad.float()
    optimizer = SimpleNamespace(fp32_groups_gradients=[[sums.view(-1)]], fp32_groups_has_gradients=[[False]])
    add_up_without_copies(optimizer)
    optimizer._update_hp_grad(parameter, 0, 0, clear_lp_grads=False)
    assert torch.equal(sums, expected)
    assert optimizer.fp32_groups_has_gradients == [[True]]
