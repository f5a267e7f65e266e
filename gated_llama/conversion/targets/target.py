# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a format is to `gated_llama.conversion.export`."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gated_llama.checkpoints.folder import WEIGHTS_NAME, Checkpoint
from gated_llama.checkpoints.shards import TensorPlan, carried
from gated_llama.conversion.classes import load_model
from gated_llama.errors import UserError
from gated_llama.gates import is_gate


@dataclass(frozen=True)
class Target:
    """
    A format.

    Attributes:
        config: the config.json; None where `write` writes everything.
        plans: of the tensors in safetensors.
        load: of the folder and a dtype, the model to compare.
        expect: what the comparison must find, see `gated_llama.conversion.verify`.
        write: into a folder, with or without a progress bar.
        note: what whoever exports should know.
    """

    config: dict | None
    plans: dict[str, TensorPlan]
    load: Callable[[Path, torch.dtype | None], PreTrainedModel]
    expect: str
    gates_added: bool = False
    note: str | None = None
    write: Callable[[Path, bool], None] | None = None


def refuse(folder: Path, reasons: dict[str, bool]) -> None:
    """
    Refuse what a format cannot express.

    Args:
        reasons: what the checkpoint in `folder` may have, as the sentence goes on, and whether it has it.

    Raises:
        UserError: one of them holds.
    """
    for what, is_so in reasons.items():
        if is_so:
            raise UserError(f"{folder} has {what}")


def without_gates(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """Everything but the gates, in its shards; alone in one, under the name that needs no index."""
    kept = {key: info for key, info in checkpoint.tensors.items() if not is_gate(key)}
    single = len({info.file for info in kept.values()}) == 1
    return {key: carried(key, info, file=WEIGHTS_NAME if single else info.file) for key, info in kept.items()}


def saved_config(config: PreTrainedConfig) -> dict:
    return json.loads(config.to_json_string())


def load_as(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    own = deepcopy(config)
    own.dtype = dtype or config.dtype
    return load_model(model_class, folder, own)
