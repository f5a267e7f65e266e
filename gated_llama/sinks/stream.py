# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a model sees of a stream: the last tokens alone, where it needs no sink; and as StreamingLLM reads it (Xiao et al.,
arXiv 2309.17453), which keeps the first tokens as well, where it does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from gated_llama.errors import UserError
from gated_llama.inspection.attention import decoder_layers


FIRST = 4  # tokens that StreamingLLM keeps


def last_tokens(length: int, size: int, first: int = 0) -> torch.Tensor:
    """The keys that queries see, (T, T): the last `size`, and so many first ones."""
    places = torch.arange(length)
    distance = places[:, None] - places
    return (distance >= 0) & ((distance < size) | (places < first))


def let_slide(model: PreTrainedModel, window: int) -> None:
    """
    Every layer sees the last `window` tokens, as if the model had been loaded with this `sliding_window`.

    Raises:
        UserError: a layer sees fewer already.
    """
    for layer in decoder_layers(model):
        if window > (own := layer.self_attn.sliding_window or window):
            raise UserError(f"layers of the model see the last {own:,} tokens: give a sliding_window of at most that.")
    model.config.sliding_window = window
    if hasattr(model.config, "layer_types"):
        del model.config.layer_types
    for layer in decoder_layers(model):
        layer.self_attn.sliding_window = window


@contextmanager
def keeping_first(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Context manager: forwards without a mask see the last `window` tokens and the `FIRST` ones. No cache is read."""

    def see(decoder: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
        if keywords.get("attention_mask") is None:
            ids = inputs[0] if inputs else keywords["input_ids"]
            seen = last_tokens(ids.shape[1], window, FIRST).to(ids.device)
            keywords = keywords | {"attention_mask": seen.expand(len(ids), 1, -1, -1)}
        return inputs, keywords

    hook = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
