# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A short text, looked at token by token."""

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.errors import UserError
from gated_llama.gates import gate_modules
from gated_llama.inspection import SENTENCE
from gated_llama.inspection.attention import capture_attention
from gated_llama.inspection.losses import last_states
from gated_llama.inspection.results import TextReport


TEXT_TOKENS = 96  # of a text that is shown


@torch.no_grad()
def look_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    query: int | None = None,
    *,
    maps: bool = True,
) -> TextReport:
    """
    Record what attention and gates do on one short text.

    Args:
        ids: token ids (1, T) of a short text.
        query: the number of the token whose attention is shown; the last if None.
        maps: whether to keep the attention of all others too.
    """
    tokens = ids.shape[1]
    query = tokens - 1 if query is None else query
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    seen = torch.zeros(layers, heads, tokens, tokens)
    gates: dict[int, torch.Tensor] = {}

    def see(layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        seen[layer, :, start : start + weights.shape[2], first : first + weights.shape[3]] = weights[0].cpu()

    with ExitStack() as stack:
        stack.enter_context(capture_attention(model, see))
        for layer, modules in gate_modules(model).items():
            for module in modules:
                hook = module.register_forward_hook(
                    lambda m, i, output, n=layer: gates.update({n: m.values(output[1][0])})
                )
                stack.callback(hook.remove)
        last_states(model, ids)
    by_head = torch.stack([gates[n].float().cpu().unflatten(1, (heads, -1)).mean(2) for n in gates]) if gates else None
    return TextReport(
        tokens=[tokenizer.decode([token]) for token in ids[0].tolist()],
        query=query,
        attention=_rounded(seen[:, :, query]),
        maps=_rounded(seen) if maps else None,
        gates=_rounded(by_head.mean(2)) if gates else None,  # (L, T, N) -> (L, T)
        query_gates=_rounded(by_head[:, query]) if gates else None,
    )


def _rounded(values: torch.Tensor) -> list:
    """Four places are more than a picture shows."""
    return (values.double() * 1e4).round().div(1e4).tolist()


def look_at_sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, query: str | None
) -> TextReport:
    """As [`look_at`], with `query` a word; None is the last token, of [`SENTENCE`] its "which" if it has one."""
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    ids = tokenizer(sentence, add_special_tokens=False).input_ids[:TEXT_TOKENS]
    ids = [tokenizer.bos_token_id, *ids] if begins else ids
    if len(ids) < 2:
        raise UserError(f"the sentence {sentence!r} has fewer than 2 tokens: take a longer one.")
    wanted = "which" if query is None and sentence == SENTENCE else query or ""
    words = [tokenizer.decode([token]).strip() for token in ids]
    place = next((n for n, word in enumerate(words) if word and wanted.startswith(word) and n), None)
    if place is None and query is not None:
        raise UserError(f"the sentence {sentence!r} has no token that begins {query!r}.")
    return look_at(model, tokenizer, torch.tensor([ids]), place)
