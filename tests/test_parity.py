"""ZeRO stages 0 to 3 give the losses and gradient norms of a plain PyTorch loop, in float32 on CPU processes.

So do offloading and hierarchical partitioning: the runs read the files of ds_configs/, without bf16.
"""

import json

import pytest
from launching import launch
from parity_worker import ACCUMULATIONS, CLIP, FILES, STEPS, plain_run


@pytest.fixture(scope="module")
def plain(data):
    """[[loss, gradient norm] of each step] on one process, the whole batch at a time, without DeepSpeed."""
    return plain_run(data, STEPS, lambda model, loss: loss.item())


@pytest.mark.parametrize("processes", [1, 2])
def test_every_zero_json_and_accumulation_equals_plain_pytorch(data, plain, processes, tmp_path):
    out = tmp_path / "results.json"
    result = launch(data, out, processes=processes, program="tests/parity_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(out.read_text())
    assert len(results) == len(FILES) * len(ACCUMULATIONS)
    for name, rows in results.items():
        assert len(rows) == STEPS
        for step, (row, expected) in enumerate(zip(rows, plain, strict=True), start=1):
            # float32 sums in another order: found to differ by 2e-7
            assert row == pytest.approx(expected, rel=1e-3), f"{name}, {processes} processes, step {step}"
    assert min(norm for _, norm in plain) > CLIP  # so that clipping was part of it
