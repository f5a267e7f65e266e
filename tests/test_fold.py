# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Folding massive activations away, on models with fewer tokens than channels, where it must be exact."""

import copy

import pytest
import torch

from gated_llama.errors import UserError
from gated_llama.fold import fold_first_token
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, token_ids


MASSIVE = 200.0  # times


def windows(batch: int = 2) -> torch.Tensor:
    ids = token_ids(batch)
    ids[:, 0] = 1
    return ids


def states(model: torch.nn.Module) -> torch.Tensor:
    """What the layers but the last put out (L - 1, B, T, E); the last one's comes normed."""
    return torch.stack(model(windows(), output_hidden_states=True).hidden_states[1:-1])


@torch.no_grad()
def inner_lengths(model: torch.nn.Module) -> torch.Tensor:
    """Of what the first layer's `down_proj` reads, (B, T)."""
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(windows())
    hook.remove()
    return seen[0].norm(dim=2)


@torch.no_grad()
def with_massive_activations(model: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The first layer's MLP makes of the first token many times what it did, and of the others what it did."""
    model, read = model.double(), []
    up = model.model.layers[0].mlp.up_proj
    hook = up.register_forward_hook(lambda module, inputs, output: read.extend((inputs[0], output)))
    model(windows())
    hook.remove()
    is_first = (torch.arange(windows().numel()) % windows().shape[1] == 0).double()
    up.weight += torch.outer(MASSIVE * read[1][0, 0], torch.linalg.pinv(read[0].flatten(0, 1), rtol=1e-12) @ is_first)
    lengths = states(model).norm(dim=-1)
    assert (lengths[0, :, :1] > 20 * lengths[0, :, 1:]).all()
    return model.to(dtype)


MODELS = {
    "gated": lambda: gated_model(GatedLlamaForCausalLM),
    "gated, QK norm, biases": lambda: gated_model(GatedLlamaForCausalLM, use_qk_norm=True, attention_bias=True),
    "llama": source_model,
    "llama, biases": lambda: source_model("llama-biases"),
    "qwen3": lambda: source_model("qwen3"),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_model_computes_what_it_did(name):
    model = with_massive_activations(MODELS[name]())
    before, logits, long = copy.deepcopy(model), model(windows()).logits, states(model)
    shares = fold_first_token(model, windows(), ridge=1e-14)
    assert all(0 < share < 0.1 for share in shares)
    torch.testing.assert_close(model(windows()).logits, logits, rtol=0, atol=1e-4)
    short = states(model)
    torch.testing.assert_close(short[:, :, 1:], long[:, :, 1:], rtol=0, atol=1e-4)
    for layer, share in enumerate(shares[:-1]):
        torch.testing.assert_close(short[layer, :, 0], share * long[layer, :, 0], rtol=0, atol=1e-4)
        lengths = short[layer].norm(dim=-1)
        torch.testing.assert_close(lengths[0, 0], lengths[:, 1:].mean(), rtol=1e-3, atol=0)
    inner = inner_lengths(model)
    assert inner_lengths(before)[0, 0] > 20 * inner[0, 1:].max()  # it is not the last weight alone that was large
    torch.testing.assert_close(inner[0, 0], inner[:, 1:].mean(), rtol=1e-3, atol=0)
    # Half of it is not enough: where one layer is shortened and those after it are left alone, directions change.
    half = copy.deepcopy(before)
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    assert (half(windows()).logits - logits).abs().max() > 1e-2


@torch.no_grad()
def test_states_of_common_length_stay_as_they_are():
    model = gated_model(GatedLlamaForCausalLM)
    before = copy.deepcopy(model)
    assert fold_first_token(model, windows()) == [1, 1, 1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_narrow_dtypes_lose_no_more_than_they_did(dtype):
    whole = with_massive_activations(gated_model(GatedLlamaForCausalLM))
    logits, model = whole(windows()).logits, copy.deepcopy(whole).to(dtype)
    rounded = (model(windows()).logits - logits).abs().mean()
    long = states(model).abs().max()
    fold_first_token(model, windows(), ridge=1e-12)
    assert states(model).abs().max() < long / 10
    assert (model(windows()).logits - logits).abs().mean() < 2 * rounded


def test_first_tokens_that_vary_are_refused():
    with pytest.raises(UserError, match="begin with different tokens"):
        fold_first_token(source_model(), token_ids())
