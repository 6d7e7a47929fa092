"""The network: embedding, layers of a mixer and a SwiGLU each, norm, head.

model = HybridLM(PRESETS["nano"])
loss = model(tokens, targets=targets, document_ids=document_ids)
"""

from functools import partial
from importlib import import_module

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.layers import AddNorm, Packing, RMSNorm, SplitLinear, SwiGLU
from model.mamba2 import Mamba2
from model.ops import load_ops

INIT_STD = 0.02  # GPT-2's; output projections are scaled down by the number of residual additions
RECOMPUTE = ("none", "layer")


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) unless d_ff is 0; the norm that follows makes each addition."""

    def __init__(self, config, kind, ops):
        super().__init__()
        norm = partial(AddNorm, config.d_model, config.norm_eps, ops, config.residual_multiplier)
        self.mixer_norm = norm()
        self.mixer = Attention(config, ops) if kind == "A" else Mamba2(config, ops)
        self.has_mlp = config.d_ff > 0
        if self.has_mlp:
            self.mlp_norm = norm()
            self.mlp = SwiGLU(config.d_model, config.d_ff, ops)

    def forward(self, x, update=None, packing=None, state=None):
        """The residual stream x and what the layer before is still to add to it; returns the same two for the next."""
        x, y = self.mixer_norm(x, update)
        update = self.mixer(y, packing, state)
        if self.has_mlp:
            x, y = self.mlp_norm(x, update)
            update = self.mlp(y)
        return x, update


class HybridLM(nn.Module):
    """A causal language model over token ids of a ModelConfig's shape, with random weights from torch's generator.

    kernels: "torch", "fused" or "auto" (model/ops.py); on a machine with a GPU, a network that is to run on its CPU
    needs "torch". recompute: "none", or "layer" to keep only each layer's input for the backward pass and run the
    layer again there: about a third more work, a fraction of the memory. z_loss: weight of the term that keeps the
    softmax's denominator near 1, in training alone (reference.cross_entropy). fp8: the layers' matrix products are in
    8-bit floats in training (model/fp8.py), and `scales.end_step()` is called after each optimizer step.
    """

    def __init__(self, config, kernels="auto", recompute="none", z_loss=0.0, fp8=False):
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"--recompute {recompute!r} is unknown; choose one of {', '.join(RECOMPUTE)}")
        self.config, self.recompute, self.z_loss, self.ops = config, recompute, z_loss, load_ops(kernels)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = RMSNorm(config.d_model, config.norm_eps, self.ops) if config.embedding_norm else None
        self.layers = nn.ModuleList(Layer(config, kind, self.ops) for kind in config.layer_pattern)
        self.norm = AddNorm(config.d_model, config.norm_eps, self.ops, config.residual_multiplier)
        self.head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        self.scales = import_module("model.fp8").use_fp8(self) if fp8 else None

    @property
    def head_weight(self):
        """(vocab, d): what turns `hidden` into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self):
        """Normal of 0.02; the projections that write to the residual stream, 0.02 / sqrt(their number), or zero.

        The number counts both projections of a layer (GPT-2, mamba_ssm). Zero (zero_init_output) makes every layer the
        identity at the start (Fixup, arXiv:1901.09321).
        """
        config = self.config
        n_writers = config.n_layers * (2 if config.d_ff else 1)
        writer_std = 0.0 if config.zero_init_output else INIT_STD * n_writers**-0.5
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.init_scan()
            elif isinstance(module, SplitLinear | nn.Embedding):
                for weight in module.parameters():
                    weight.normal_(std=INIT_STD)
        if self.head is not None:
            self.head.weight.normal_(std=INIT_STD)
        for layer in self.layers:
            layer.mixer.out_proj.weight.normal_(std=writer_std)
            if config.d_ff:
                layer.mlp.out_proj.weight.normal_(std=writer_std)

    def hidden(self, tokens, document_ids=None, state=None):
        """tokens (b, l) -> what head_weight reads, (b, l, d). One document a row where document_ids (b, l) is None."""
        config = self.config
        packing = None if document_ids is None else Packing(document_ids)
        x = self.embedding(tokens)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        if config.embedding_multiplier != 1:
            x = x * config.embedding_multiplier
        update = None
        for i, layer in enumerate(self.layers):
            if self.recompute == "layer" and torch.is_grad_enabled():
                if update is not None:  # one tensor to keep, not two
                    x = torch.add(x, update, alpha=config.residual_multiplier)
                x, update = checkpoint(
                    layer, x, None, packing, use_reentrant=False, preserve_rng_state=False
                )  # no dropout to repeat
            else:
                x, update = layer(x, update, packing, None if state is None else state[i])
        _, x = self.norm(x, update)
        return x if config.logits_scaling == 1 else x / config.logits_scaling

    def logits(self, hidden):
        """hidden (..., d) -> (..., vocab), in float32."""
        return self.ops.products(hidden, [self.head_weight]).float()

    def forward(self, tokens, targets=None, document_ids=None, state=None, head=True):
        """Logits (b, l, vocab) in float32; with targets (b, l), the mean loss in nats over those that are not -100.

        head False: `hidden` instead, of tokens behind `state`; for what calls the network through its wrapper.
        """
        hidden = self.hidden(tokens, document_ids, state)
        if not head:
            return hidden
        if targets is None:
            return self.logits(hidden)
        z_loss = self.z_loss if self.training else 0.0
        return self.ops.cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten(), z_loss)

    def new_state(self):
        """The decoding state before the first token: a dict a layer, filled by step; every tensor has b first."""
        return [{} for _ in self.layers]

    def going_on(self, state=None, lengths=None):
        """A state for `hidden` to change: `state` (None: before the first token) stays as it was.

        lengths (b,): the tokens to come are so many in each row, and padding behind them; None: none is padded.
        """
        state = self.new_state() if state is None else [dict(layer) for layer in state]
        if lengths is not None:
            for layer in state:
                layer["lengths"] = lengths
        return state

    def take_rows(self, state, rows):
        """The state of these rows (indices), in this order; a row may come several times, to branch off it."""
        rows = torch.as_tensor(rows, device=self.embedding.weight.device)
        return [
            {name: kept.take(rows) if name == "cache" else kept[rows] for name, kept in layer.items()}
            for layer in state
        ]

    def step(self, tokens, state, last=False):
        """Go on from `state` with tokens (b, l), l >= 1. Returns logits (b, l, vocab) in float32 and the new state.

        last: logits of the last token alone, (b, 1, vocab). The state given stays as it was, so that one prefix can be
        continued in many ways.
        """
        state = [dict(layer) for layer in state]
        hidden = self.hidden(tokens, state=state)
        return self.logits(hidden[:, -1:] if last else hidden), state
