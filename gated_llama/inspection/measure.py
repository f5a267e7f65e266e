# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Look inside a model on a text: attention sinks, massive activations, gates, and what the gates are worth. Everything is
summed up as it passes.
"""

from contextlib import ExitStack
from dataclasses import replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.errors import UserError
from gated_llama.gates import gate_modules
from gated_llama.inspection.collectors import COLLECTORS
from gated_llama.inspection.losses import last_states, logits_in_parts, token_losses
from gated_llama.inspection.results import Measurements
from gated_llama.inspection.text import TEXT_TOKENS, look_at, look_at_sentence


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    compared_windows: int = 4,
    sentence: str | None = None,
    query: str | None = None,
    progress: bool = False,
) -> Measurements:
    """
    Args:
        model: a causal language model whose layers are Llama's: Llama, Mistral, Qwen2, Qwen3 or gated.
        windows: token ids (windows, T) without padding, each measured by itself.
        compared_windows: how many of them to run again with the gates open and inverted, if there are gates.
        sentence, query: a short text to look at token by token, and the word in it whose attention is shown (its last
            token if None).

    Raises:
        UserError: the windows are too short, hold tokens that the model does not have, or do not fit into memory; or
            the loss is no number.
    """
    try:
        return _measure(model, tokenizer, windows, batch_size, compared_windows, sentence, query, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {batch_size} windows of {windows.shape[1]} tokens at once: take fewer or shorter ones."
        ) from error


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    batch_size: int,
    compared_windows: int,
    sentence: str | None,
    query: str | None,
    progress: bool,
) -> Measurements:
    length = windows.shape[1]
    if length < 2:
        raise UserError(f"windows of {length} tokens are too short to measure: take at least 2.")
    if windows.max() >= model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer made token {int(windows.max())}, and the model has "
            f"{model.get_input_embeddings().num_embeddings}: it is not this model's tokenizer."
        )
    model.eval()
    gated = bool(gate_modules(model))
    collectors = {name: collector(model, tokenizer, length) for name, collector in COLLECTORS.items()}
    losses = torch.zeros(length - 1, dtype=torch.float64)
    with ExitStack() as stack, tqdm(total=windows.numel(), unit=" tokens", disable=not progress) as bar:
        stack.enter_context(torch.no_grad())
        for collector in collectors.values():
            stack.enter_context(collector.watching())
        for part in windows.split(batch_size):
            for collector in collectors.values():
                collector.begin(part)
            losses += token_losses(model, last_states(model, part), part).sum(0)
            for collector in collectors.values():
                collector.end(part)
            bar.update(part.numel())
    losses /= len(windows)
    compared = windows[:compared_windows]
    if not losses.isfinite().all():
        raise UserError(f"the loss of {_name(model)} on this text is no number: its weights or its dtype are at fault.")
    starts = [0, *(2**power for power in range(4, 20) if 2**power < length - 1)]
    bounds = zip(starts, [*starts[1:], length - 1], strict=True)
    return Measurements(
        model=_name(model),
        gated=gated,
        windows=len(windows),
        length=length,
        loss=losses.mean().item(),
        loss_by_position=[(start + 1, losses[start:stop].mean().item()) for start, stop in bounds],
        **{name: collector.report(len(windows)) for name, collector in collectors.items()},
        text=replace(look_at(model, tokenizer, windows[:1, :TEXT_TOKENS]), maps=None),
        sentence=look_at_sentence(model, tokenizer, sentence, query) if sentence else None,
        without_gates=_without_gates(model, compared, batch_size) if gated and len(compared) else None,
    )


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


@torch.no_grad()
def _without_gates(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> dict[str, tuple[float, float]]:
    """The loss with every gate at 1 and with every gate g at 2 - g, and what that does to the predictions."""
    trained = model.config.gate_strength
    strengths = {"trained": trained, "open": 0.0, "inverted": -trained}
    sums = {name: [0.0, 0.0] for name in strengths}
    try:
        for part in windows.split(batch_size):
            expected = None
            for name, strength in strengths.items():
                model.set_gate_strength(strength)
                states = last_states(model, part)
                expected = states if expected is None else expected
                sums[name][0] += token_losses(model, states, part).mean(1).sum().item()
                for (_, _, p), (_, _, q) in zip(
                    logits_in_parts(model, expected), logits_in_parts(model, states), strict=True
                ):
                    p, q = p.log_softmax(-1), q.log_softmax(-1)
                    sums[name][1] += (p.exp() * (p - q)).sum().item() / part.shape[1]
    finally:
        model.set_gate_strength(trained)
    return {name: (loss / len(windows), divergence / len(windows)) for name, (loss, divergence) in sums.items()}
