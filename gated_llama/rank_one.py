# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rank-one edits of linears: they change what is made of the first token, a constant vector, and of what is made of the
others as little as can be.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from configuration_gated import GatedLlamaConfig
from gated_llama.diagnose import decoder_layers
from gated_llama.errors import UserError
from gated_llama.families import FAMILIES


def check(model: PreTrainedModel, windows: torch.Tensor, names: Sequence[str], channels: int) -> None:
    """
    Whether the linears of these names can be edited in every layer of `model`, by regressions on so many channels of
    what they read. Warns if there are few tokens for that.

    Raises:
        UserError: they cannot.
    """
    if model.config.model_type not in (*FAMILIES, GatedLlamaConfig.model_type):
        raise UserError(
            f"a {model.config.model_type!r} model has other layers than Llama's: take a gated one, or one of "
            f"{', '.join(FAMILIES)}."
        )
    for number, layer in enumerate(decoder_layers(model)):
        for name in names:
            linear = layer.get_submodule(name)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point() or linear.weight.is_meta:
                raise UserError(
                    f"{name} of layer {number} is a {type(linear).__name__} that cannot be edited: merge adapters "
                    "(merge_and_unload), and load the weights whole, without quantization or offloading."
                )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices[0].startswith("mps"):
        raise UserError(
            f"the model is on {' and '.join(devices)}: move it to the CPU or to one CUDA device (model.to), since its "
            "layers are compared, and sums taken in fp64, which MPS does not have."
        )
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 3:
        raise UserError(f"windows of shape {tuple(windows.shape)} are too few or too short: take (B, T), T at least 3.")
    if windows.numel() < 4 * channels:
        warnings.warn(
            f"{windows.numel()} tokens are few for regressions on {channels} channels, so other text will suffer: take "
            f"{4 * channels} or more.",
            stacklevel=4,
        )


def with_ridge(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """The mean square `second` (E, E) of some vectors, with `ridge` times the mean of its diagonal added to that."""
    second = second.clone()
    second.diagonal().add_(ridge * second.diagonal().mean())
    return second


def separating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Of all u (E) with u·first = 1, the one that is smallest on vectors with the mean square `second` (E, E): to add y·uᵀ
    to a weight adds y to what it makes of `first`, and as little as can be to what it makes of the others.
    """
    direction = torch.linalg.solve(second, first)
    return direction / (direction @ first)


def add(linear: nn.Linear, change: torch.Tensor, direction: torch.Tensor) -> None:
    """Add `change` (O) to what the linear makes of vectors whose product with `direction` (I) is 1, rounding once."""
    linear.weight.copy_(linear.weight.double() + torch.outer(change, direction))
