# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The layout in which the paper's authors released their models (repository qiuzh20/gated_attention): a Qwen3 whose gate
rows are fused into `q_proj`, grouped by key/value head. With K key/value heads, R = N/K query heads to each and H
channels a head, the rows of `q_proj` are K groups of

    [ R·H query rows | R gate rows ]      headwise
    [ R·H query rows | R·H gate rows ]    elementwise

The gate is a plain σ.
"""

import torch
from torch import nn

from configuration_gated import GatedLlamaConfig
from gated_llama.errors import UserError


FLAGS = {"headwise_attn_output_gate": "headwise", "elementwise_attn_output_gate": "elementwise"}


def is_official(raw_config: dict) -> bool:
    return raw_config.get("model_type") == "qwen3" and any(raw_config.get(flag) for flag in FLAGS)


def gate_type_of(raw_config: dict, where: str) -> str:
    """
    The type of the gates that a config of the authors' asks for.

    Raises:
        UserError: both kinds of gate are switched on.
    """
    kinds = [kind for flag, kind in FLAGS.items() if raw_config.get(flag)]
    if len(kinds) != 1:
        raise UserError(f"{where} switches on {' and '.join(FLAGS)}: a model has one of them.")
    return kinds[0]


def _sizes(config: GatedLlamaConfig) -> tuple[int, int, int]:
    """K, and the query and the gate rows of one group."""
    groups = config.num_attention_heads // config.num_key_value_heads
    queries = groups * config.head_dim
    return config.num_key_value_heads, queries, groups if config.gate_type == "headwise" else queries


def fused_rows(config: GatedLlamaConfig) -> int:
    kv_heads, queries, gates = _sizes(config)
    return kv_heads * (queries + gates)


def split_queries(fused: torch.Tensor, config: GatedLlamaConfig) -> torch.Tensor:
    """The query rows (N·H, …) of a fused weight or bias."""
    kv_heads, queries, _ = _sizes(config)
    return fused.unflatten(0, (kv_heads, -1))[:, :queries].flatten(0, 1)


def split_gates(fused: torch.Tensor, config: GatedLlamaConfig) -> torch.Tensor:
    """The gate rows (N·G, …) of a fused weight or bias."""
    kv_heads, queries, _ = _sizes(config)
    return fused.unflatten(0, (kv_heads, -1))[:, queries:].flatten(0, 1)


def fuse(queries: torch.Tensor, gates: torch.Tensor, config: GatedLlamaConfig) -> torch.Tensor:
    """The fused weight or bias of separate ones."""
    kv_heads = config.num_key_value_heads
    return torch.cat([part.unflatten(0, (kv_heads, -1)) for part in (queries, gates)], dim=1).flatten(0, 1)


def use_fused(attention: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, config: GatedLlamaConfig) -> None:
    """Let a `GatedLlamaAttention` compute its queries and gates from a fused weight and bias."""
    attention.q_proj = FusedProjection(weight, bias, config, "queries")
    attention.attn_gate.proj = FusedProjection(weight, bias, config, "gates")


class FusedProjection(nn.Module):
    """
    What the released code computes, for verification: one projection, whose *activations* are regrouped. It stands in
    for a layer's `q_proj` and its gate's `proj`, one after the other on the same input.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, config: GatedLlamaConfig, part: str):
        super().__init__()
        self.weight, self.bias, self.config, self.part = weight, bias, config, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kv_heads, queries, gates = _sizes(self.config)
        projected = nn.functional.linear(x, self.weight, self.bias).view(*x.shape[:-1], kv_heads, -1)
        query_states, gate_logits = projected.split([queries, gates], dim=-1)
        return (query_states if self.part == "queries" else gate_logits).reshape(*x.shape[:-1], -1)
