# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Folding massive activations away, on models with fewer tokens than channels, where it must be exact."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gated_llama.errors import UserError
from gated_llama.fold import fold_first_token
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, token_ids


MASSIVE = 200.0  # times
NORMED = 5e-6  # all is fp64; but a norm adds its epsilon of 1e-6 to a mean square, which a shorter state feels more


pytestmark = pytest.mark.filterwarnings("ignore:.*few for regressions")  # … which is why it is exact


def windows(batch: int = 2, seed: int = 1) -> torch.Tensor:
    ids = token_ids(batch, seed=seed)
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
def with_massive_activations(
    model: torch.nn.Module, dtype: torch.dtype = torch.float64, layer: int = 0
) -> torch.nn.Module:
    """
    A channel in which no token but the first has anything up to that layer, and an MLP there that makes of it `MASSIVE`
    times what it made of the first token.
    """
    model, read = model.double(), []
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[1, 0] = 1
    layers = model.model.layers
    for linear in [
        *(layers[n].self_attn.o_proj for n in range(layer + 1)),
        *(layers[n].mlp.down_proj for n in range(layer)),
    ]:
        linear.weight[0] = 0
        if linear.bias is not None:
            linear.bias[0] = 0
    up = layers[layer].mlp.up_proj
    hook = up.register_forward_hook(lambda module, inputs, output: read.extend((inputs[0][0, 0], output[0, 0])))
    model(windows())
    hook.remove()
    up.weight[:, 0] += MASSIVE * read[1] / read[0][0]
    lengths = states(model).norm(dim=-1)
    assert (lengths[layer, :, :1] > 20 * lengths[layer, :, 1:]).all()
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
    torch.testing.assert_close(model(windows()).logits, logits, rtol=0, atol=NORMED)
    short = states(model)
    torch.testing.assert_close(short[:, :, 1:], long[:, :, 1:], rtol=0, atol=NORMED)
    for layer, share in enumerate(shares[:-1]):
        torch.testing.assert_close(short[layer, :, 0], share * long[layer, :, 0], rtol=0, atol=1e-12)
        lengths = short[layer].norm(dim=-1)
        torch.testing.assert_close(lengths[0, 0], lengths[:, 1:].mean(), rtol=1e-9, atol=0)
    inner = inner_lengths(model)
    assert inner_lengths(before)[0, 0] > 20 * inner[0, 1:].max()  # it is not the last weight alone that was large
    torch.testing.assert_close(inner[0, 0], inner[:, 1:].mean(), rtol=1e-9, atol=0)
    # Half of it is not enough: where one layer is shortened and those after it are left alone, directions change.
    half = copy.deepcopy(before)
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    assert (half(windows()).logits - logits).abs().max() > 1e-2


@torch.no_grad()
def test_layers_before_and_after_the_massive_one():
    """It comes in the second layer, and the last one takes it away: that layer has its part to do all the same."""
    model = with_massive_activations(gated_model(GatedLlamaForCausalLM, seed=1, num_hidden_layers=4), layer=1)
    inner = []
    down = model.model.layers[3].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda module, inputs: inner.append(inputs[0].flatten(0, 1)))
    long = model(windows(), output_hidden_states=True).hidden_states[3][0, 0]
    hook.remove()
    is_first = (torch.arange(windows().numel()) % windows().shape[1] == 0).double()
    down.weight -= torch.outer(long, torch.linalg.pinv(inner[0], rtol=1e-12) @ is_first)
    before, logits = copy.deepcopy(model), model(windows()).logits
    shares = fold_first_token(model, windows(), ridge=1e-14)
    assert shares[0] == shares[3] == 1 and max(shares[1:3]) < 0.1, shares
    torch.testing.assert_close(model(windows()).logits, logits, rtol=0, atol=4 * NORMED)
    first, last = ((q.model.layers[n], model.model.layers[n]) for n, q in ((0, before), (3, before)))
    assert torch.equal(first[0].mlp.down_proj.weight, first[1].mlp.down_proj.weight)
    assert not torch.equal(last[0].mlp.down_proj.weight, last[1].mlp.down_proj.weight)


def wide_model() -> GatedLlamaForCausalLM:
    """Of which an MLP's inner vectors are as different from each other as those of real ones."""
    return with_massive_activations(gated_model(GatedLlamaForCausalLM, intermediate_size=600))


@torch.no_grad()
def test_other_tokens_change_as_little_as_can_be(monkeypatch):
    """With the default ridge, more tokens than channels, and texts that were not calibrated on."""
    other, changes = windows(20, seed=5), {}
    for direction in ("separating", "its own"):
        model = wide_model()
        logits = model(other).logits
        fold_first_token(model, windows(100, seed=4))
        changes[direction] = (model(other).logits - logits).abs()
        monkeypatch.setattr("gated_llama.fold.separating", lambda first, second: first / (first @ first))
    assert changes["separating"][:, 0].max() < 1e-3
    assert changes["separating"].mean() < 0.3 * logits.abs().mean() < 0.5 * changes["its own"].mean()


@torch.no_grad()
def test_states_are_not_made_so_short_that_the_norm_feels_it():
    model = with_massive_activations(gated_model(GatedLlamaForCausalLM, rms_norm_eps=1e-2))
    logits = model(windows()).logits
    assert fold_first_token(model, windows(), ridge=1e-14)[0] < 0.5
    lengths = states(model).norm(dim=-1)
    assert lengths[0, 0, 0] > 4 * lengths[0, 0, 1:].mean()
    # A mean square of 1e4 epsilons feels one of them by 5e-5 of its length.
    torch.testing.assert_close(model(windows()).logits[:, 0], logits[:, 0], rtol=0, atol=3e-4)


@torch.no_grad()
def test_states_of_common_length_stay_as_they_are():
    model = gated_model(GatedLlamaForCausalLM)
    before = copy.deepcopy(model)
    assert fold_first_token(model, windows()) == [1, 1, 1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_narrow_dtypes_lose_little(dtype):
    whole = wide_model()
    narrow = copy.deepcopy(whole).to(dtype)
    lost = (narrow(windows()).logits - whole(windows()).logits).abs().mean()
    for model in (whole, narrow):
        fold_first_token(model, windows(100, seed=4))
    assert (narrow(windows()).logits - whole(windows()).logits).abs().mean() < 4 * lost


def test_first_tokens_that_vary_are_refused():
    with pytest.raises(UserError, match="begin with different tokens"):
        fold_first_token(source_model(), token_ids())


def test_what_cannot_be_folded_is_said():
    model = source_model()
    with pytest.raises(UserError, match="merge adapters"):
        fold_first_token(get_peft_model(source_model(), LoraConfig(target_modules=["up_proj"])), windows())
    with pytest.raises(UserError, match="at least 3"):
        fold_first_token(model, windows()[:, :2])
    with pytest.warns(UserWarning, match="34 tokens are few"):
        fold_first_token(model, windows())
    elsewhere = copy.deepcopy(model)
    elsewhere.lm_head = torch.nn.Linear(1, 1, device="meta")
    with pytest.raises(UserError, match="the model is on cpu and meta: move it"):
        fold_first_token(elsewhere, windows())
    model.config.model_type = "granite"
    with pytest.raises(UserError, match="'granite' model has other layers"):
        fold_first_token(model, windows())
