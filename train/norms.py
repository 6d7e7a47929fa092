"""The gradient's norm by part of the network, from the pieces of it that each process has anyway.

Whatever the ZeRO stage, the torch optimizer inside DeepSpeed is given the summed and clipped gradient, each process
its own flat stretches of it. A hook before the optimizer's step adds up the squares of each part there, one all-reduce
of a number a part makes them whole, and what clipping took away is put back. Their squares add up to grad_norm's.
"""

import math

import torch
import torch.distributed as dist

from train.checkpoint import owned_pieces, torch_optimizer

PARTS = ("embedding", "attention", "mamba", "mlp", "norms", "head")  # as ModelConfig.parameters_by_part has them


def part_of(name, layer_pattern):
    """The part that a parameter of HybridLM belongs to, by its name."""
    owner, *inside = name.split(".")
    if owner in ("embedding", "head"):
        return owner
    if owner != "layers" or inside[1].endswith("_norm") or inside[2] in ("q_norm", "k_norm"):
        return "norms"
    if inside[1] == "mlp":
        return "mlp"
    return {"A": "attention", "M": "mamba"}[layer_pattern[int(inside[0])]]


def parts_of(model_config):
    """The parts that a model of this shape has, in PARTS' order."""
    return [part for part in PARTS if model_config.parameters_by_part[part]]


class GradientNorms:
    """Measures every `every` steps. All ranks make one, and call begin and end at every step.

    clip: --clip, by which the gradient has been scaled down before the optimizer sees it.
    """

    def __init__(self, engine, every, clip):
        config = engine.module.config
        self.every, self.clip, self.parts = every, clip, parts_of(config)
        self.squares = torch.zeros(len(self.parts), device=engine.device)
        self.measures = False
        self.held = {}  # flat parameter -> [(start, stop in it, index of the part)]
        if engine.zero_optimization_stage() == 0 and dist.get_rank():
            return  # every rank has the whole gradient: rank 0 speaks for all
        for piece in owned_pieces(engine):
            index = self.parts.index(part_of(piece.name, config.layer_pattern))
            self.held.setdefault(piece.flat, []).append((piece.offset, piece.offset + piece.numel, index))
        torch_optimizer(engine).register_step_pre_hook(self._add_squares)

    def begin(self, step):
        self.measures = step % self.every == 0
        self.squares.zero_()

    def end(self, grad_norm):
        """{"grad_norm_by_part": {part: norm before clipping}} of the step that began, or {} where none was measured.

        grad_norm: of the whole gradient, before clipping.
        """
        if not self.measures:
            return {}
        dist.all_reduce(self.squares)
        squares = self.squares.tolist()
        if not any(squares):
            return {}  # the optimizer made no step
        shrunk = max(1.0, (grad_norm + 1e-6) / self.clip) if self.clip else 1.0  # as torch and DeepSpeed clip
        norms = {part: shrunk * math.sqrt(square) for part, square in zip(self.parts, squares, strict=True)}
        return {"grad_norm_by_part": norms}

    @torch.no_grad()
    def _add_squares(self, optimizer, *_):
        """Before each step of the torch optimizer, of which DeepSpeed makes one for each of its groups."""
        if not self.measures:
            return
        for flat in [flat for group in optimizer.param_groups for flat in group["params"]]:
            if flat.grad is None or flat not in self.held:
                continue
            grad = flat.grad.view(-1)
            starts, stops, indices = zip(*self.held[flat], strict=True)
            pieces = [grad[start:stop] for start, stop in zip(starts, stops, strict=True)]
            norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)).to(self.squares.device)
            self.squares.index_add_(0, torch.tensor(indices, device=self.squares.device), norms.square())
