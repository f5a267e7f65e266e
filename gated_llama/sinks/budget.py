# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an edit may cost, and how much of it is undone for it to cost no more."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TypeVar

import torch
from torch import nn

from gated_llama.sinks.judge import Judgement


LOSSES = {  # that a budget holds for, by their fields of a `Judgement`, from the quickest on to measure
    "short": "of short texts",
    "loss": "on held-out text",
    "recalled": "of passages that come back",
    "far": "past the rows' length",
}

Edit = TypeVar("Edit")


def highest_losses(before: Judgement, share: float) -> dict[str, float]:
    """What each of `LOSSES` may come to. Passages that come back may lose as many nats as other text."""
    return {
        "short": (1 + share) * before.short,
        "loss": (1 + share) * before.loss,
        "recalled": before.recalled + share * before.loss,
        "far": (1 + share) * before.far,
    }


def excess(before: Judgement, now: Judgement, share: float) -> dict[str, float]:
    """Those of `LOSSES` that are higher than they may be, and by how many nats."""
    highest = highest_losses(before, share).items()
    return {name: getattr(now, name) - most for name, most in highest if not getattr(now, name) <= most}


def too_dear(before: Judgement, now: Judgement, share: float) -> str | None:
    """What costs more than it may, in a sentence."""
    name = next(iter(excess(before, now, share)), None)
    if name is None:
        return None
    then, value, most = getattr(before, name), getattr(now, name), highest_losses(before, share)[name]
    return f"the loss {LOSSES[name]} rose from {then:.4f} to {value:.4f}, and it may by {most - then:.4f}"


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
    order: Sequence[Edit], undo: Callable[[Sequence[Edit]], None], budgets: Sequence[Callable[[], bool]]
) -> Sequence[Edit]:
    """
    Let `undo` undo as few as need be for all `budgets` to be kept, from the first of `order` on: of these one is not
    kept as long as nothing is undone. It is given all that shall be undone; what it undid before is edited again.

    Returns:
        Those that are undone.
    """

    def kept_by(count: int, is_kept: Callable[[], bool]) -> bool:
        undo(order[:count])
        return is_kept()

    count, in_a_row = min(1, len(order)), 0
    for is_kept in cycle(budgets):
        least = fewest(count, len(order), partial(kept_by, is_kept=is_kept))
        count, in_a_row = least, in_a_row + 1 if least == count else 1
        if in_a_row == len(budgets):
            break
    undo(order[:count])
    return order[:count]
