# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Look at the gates of a model on a text: how far they are from open, by layer and by kind of token."""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.errors import UserError


FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from has have if in into is it its no not of on or so than that the their then "
    "there these they this to was were which will with would you".split()
)
KINDS = ("first token", "whitespace", "punctuation", "number", "function word", "other")


@dataclass(frozen=True)
class GateStatistics:
    """Of the gates over some group of tokens; 1 is open, 0 shut, `gate_scale` the most a gate can be."""

    tokens: int
    mean: float
    moved: float  # mean |gate - 1|
    nearly_shut: float  # share below 0.1
    amplifying: float  # share above 1.5


@dataclass(frozen=True)
class GateReport:
    layers: list[GateStatistics]
    kinds: dict[str, GateStatistics]  # over all layers


def token_kind(text: str) -> str:
    """One of `KINDS` (the position decides on the first), for the text of one token."""
    word = text.strip()
    if not word:
        return "whitespace"
    if re.fullmatch(r"[\W_]+", word):
        return "punctuation"
    if re.fullmatch(r"[\d.,]+", word):
        return "number"
    return "function word" if word.lower() in FUNCTION_WORDS else "other"


@torch.no_grad()
def gate_statistics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: torch.Tensor, batch_size: int = 8
) -> GateReport:
    """
    Gate statistics over the token ids `blocks` (blocks, T), in memory that does not grow with their number.

    Raises:
        UserError: the model returns no gates.
    """
    model.eval()
    sums: dict[tuple[int, str], torch.Tensor] = {}
    for part in blocks.split(batch_size):
        gates = getattr(model(part.to(model.device), output_gates=True, use_cache=False), "gates", None)
        if gates is None:
            raise UserError(f"{type(model).__name__} has no gates to look at: convert the checkpoint first.")
        kinds = _kinds(tokenizer, part)  # (B, T)
        for layer, gate in enumerate(gates):
            gate = gate.float().cpu()  # (B, T, N·G)
            measured = torch.stack([torch.ones_like(gate), gate, (gate - 1).abs(), gate < 0.1, gate > 1.5])
            for number, kind in enumerate(KINDS):
                chosen = measured[:, kinds == number].double().sum((1, 2))  # (5, tokens, N·G) -> (5,)
                sums[layer, kind] = sums.get((layer, kind), 0.0) + chosen
    values_per_token = gates[0].shape[-1]
    layers = range(len(gates))

    def summary(keys) -> GateStatistics:
        keys = list(keys)
        count, *rest = sum(sums[key] for key in keys).tolist()
        per_layer = len({layer for layer, _ in keys}) * values_per_token
        return GateStatistics(round(count / per_layer), *(value / count if count else float("nan") for value in rest))

    return GateReport(
        layers=[summary((layer, kind) for kind in KINDS) for layer in layers],
        kinds={kind: summary((layer, kind) for layer in layers) for kind in KINDS},
    )


def _kinds(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    kinds = {token: KINDS.index(token_kind(tokenizer.decode([token]))) for token in ids.unique().tolist()}
    numbers = torch.tensor([[kinds[token] for token in row] for row in ids.tolist()])
    numbers[:, 0] = KINDS.index("first token")
    return numbers


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Mean loss in nats per predicted token over `blocks` (blocks, T)."""
    model.eval()
    losses = [model(part, labels=part).loss * len(part) for part in blocks.to(model.device).split(batch_size)]
    return (torch.stack(losses).sum() / len(blocks)).item()
