# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The gates of a model: find them, train them alone or at a rate of their own, write them without the rest."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gated_llama.checkpoints.folder import GATES_NAME, SINGLE_SHARD, WEIGHTS_NAME, Checkpoint
from gated_llama.checkpoints.shards import TensorPlan, carried, write_index, write_shards
from gated_llama.errors import UserError


# Gates that share the rate of the weights hardly move; a published retrofit of Qwen3-0.6B (takuma104/OutliersInLLM)
# trains them at 50 times that rate.
GATE_RATE = 50


def is_gate(key: str) -> bool:
    return ".attn_gate." in key


def gate_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of every `attn_gate`; with PEFT of the frozen originals and of each adapter's copies."""
    return ((name, parameter) for name, parameter in model.named_parameters() if is_gate(name))


def gate_modules(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The `AttentionGate`s by layer: one; with PEFT the original and each adapter's copy, of which one is at work."""
    gates: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if "values_per_head" in vars(module):  # not by class: as remote code it is another one
            gates.setdefault(int(re.search(r"\blayers\.(\d+)\.", name)[1]), []).append(module)
    return gates


def gate_values(gate: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The values (B, T, N·G) of an `AttentionGate` for hidden states (B, T, E), with nothing to multiply by them."""
    return gate.values(torch.sigmoid(gate.proj(states)))


def train_only_gates(model: nn.Module) -> int:
    """
    Freeze everything but the gates.

    Returns:
        The number of parameters left to train.

    Raises:
        UserError: the model has no gates.
    """
    gates = dict(gate_parameters(model))
    if not gates:
        raise UserError(f"{type(model).__name__} has no gates to train: convert the checkpoint first.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in gates
    return sum(parameter.numel() for parameter in gates.values())


def gate_parameter_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """
    Parameter groups for any optimizer: the trainable gates at `gate_lr` (50 · `lr` if None) and never decayed, since
    decay would pull every gate to one half of its scale; the rest at `lr`, matrices with `weight_decay`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gates = [parameter for name, parameter in trained if is_gate(name)]
    rest = [parameter for name, parameter in trained if not is_gate(name)]
    groups = [
        {"params": gates, "lr": GATE_RATE * lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def write_with_gates(
    checkpoint: Checkpoint, gates: dict[str, torch.Tensor], folder: Path, *, link: bool = False, progress: bool = True
) -> None:
    """
    Write the weights of `checkpoint` to `folder` with other `gates`: they come in `model-gates.safetensors`, in the
    dtype that the checkpoint's have, and every other tensor keeps its bytes. A checkpoint as converted keeps its other
    shards whole; with `link` they are links.

    Raises:
        UserError: `gates` are not those that the checkpoint has.
    """
    have = {key: info.shape for key, info in checkpoint.tensors.items() if is_gate(key)}
    if have != {key: tuple(gate.shape) for key, gate in gates.items()}:
        raise UserError(f"{checkpoint.folder} has other gates than those to write into it: use the checkpoint trained.")
    plans = {}
    for key, info in checkpoint.tensors.items():
        if key in gates:
            plans[key] = TensorPlan(replace(info, file=GATES_NAME), make=lambda gate=gates[key]: gate)
        else:
            plans[key] = carried(key, info, file=SINGLE_SHARD if info.file == WEIGHTS_NAME else info.file)
    write_shards(checkpoint, plans, folder, link=link, progress=progress)
    write_index(folder, plans)
    checkpoint.copy_carried(folder)
