# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Watched attention is the eager attention, map and output, for every kind of model; and it lets go of the model."""

import pytest
import torch

from gated_llama.inspection import attention
from modeling_gated import GatedLlamaForCausalLM
from tiny import VARIANTS, gated_model, left_padding, source_model, token_ids


def maps(model, ids, **inputs):
    """The attention maps (B, N, T, T) of each layer, put together from the blocks."""
    layers = {}

    def callback(layer, start, first, weights, output):
        whole = layers.setdefault(layer, torch.zeros(*weights.shape[:2], ids.shape[1], ids.shape[1]))
        whole[:, :, start : start + weights.shape[2], first : first + weights.shape[3]] = weights

    with torch.no_grad(), attention.capture_attention(model, callback):
        logits = model(ids, use_cache=False, **inputs).logits
    return logits, [layers[layer] for layer in sorted(layers)]


@pytest.mark.parametrize("block", [1, 4000, 2**23], ids=["row by row", "few rows", "at once"])
@pytest.mark.parametrize("variant", ["gated", *VARIANTS])
def test_maps_are_the_eager_ones(monkeypatch, variant, block):
    monkeypatch.setitem(attention.BLOCK, "cpu", block)
    model = gated_model(GatedLlamaForCausalLM, sliding_window=4) if variant == "gated" else source_model(variant)
    ids, mask = token_ids(), left_padding(token_ids())
    model.set_attn_implementation("eager")
    for inputs in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            expected = model(ids, use_cache=False, output_attentions=True, **inputs)
        logits, captured = maps(model, ids, **inputs)
        real = mask.bool() if inputs else torch.ones_like(mask).bool()
        torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
        assert len(captured) == len(expected.attentions) == 3
        for ours, theirs in zip(captured, expected.attentions, strict=True):
            rows = real[:, None, :, None].expand_as(ours)  # what padding looks at means nothing
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "eager" and not attention._callbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 8], ids=["scaled by a power of two", "scaled by none"])
def test_maps_in_half_precision(head_dim, dtype):
    model, ids = source_model("llama", head_dim=head_dim).to(dtype), token_ids()
    _, captured = maps(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_attentions=True).attentions[0]  # the first: later ones drift
    assert expected.dtype == dtype
    # What is summed in another order may round otherwise: on an AMD EPYC one weight of 5,202, in fp16, by 1.6 eps (its
    # logit's last place); on Intel none. Scaled at another place than in eager attention, a thousand would.
    assert (captured[0] != expected.float()).sum() <= 1
    torch.testing.assert_close(captured[0], expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_control_a_window_that_is_forgotten_is_seen(monkeypatch):
    model = source_model("mistral")
    _, right = maps(model, token_ids())
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    monkeypatch.setattr(model.config, "sliding_window", None)
    _, wrong = maps(model, token_ids())
    assert (right[0] - wrong[0]).abs().max() > 0.1


def test_an_error_lets_go_of_the_model():
    model = source_model("llama")

    def callback(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attention.capture_attention(model, callback):
        model(token_ids())
    assert model.config._attn_implementation == "sdpa" and not attention._callbacks


def test_half_precision_follows_eager():
    model = source_model("qwen3").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(token_ids(), output_attentions=True)
    logits, captured = maps(model, token_ids())
    torch.testing.assert_close(logits, expected.logits, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(captured[0], expected.attentions[0].float(), rtol=2e-2, atol=4e-3)
