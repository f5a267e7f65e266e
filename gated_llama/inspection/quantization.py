# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What quantization would cost, simulated: numbers are rounded as integers would be, and computed with as they were."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from gated_llama.inspection.attention import decoder_layers


QUANTIZATIONS = {  # how inputs are scaled, and to how many bits
    "W8A8, dynamic per tensor": ("dynamic per tensor", 8),
    "W8A8, static per tensor": ("static per tensor", 8),
    "W8A8, per token": ("per token", 8),
    "W4A4, per token": ("per token", 4),
}


def rounded(x: torch.Tensor, largest: torch.Tensor, levels: int = 127) -> torch.Tensor:
    step = largest.clamp_min(1e-12) / levels
    return (x / step).round_().clamp_(-levels, levels).mul_(step)


def quantized_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The layers' linears, gates left out."""
    return [
        linear
        for layer in decoder_layers(model)
        for name, linear in layer.named_modules()
        if isinstance(linear, nn.Linear) and "attn_gate" not in name
    ]


@contextmanager
def quantized(
    model: PreTrainedModel, how: str, calibrate: Callable[[], object] = lambda: None, bits: int = 8
) -> Iterator[None]:
    """
    Simulated: weights (a scale each) and inputs of the [`quantized_linears`]. `how`: "dynamic per tensor",
    "static per tensor" (scales from what `calibrate` runs), "per token" (weights per output channel).
    """
    levels = 2 ** (bits - 1) - 1
    linears, largest = quantized_linears(model), {}
    if how == "static per tensor":

        def see(linear: nn.Module, inputs: tuple) -> None:
            peak = inputs[0].detach().abs().amax()
            largest[linear] = torch.maximum(largest.get(linear, peak), peak)

        with ExitStack() as stack:
            for linear in linears:
                stack.callback(linear.register_forward_pre_hook(see).remove)
            calibrate()
    own: dict[nn.Module, torch.Tensor] = {}  # that stands aside: one at a time, so that there is no second model

    def quantize(linear: nn.Module, inputs: tuple) -> tuple:
        own[linear] = weight = linear.weight.data
        peak = weight.abs().amax(1, keepdim=True) if how == "per token" else weight.abs().amax()
        linear.weight.data = rounded(weight, peak, levels)
        x = inputs[0]
        peak = {
            "dynamic per tensor": lambda: x.abs().amax(),
            "static per tensor": lambda: largest[linear],
            "per token": lambda: x.abs().amax(-1, keepdim=True),
        }[how]()
        return (rounded(x, peak, levels),)

    # Not a lambda: what a hook returns becomes the output.
    def put_back(linear: nn.Module, inputs: tuple | None = None, output: torch.Tensor | None = None) -> None:
        linear.weight.data = own.pop(linear, linear.weight.data)

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(put_back, linear)
            stack.callback(linear.register_forward_pre_hook(quantize).remove)
            stack.callback(linear.register_forward_hook(put_back).remove)
        yield
