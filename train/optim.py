"""Which parameters decay, and the optimizer that DeepSpeed shards."""

import torch

NO_DECAY = ("embedding.weight", "conv1d_weight")  # a table looked up, and a filter of four taps a channel


def parameter_groups(model, weight_decay):
    """Matrices decay; norms, biases, A_log, D, dt_bias, the convolution and the embedding do not (as in mamba_ssm)."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and not name.endswith(NO_DECAY) else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(model, config):
    """torch's AdamW; the learning rate is set before every step, by the schedule."""
    groups = parameter_groups(model, config.weight_decay)
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused)
