"""A model of random weights that tells inputs apart, and random tokens for it."""

import torch

from model.config import PRESETS
from model.hybrid import HybridLM

SHAPE = PRESETS["tiny"]  # chunks of 16


def sharpened(config, **settings):
    """A HybridLM of the shape with larger matrices than at the start, so that a leak or a difference would show."""
    torch.manual_seed(0)
    model = HybridLM(config, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def random_tokens(b, l, seed=0):
    """(b, l) ids of SHAPE's vocabulary."""
    return torch.randint(0, SHAPE.vocab_size, (b, l), generator=torch.Generator().manual_seed(seed))
