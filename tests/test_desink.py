# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Moving a sink into the gate: the algebra it rests on, and heads made so that it must be exact."""

import copy

import pytest
import torch
from peft import get_peft_model

from gated_llama import gated_lora_config
from gated_llama.attention import watched
from gated_llama.desink import Desink, _fit_gates, _scale_channels, desink
from gated_llama.errors import UserError
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, token_ids


TOKENS = 17
KINDS = 2  # tokens that may stand at each place but the first
EXACT = Desink(ridge=1e-12, max_error=1e-3, min_sink=0.3)
VARIANTS = {
    "headwise": {},
    "elementwise": {"gate_type": "elementwise"},
    "a key head each": {"num_key_value_heads": 6},
    "one key head": {"num_key_value_heads": 1},
    "QK norm": {"use_qk_norm": True},
    "biases": {"attention_bias": True},
    "trained gates": {"trained": True},
}


def windows(count: int = 40) -> torch.Tensor:
    """The first token is 0, and any other tells its place: so whatever depends on the place depends on the token."""
    kinds = torch.randint(KINDS, (count, TOKENS), generator=torch.Generator().manual_seed(2))
    ids = 1 + KINDS * (torch.arange(TOKENS) - 1) + kinds
    ids[:, 0] = 0
    return ids


@torch.no_grad()
def with_sinks(attraction: float = 1.5, hidden: bool = False, **fields) -> GatedLlamaForCausalLM:
    """
    One layer in fp64, with fewer tokens than channels. Keys tell the first token from the others and no more, and the
    first token's value is zero. So p₀ is a function of the query's token, v₀ is 0, and the edit must be exact. Hidden,
    the first token has a channel of its own, which the norm nearly takes away, and it is the other keys that repel.
    """
    fields = {
        "trained": False,
        "gate_bias": True,
        "vocab_size": 1 + KINDS * (TOKENS - 1),
        "pad_token_id": None,
        **fields,
    }
    model = gated_model(GatedLlamaForCausalLM, num_hidden_layers=1, **fields).double()
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    if hidden:
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[0] = torch.eye(model.config.hidden_size)[0]
        layer.input_layernorm.weight[0] = 1e-4
    states = layer.input_layernorm(model.model.embed_tokens.weight)  # (V, E)
    is_first = torch.arange(len(states)) == 0
    # Their products with a state are 1 if it is the first token's, and 1 if it is another's; else 0.
    first, other = (torch.linalg.pinv(states) @ torch.stack([is_first, ~is_first], dim=1).double()).unbind(1)
    attract = torch.zeros(attention.head_dim).double()
    attract[attention.head_dim // 2 - 1] = attraction * attention.head_dim**0.25  # a slow channel, which hardly rotates
    attention.q_proj.weight += torch.outer(attract.repeat(attention.config.num_attention_heads), other)
    keys = attract.repeat(attention.config.num_key_value_heads)
    attention.k_proj.weight.copy_(torch.outer(-keys, other) if hidden else torch.outer(keys, first))
    attention.v_proj.weight -= torch.outer(attention.v_proj(states[0]), first)
    return model


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    ids = windows(10)
    return (one(ids).logits - other(ids).logits).abs().max().item()


@torch.no_grad()
def test_a_head_is_a_mixture_of_its_first_value_and_of_the_rest():
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True).double()
    seen, values = {}, {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, output, n=n: values.update({n: output}))
        for n, layer in enumerate(model.model.layers)
    ]
    with watched(model, lambda layer, start, first, weights, output: seen.update({layer: (weights.double(), output)})):
        model(token_ids())
    for layer, (weights, output) in seen.items():
        value = values[layer].unflatten(2, (2, -1)).repeat_interleave(3, 2).transpose(1, 2)  # (B, N, T, H)
        share = weights[:, :, 1:, :1]
        rest = weights[:, :, 1:, 1:] / weights[:, :, 1:, 1:].sum(3, keepdim=True) @ value[:, :, 1:]
        torch.testing.assert_close((1 - share) * rest + share * value[:, :, :1], output[:, :, 1:], rtol=0, atol=1e-5)
        assert (rest - output[:, :, 1:]).abs().max() > 1e-2
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", ["fitted", "zero"])
@torch.no_grad()
def test_the_model_computes_what_it_did(variant, key):
    model = with_sinks(**VARIANTS[variant])
    before, settings = copy.deepcopy(model), Desink(**{**vars(EXACT), "key": key})
    fits = desink(model, windows(), settings)
    assert all(fit.moved and fit.sink > 0.3 and fit.gate_error < 1e-5 for fit in fits)
    assert all(fit.value_size < 1e-6 and fit.r2 > 0.999 for fit in fits)
    assert difference(model, before) < 1e-5
    # Neither half does it.
    attention, was = model.model.layers[0].self_attn, before.model.layers[0].self_attn
    keys_alone, gates_alone = copy.deepcopy(model), copy.deepcopy(before)
    keys_alone.model.layers[0].self_attn.attn_gate.load_state_dict(was.attn_gate.state_dict())
    gates_alone.model.layers[0].self_attn.attn_gate.load_state_dict(attention.attn_gate.state_dict())
    assert min(difference(keys_alone, before), difference(gates_alone, before)) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_sinks_are_gone(variant):
    fits = desink(with_sinks(**VARIANTS[variant]), windows(), EXACT)
    assert all(fit.sink > 0.3 and fit.sink_left < fit.sink / 4 for fit in fits)


@torch.no_grad()
def test_a_key_of_zero_stays_a_sink_where_other_logits_are_far_below():
    model = with_sinks(attention_bias=True)
    attention = model.model.layers[0].self_attn
    for linear, size in ((attention.q_proj, 7.0), (attention.k_proj, -7.0)):
        linear.bias.zero_()
        linear.bias.view(-1, attention.head_dim)[:, attention.head_dim // 2 - 1] = size  # the slow channel
    left = {
        key: max(fit.sink_left for fit in desink(copy.deepcopy(model), windows(), Desink(key=key, max_error=2)))
        for key in ("zero", "fitted")
    }
    assert left["zero"] > 0.9 and left["fitted"] < 0.1


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, (0, 1e-3)), (torch.bfloat16, (1e-2, 10))])
@torch.no_grad()
def test_a_key_norm_blows_up_what_rounding_leaves_of_a_key_of_zero(dtype, size):
    """Why a key of zero is no more than a control: in bf16 it does not come out of the norm as one."""
    for key, (least, most) in {"zero": size, "fitted": (0.5, 10)}.items():
        model = with_sinks(use_qk_norm=True).to(dtype)
        assert all(fit.moved for fit in desink(model, windows(), Desink(key=key)))
        layer = model.model.layers[0]
        keys = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens.weight[:1])).view(2, -1)
        norms = layer.self_attn.k_norm(keys).norm(dim=1)
        assert (norms > least).all() and (norms < most).all()


@torch.no_grad()
def test_a_first_token_that_the_norm_hides_takes_no_large_weights(monkeypatch):
    model = with_sinks(hidden=True)
    before, largest = copy.deepcopy(model), {}
    for name in ("scaled", "left hidden"):
        edited = copy.deepcopy(model)
        assert all(fit.moved and fit.sink > 0.3 for fit in desink(edited, windows(), EXACT))
        assert difference(edited, before) < 1e-5
        largest[name] = edited.model.layers[0].self_attn.k_proj.weight.abs().max().item()
        monkeypatch.setattr("gated_llama.desink._hidden_scale", lambda states: torch.ones_like(states[0, 0]))
    assert largest["scaled"] < 10 and largest["left hidden"] > 1e3


@pytest.mark.parametrize("stop", ["no gate fits", "an error"])
@torch.no_grad()
def test_a_layer_is_edited_as_a_whole_or_not_at_all(stop, monkeypatch):
    model = with_sinks(hidden=True)
    before = copy.deepcopy(model)
    if stop == "an error":
        monkeypatch.setattr("gated_llama.desink._keep", None)
        with pytest.raises(TypeError):
            desink(model, windows(), EXACT)
    else:
        assert not any(fit.moved for fit in desink(model, windows(), Desink(max_error=-1)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@torch.no_grad()
def test_gates_are_fitted_to_what_heads_put_out(gate_type, monkeypatch):
    """Of shares that no gate can give: the fit is the best there, and better than that of logits or without weights."""
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True, gate_type=gate_type, trained=False).double()
    attention = model.model.layers[0].self_attn
    random = torch.Generator().manual_seed(3)
    states = torch.randn(20, TOKENS, 36, generator=random).double()
    outputs = torch.randn(20, TOKENS, 6, attention.head_dim, generator=random).double() * states[..., :6, None].exp()
    wanted = torch.rand(20, TOKENS, 6, generator=random).double() * (states[..., 6:12] > 0)

    def error(gates: torch.Tensor, weighted: bool = True) -> float:
        gates = gates.unflatten(2, (6, -1)).expand_as(outputs)
        return ((gates - wanted[..., None]) * (outputs if weighted else 1)).square().mean().item()

    def fitted(outputs: torch.Tensor, steps: int = 100) -> torch.Tensor:
        step = torch.optim.LBFGS.step
        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.LBFGS, "step", step if steps else lambda self, closure: None)
            (weight, bias), r2, errors = _fit_gates(attention.attn_gate, states, outputs, wanted, 1e-6)
        assert r2.shape == errors.shape == (6,)
        return 2 * torch.sigmoid(states @ weight.T + bias)

    best = fitted(outputs)
    assert error(best) < 0.95 * error(fitted(torch.ones_like(outputs)))
    assert error(fitted(torch.ones_like(outputs)), weighted=False) < 0.95 * error(best, weighted=False)
    assert error(best) < 0.9 * error(fitted(outputs, steps=0))


@torch.no_grad()
def test_gates_get_no_large_weights_for_what_states_hardly_show():
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True, trained=False).double()
    states = torch.randn(20, TOKENS, 36, generator=torch.Generator().manual_seed(3)).double()
    states[..., 0] *= 1e-3
    wanted = (states[..., :1] > 0).double().expand(-1, -1, 6)
    outputs = torch.ones(20, TOKENS, 6, 6).double()
    largest = {}
    for ridge in (1e-3, 1e-9):
        (weight, _), _, _ = _fit_gates(model.model.layers[0].self_attn.attn_gate, states, outputs, wanted, ridge)
        largest[ridge] = weight.abs().max().item()
    assert largest[1e-3] < 5 and largest[1e-9] > 100


@torch.no_grad()
def test_to_scale_channels_changes_nothing_that_is_computed():
    model = gated_model(GatedLlamaForCausalLM, use_qk_norm=True, attention_bias=True)
    expected, layer = model(token_ids()).logits, model.model.layers[1]
    scale = torch.ones(model.config.hidden_size)
    scale[3], scale[7] = 2.0**14, 2.0
    _scale_channels(layer, scale)
    assert torch.equal(model(token_ids()).logits, expected)
    layer.self_attn.attn_gate.proj.weight *= scale  # without what reads them they do
    assert not torch.equal(model(token_ids()).logits, expected)


@torch.no_grad()
def test_heads_without_a_sink_or_a_fit_stay_as_they_are():
    model = with_sinks()
    keys = model.model.layers[0].self_attn.k_proj.weight
    keys[6:] = -keys[6:]  # the second key head repels
    before = copy.deepcopy(model)
    fits = desink(model, windows(), EXACT)
    assert [fit.moved for fit in fits] == [True] * 3 + [False] * 3
    untouched = {
        "k_proj.weight": slice(6, None),
        "attn_gate.proj.weight": slice(3, 6),
        "attn_gate.proj.bias": slice(3, 6),
    }
    for name, parameter in model.named_parameters():
        was = before.get_parameter(name)
        part = untouched.get(name.removeprefix("model.layers.0.self_attn."))
        assert torch.equal(parameter, was) if part is None else torch.equal(parameter[part], was[part]), name
        assert part is None or not torch.equal(parameter, was), name
    unfit = with_sinks()
    fits = desink(unfit, windows(), Desink(ridge=1e3, max_error=0.01))  # such a ridge fits nothing
    assert not any(fit.moved for fit in fits)
    assert all(torch.equal(p, q) for p, q in zip(unfit.parameters(), with_sinks().parameters(), strict=True))


@torch.no_grad()
def test_first_tokens_that_vary_and_sliding_windows_and_depth():
    model = gated_model(
        GatedLlamaForCausalLM,
        gate_bias=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    fits = desink(model, token_ids(8, 40), Desink(min_sink=0.01, max_error=2))
    assert len(fits) == 18 and sum(fit.moved for fit in fits) > 12
    assert all(torch.tensor([fit.sink, fit.sink_left, fit.r2, fit.gate_error]).isfinite().all() for fit in fits)
    assert model(token_ids()).logits.isfinite().all()


def test_what_cannot_be_done_is_said():
    ids = token_ids()
    for model in (source_model(), gated_model(GatedLlamaForCausalLM)):
        with pytest.raises(UserError, match="convert the checkpoint with --gate-bias"):
            desink(model, ids)
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True)
    with pytest.raises(UserError, match="not 'none'"):
        desink(model, ids, Desink(key="none"))
    for few in (ids[:, :2], ids[:0]):
        with pytest.raises(UserError, match="at least 3"):
            desink(model, few)
    with pytest.warns(UserWarning, match="51 tokens are few .* take 144 or more"):
        desink(copy.deepcopy(model), ids)
    with pytest.raises(UserError, match="merge adapters"):
        desink(get_peft_model(copy.deepcopy(model), gated_lora_config(r=2)), ids)
    model.set_gate_strength(0.5)
    with pytest.raises(UserError, match="set_gate_strength"):
        desink(model, ids)
