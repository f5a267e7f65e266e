# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The neurons of an MLP that make sink tokens massive."""

import torch
from torch import nn

from gated_llama.inspection.collectors import MASSIVE


ELSEWHERE = 0.02  # of the length of a state: what such a neuron may write to other tokens on average


@torch.no_grad()
def massive_writers(layer: nn.Module, states: torch.Tensor, length: float, batch_size: int) -> torch.Tensor:
    """
    Which neurons of the layer's MLP write to some token more than `MASSIVE` times `length`, and next to nothing to
    others: their numbers. `states` (B, T, E) are residual, in front of the MLP's norm; `length` is the median of those
    after the layer.
    """
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    sizes = mlp.down_proj.weight.norm(dim=0)  # (I)
    largest, elsewhere = torch.zeros_like(sizes), torch.zeros_like(sizes)
    for rows in states.split(batch_size):
        read = norm(rows)
        written = (mlp.act_fn(mlp.gate_proj(read)) * mlp.up_proj(read)).abs() * sizes  # (b, T, I)
        largest = largest.maximum(written.amax((0, 1)))
        elsewhere += written.masked_fill_(written > MASSIVE * length, 0).sum((0, 1))
    tokens = states.shape[0] * states.shape[1]
    return ((largest > MASSIVE * length) & (elsewhere < ELSEWHERE * length * tokens)).nonzero().flatten()


@torch.no_grad()
def damp(layer: nn.Module, neurons: torch.Tensor, times: float) -> None:
    """These put out so many times less. It is `up_proj` that is edited, so that `down_proj` reads no large number."""
    up = layer.mlp.up_proj
    up.weight[neurons] /= times
    if up.bias is not None:
        up.bias[neurons] /= times
