"""The Mamba-2 mixer (arXiv:2405.21060): projection, causal convolution, state-space scan, gated norm, projection."""

import math

import torch
from torch import nn

from model.layers import FixedState, Linear, SplitLinear

NO_STEP = -1e4  # whose softplus is 0
DT_MIN, DT_MAX = 0.001, 0.1  # step sizes at the start, as in Mamba (arXiv:2312.00752, section 3.6)
A_MIN, A_MAX = 1.0, 16.0  # decay rates at the start, as in Mamba-2


class Mamba2(nn.Module):
    """(b, l, d) -> (b, l, d), each position from those before it in its document. Parameters named as in mamba_ssm."""

    def __init__(self, config, ops):
        super().__init__()
        self.config, self.ops = config, ops
        bc = config.n_groups * config.d_state
        widths = {"z": config.d_inner, "x": config.d_inner, "B": bc, "C": bc, "dt": config.n_mamba_heads}
        self.in_proj = SplitLinear(config.d_model, widths, ops)
        self.conv1d_weight = nn.Parameter(torch.empty(config.d_conv_channels, config.d_conv))
        self.conv1d_bias = nn.Parameter(torch.empty(config.d_conv_channels))
        self.A_log = nn.Parameter(torch.empty(config.n_mamba_heads))
        self.D = nn.Parameter(torch.empty(config.n_mamba_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.n_mamba_heads))
        self.norm_weight = nn.Parameter(torch.empty(config.d_inner))
        self.out_proj = Linear(config.d_inner, config.d_model, ops)

    @torch.no_grad()
    def init_scan(self):
        """Set what is not a matrix: decay rates in [1, 16], step sizes log-uniform in [0.001, 0.1], D = 1."""
        self.A_log.uniform_(A_MIN, A_MAX).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.D.fill_(1.0)
        self.norm_weight.fill_(1.0)
        bound = self.conv1d_weight.shape[1] ** -0.5  # torch.nn.Conv1d's own start
        self.conv1d_weight.uniform_(-bound, bound)
        self.conv1d_bias.uniform_(-bound, bound)

    def forward(self, u, packing=None, state=None):
        """state: {} before the first token; keeps "conv" (b, d_conv - 1, channels) and "ssm" (b, heads, n, p).

        With "lengths" (b,) in it, a row is so long, and padded behind: what is kept is that of the row's own end.
        """
        config = self.config
        weights = self.conv1d_weight, self.conv1d_bias, self.A_log, self.D, self.dt_bias, self.norm_weight
        zxbcdt = self.in_proj(u, split=())
        if isinstance(state, FixedState):
            return self.out_proj(self.ops.mixer_step(zxbcdt, *weights, config.n_groups, config.norm_eps, **state))
        lengths = None if state is None else state.pop("lengths", None)
        before = state or {"conv": None, "ssm": None}
        if lengths is not None:  # steps of no size leave the scan where it is
            padding = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]
            zxbcdt[..., -config.n_mamba_heads :].masked_fill_(padding[..., None], NO_STEP)
        y, conv, ssm = self.ops.mixer(
            zxbcdt, *weights, config.n_groups, config.chunk_size, config.norm_eps,
            None if packing is None else packing.document_ids, before["conv"], before["ssm"],
        )  # fmt: skip
        if lengths is not None:
            conv = self.inputs_before(lengths, zxbcdt, before["conv"])
        if state is not None:
            state.update(conv=conv.clone(), ssm=ssm)  # not a part of in_proj's product, which it would keep whole
        return self.out_proj(y)

    def inputs_before(self, lengths, zxbcdt, conv):
        """The convolution's last inputs, (b, d_conv - 1, channels), of rows that end after `lengths` (b,) tokens."""
        config = self.config
        inputs = zxbcdt[..., config.d_inner : config.d_inner + config.d_conv_channels]
        if conv is None:
            conv = inputs.new_zeros(len(inputs), config.d_conv - 1, config.d_conv_channels)
        places = lengths[:, None] + torch.arange(config.d_conv - 1, device=lengths.device)
        return torch.cat([conv, inputs], dim=1)[torch.arange(len(inputs), device=lengths.device)[:, None], places]
