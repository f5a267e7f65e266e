# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The loss of each token, without the logits of a whole text in memory."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


TOKENS_AT_ONCE, CACHED = 1024, 64  # whose logits are held; of those as fp32 that a processor's cache holds


def last_states(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden states (B, T, E): the logits of a long text would take more room than all else."""
    return model.get_decoder()(ids.to(model.device), attention_mask=mask, use_cache=False).last_hidden_state


def logits_in_parts(model: PreTrainedModel, states: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The logits of some tokens of each row at a time, with the first and the last of them."""
    at_once = max(1, TOKENS_AT_ONCE // len(states))
    for start in range(0, states.shape[1], at_once):
        stop = min(start + at_once, states.shape[1])
        yield start, stop, model.get_output_embeddings()(states[:, start:stop])


def token_losses(model: PreTrainedModel, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In nats, for each predicted token: (B, T - 1), on the CPU."""
    wanted = ids[:, 1:].to(states.device)
    at_once = CACHED if states.device.type == "cpu" else TOKENS_AT_ONCE
    found = []
    for start, stop, logits in logits_in_parts(model, states[:, :-1]):
        parts = zip(logits.flatten(0, 1).split(at_once), wanted[:, start:stop].flatten().split(at_once), strict=True)
        losses = [nn.functional.cross_entropy(part.float(), token, reduction="none") for part, token in parts]
        found.append(torch.cat(losses).unflatten(0, (len(ids), -1)))
    return torch.cat(found, dim=1).cpu().double()  # there is no fp64 on Apple's GPUs
