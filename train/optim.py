"""Which parameter is stepped how: by AdamW, by AdamW with 8-bit moments, or by Muon (the layers' matrices) and AdamW.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) averages the gradients of a matrix and takes the
step along the nearest orthogonal matrix, so it needs whole matrices, of which ZeRO gives each process flat pieces.
DeepSpeed's own Muon orthogonalises before it clips, which scales the finished update, and keeps its momentum in the
gradients' dtype. Ours is therefore an optimizer like any other to DeepSpeed: it is given flat float32 weights and
gradients, already summed and clipped; its momentum is as flat as they are, and is saved and resumed like AdamW's
moments; and the processes put the matrices together themselves.

The 8-bit AdamW steps with bitsandbytes' kernel, which takes flat stretches of any length and needs no memory beside
its states. torchao's keeps moments of a length that is no multiple of 256, as ZeRO's pieces may be, in float32.
"""

from collections import Counter
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

NO_DECAY = ("embedding.weight", "conv1d_weight")  # a table looked up, and a filter of four taps a channel
MOMENTUM = 0.95  # Jordan's
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values come out between about 0.7 and 1.2
NS_STEPS = 5
BLOCK = 256  # elements that share a scale: bitsandbytes'
STRETCH = 1 << 26  # elements handled at a time: a bound on memory, and bitsandbytes counts in 32 bits


def parameter_groups(model, weight_decay):
    """Matrices decay; norms, biases, A_log, D, dt_bias, the convolution and the embedding do not (as in mamba_ssm)."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and not name.endswith(NO_DECAY) else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def is_muon(name, shape):
    """Whether Muon steps this parameter: a matrix inside a layer that maps vectors to vectors.

    So not the embedding and the head, whose rows are looked up or scored one by one (Jordan), nor the convolution, the
    norms, A_log, D and dt_bias. The projection to dt is such a matrix, one row a head, like those to B and C.
    """
    return name.startswith("layers.") and len(shape) == 2 and not name.endswith(NO_DECAY)


def check_optimizer(config):
    """Raise ValueError where this machine cannot run --optimizer."""
    if config.optimizer != "adamw8bit":
        return
    if not torch.cuda.is_available():
        raise ValueError("--optimizer adamw8bit runs on NVIDIA GPUs alone, and there is none here; use adamw")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--optimizer adamw8bit needs bitsandbytes, which is not installed: pip install -r requirements-gpu.txt"
        )


def make_optimizer(model, config):
    """The optimizer that DeepSpeed shards; the learning rates are set before every step, by the schedule."""
    groups = parameter_groups(model, config.weight_decay)
    on_gpu = next(model.parameters()).is_cuda
    settings = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": on_gpu}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if config.optimizer == "adamw8bit":
        return AdamW8bit(*groups, **settings)
    matrices = {p for name, p in model.named_parameters() if is_muon(name, p.shape)}
    decayed, kept = groups
    momentum = MOMENTUM if config.muon_momentum is None else config.muon_momentum
    muon = {**decayed, "params": [p for p in decayed["params"] if p in matrices], "momentum": momentum}
    rest = {**decayed, "params": [p for p in decayed["params"] if p not in matrices]}  # the head, unless it is tied
    return Muon(muon, [group for group in (rest, kept) if group["params"]], **settings)


class Muon(torch.optim.Optimizer):
    """Muon for one group of matrices, AdamW for the other groups.

    The matrices are parameters as they are, or flat pieces of matrices after `shard` has said of which.
    """

    def __init__(self, matrices, others, **adamw_settings):
        self.adamw = torch.optim.AdamW(others, **adamw_settings)
        super().__init__([matrices, *self.adamw.param_groups], {"lr": 0.0})
        self.own = {}  # flat parameter -> {name: Piece} of the matrices in it
        self.shared = {}  # flat parameter -> names of the matrices that several processes have pieces of, in one order
        self.shapes, self.device = {}, None  # of the matrices; where they are put together

    def shard(self, flats, pieces, device):
        """Say which matrices the flat parameters hold. All ranks call it.

        flats: this rank's flat parameters, alike in number and order on all ranks; pieces: what it owns, as
        train.checkpoint.owned_pieces gives them; device: where matrices are put together.
        """
        self.device = device
        index = {flat: i for i, flat in enumerate(flats)}
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, [(index[piece.flat], piece.name, piece.shape) for piece in pieces])
        holders = Counter(place for places in held for place in places)
        self.shapes = {name: shape for _, name, shape in holders}
        for i, flat in enumerate(flats):
            self.own[flat] = {piece.name: piece for piece in pieces if piece.flat is flat}
            self.shared[flat] = [name for (where, name, _), count in holders.items() if where == i and count > 1]

    @torch.no_grad()
    def step(self, closure=None):
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        loss = self.adamw.step(closure)
        for group in self.param_groups:
            for weight in group["params"] if "momentum" in group else ():
                self._muon_step(weight, group)
        return loss

    def _muon_step(self, weight, group):
        """w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonalised(Nesterov's mean of the gradients).

        The factor gives the update the root mean square of AdamW's, so that AdamW's rate and decay suit Muon too
        (Moonlight, arXiv:2502.16982, section 2.2).
        """
        state, beta = self.state[weight], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - beta)
        update = weight.grad.lerp(momentum, beta)
        if weight.ndim == 2:
            update = scaled_orthogonal(update)
        else:
            self._orthogonalize_pieces(update, weight)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonalize_pieces(self, flat, weight):
        """Orthogonalise, in place, the matrices whose pieces lie in `flat`. All ranks call it, for the same weight."""
        own = {name: flat[p.offset : p.offset + p.numel] for name, p in self.own[weight].items()}
        shared, rank, world_size = self.shared[weight], dist.get_rank(), dist.get_world_size()
        for name in own.keys() - set(shared):
            own[name].copy_(scaled_orthogonal(own[name].view(self.shapes[name]).to(self.device)).flatten())
        for first in range(0, len(shared), world_size):  # the ranks work on a matrix each at a time
            names = shared[first : first + world_size]
            matrices = [torch.zeros(self.shapes[n], dtype=flat.dtype, device=self.device) for n in names]
            for worker, (name, matrix) in enumerate(zip(names, matrices, strict=True)):
                self._stretch(matrix, weight, name).copy_(own.get(name, flat[:0]))
                dist.reduce(matrix, worker)  # each element is one rank's, and 0 on the others: nothing is rounded
            if rank < len(matrices):
                matrices[rank].copy_(scaled_orthogonal(matrices[rank]))
            for worker, (name, matrix) in enumerate(zip(names, matrices, strict=True)):
                dist.broadcast(matrix, worker)
                own.get(name, flat[:0]).copy_(self._stretch(matrix, weight, name))

    def _stretch(self, whole, weight, name):
        """The part of a whole matrix that this rank owns, as a flat view; empty where it owns none."""
        piece = self.own[weight].get(name)
        return whole.view(-1)[piece.start : piece.start + piece.numel] if piece else whole.view(-1)[:0]


def scaled_orthogonal(matrix):
    """matrix (r, c) made orthogonal, times 0.2 sqrt(max(r, c))."""
    return orthogonalized(matrix).mul_(0.2 * max(matrix.shape) ** 0.5)


def orthogonalized(matrix):
    """Roughly the nearest orthogonal matrix: five Newton-Schulz steps, in bfloat16 on a GPU and float32 elsewhere."""
    a, b, c = NS_COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp(min=1e-15)).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments for one group of matrices, and with moments in float32 for the others.

    The others are the embedding, for which float32 is the authors' advice (arXiv:2110.02861, section 2.3), and what is
    too small to matter: norms, convolution, A_log, D, dt_bias. Parameters must lie on a GPU.
    """

    def __init__(self, matrices, others, **adamw_settings):
        self.adamw = torch.optim.AdamW([others], **adamw_settings)
        betas, eps = adamw_settings["betas"], adamw_settings["eps"]
        matrices = {**matrices, "bits": 8, "betas": betas, "eps": eps}
        super().__init__([matrices, *self.adamw.param_groups], {"lr": 0.0})
        self.runs = {}  # flat parameter -> list of Run; of a parameter that is not listed, one of all of it

    def shard(self, flats, pieces):
        """Say which matrices the flat parameters hold, as Muon.shard takes them: blocks are counted from a matrix's
        start, so that another number of processes has the same blocks, but for those that a boundary cuts."""
        self.runs = {flat: block_runs([piece for piece in pieces if piece.flat is flat]) for flat in flats}

    @torch.no_grad()
    def step(self, closure=None):
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "bits" not in group]
        loss = self.adamw.step(closure)
        for group in self.param_groups:
            for weight in group["params"] if "bits" in group else ():
                if weight.grad is not None:
                    self._step_8bit(weight, group)
        return loss

    def _step_8bit(self, weight, group):
        from bitsandbytes.functional import optimizer_update_8bit_blockwise  # installed where it is used

        state, runs = self.state[weight], self.runs.get(weight, [Run(0, weight.numel(), 0)])
        state["step"] = step = int(state.get("step", 0)) + 1
        for kind, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if not isinstance(state.get(kind), EightBit):  # the first step, or the first after a resume: in float32
                values = state.pop(kind, None)
                state[kind] = EightBit(weight.numel(), levels(signed, weight.device), runs)
                if values is not None:
                    state[kind].pack(values.view(-1))
        first, second = state["exp_avg"], state["exp_avg_sq"]
        flat, grad = weight.view(-1), weight.grad.view(-1)
        for part, blocks in stretches(runs):
            optimizer_update_8bit_blockwise(
                "adam", grad[part], flat[part], first.codes[part], second.codes[part], *group["betas"], 0.0, 0.0,
                group["eps"], step, group["lr"], first.levels, second.levels, first.scales[blocks],
                second.scales[blocks], group["weight_decay"],
            )  # fmt: skip


class Run(NamedTuple):
    """Elements start to stop of a flat row, in blocks of 256 from `start` on; the first has the number `block`."""

    start: int
    stop: int
    block: int

    @property
    def n_blocks(self):
        return -(-(self.stop - self.start) // BLOCK)


def block_runs(pieces):
    """The runs of a flat parameter that holds these pieces (train.checkpoint.Piece): blocks begin where they do in
    the whole parameters. Neighbours whose blocks follow one another are one run."""
    runs: list[Run] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        begin, end = piece.offset, piece.offset + piece.numel
        middle = begin + min(-piece.start % BLOCK, piece.numel)  # end of a block that begins before the piece
        for start, stop in ((begin, middle), (middle, end)):
            last = runs[-1] if runs else Run(0, 0, 0)
            if start == stop:
                continue
            if runs and last.stop == start and not (start - last.start) % BLOCK:
                runs[-1] = last._replace(stop=stop)
            else:
                runs.append(Run(start, stop, last.block + last.n_blocks))
    return runs


def stretches(runs):
    """Yield (slice of elements, slice of blocks) of at most STRETCH elements."""
    for run in runs:
        for start in range(run.start, run.stop, STRETCH):
            stop, block = min(start + STRETCH, run.stop), run.block + (start - run.start) // BLOCK
            yield slice(start, stop), slice(block, block - (start - stop) // BLOCK)


class EightBit:
    """A flat row of numbers in 8 bits each: the nearest of 256 levels, times the largest of its block of 256.

    Levels end at 1, and at -1 or above 0, so that the largest number of a block is kept exactly: what is unpacked and
    packed again, in the same blocks, is the same bit for bit. What no run covers is padding, and 0.
    """

    def __init__(self, n, levels, runs=None):
        self.levels = levels  # (256,), rising
        self.runs = [Run(0, n, 0)] if runs is None else runs
        self.codes = torch.zeros(n, dtype=torch.uint8, device=levels.device)
        self.scales = torch.zeros(sum(run.n_blocks for run in self.runs), device=levels.device)

    def pack(self, values):
        """values (n,), float32"""
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        for where, numbers in stretches(self.runs):
            part = values[where]
            blocks = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
            scales = blocks.abs().amax(dim=1)
            codes = torch.bucketize(blocks / scales[:, None], middles, out_int32=True)  # of a block of zeros any code
            self.codes[where] = codes.view(-1)[: len(part)].to(torch.uint8)
            self.scales[numbers] = scales

    def unpack(self, start, stop):
        """The numbers from start to stop, float32."""
        values = torch.zeros(stop - start, device=self.codes.device)
        for run in self.runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                blocks = run.block + torch.arange(first - run.start, last - run.start, device=values.device) // BLOCK
                values[first - start : last - start] = self.levels[self.codes[first:last].int()] * self.scales[blocks]
        return values


def levels(signed, device):
    """bitsandbytes' levels, finer towards zero; those with signs would end at -0.993 and 1, here at -1 and 1."""
    from bitsandbytes.functional import create_dynamic_map

    found = create_dynamic_map(signed=signed).to(device)
    if signed:
        found[0] = -1.0
    return found
