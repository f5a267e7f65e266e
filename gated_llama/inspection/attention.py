# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Attention whose weights can be captured at any length: computed by blocks of queries, so that memory holds a few rows of
the attention map, never the map. Registered with Transformers under a name of its own, it serves every model that takes
its attention from there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel


NAME = "gated_llama_watched"
# Bytes of attention weights held at once: on a CPU what its cache holds, and so few queries that most keys which a
# causal mask hides are never met.
BLOCK = {"cpu": 2**23}
BLOCK_ELSEWHERE = 2**26

# Told of each block: the layer, the number of the first query and of the first key in it, the attention weights
# (B, N, queries, keys), zero where a query does not look, and the output (B, N, queries, H); in the model's dtype.
AttentionCallback = Callable[[int, int, int, torch.Tensor, torch.Tensor], None]
_callbacks: list[AttentionCallback] = []


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, of a model with an adapter too."""
    return [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")]


def has_experts(layer: nn.Module) -> bool:
    """Whether its MLP is a mixture of experts, whose weights are in no linears."""
    return hasattr(layer.mlp, "experts")


def layer_states(output: torch.Tensor | tuple) -> torch.Tensor:
    """The residual states (B, T, E) in what a decoder layer gives, which some versions wrap into a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def capture_attention(model: PreTrainedModel, callback: AttentionCallback) -> Iterator[None]:
    """Context manager: every forward of `model` (without a cache) passes its attention weights to `callback`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.pop()
        model.set_attn_implementation(before)


def _padding_mask(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """The mask as it was given, (B, T) or (B, 1, T, T): what it means for each query is found block by block."""
    return attention_mask


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention as Transformers' eager attention computes it (softmax in fp32), for `query` (B, N, T, H), `key` and
    `value` (B, K, T, H): the output (B, T, N, H).
    """
    batch, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    # Which is less work; in half precision it rounds otherwise, but for powers of two.
    scaled_before = query.dtype == torch.float32 or math.frexp(scaling)[0] == 0.5
    grouped = (query * scaling if scaled_before else query).unflatten(1, (-1, groups))  # (B, K, N/K, T, H)
    output = torch.empty_like(query)
    row = batch * heads * tokens * query.element_size()  # bytes of one query's
    rows = max(1, BLOCK.get(query.device.type, BLOCK_ELSEWHERE) // row)
    places = torch.arange(tokens, device=query.device)
    for start in range(0, tokens, rows):
        stop = min(tokens, start + rows)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        block = grouped[:, :, :, start:stop].flatten(2, 3)  # (B, K, N/K · b, H)
        logits = block @ key[:, :, first:stop].transpose(2, 3)
        logits = logits if scaled_before else logits.mul_(scaling)
        logits = logits.unflatten(2, (groups, -1)).flatten(1, 2)  # (B, N, b, keys)
        # Where nothing but causality hides keys, those before the block are seen by all of it.
        hidden_from = start if sliding_window is None and attention_mask is None else first
        distance = places[start:stop, None] - places[None, hidden_from:stop]  # (b, keys)
        seen = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        if attention_mask is not None:
            is_whole = attention_mask.ndim == 4
            given = attention_mask[:, :, start:stop] if is_whole else attention_mask[:, None, None]
            seen = seen & given[..., first:stop].bool()
        # To add takes a third as long as to fill.
        logits[..., hidden_from - first :] += logits.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        weights = logits.softmax(-1)  # which computes in fp32
        if attention_mask is not None:
            weights = weights.nan_to_num_()  # of padding, which sees nothing
        block = weights.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, N/K · b, keys)
        output[:, :, start:stop] = (block @ value[:, :, first:stop]).unflatten(2, (groups, -1)).flatten(1, 2)
        for callback in _callbacks:
            callback(module.layer_idx, start, first, weights, output[:, :, start:stop])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _padding_mask)
