"""The network: embedding, layers of a mixer and a SwiGLU each, norm, head.

model = HybridLM(PRESETS["nano"])
loss = model(tokens, targets=targets, document_ids=document_ids)
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import Attention
from model.layers import Packing, RMSNorm, SplitLinear, SwiGLU
from model.mamba2 import Mamba2

INIT_STD = 0.02  # GPT-2's; output projections are scaled down by the number of residual additions
IGNORED_TARGET = -100


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, kind):
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Attention(config) if kind == "A" else Mamba2(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x, packing=None, state=None):
        x = x + self.mixer(self.mixer_norm(x), packing, state)
        return x + self.mlp(self.mlp_norm(x))


class HybridLM(nn.Module):
    """A causal language model over token ids of a ModelConfig's shape, with random weights from torch's generator."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_pattern)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal of 0.02; a layer's two projections that write to the residual stream, 0.02 / sqrt(2 n_layers)."""
        residual_std = INIT_STD * (2 * self.config.n_layers) ** -0.5
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.init_scan()
            elif isinstance(module, SplitLinear | nn.Embedding):
                for weight in module.parameters():
                    weight.normal_(std=INIT_STD)
        self.head.weight.normal_(std=INIT_STD)
        for layer in self.layers:
            layer.mixer.out_proj.weight.normal_(std=residual_std)
            layer.mlp.out_proj.weight.normal_(std=residual_std)

    def hidden(self, tokens, document_ids=None, state=None):
        """tokens (b, l) -> what the head reads, (b, l, d). One document a row where document_ids (b, l) is None."""
        packing = None if document_ids is None else Packing.of(document_ids)
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, packing, None if state is None else state[i])
        return self.norm(x)

    def forward(self, tokens, targets=None, document_ids=None):
        """Logits (b, l, vocab) in float32; with targets (b, l), the mean loss in nats over those that are not -100."""
        logits = self.head(self.hidden(tokens, document_ids)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)

    def new_state(self):
        """The decoding state before the first token: a dict a layer, filled by step; every tensor has b first."""
        return [{} for _ in self.layers]

    def step(self, tokens, state):
        """Go on from `state` with tokens (b, l), l >= 1. Returns logits (b, l, vocab) in float32 and the new state.

        The state given stays as it was, so that one prefix can be continued in many ways.
        """
        state = [dict(layer) for layer in state]
        return self.head(self.hidden(tokens, state=state)).float(), state
