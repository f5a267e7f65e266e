# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' own Qwen3.5 text model, which has this gate: no custom code needed."""

from dataclasses import replace
from functools import partial

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Checkpoint
from gated_llama.conversion.targets.fused import fused_plans, has_bias, require
from gated_llama.conversion.targets.target import Target, load_as, saved_config


def target(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    require(config, "qwen3_5", {"use_qk_norm": True, "mlp_bias": False}, checkpoint.folder)

    def fuse(queries: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        if config.gate_type == "headwise":
            gates = gates.repeat_interleave(config.head_dim, dim=0)
        heads = [part.unflatten(0, (config.num_attention_heads, -1)) for part in (queries, gates)]
        return torch.cat(heads, dim=1).flatten(0, 1)  # of each head [H query rows | H gate rows]

    rows = 2 * config.num_attention_heads * config.head_dim
    plans = fused_plans(checkpoint, config, fuse, rows)
    for key, plan in plans.items():
        if key.endswith("norm.weight"):  # stored as their distance from 1, which fp32 holds for every bf16 weight
            plans[key] = replace(plan, info=replace(plan.info, dtype="F32"), make=lambda weight: weight.float() - 1)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings "
        "attention_dropout head_dim pad_token_id bos_token_id eos_token_id dtype"
    ).split()
    qwen = Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in names},
        attention_bias=has_bias(config),
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        layer_types=["full_attention"] * config.num_hidden_layers,
        architectures=["Qwen3_5ForCausalLM"],
    )
    return Target(saved_config(qwen), plans, partial(load_as, Qwen3_5ForCausalLM, qwen), expect="rounding")
