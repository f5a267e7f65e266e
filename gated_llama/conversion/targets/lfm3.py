# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' own LFM3 (in its newer versions), whose attention has QK norm, windows and a headwise gate."""

import re
from functools import partial

import torch
import transformers

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Checkpoint
from gated_llama.checkpoints.shards import carried
from gated_llama.conversion.targets.target import Target, load_as, refuse, saved_config
from gated_llama.errors import UserError


NAMES = {
    "self_attn.attn_gate.proj": "self_attn.g_proj",
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "model.norm": "model.embedding_norm",
}


def target(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    where, rope = checkpoint.folder, config.rope_parameters
    if not hasattr(transformers, "Lfm3ForCausalLM"):
        raise UserError(f"Transformers {transformers.__version__} has no LFM3, newer versions have")
    refuse(
        where,
        {
            f"the head {config.architectures[0]}, and lfm3 is a dense causal language model": (
                config.architectures != ["GatedLlamaForCausalLM"]
            ),
            "elementwise gates, and lfm3 headwise ones": config.gate_type != "headwise",
            "no QK norm, which lfm3 has": not config.use_qk_norm,
            "biases of gates or MLPs, which lfm3 has not": config.gate_bias or config.mlp_bias,
            "biases of q, k and v, and not of o, or the other way": config.attention_bias != config.attention_out_bias,
            f"the activation {config.hidden_act!r}, and lfm3 has silu": config.hidden_act != "silu",
            f"RoPE of type {rope['rope_type']!r}, which the export does not know": rope["rope_type"] != "default",
        },
    )
    plans = {}
    for key, info in checkpoint.tensors.items():
        plan = carried(key, info)
        if key.endswith("o_proj.weight") and config.gate_scale != 1:
            plan = plan.then(partial(torch.mul, other=config.gate_scale))
        plans[re.sub("|".join(map(re.escape, NAMES)), lambda found: NAMES[found[0]], key)] = plan
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings initializer_range use_cache tie_word_embeddings attention_bias attention_dropout "
        "sliding_window pad_token_id bos_token_id eos_token_id dtype"
    ).split()
    kinds = dict.fromkeys(config.attention_types)
    own = transformers.Lfm3Config(
        **{name: getattr(config, name) for name in names},
        norm_eps=config.rms_norm_eps,
        layer_types=config.attention_types,
        rope_parameters=dict.fromkeys(kinds, rope),
        use_sandwich_norm=False,
        architectures=["Lfm3ForCausalLM"],
    )
    return Target(saved_config(own), plans, partial(load_as, transformers.Lfm3ForCausalLM, own), expect="rounding")
