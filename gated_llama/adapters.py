# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
PEFT and gated models. Importing this file makes `gated_llama` known to PEFT's default target modules, so that
`LoraConfig()` and its like work without `target_modules`.
"""

from peft import LoraConfig
from peft.utils import constants


ATTENTION = r".*\.self_attn\.(q|k|v|o)_proj"
ATTENTION_AND_MLP = r".*\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj"

# Every method's defaults are a table from model type to module names; a gated Llama's modules are named as a Llama's.
for _table in vars(constants).values():
    if isinstance(_table, dict) and "llama" in _table:
        for _model_type in ("gated_llama", "gated_moe"):  # of experts, the attention
            _table.setdefault(_model_type, _table["llama"])


def gated_lora_config(r: int = 16, *, mlp: bool = False, **settings) -> LoraConfig:
    """
    LoRA of rank `r` on q, k, v and o, with `mlp` on the MLP too, and the gates trained whole beside it.

    Args:
        settings: any other field of [`~peft.LoraConfig`], such as `use_dora=True` or `task_type="SEQ_CLS"`.
    """
    defaults = {
        "lora_alpha": 2 * r,
        "target_modules": ATTENTION_AND_MLP if mlp else ATTENTION,
        "modules_to_save": ["attn_gate.proj"],  # the linear: of those PEFT mixes the adapters of a batch
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(r=r, **{**defaults, **settings})
