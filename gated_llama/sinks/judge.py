# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What moving a sink costs and buys, on windows of a text: loss, attention to sinks, massive activations, quantization
(simulated), and attention to the last tokens alone, without the first ones.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from gated_llama.inspection.attention import capture_attention, decoder_layers, layer_states
from gated_llama.inspection.collectors import SINK_SHARE
from gated_llama.inspection.losses import last_states, token_losses
from gated_llama.inspection.quantization import QUANTIZATIONS, quantized
from gated_llama.sinks.stream import last_tokens


LATER = 64  # queries from here on count: the earlier have few keys to look at; and how many a short window sees


@dataclass(frozen=True)
class Judgement:
    """
    Losses and costs are in nats a token. An attended key is one in the first half of a window, seen by queries from the
    64th on, so that a sink counts wherever it stands.
    """

    loss: float
    first_token: float  # attention, a mean over queries, heads and layers
    most_attended: float  # of each head and window, its most attended key
    sink_rate: float  # share of heads and windows in which that key gets more than .3
    m_act: float  # mean over layers of the largest |x| of a window
    heads: list[list[float]]  # attention to the most attended key, layer by layer
    penalties: dict[str, float]  # of quantization, simulated; by the names of `QUANTIZATIONS`
    short_window: float  # cost of seeing the last 64 tokens only, for queries from the 64th on
    short_window_and_first: float  # … and the first token, as StreamingLLM keeps it
    far: float | None = None  # loss of what lies past a row's length, in longer texts
    recalled: float | None = None  # … of passages that come back, in texts twice as long as a row
    short: float | None = None  # … of short texts


@torch.no_grad()
def losses(
    model: PreTrainedModel, windows: torch.Tensor, batch_size: int = 8, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """In nats, of each token but the first, (B, T - 1); `seen` (T, T) says which keys a query sees, all if None."""
    found = []
    for rows in windows.split(batch_size):
        mask = None if seen is None else seen.to(model.device).expand(len(rows), 1, -1, -1)
        found.append(token_losses(model, last_states(model, rows, mask), rows))
    return torch.cat(found)


@torch.no_grad()
def _attention_and_states(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, tuple]:
    """
    In one pass the losses (B, T - 1), and first-token attention, the most attended keys', the sink rate, M-Act, and the
    most attended keys' by head.
    """
    later, half = min(LATER, windows.shape[1] // 2), max(1, windows.shape[1] // 2)
    found, first, largest, received = [], [], [], {}

    def see(layer: int, start: int, begin: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        if begin == 0:
            first.append(weights[..., 0].sum(dtype=torch.float32).item())
        late = weights[:, :, max(0, later - start) :].sum(2, dtype=torch.float32)  # (B, N, keys)
        sums = received.setdefault(layer, late.new_zeros(*late.shape[:2], windows.shape[1]))
        sums[:, :, begin : begin + late.shape[2]] += late

    def see_states(layer: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        largest.append(layer_states(output).abs().amax((1, 2)).float())

    most: dict[int, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(capture_attention(model, see))
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_hook(see_states).remove)
        for rows in windows.split(batch_size):
            found.append(token_losses(model, last_states(model, rows), rows))
            for layer, sums in received.items():
                most.setdefault(layer, []).append(sums[..., :half].amax(2) / (windows.shape[1] - later))
            received.clear()
    by_window = torch.stack([torch.cat(most[layer]) for layer in sorted(most)])  # (L, B, N)
    return torch.cat(found), (
        sum(first) / (windows.shape[1] * by_window.numel()),
        by_window.mean().item(),
        (by_window > SINK_SHARE).float().mean().item(),
        torch.cat(largest).mean().item(),
        [[round(share, 4) for share in layer] for layer in by_window.mean(1).tolist()],
    )


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    windows: torch.Tensor,
    calibration: torch.Tensor,
    *,
    quantizations: tuple[str, ...] = tuple(QUANTIZATIONS),
    batch_size: int = 8,
) -> Judgement:
    """
    Measure a model's loss, sinks and quantization costs on held-out windows.

    Args:
        windows: token ids (B, T), T more than 64, that nothing was fitted to or trained on.
        calibration: other windows, from which static quantization takes its scales.
    """
    model.eval()
    full, attention_and_states = _attention_and_states(model, windows, batch_size)
    loss, costs = full.mean().item(), []
    penalties = quantization_costs(model, windows, calibration, quantizations, batch_size=batch_size, loss=loss)
    for first in (0, 1):
        seen = last_tokens(windows.shape[1], LATER, first)
        costs.append((losses(model, windows, batch_size, seen) - full)[:, LATER:].mean().item())
    return Judgement(loss, *attention_and_states, penalties, *costs)


@torch.no_grad()
def quantization_costs(
    model: PreTrainedModel,
    windows: torch.Tensor,
    calibration: torch.Tensor,
    names: tuple[str, ...] = tuple(QUANTIZATIONS),
    *,
    batch_size: int = 8,
    loss: float | None = None,
) -> dict[str, float]:
    """In nats a token, by the names of `QUANTIZATIONS`; arguments as those of [`judge`], and the `loss` if known."""
    loss, costs = losses(model, windows, batch_size).mean().item() if loss is None else loss, {}
    for name in names:
        how, bits = QUANTIZATIONS[name]
        with quantized(model, how, partial(losses, model, calibration), bits):
            costs[name] = losses(model, windows, batch_size).mean().item() - loss
    return costs
