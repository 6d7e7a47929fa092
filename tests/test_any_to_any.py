"""A run goes on from any layout in any other: number of processes, ZeRO stage, micro-batch, accumulation, optimizer.

Same layout: the same losses bit for bit for 20 steps. Another: the same samples in each step, losses within 1e-5, in
float32. Of 8-bit moments only the blocks that a boundary between processes cuts are rounded once more (6e-6 here).
"""

import json
import subprocess
import sys

import pytest
from launching import ROOT, free_port
from layouts import LAYOUTS, SAVED, STEPS

OPTIMIZERS = ["adamw", "muon", "adamw8bit"]
OF_PROCESSES = {2: OPTIMIZERS, 1: OPTIMIZERS, 4: ["adamw"]}  # Muon on four: test_muon.py


def start(processes, data, out, *earlier):
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={processes}", f"--master_port={free_port()}",
        str(ROOT / "tests/layouts.py"), str(data), str(out), ",".join(OF_PROCESSES[processes]), *map(str, earlier),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """{processes: {optimizer: {layout: rows of steps}}}; all go on from what two processes saved."""
    out, rows = tmp_path_factory.mktemp("layouts"), {}
    for processes in OF_PROCESSES:
        process = start(processes, data, out, *([] if processes == 2 else [out]))
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        rows[processes] = json.loads((out / f"{processes}.json").read_text())
    return rows


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_layout_has_the_same_losses_bit_for_bit_for_twenty_steps(found, optimizer):
    unbroken = found[2][optimizer]["unbroken"]
    assert len(unbroken) == STEPS
    assert unbroken[-1][0] < unbroken[0][0] - 0.1  # it learns
    assert found[2][optimizer]["stage 2, micro-batch 2"] == unbroken[SAVED:]
    assert STEPS - SAVED == 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_another_layout_has_the_same_samples_and_losses(found, optimizer):
    expected = found[2][optimizer]["unbroken"][SAVED:]
    for processes, layouts in LAYOUTS.items():
        for stage, micro_batch in layouts if optimizer in OF_PROCESSES[processes] else []:
            rows = found[processes][optimizer][f"stage {stage}, micro-batch {micro_batch}"]
            assert [samples for _, samples in rows] == [samples for _, samples in expected]
            for (loss, _), (expected_loss, _) in zip(rows, expected, strict=True):
                assert abs(loss - expected_loss) < 1e-5, (processes, stage, micro_batch)
