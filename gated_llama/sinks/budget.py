# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an edit may cost, and layers that are given back what they computed before it until it costs no more."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.inspection.attention import decoder_layers
from gated_llama.sinks.distil import divergence
from gated_llama.sinks.judge import Judgement


LOSSES = {  # that a budget holds for, by their fields of a `Judgement`, from the quickest on to measure
    "loss": "on held-out text",
    "recalled": "of passages that come back",
    "far": "behind the rows' length",
}


def highest_losses(before: Judgement, share: float) -> dict[str, float]:
    """What each of `LOSSES` may come to. Passages that come back may lose as many nats as other text."""
    return {
        "loss": (1 + share) * before.loss,
        "recalled": before.recalled + share * before.loss,
        "far": (1 + share) * before.far,
    }


def too_dear(before: Judgement, now: Judgement, share: float, last: Judgement | None = None) -> str | None:
    """What costs more than it may, in a sentence; what cost as much already in the `last` step does not count."""
    for name, most in highest_losses(before, share).items():
        then, value = getattr(before, name), getattr(now, name)
        if not value <= max(most, getattr(last or before, name)):
            return f"the loss {LOSSES[name]} rose from {then:.4f} to {value:.4f}, and it may by {most - then:.4f}"
    return None


def weights_of_attention(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what moving a sink may change in a decoder layer."""
    return {name: value.clone() for name, value in layer.state_dict().items() if not name.startswith("mlp.")}


def fewest(least: int, most: int, suffices: Callable[[int], bool]) -> int:
    """The first of `least`, …, `most` that suffices, by halving; `most` is known to."""
    if least == most or suffices(least):
        return least
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if suffices(middle) else (middle, most)
    return most


def undo_fewest(
    model: PreTrainedModel, before: Sequence[dict], order: Sequence[int], budgets: Sequence[Callable[[], bool]]
) -> list[int]:
    """
    Give layers back what they were `before`, in this `order`: the fewest with which all `budgets` are kept, of which
    one is not kept as the model is.

    Returns:
        Their numbers.
    """
    layers = decoder_layers(model)
    made = {number: weights_of_attention(layers[number]) for number in order}

    def give_back(count: int) -> None:
        for place, number in enumerate(order):
            layers[number].load_state_dict(before[number] if place < count else made[number], strict=False)

    def kept_by(count: int, is_kept: Callable[[], bool]) -> bool:
        give_back(count)
        return is_kept()

    count, in_a_row = min(1, len(order)), 0
    for is_kept in cycle(budgets):
        least = fewest(count, len(order), partial(kept_by, is_kept=is_kept))
        count, in_a_row = least, in_a_row + 1 if least == count else 1
        if in_a_row == len(budgets):
            break
    give_back(count)
    return sorted(order[:count])


@torch.no_grad()
def divergence_saved(
    model: PreTrainedModel,
    base: PreTrainedModel,
    rows: torch.Tensor,
    before: Sequence[dict],
    numbers: Sequence[int],
    *,
    progress: bool = False,
) -> dict[int, float]:
    """By how much the divergence from `base` on `rows` (B, T) falls if one of these layers is what it was `before`."""
    layers, device = decoder_layers(model), model.device
    expected = [base(row[None].to(device), use_cache=False).logits for row in rows]

    def diverges() -> float:
        found = (model(row[None].to(device), use_cache=False).logits for row in rows)
        return sum(divergence(*pair).item() for pair in zip(expected, found, strict=True)) / len(rows)

    usual, saved = diverges(), {}
    for number in tqdm(numbers, desc="what layers cost", unit=" layers", disable=not progress):
        made = weights_of_attention(layers[number])
        layers[number].load_state_dict(before[number], strict=False)
        saved[number] = usual - diverges()
        layers[number].load_state_dict(made, strict=False)
    return saved
