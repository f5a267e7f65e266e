# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the textbook tasks share: a plain training loop, in which nothing but the model differs, and their claims."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from gated_llama import gate_parameter_groups


@dataclass(frozen=True)
class Claim:
    """Something that a task is to show, what was found, and whether that shows it."""

    says: str
    found: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS':6} {self.says}: {self.found}"


def train(
    model: PreTrainedModel,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    rate: float,
    gate_rate: float | None = None,
    name: str = "training",
) -> list[tuple[int, float]]:
    """
    Adam (beta2 .95, no decay, gradients clipped to a norm of 1), 5 % of warm-up and a cosine.

    Args:
        batches: token ids and labels, (B, T) each.
        gate_rate: the gates' learning rate; that of the weights if None.

    Returns:
        The training loss, nats a predicted token, as (step, mean since the last): 50 of them.
    """
    groups = gate_parameter_groups(model, rate, rate if gate_rate is None else gate_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    every, curve, recent = max(1, steps // 50), [], []
    model.train()
    with tqdm(range(1, steps + 1), desc=name, unit=" steps", mininterval=1) as bar:
        for step, (ids, labels) in zip(bar, batches, strict=False):
            loss = model(ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent.append(loss.item())
            if step % every == 0 or step == steps:
                curve.append((step, sum(recent) / len(recent)))
                recent.clear()
                bar.set_postfix(loss=f"{curve[-1][1]:.4f}")
    model.eval()
    return curve
