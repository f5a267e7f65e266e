# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The paper authors' layout (see `gated_llama.conversion.official`)."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import modeling_gated
from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Checkpoint
from gated_llama.checkpoints.shards import TensorPlan
from gated_llama.conversion import official
from gated_llama.conversion.families import base_config
from gated_llama.conversion.targets.fused import fused_plans, has_bias, require
from gated_llama.conversion.targets.target import Target, load_as, saved_config


def target(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    require(config, "official", {"mlp_bias": False}, checkpoint.folder)
    fuse = partial(official.fuse, config=config)
    plans = fused_plans(checkpoint, config, fuse, official.fused_rows(config), biased=has_bias(config))
    saved = saved_config(base_config("qwen3", config, "Qwen3ForCausalLM"))
    rope = saved.pop("rope_parameters")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    saved |= {flag: config.gate_type == kind for flag, kind in official.FLAGS.items()}
    saved |= {"use_qk_norm": config.use_qk_norm, "qkv_bias": has_bias(config)}
    saved |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "torch_dtype": saved.pop("dtype", None),
    }
    scaled = deepcopy(config)
    scaled.gate_scale, scaled.gate_init = 1.0, "normal"
    # The projections are compared as the authors' code runs them: fused, on the tensors that were written.
    return Target(saved, plans, partial(_load_official, scaled, checkpoint, plans), expect="rounding")


def _load_official(
    config: GatedLlamaConfig,
    checkpoint: Checkpoint,
    plans: dict[str, TensorPlan],
    folder: Path,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    model = load_as(modeling_gated.GatedLlamaForCausalLM, config, checkpoint.folder, dtype)
    for name, module in model.named_modules():
        if isinstance(module, modeling_gated.GatedLlamaAttention):
            read = partial(_read, plans, folder, model.dtype)
            weight, bias = read(f"{name}.q_proj.weight"), read(f"{name}.q_proj.bias")
            official.use_fused(module, weight, bias, config)
            module.o_proj.weight.data = read(f"{name}.o_proj.weight")
    return model


def _read(plans: dict[str, TensorPlan], folder: Path, dtype: torch.dtype, key: str) -> torch.Tensor | None:
    if key not in plans:
        return None
    with safe_open(folder / plans[key].info.file, framework="pt") as file:
        return file.get_tensor(key).to(dtype)
