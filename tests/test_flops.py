"""The FLOP formula against what torch counts in the matrix products of a forward and backward pass."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS
from model.hybrid import HybridLM

COUNTED = ("attention_projections", "mamba_projections", "mlp", "head")  # what is a product of torch's own


@pytest.mark.parametrize("pattern", ["MM", "A", "MMA"])
def test_flop_formula_equals_torchs_count_of_the_matrix_products(pattern):
    config = dataclasses.replace(PRESETS["tiny"], layer_pattern=pattern, attention_gate=True, seq_len=32)
    model = HybridLM(config)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(
        count for operation, count in by_operation.items() if operation.__name__.startswith(("mm", "addmm"))
    )
    expected = sum(config.flops_per_token_by_part[part] for part in COUNTED) * tokens.numel()
    assert products == expected
