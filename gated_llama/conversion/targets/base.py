# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The family that a checkpoint was converted from, while its gates are open: the shards are carried over."""

from functools import partial

import torch
import transformers
from safetensors import safe_open

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import CONFIG_NAME, Checkpoint
from gated_llama.conversion.families import FAMILIES, GATED_TYPES, base_config
from gated_llama.conversion.targets.target import Target, load_as, saved_config, without_gates
from gated_llama.errors import UserError
from gated_llama.gates import is_gate


def target(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    where = checkpoint.folder / CONFIG_NAME
    model_type = (config.conversion or {}).get("source_model_type")
    if model_type not in tuple(FAMILIES):  # it may be a list, in a damaged file
        raise UserError(f"{where} names no family that it was converted from, so there is no base to go back to")
    _refuse_moved_gates(checkpoint, config)
    head = config.architectures[0].removeprefix(GATED_TYPES[config.model_type].prefix)
    base_class = getattr(transformers, FAMILIES[model_type].prefix + head)
    base = base_config(model_type, config, base_class.__name__)
    return Target(
        config=saved_config(base),
        plans=without_gates(checkpoint),
        load=partial(load_as, base_class, base),
        expect="equal" if config.gate_scale == 2 else "rounding",
        gates_added=True,
    )


def _refuse_moved_gates(checkpoint: Checkpoint, config: GatedLlamaConfig) -> None:
    """Open is what a conversion writes: zero weights, and the bias at which the gate is 1."""
    if config.gate_init != "open":
        raise UserError(f"{checkpoint.folder} has gates that did not start open (gate_init is {config.gate_init!r})")
    for key, info in checkpoint.tensors.items():
        if not is_gate(key):
            continue
        with safe_open(checkpoint.folder / info.file, framework="pt") as file:
            tensor = file.get_tensor(key)
        start = torch.zeros_like(tensor)
        if key.endswith(".bias"):
            start.fill_(config.open_gate_logit)
        distance = (tensor.double() - start.double()).abs().max().item()
        if not distance == 0:
            raise UserError(
                f"the gates of {checkpoint.folder} are no longer open ({key} is up to {distance:.3g} away), "
                "which a model without gates cannot express"
            )
