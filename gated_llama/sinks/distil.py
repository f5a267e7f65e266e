# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Train a model to say what its base says (the KL divergence of their next-token distributions), with a penalty on massive
states: what an edit cost is made good, and what is massive becomes calm.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.gates import is_gate
from gated_llama.sinks.layers import Lengths, lengths_seen


@dataclass(frozen=True)
class DistilSettings:
    """
    How to distil.

    Attributes:
        train: `"gates"` and the biases of v and o beside them, or `"layers"`, everything but embeddings and head.
        lr, gate_lr: of the weights, and of gates and biases. They fall to a tenth, along a cosine, after a tenth of the
            steps in which they rise.
        batch_size: rows of one step.
        penalty, times: weight of the penalty on long states, and from how many medians on they are long (see
            [`long_states`]).
        frozen: parts of names of weights that stay as they are.
    """

    train: str = "gates"
    lr: float = 2e-4
    gate_lr: float = 1e-3
    batch_size: int = 4
    penalty: float = 0.02
    times: float = 2.5
    frozen: tuple[str, ...] = ()


def choose_trained(model: PreTrainedModel, train: str, frozen: Sequence[str] = ()) -> tuple[list, list]:
    """Let only what is to be trained require gradients: gates and the biases of v and o, and the rest."""
    gates, rest = [], []
    for name, parameter in model.named_parameters():
        is_quick = is_gate(name) or name.endswith(("v_proj.bias", "o_proj.bias"))
        chosen = is_quick or (train == "layers" and ".layers." in name)
        parameter.requires_grad = chosen and not any(part in name for part in frozen)
        if parameter.requires_grad:
            (gates if is_quick else rest).append(parameter)
    return gates, rest


@contextmanager
def long_states(model: PreTrainedModel, lengths: Lengths, times: float) -> Iterator[Callable[[], torch.Tensor]]:
    """
    In the block, of the last forward: Σ ReLU(ln(|x| / τ))² over tokens and layers, a mean over rows, of the states
    behind layers and of what `down_proj` reads; τ is so many times their median in the base, which has `lengths`.
    """
    limits = {what: values.tolist() for what, values in zip(("states", "inner"), lengths.limits(times), strict=True)}
    terms: list[torch.Tensor] = []

    def see(what: str, layer: int, lengths: torch.Tensor) -> None:
        terms.append((lengths / limits[what][layer]).clamp_min(1).log().square().sum(1).mean())

    def penalty() -> torch.Tensor:
        value = torch.stack(terms).sum()
        terms.clear()
        return value

    with lengths_seen(model, see):
        yield penalty


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) in nats a token, of logits (B, T, V)."""
    teacher, student = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (teacher, student))
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In nats a token, of logits (B, T, V) and ids (B, T)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def distil(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    rows: torch.Tensor,
    lengths: Lengths,
    settings: DistilSettings | None = None,
    *,
    progress: bool = False,
) -> list[tuple[float, float]]:
    """
    Train `model` in place on `rows` (rows, T) of token ids, each seen once.

    Args:
        base: whose predictions are learned; those of the text itself if None.
        lengths: of the base's states, as [`gated_llama.sinks.layers.state_lengths`] gives them.

    Returns:
        Divergence and penalty of each step.
    """
    settings = settings or DistilSettings()
    gates, rest = choose_trained(model, settings.train, settings.frozen)
    groups = [{"params": gates, "lr": settings.gate_lr}, {"params": rest, "lr": settings.lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    batches = rows.split(settings.batch_size)
    warm = max(1, len(batches) // 10)

    def rate(step: int) -> float:
        done = (step - warm) / max(1, len(batches) - warm)
        return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    device, found = model.device, []
    bar = tqdm(batches, desc=f"distilling ({settings.train})", unit=" steps", disable=not progress)
    model.train()
    with long_states(model, lengths, settings.times) as penalty_of:
        for ids in bar:
            ids = ids.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                if base is not None:
                    with torch.no_grad():
                        wanted = base(ids, use_cache=False).logits
                got = model(ids, use_cache=False).logits
            loss = next_token_loss(got, ids) if base is None else divergence(wanted, got)
            penalty = penalty_of()
            optimizer.zero_grad()
            (loss + settings.penalty * penalty).backward()
            nn.utils.clip_grad_norm_([*gates, *rest], 1.0)
            optimizer.step()
            schedule.step()
            found.append((loss.item(), penalty.item()))
            bar.set_postfix(loss=f"{found[-1][0]:.3f}", penalty=f"{found[-1][1]:.2f}")
    model.eval()
    return found
