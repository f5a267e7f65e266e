# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Layouts in which q_proj has the gate's rows too."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Checkpoint
from gated_llama.checkpoints.shards import TensorPlan
from gated_llama.conversion.targets.target import without_gates
from gated_llama.errors import UserError


def require(config: GatedLlamaConfig, to: str, needs: dict[str, bool], folder: Path) -> None:
    if config.architectures != ["GatedLlamaForCausalLM"]:
        raise UserError(f"{folder} is a {config.architectures[0]}, and {to} is for dense causal language models")
    for name, needed in needs.items():
        if (value := getattr(config, name)) != needed:
            raise UserError(f"{folder} has {name} {value!r}, which {to} cannot express")
    if "sliding_attention" in config.attention_types:
        raise UserError(f"{folder} has sliding-window layers, which {to} cannot express")


def has_bias(config: GatedLlamaConfig) -> bool:
    """A fused layout has a bias on q, k, v, o and the gate, or on none of them; one that ours lacks is zero there."""
    return config.attention_bias or config.attention_out_bias or config.gate_bias


def fused_plans(
    checkpoint: Checkpoint,
    config: GatedLlamaConfig,
    fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: int,
    *,
    biased: bool,
) -> dict[str, TensorPlan]:
    """q_proj takes the gate's rows in, and o_proj the gate's scale (which a σ of its own does not have)."""
    plans = without_gates(checkpoint)
    for key in [key for key in plans if key.endswith(".q_proj.weight")]:
        attention, file = key.removesuffix("q_proj.weight"), plans[key].info.file
        for kind in ("weight", "bias") if biased else ("weight",):
            plans[f"{attention}q_proj.{kind}"] = _fused(checkpoint, attention, kind, file, fuse, rows)
        for name in ("k_proj", "v_proj", "o_proj") if biased else ():
            weight = checkpoint.tensors[f"{attention}{name}.weight"]
            zero = replace(weight, file=file, shape=weight.shape[:1])
            plans.setdefault(f"{attention}{name}.bias", TensorPlan(zero, make=partial(torch.zeros, zero.shape)))
        if config.gate_scale != 1:
            output = f"{attention}o_proj.weight"
            plans[output] = plans[output].then(partial(torch.mul, other=config.gate_scale))
    return plans


def _fused(
    checkpoint: Checkpoint, attention: str, kind: str, file: str, fuse: Callable[..., torch.Tensor], rows: int
) -> TensorPlan:
    """The weight or bias of the queries and of the gates in one; a bias that one of them lacks is zero."""
    parts = [f"{attention}{name}" for name in ("q_proj", "attn_gate.proj")]
    weights = [checkpoint.tensors[f"{part}.weight"] for part in parts]
    have = [f"{part}.{kind}" in checkpoint.tensors for part in parts]

    def make(*found: torch.Tensor) -> torch.Tensor:
        left = iter(found)
        return fuse(*(next(left) if own else torch.zeros(w.shape[0]) for own, w in zip(have, weights, strict=True)))

    shape = (rows, *weights[0].shape[1:]) if kind == "weight" else (rows,)
    inputs = tuple(f"{part}.{kind}" for part, own in zip(parts, have, strict=True) if own)
    return TensorPlan(replace(weights[0], file=file, shape=shape), inputs, make)
