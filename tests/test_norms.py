"""The gradient's norm by part: what plain PyTorch finds, with any ZeRO stage, accumulation, number of processes."""

import dataclasses
import json
import math
from collections import Counter

import pytest
from launching import launch
from norms_worker import IN_BF16, RUNS, STEPS
from parity_worker import CLIP, plain_run

from model.config import PRESETS
from model.hybrid import HybridLM
from train.norms import PARTS, part_of, parts_of


@pytest.fixture(scope="module")
def plain(data):
    """[[gradient norm, {part: norm}] of each step] of a plain loop on one process."""

    def norms(model, loss):
        squares = Counter()
        for name, parameter in model.named_parameters():
            squares[part_of(name, model.config.layer_pattern)] += parameter.grad.double().square().sum().item()
        return {part: math.sqrt(square) for part, square in squares.items()}

    return [[norm, by_part] for by_part, norm in plain_run(data, STEPS, norms)]


@pytest.mark.parametrize("processes", [1, 2])
def test_norms_by_part_are_those_of_plain_pytorch(data, plain, processes, tmp_path):
    out = tmp_path / "results.json"
    result = launch(data, out, processes=processes, program="tests/norms_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(out.read_text())
    assert len(results) == len(RUNS[processes])
    for name, rows in results.items():
        loose = 0.05 if "bf16" in name else 1e-4  # bf16 weights have other gradients
        for (norm, by_part), (expected, expected_by_part) in zip(rows, plain, strict=True):
            assert sum(n**2 for n in by_part.values()) == pytest.approx(norm**2, rel=1e-4), name
            assert norm == pytest.approx(expected, rel=loose), name
            assert by_part == pytest.approx(expected_by_part, rel=loose), name
    assert min(norm for norm, _ in plain) > CLIP  # so that the optimizer sees a clipped gradient
    stage_1, stage_2 = ([norm for norm, _ in results[f"{name}, accumulation {n}"]] for name, n in IN_BF16)
    # both add the same bf16 gradients up in float32; added up in bf16 they would be 1e-3 off
    assert stage_1 == pytest.approx(stage_2, rel=1e-5)


@pytest.mark.parametrize("size", ["tiny", "nano-gated"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_of_the_part_that_the_config_counts_it_in(size, tied):
    config = dataclasses.replace(
        PRESETS[size], vocab_size=512, qk_norm=True, embedding_norm=True, tied_embeddings=tied
    )
    counts = Counter()
    for name, parameter in HybridLM(config).named_parameters():
        counts[part_of(name, config.layer_pattern)] += parameter.numel()
    assert {part: counts[part] for part in PARTS} == config.parameters_by_part
    assert parts_of(config) == [part for part in PARTS if counts[part]]
