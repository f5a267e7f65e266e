# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sinks found, moved into gates, calmed: heads made so that the edit must be exact, budgets, and the whole command."""

import copy
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gated_llama import DesinkSettings, desink_checkpoint, gated_lora_config
from gated_llama.checkpoints.folder import new_folder
from gated_llama.data import PASSAGE, Document, read_documents, with_returns
from gated_llama.errors import UserError, VerificationError
from gated_llama.inspection.attention import capture_attention, layer_states
from gated_llama.inspection.quantization import quantized
from gated_llama.scripts.cli import main
from gated_llama.sinks import recipe
from gated_llama.sinks.budget import undo_fewest, weights_of_attention
from gated_llama.sinks.distil import (
    DistilSettings,
    choose_trained,
    distance,
    distil,
    loss_of,
    multiplies_bf16,
    states_of,
)
from gated_llama.sinks.judge import judge, losses
from gated_llama.sinks.kv_heads import KVHeads
from gated_llama.sinks.layers import Lengths, attend, rotary_of, sink_tokens, state_lengths
from gated_llama.sinks.move import MoveSettings, _LayerEdit, add_biases, move_sinks
from gated_llama.sinks.stream import keeping_first, last_tokens, let_slide
from gated_llama.sinks.unfinished import Unfinished
from gated_llama.sinks.windows import Windows
from hub import local_hub
from modeling_gated import GatedLlamaForCausalLM, GatedLlamaForSequenceClassification
from tiny import VOCAB, gated_model, published, source_model, tiny_tokenizer, token_ids


TOKENS = 17
KINDS = 2  # tokens that may stand at each place but a sink's
EXACT = MoveSettings(ridge=1e-12, max_error=0.05, min_sink=0.1, outputs=False)
DAMPED = replace(EXACT, damping=32.0)
ROUGH = replace(EXACT, ridge=0.3, max_error=9.0, outputs=True)  # which leaves `o_proj` something to make good
VARIANTS = {
    "headwise": {},
    "elementwise": {"gate_type": "elementwise"},
    "a KV head each": {"num_key_value_heads": 6},
    "one KV head": {"num_key_value_heads": 1},
    "QK norm": {"use_qk_norm": True},
    "biases": {"attention_bias": True},
    "trained gates": {"trained": True, "gate_bias": True},
}
PLACES = {"first": [0], "in the middle": [5], "two": [0, 7]}


def windows(places=(0,), count: int = 40) -> torch.Tensor:
    """Token 0 is the sink, and any other tells its place: so whatever depends on the place depends on the token."""
    kinds = torch.randint(KINDS, (count, TOKENS), generator=torch.Generator().manual_seed(2))
    ids = 1 + KINDS * torch.arange(TOKENS) + kinds
    ids[:, list(places)] = 0
    return ids


def sinks_of(ids: torch.Tensor, layers: int = 1) -> torch.Tensor:
    return (ids == 0).expand(layers, -1, -1)


def telling(states: torch.Tensor, is_sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their products with a state are 1 if it is the sink's, and 1 if it is another's; else 0."""
    return (torch.linalg.pinv(states) @ torch.stack([is_sink, ~is_sink], dim=1).double()).unbind(1)


def attract(attention, queries: torch.Tensor, keys: torch.Tensor, attraction: float = 1.5) -> None:
    """What `queries` tells asks, in every head, for what `keys` tells."""
    key = torch.zeros(attention.head_dim).double()
    key[attention.head_dim // 2 - 1] = attraction * attention.head_dim**0.25  # a slow channel, which hardly rotates
    attention.q_proj.weight += torch.outer(key.repeat(attention.config.num_attention_heads), queries)
    attention.k_proj.weight.copy_(torch.outer(key.repeat(attention.config.num_key_value_heads), keys))


@torch.no_grad()
def with_sinks(attraction: float = 1.5, hidden: bool = False, **fields) -> GatedLlamaForCausalLM:
    """
    One layer in fp64, with fewer tokens than channels. Keys tell the sink from the others and no more, so p₀ is a
    function of the query's token, and the edit must be exact. Hidden, the sink has a channel of its own, which the norm
    nearly takes away, and it is the other keys that repel.
    """
    fields = {"trained": False, "vocab_size": 1 + KINDS * TOKENS, "pad_token_id": None, **fields}
    model = gated_model(GatedLlamaForCausalLM, num_hidden_layers=1, **fields).double()
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    if hidden:
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[0] = torch.eye(model.config.hidden_size)[0]
        layer.input_layernorm.weight[0] = 1e-4
    states = layer.input_layernorm(model.model.embed_tokens.weight)  # (V, E)
    is_sink = torch.arange(len(states)) == 0
    sink, other = telling(states, is_sink)
    attract(attention, other, -other if hidden else sink, attraction)
    return model


def moved(model, places=(0,), settings=EXACT):
    return move_sinks(model, windows(places), settings, sinks=sinks_of(windows(places)))


def difference(one: torch.nn.Module, other: torch.nn.Module, places=(0,)) -> float:
    ids = windows(places, 10)
    return (one(ids).logits - other(ids).logits).abs().max().item()


@torch.no_grad()
def without(model, part: str, was) -> torch.nn.Module:
    """`model` with one linear as it was before; a bias that it had not is zero."""
    model = copy.deepcopy(model)
    old = dict(was.model.layers[0].self_attn.get_submodule(part).named_parameters())
    for name, parameter in model.model.layers[0].self_attn.get_submodule(part).named_parameters():
        parameter.copy_(old.get(name, torch.zeros_like(parameter)))
    return model


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_model_computes_what_it_did(variant, places):
    # What a gate lets pass of a shifted value is no constant where gates were trained: there values stay.
    settings = replace(EXACT, values=variant != "trained gates")
    model = with_sinks(**VARIANTS[variant])
    if variant == "trained gates":
        layer = model.model.layers[0]
        sink = torch.linalg.pinv(layer.input_layernorm(model.model.embed_tokens.weight))[:, 0]
        layer.self_attn.v_proj.weight -= torch.outer(
            layer.self_attn.v_proj(layer.input_layernorm(model.model.embed_tokens.weight[0])), sink
        )
    before = copy.deepcopy(model)
    found = moved(model, places, settings)
    assert all(fit.moved and fit.error < 0.05 for fit in found.heads)
    assert all(fit.sink_left < fit.sink / 2 and fit.error_ungated > 30 * fit.error for fit in found.heads)
    changed = difference(model, before, places)
    assert found.loss_after == pytest.approx(found.loss_before, abs=0.02) and not found.undone
    # No part of it does it alone.
    for part in ("k_proj", "attn_gate.proj", *(["v_proj", "o_proj"] if settings.values else [])):
        assert difference(without(model, part, before), before, places) > 4 * changed, part


@torch.no_grad()
def test_a_head_is_a_mixture_of_its_sinks_value_and_of_the_rest():
    model = gated_model(GatedLlamaForCausalLM).double()
    seen, values = {}, {}
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, output, n=n: values.update({n: output}))
    with capture_attention(
        model, lambda layer, start, first, weights, output: seen.update({layer: (weights.double(), output)})
    ):
        model(token_ids())
    for layer, (weights, output) in seen.items():
        value = values[layer].unflatten(2, (2, -1)).repeat_interleave(3, 2).transpose(1, 2)  # (B, N, T, H)
        share, sink = weights[:, :, 1:, :1], value[:, :, :1]
        rest = weights[:, :, 1:, 1:] / weights[:, :, 1:, 1:].sum(3, keepdim=True) @ value[:, :, 1:]
        torch.testing.assert_close((1 - share) * (rest - sink) + sink, output[:, :, 1:], rtol=0, atol=1e-5)
        assert (rest - output[:, :, 1:]).abs().max() > 1e-2


def lengths_of(states: torch.Tensor) -> Lengths:
    return Lengths(states, states)


def test_sinks_are_tokens_that_layers_make_massive_wherever_they_stand():
    states = torch.ones(4, 3, 30)
    states[1:3, 0, 0] = 100.0  # written by the second layer, taken away by the last
    states[1:3, 1, 11] = 50.0
    states[1, 1, 12] = 20.0  # no sink to the last layer
    found = sink_tokens(lengths_of(states))
    assert [layer.nonzero().tolist() for layer in found] == [
        [[0, 0], [1, 11], [1, 12]],  # none is massive yet: those that come
        [[0, 0], [1, 11], [1, 12]],
        [[0, 0], [1, 11], [1, 12]],
        [[0, 0], [1, 11]],
    ]
    assert not sink_tokens(lengths_of(torch.ones(4, 3, 30))).any()


@torch.no_grad()
def test_a_text_without_sinks_is_refused_before_any_edit():
    model = gated_model(GatedLlamaForCausalLM)
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match="no sink to move"):
        move_sinks(model, token_ids(12, 20))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@torch.no_grad()
def test_a_sink_that_the_norm_hides_takes_no_large_weights(monkeypatch):
    model = with_sinks(hidden=True)
    largest = {}
    for name in ("scaled", "left hidden"):
        edited = copy.deepcopy(model)
        assert all(fit.moved and fit.sink > 0.3 for fit in moved(edited).heads)
        largest[name] = edited.model.layers[0].self_attn.k_proj.weight.abs().max().item()
        monkeypatch.setattr("gated_llama.sinks.move.HIDDEN", 1e30)
    assert largest["scaled"] < 10 and largest["left hidden"] > 1e3


@torch.no_grad()
def test_scaled_channels_change_nothing_that_is_computed():
    model = with_sinks(hidden=True)
    before, ids = copy.deepcopy(model), windows()
    edit = _LayerEdit(model.model.layers[0], (), sinks_of(ids)[0], 1, EXACT)
    seen = type("Seen", (), {"states": model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))})
    edit.scale_hidden(seen)
    assert edit.scale[0] > 100 and difference(model, before) == 0
    model.model.layers[0].self_attn.v_proj.weight *= edit.scale  # without what reads them they do
    assert difference(model, before) > 0


@torch.no_grad()
def with_a_writer(elsewhere: float = 0.0, **fields) -> GatedLlamaForCausalLM:
    """
    Two layers in fp64. In the first, without attention, neuron 3 makes token 0 massive; in the second this is a sink,
    as in [`with_sinks`]. What the neuron writes to others is so many times the length of their states.
    """
    fields = {"trained": False, "vocab_size": 1 + KINDS * TOKENS, "pad_token_id": None, **fields}
    model = gated_model(GatedLlamaForCausalLM, num_hidden_layers=2, **fields).double()
    first, second = model.model.layers
    first.self_attn.o_proj.weight.zero_()
    embedded = model.model.embed_tokens.weight  # (V, E)
    is_sink = (torch.arange(len(embedded)) == 0).double()
    mlp, norm = first.mlp, first.post_attention_layernorm
    mlp.down_proj.weight[:, 3] /= mlp.down_proj.weight[:, 3].norm()
    mlp.down_proj.weight[:, 3] *= 2 * (embedded + mlp(norm(embedded))).norm(dim=1).median()
    tells = torch.linalg.pinv(norm(embedded))  # (E, V)
    mlp.gate_proj.weight[3] = 30 * tells.sum(1)  # silu(30) is 30, and so it is for every token
    mlp.up_proj.weight[3] = tells @ (is_sink * 10 + (1 - is_sink) * elsewhere / 60)
    states = second.input_layernorm(embedded + mlp(norm(embedded)))
    sink, other = telling(states, is_sink == 1)
    attract(second.self_attn, other, sink)
    return model


def longest(model) -> float:
    """State of a token behind the first layer, in medians."""
    lengths = state_lengths(model, windows()).states[0]
    return (lengths.max() / lengths.median()).item()


@torch.no_grad()
def test_what_makes_sinks_massive_is_damped_and_the_gates_do_what_they_did():
    model = with_a_writer()
    before = copy.deepcopy(model)
    found = move_sinks(model, windows(), DAMPED)
    assert found.damped == [(0, 3)] and str(found).endswith("; damped neuron 3 of layer 0")
    several = replace(found, damped=[(2, 4), (2, 7), (5, 3)])
    assert several.said_of_damped() == "damped neurons 4 and 7 of layer 2, neuron 3 of layer 5"
    assert longest(before) > 80 and longest(model) < longest(before) / 30
    assert all(fit.moved and fit.sink > 0.4 and fit.sink_left < 0.1 for fit in found.heads if fit.layer == 1)
    for name, weight in before.model.layers[0].mlp.named_parameters():
        changed = (weight != model.model.layers[0].mlp.get_parameter(name)).nonzero()[:, 0].unique().tolist()
        assert changed == ([3] if name == "up_proj.weight" else [])
    loud, alone, ids = copy.deepcopy(before), copy.deepcopy(before), windows(count=10)
    alone.model.layers[0].mlp.up_proj.weight[3] /= 32
    expected, found, damped = (each(ids).logits[:, 1:] for each in (before, model, alone))  # not of the sink itself
    assert (damped - expected).abs().max() > 6 * (found - expected).abs().max()  # to damp is not enough
    assert move_sinks(loud, windows(), EXACT).damped == [] and longest(loud) > 80


@torch.no_grad()
def test_what_writes_to_other_tokens_too_is_not_damped():
    model = with_a_writer(elsewhere=0.1)
    assert longest(model) > 80 and move_sinks(model, windows(), DAMPED).damped == [] and longest(model) > 80


@torch.no_grad()
@pytest.mark.parametrize("left", [{"max_error": -1.0}, {"min_sink": 1.0}], ids=["no gate fits", "too small to move"])
def test_a_head_that_is_not_moved_keeps_the_sink_that_was_damped(left, monkeypatch):
    base, ids, differ = with_a_writer(), windows(count=10), {}
    for name in ("kept", "lost"):
        model = copy.deepcopy(base)
        found = move_sinks(model, windows(), replace(DAMPED, **left))
        assert found.damped == [(0, 3)] and not any(fit.moved for fit in found.heads)
        differ[name] = (model(ids).logits - base(ids).logits)[:, 1:].abs().max()
        monkeypatch.setattr(_LayerEdit, "reading_sinks_as_they_were", lambda *args: {})
    assert differ["kept"] < 1e-3 < 1e-2 < differ["lost"]


@torch.no_grad()
def test_a_head_that_is_restored_has_the_sink_that_was_damped():
    base, ids, differ = with_a_writer(), windows(count=10), []
    model = copy.deepcopy(base)
    found = move_sinks(model, windows(), replace(DAMPED, max_error=9.0))
    add_biases(base)
    raw = [weights_of_attention(layer) for layer in base.model.layers]
    assert all(fit.moved for fit in found.heads if fit.layer == 1)
    for unmoved in (found.unmoved, raw):
        heads = KVHeads(model, unmoved, ids, torch.float64)
        heads.restore(heads.each)
        differ.append((model(ids).logits - base(ids).logits)[:, 1:].abs().max())
        heads.restore(())
    assert differ[0] < 1e-3 < 1e-2 < differ[1]


@torch.no_grad()
def test_damping_that_costs_too_much_is_done_without():
    model, loud = with_a_writer(), with_a_writer()
    settings = replace(DAMPED, max_loss=-0.9)  # which nothing keeps
    found = move_sinks(model, windows(), settings)
    assert found == move_sinks(loud, windows(), replace(settings, damping=1.0)) and not found.damped
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loud.parameters(), strict=True))
    assert longest(model) > 80


@torch.no_grad()
def test_heads_without_a_sink_or_a_fit_stay_as_they_are():
    model = with_sinks()
    keys = model.model.layers[0].self_attn.k_proj.weight
    keys[6:] = -keys[6:]  # the second KV head repels
    before = copy.deepcopy(model)
    found = moved(model)
    assert [fit.moved for fit in found.heads] == [True] * 3 + [False] * 3
    attention, was = model.model.layers[0].self_attn, before.model.layers[0].self_attn
    assert torch.equal(attention.k_proj.weight[6:], was.k_proj.weight[6:])
    assert torch.equal(attention.attn_gate.proj.weight[3:], was.attn_gate.proj.weight[3:])
    assert not attention.v_proj.bias[6:].any() and attention.v_proj.bias[:6].any()
    for part in ("k_proj.weight", "attn_gate.proj.weight"):
        assert not torch.equal(attention.get_parameter(part), was.get_parameter(part))
    assert torch.equal(attention.o_proj.weight, was.o_proj.weight)
    refitted = copy.deepcopy(before)  # and none makes good what another misses
    moved(refitted, settings=ROUGH)
    weight = refitted.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(weight[:, 18:], was.o_proj.weight[:, 18:]) and not torch.equal(weight, was.o_proj.weight)
    unfit = with_sinks()
    found = moved(unfit, settings=replace(EXACT, ridge=1e3, max_error=0.01))  # such a ridge fits nothing
    assert not any(fit.moved for fit in found.heads) and difference(unfit, with_sinks()) == 0


@torch.no_grad()
def test_layers_are_undone_until_the_budget_is_kept():
    """Heads of a random model have no sinks, so that to move them ruins what it says: how far, a budget decides."""
    model = gated_model(GatedLlamaForCausalLM, trained=False)
    model.lm_head.weight *= 10
    ids = model.generate(token_ids(24, 4), max_length=20, min_length=20, do_sample=False)
    sinks = torch.zeros(3, *ids.shape, dtype=torch.bool)
    sinks[:, :, 0] = True
    settings = MoveSettings(min_sink=0.0, max_error=1e9, max_loss=1e9, ridge=10.0)
    free = move_sinks(copy.deepcopy(model), ids, settings, sinks=sinks)
    cost = free.loss_after / free.loss_before - 1
    assert cost > 1e-3 and all(fit.moved for fit in free.heads) and not free.undone
    for budget in (0.5 * cost, 0.0):
        edited = copy.deepcopy(model)
        found = move_sinks(edited, ids, replace(settings, max_loss=budget), sinks=sinks)
        assert found.undone and found.loss_after <= (1 + budget) * found.loss_before + 1e-6
        assert {fit.layer for fit in found.heads if fit.moved} == {0, 1, 2} - set(found.undone)
        held_out = ids[-3:]
        assert losses(edited, held_out).mean().item() == pytest.approx(found.loss_after, abs=1e-5)
    assert len(found.undone) == 3 and "undone" in str(found)


@pytest.mark.parametrize(("hidden", "settings", "times"), [(False, EXACT, 4), (True, EXACT, 4), (False, ROUGH, 2)])
@torch.no_grad()
def test_a_kv_head_that_is_restored_is_what_it_was(hidden, settings, times):
    model = with_sinks(hidden=hidden)
    before = copy.deepcopy(model)
    add_biases(before)
    unmoved = [weights_of_attention(layer) for layer in before.model.layers]
    moved(model, settings=settings)
    changed, made = difference(model, before), copy.deepcopy(model.state_dict())
    heads = KVHeads(model, unmoved, windows(), torch.float64)
    assert heads.moved() == [(0, 0), (0, 1)] and heads.said([(0, 1)]) == "layer 0 (1)" and heads.said(()) == ""
    heads.restore([(0, 1)])
    attention, was = model.model.layers[0].self_attn, before.model.layers[0].self_attn
    assert heads.moved() == [(0, 0), (0, 1)]  # as they were made, whatever is restored
    assert torch.equal(attention.o_proj.weight[:, 18:], was.o_proj.weight[:, 18:])
    assert not attention.attn_gate.proj.weight[3:].any() and attention.attn_gate.proj.weight[:3].any()
    assert not attention.v_proj.bias[6:].any() and attention.v_proj.bias[:6].any()
    assert difference(model, before) < 1.1 * changed
    if not hidden:  # such a sink has next to no value
        attention.o_proj.bias.copy_(made["model.layers.0.self_attn.o_proj.bias"])  # as if it did not stand for values
        assert difference(model, before) > times * changed
    heads.restore([(0, 0), (0, 1)])
    assert difference(model, before) == 0 and heads.said([(0, 0), (0, 1)]) == "layer 0"
    heads.restore(())
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_what_a_kv_head_costs_is_what_restoring_it_saves(monkeypatch):
    monkeypatch.setattr(KVHeads, "_mean_inputs", lambda self: [torch.zeros(36)] * 3)  # this edit left biases alone
    base = gated_model(GatedLlamaForCausalLM, trained=False)
    base.lm_head.weight *= 10
    add_biases(base)
    edited, before = copy.deepcopy(base), [weights_of_attention(layer) for layer in base.model.layers]
    for number, columns, factor in ((0, slice(18), 1.5), (2, slice(18, None), 9.0)):
        edited.model.layers[number].self_attn.o_proj.weight[:, columns] *= factor
        edited.model.layers[number].self_attn.k_proj.weight *= 1.01
    made = copy.deepcopy(edited.state_dict())
    heads = KVHeads(edited, before, token_ids(2, 30), torch.float32)
    moved = heads.moved()
    assert moved == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert heads.divergence_saved(base, [(1, 0)]) == {(1, 0): 0}
    saved = heads.divergence_saved(base, moved)
    assert saved[0, 1] < saved[0, 0] < saved[2, 1] and saved[2, 0] < saved[2, 1]
    assert all(torch.equal(value, made[name]) for name, value in edited.state_dict().items())


def test_as_few_as_need_be_are_undone():
    undone = []

    def undo(those):
        undone[:] = those

    def has(name):
        return lambda: name in undone

    assert undo_fewest("bca", undo, [has("c")]) == "bc"
    assert undo_fewest("cab", undo, [has("c")]) == "c"
    assert undo_fewest("cab", undo, [has("c"), has("a")]) == "ca"
    assert undo_fewest("abcdefgh", undo, [has("b"), has("g"), has("c")]) == "abcdefg" and undone == list("abcdefg")
    assert undo_fewest("bca", undo, [lambda: False]) == "bca"  # all is the most


@torch.no_grad()
def test_sliding_windows_depth_and_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        model = gated_model(
            GatedLlamaForCausalLM,
            sliding_window=7,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ).to(dtype)
        ids = token_ids(8, 40)
        sinks = torch.zeros(3, 8, 40, dtype=torch.bool)
        sinks[:, torch.arange(8), torch.arange(8)] = True
        found = move_sinks(model, ids, MoveSettings(min_sink=0.01, max_error=9, max_loss=9), sinks=sinks)
        assert len(found.heads) == 18 and sum(fit.moved for fit in found.heads) > 6
        assert all(torch.tensor([fit.sink, fit.sink_left, fit.error]).isfinite().all() for fit in found.heads)
        assert model.dtype == dtype and model(token_ids()).logits.isfinite().all()
        assert {value.dtype for layer in found.unmoved for value in layer.values()} == {dtype}  # as the layers at home
        assert model.config.attention_bias and model.config.attention_out_bias and model.config.gate_bias


@pytest.mark.parametrize("variant", ["headwise", "elementwise", "QK norm"])
@torch.no_grad()
def test_what_slides_computes_what_its_base_did_that_saw_its_first_token(variant):
    base, ids, seen = with_sinks(**VARIANTS[variant]), windows(count=10), last_tokens(TOKENS, 5, 1)
    expected, behind, missed = losses(base, ids, seen=seen), slice(5, None), []
    for first in (1, 0):  # what is fitted to a base that lost its sink has nothing to make good
        model = copy.deepcopy(base)
        let_slide(model, 5)
        found = moved(model, settings=replace(EXACT, max_error=float("inf"), first=first))
        assert all(fit.moved for fit in found.heads)
        missed.append((losses(model, ids) - expected)[:, behind].abs().mean().item())
    assert missed[0] < 2e-3 and missed[1] > 100 * missed[0]  # 9e-6 to 1.2e-3, and .8 to 1.2 nats


@pytest.mark.parametrize("own_window", [None, 9])
@torch.no_grad()
def test_a_base_that_keeps_its_first_tokens(own_window):
    model, ids = gated_model(GatedLlamaForCausalLM, sliding_window=own_window), token_ids(2, TOKENS)
    seen, shares = last_tokens(TOKENS, 6, 4), []
    expected, usual = losses(model, ids, seen=seen), losses(model, ids)
    with keeping_first(model, 6):
        assert torch.equal(losses(model, ids), expected) and not torch.equal(expected, usual)
        assert torch.equal(losses(model, ids, seen=last_tokens(TOKENS, own_window or TOKENS)), usual)  # asked otherwise
        if own_window is None:
            with capture_attention(model, lambda layer, start, begin, weights, output: shares.append(weights)):
                # Sums in another order: nine last places of losses near 7, on an AMD EPYC (4.3e-6; on Intel 1.9e-6).
                torch.testing.assert_close(losses(model, ids), expected, rtol=0, atol=5e-6)
                assert (usual - expected).abs().max() > 1e-3
            assert all(torch.equal(found != 0, seen.expand_as(found)) for found in shares) and len(shares) == 3
    assert torch.equal(losses(model, ids), usual)


def test_what_cannot_be_done_is_said():
    ids = token_ids()
    with pytest.raises(UserError, match="convert it first"):
        move_sinks(source_model(), ids)
    model = gated_model(GatedLlamaForCausalLM)
    for few in (ids[:, :2], ids[:1]):
        with pytest.raises(UserError, match="B at least 2"):
            move_sinks(model, few)
    with (
        pytest.warns(UserWarning, match="51 tokens are few .* take 144 or more"),
        pytest.raises(UserError, match="no sink"),
    ):
        move_sinks(copy.deepcopy(model), ids)
    with pytest.raises(UserError, match="merge adapters"):
        move_sinks(get_peft_model(copy.deepcopy(model), gated_lora_config(r=2)), ids)
    model.set_gate_strength(0.5)
    with pytest.raises(UserError, match="set_gate_strength"):
        move_sinks(model, ids)


@torch.no_grad()
def with_massive_tokens() -> GatedLlamaForCausalLM:
    """Token 1, with which texts begin, is a thousand times as long as others from the embedding on."""
    model = gated_model(GatedLlamaForCausalLM, trained=False)
    model.model.embed_tokens.weight[1] *= 1000
    return model


@pytest.mark.parametrize("bf16", [False, True])
def test_distillation_learns_from_the_base_and_calms_what_is_massive(monkeypatch, bf16):
    monkeypatch.setattr("gated_llama.sinks.distil.multiplies_bf16", lambda device: bf16)
    base, ids = with_massive_tokens(), token_ids(400, 20)
    ids[:, 0] = 1
    lengths = state_lengths(base, ids)
    assert sink_tokens(lengths)[:, :, 0].all()
    massive, given = {}, {}
    for penalty in (0.1, 0.0):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model.model.layers[0].self_attn.attn_gate.proj.weight.normal_(0, 0.3)
        settings = DistilSettings("layers", lr=0.3, gate_lr=0.6, states=0.0, penalty=penalty)
        found = distil(model, base, ids.split(4), lengths, settings)
        assert all(parameter.grad is None for parameter in model.parameters())
        massive[penalty] = state_lengths(model, ids).states[:, :, 0].mean().item()
        given[penalty] = [sum(loss for loss, _ in part) / len(part) for part in (found[:4], found[-4:])]
    assert given[0.0][1] < 0.7 * given[0.0][0]
    assert massive[0.1] < 0.8 * massive[0.0]


@pytest.mark.parametrize("of_text", [False, True])
def test_a_loss_in_parts_is_that_of_all_logits(monkeypatch, of_text):
    """And so are its gradients. Negative control: a part that is left out shows."""
    (base, model), ids = (gated_model(GatedLlamaForCausalLM, seed=seed) for seed in (0, 1)), token_ids(3, 7)
    logits = model(ids).logits
    if of_text:
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    else:
        teacher, student = base(ids).logits.log_softmax(-1), logits.log_softmax(-1)
        expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    gate = model.model.layers[0].self_attn.attn_gate.proj.weight
    (slope,) = torch.autograd.grad(expected, gate)
    monkeypatch.setattr("gated_llama.sinks.distil.AT_ONCE", 4)  # 21 or 18 tokens: the last part is shorter

    def loss(ids):
        wanted = ids if of_text else states_of(base, ids, every=False)[-1]
        return loss_of(model, states_of(model, ids, every=False)[-1], None if of_text else base, wanted)

    found = loss(ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, gate), (slope,))
    assert (loss(ids[:2]) - expected).abs() > 1e-3


def test_the_distance_of_states_leaves_out_what_is_long():
    wanted = [
        torch.tensor([[[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]]]),
        torch.tensor([[[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]]),
    ]
    states = [x + torch.tensor([1.0, 0.0]) for x in wanted]
    found = distance(states, wanted, [5.0, 2.0])  # the second token of the first layer is 10 long
    torch.testing.assert_close(found, torch.tensor(((1 / 25 + 1) / 2 + 1 / 4) / 2))


def test_the_distance_of_states_is_the_mean_of_those_of_its_rows():
    """Whatever else they hold that is long, so that processes which share the rows make the same step."""
    wanted = torch.tensor([[[1.0], [9.0], [9.0]], [[1.0], [2.0], [3.0]]])
    states = wanted + torch.tensor([[[0.5], [0.5], [0.5]], [[0.1], [0.2], [0.3]]])
    rows = [distance([x[None]], [x0[None]], [5.0]) for x, x0 in zip(states, wanted, strict=True)]
    torch.testing.assert_close(distance([states], [wanted], [5.0]), (rows[0] + rows[1]) / 2)


def test_distilling_brings_states_back_to_the_base():
    """Further than the divergence alone does, from which nothing is asked of states."""
    base, ids, off = with_massive_tokens(), token_ids(400, 20), {}
    lengths, longest = state_lengths(base, ids), [float("inf")] * (base.config.num_hidden_layers - 1)
    for weight in (0.0, 10.0):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.normal_(0, 0.3)
        distil(model, base, ids.split(4), lengths, DistilSettings("layers", lr=0.3, penalty=0.0, states=weight))
        states, wanted = (states_of(each, ids, every=True)[:-1] for each in (model, base))
        off[weight] = distance(states, wanted, longest).item()
    assert off[10.0] < 0.5 * off[0.0]


@pytest.mark.parametrize("train", ["gates", "layers"])
def test_distillation_trains_what_it_says_and_nothing_else(train):
    base, ids = with_massive_tokens(), token_ids(8, 20)
    model = copy.deepcopy(base)
    add_biases(model)
    before = copy.deepcopy(model.state_dict())
    distil(model, base, ids.split(4), state_lengths(base, ids), DistilSettings(train, frozen=("q_proj",), penalty=0.1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"model"} and not any("embed" in name for name in changed)
    quick = {name for name in changed if "attn_gate" in name or name.endswith(("v_proj.bias", "o_proj.bias"))}
    assert quick and (changed == quick) == (train == "gates") and not any("q_proj" in name for name in changed)


def test_long_rows_that_are_made_anew_on_the_way_back_teach_the_same(monkeypatch):
    base, ids, found = with_massive_tokens(), token_ids(8, 20), []
    ids[:, 0] = 1
    lengths = state_lengths(base, ids)
    for kept in (80, 79):  # of four rows of 20
        monkeypatch.setattr("gated_llama.sinks.distil.KEPT", kept)
        model, calls = copy.deepcopy(base), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *given, calls=calls: calls.append(1))
        losses = distil(model, base, ids.split(4), lengths, DistilSettings("layers", lr=0.3, penalty=0.1))
        assert len(calls) == (2 if kept == 80 else 4) and not model.model.layers[0].gradient_checkpointing
        found.append((losses, model.model.layers[0].mlp.up_proj.weight))
    assert found[0][0] == found[1][0] and all(penalty > 0 for _, penalty in found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)  # to the bit: the same operations


def test_gates_learn_alike_whatever_the_size_of_the_states_that_they_read(monkeypatch):
    """A norm ten times as large before weights a tenth as large is the same model; and so it is after distilling."""
    monkeypatch.setattr("gated_llama.sinks.distil.multiplies_bf16", lambda device: False)
    base, ids, found = gated_model(GatedLlamaForCausalLM), token_ids(24, 20), []
    base.lm_head.weight.data.mul_(1000)  # for gradients beside which Adam's epsilon is nothing
    for size in (1, 10):
        teacher = copy.deepcopy(base)
        with torch.no_grad():
            for layer in teacher.model.layers:
                layer.input_layernorm.weight.mul_(size)
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(layer.self_attn, name).weight.div_(size)
                layer.self_attn.attn_gate.proj.weight.div_(size)
        model = copy.deepcopy(teacher)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.attn_gate.proj.weight)
        distil(model, teacher, ids.split(4), state_lengths(teacher, ids), DistilSettings("gates", penalty=0.0))
        found.append([layer.self_attn.attn_gate.proj.weight * size for layer in model.model.layers])
    assert all(gates.abs().max() > 1e-3 for gates in found[0])
    for one, ten in zip(*found, strict=True):
        torch.testing.assert_close(ten, one, rtol=0, atol=2e-6)  # fp32, in six steps: 8e-7 here, of gates up to .02


def test_biases_learn_in_the_measure_of_the_states():
    model, ids = gated_model(GatedLlamaForCausalLM), token_ids(8, 20)
    add_biases(model)
    lengths = state_lengths(model, ids)
    rates = [
        [group["lr"] for group in choose_trained(model, measured, DistilSettings("layers"))]
        for measured in (lengths, replace(lengths, states=4 * lengths.states))
    ]
    gates, biases, others = (after / before for before, after in zip(*rates, strict=True))
    assert (gates, biases, others) == (1, 4, 1)


def test_gates_of_layers_from_which_nothing_was_moved_stay_open():
    model, ids = gated_model(GatedLlamaForCausalLM, trained=False), token_ids(8, 20)
    add_biases(model)
    base = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.attn_gate.proj.weight.normal_()
    before = copy.deepcopy(model.state_dict())
    frozen = recipe._layers_with_open_gates(model)
    assert frozen == (".layers.0.", ".layers.2.")
    distil(model, base, ids.split(4), state_lengths(base, ids), DistilSettings("gates", frozen=frozen))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.layers.1.self_attn.") for name in changed)


@torch.no_grad()
def test_a_judgement_of_a_model_that_looks_at_its_first_token_alone():
    model = gated_model(GatedLlamaForCausalLM, num_hidden_layers=1).double()
    ids = token_ids(6, 130)
    uniform = judge(model, ids, ids, batch_size=4)
    assert uniform.first_token < 0.2 and uniform.sink_rate < 0.9
    sinking = with_sinks(attraction=40.0)
    ids = torch.randint(1, sinking.config.vocab_size, (6, 130), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    found = judge(sinking, ids, ids, batch_size=4)
    assert found.first_token > 0.95 and found.most_attended > 0.95 and found.sink_rate == 1
    assert abs(found.short_window_and_first) < 1e-3 < abs(found.short_window)
    assert found.loss == pytest.approx(losses(sinking, ids).mean().item())
    states = []
    with sinking.model.layers[0].register_forward_hook(lambda m, i, output: states.append(layer_states(output))):
        sinking(ids)
    assert len(sinking.model.layers) == 1
    largest = states[0].abs().amax((1, 2)).mean().item()
    assert found.m_act == pytest.approx(largest, rel=torch.finfo(torch.float32).eps)  # in which it is summed up


@torch.no_grad()
def test_quantization_is_simulated_as_said():
    model, ids = gated_model(GatedLlamaForCausalLM), token_ids(6, 130)
    model.model.layers[1].mlp.down_proj.weight[3] *= 50  # one channel of the states, of all tokens, is large
    before = copy.deepcopy(model.state_dict())
    cost = {}
    for how in ("dynamic per tensor", "static per tensor", "per token"):
        for bits in (4, 8, 16):
            with quantized(model, how, lambda: losses(model, ids), bits):
                cost[how, bits] = (losses(model, ids, batch_size=6) - losses_of(before, ids)).abs().mean().item()
        assert cost[how, 16] < cost[how, 8] < cost[how, 4]
    assert cost["per token", 8] < cost["dynamic per tensor", 8]
    with quantized(model, "static per tensor", lambda: losses(model, ids)), quantized(model, "dynamic per tensor"):
        pass

    def stopped(*args):
        raise KeyboardInterrupt

    for calibrate in (stopped, lambda: losses(model, ids)):
        with pytest.raises(KeyboardInterrupt), quantized(model, "static per tensor", calibrate):
            model.model.layers[1].mlp.down_proj.forward = stopped
            losses(model, ids)
    del model.model.layers[1].mlp.down_proj.forward
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in linears_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cost["static per tensor", 8] == pytest.approx(cost["dynamic per tensor", 8], rel=0.5)


def linears_of(model) -> list[torch.nn.Module]:
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def losses_of(weights: dict, ids: torch.Tensor) -> torch.Tensor:
    model = gated_model(GatedLlamaForCausalLM)
    model.load_state_dict(weights)
    return losses(model, ids, batch_size=6)


def test_last_tokens_and_the_first():
    assert last_tokens(4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert last_tokens(4, 2, 1).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


@torch.no_grad()
# fp32 against fp64: logits up to 7, and up to 175, in whose last place alone are 1.5e-5 (1.2e-6 and 5.6e-5 here).
@pytest.mark.parametrize(("scale", "atol"), [(1.0, 2e-6), (5.0, 1e-4)], ids=["usual", "sinks far above the others"])
@pytest.mark.parametrize(("window", "first"), [(None, 0), (6, 0), (6, 2)])
def test_attention_around_sinks_is_the_plain_one(window, first, scale, atol):
    model = gated_model(GatedLlamaForCausalLM, sliding_window=window)
    layer = model.model.layers[1]
    layer.input_layernorm.weight.mul_(scale)
    states = torch.randn(2, TOKENS, 36, generator=torch.Generator().manual_seed(0))
    sinks = torch.zeros(2, TOKENS, dtype=torch.bool)
    sinks[:, 0] = sinks[1, 5] = True
    rotary = rotary_of(model, states)
    found = attend(layer, states, rotary, sinks, first)
    layer.double()
    attention, read = layer.self_attn, layer.input_layernorm(states.double())
    queries, keys, values = (
        linear(read).unflatten(2, (-1, 6)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *(table.double() for table in rotary))
    keys, values = (x.repeat_interleave(3, 1) for x in (keys, values))
    seen = last_tokens(TOKENS, window or TOKENS, first)
    logits = (queries @ keys.mT / 6**0.5).masked_fill(~seen, float("-inf"))
    of_others = logits.masked_fill(sinks[:, None, None], float("-inf")).logsumexp(3)
    weights = logits.softmax(3)
    close = partial(torch.testing.assert_close, rtol=0, atol=atol, check_dtype=False)
    close(found.outputs.transpose(1, 2), weights @ values)
    close(found.others.transpose(1, 2), (of_others - logits.logsumexp(3)).exp())
    met = of_others.isfinite()  # the first query meets its own sink alone
    assert scale == 1 or (logits.logsumexp(3) - of_others)[met].max() > 50
    close(found.logits.transpose(1, 2)[met], of_others[met])
    assert not met[:, :, 0].any() and met[:, :, 1:].all() and found.others[:, 0].lt(1e-30).all()


SMALL = ["--calm-tokens", "512", "--move-tokens", "2048", "--heal-tokens", "256", "--length", "128", "--quiet"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain checkpoint whose beginning-of-text token is massive, and text in its words."""
    folder = tmp_path_factory.mktemp("desink")
    model = source_model(max_position_embeddings=256)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1000
    published(folder / "plain", model, dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder / "plain")
    words = "the grumpy cat sat on the mat, which was red. "
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": words * (3 + number % 5)}) + "\n" for number in range(120))
    )
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The settings with which `desink` would move sinks; it moves any here, however small and however its gate fits."""
    real, found = recipe.move_sinks, []

    def move(model, ids, settings, **keywords):
        found.append(settings)
        return real(model, ids, replace(settings, min_sink=0.0, max_error=1e9), **keywords)

    monkeypatch.setattr(recipe, "move_sinks", move)
    return found


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_the_command_writes_a_checkpoint_that_loads_and_says_what_it_did(plain, asked, capsys):
    from transformers import AutoModelForCausalLM

    arguments = [str(plain / "plain"), str(plain / "out"), "--text", str(plain / "text.jsonl"), *SMALL, "--json"]
    assert main(["desink", *arguments, "--max-loss", "900%", "--damping", "4"]) == 0
    assert asked == [MoveSettings(max_loss=float("inf"), damping=4.0)]  # small sinks too
    result = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in result["steps"]] == ["moved", "healed", "calmed"]
    model = AutoModelForCausalLM.from_pretrained(plain / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.attention_out_bias and model.config.gate_bias
    card = (plain / "out" / "README.md").read_text()
    assert "gated-llama desink plain out --text text.jsonl" in card and "--damping 4.0" in card
    assert "| moved | 2,048 |" in card
    assert str(plain) not in card
    assert not list(plain.glob(".*"))
    assert {"index.html", "measurements.json", "sinks-1.png"} <= {
        path.name for path in (plain / "out/inspection").iterdir()
    }
    assert not (plain / "out.unfinished").exists()
    # It can slide, and stream, without being saved anew.
    sliding = AutoModelForCausalLM.from_pretrained(plain / "out", dtype="auto", sliding_window=8)
    ids = token_ids(1, 40)
    assert sliding.config.attention_types == ["sliding_attention"] * 3
    logits = [each(ids).logits for each in (model, sliding)]
    assert torch.equal(logits[0][:, :8], logits[1][:, :8]) and not torch.equal(logits[0][:, 8:], logits[1][:, 8:])
    let_slide(model, 8)
    assert torch.equal(model(ids).logits, logits[1]) and model.config.to_dict() == sliding.config.to_dict()


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_run_that_was_stopped_goes_on_to_the_same_end(plain, asked, capsys, monkeypatch):
    arguments = ["--text", str(plain / "text.jsonl"), *SMALL, "--max-loss", "900%", "--sliding-window", "64"]
    arguments += ["--batch-size", "1"]
    whole, stopped = plain / "whole", plain / "stopped"
    assert main(["desink", str(plain / "plain"), str(whole), *arguments]) == 0
    assert asked == [MoveSettings(max_loss=float("inf"), max_error=float("inf"), first=4, damping=32.0)]
    weights = load_file(whole / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    assert config["sliding_window"] == 64 and "layer_types" not in config
    card = (whole / "README.md").read_text()
    assert "| | before: last 64 tokens, first 4 | after: last 64 tokens |" in card
    assert "… where the last 64 tokens alone are" in card and "--length 128" in card

    assert main(["desink", str(plain / "plain"), str(stopped), *arguments, "--resume"]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    real = torch.optim.AdamW.step
    left = []

    def stop(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    for steps in (3, 1):  # of four steps of calming; then its last, and none of healing
        left[:] = [None] * steps
        resumed = ["--resume"] if (plain / "stopped.unfinished").exists() else []
        assert main(["desink", str(plain / "plain"), str(stopped), *arguments, *resumed]) == 2
        assert "interrupted: --resume goes on" in capsys.readouterr().err and not stopped.exists()
    monkeypatch.undo()
    text = (plain / "text.jsonl").read_text()
    for options, said in (
        (["--resume", "--seed", "1"], "began with seed 0, not 1"),
        ([], "is what a stopped run left"),
        (["--resume"], "began with digest of the text"),
    ):
        if said.endswith("of the text"):
            (plain / "text.jsonl").write_text(text + '{"text": "more"}\n')
        assert main(["desink", str(plain / "plain"), str(stopped), *arguments, *options]) == 2
        assert said in capsys.readouterr().err
    (plain / "text.jsonl").write_text(text)
    assert main(["desink", str(plain / "plain"), str(stopped), *arguments, "--resume"]) == 0
    made = load_file(stopped / "model.safetensors")
    assert made.keys() == weights.keys() and all(torch.equal(made[name], weights[name]) for name in weights)
    assert not (plain / "stopped.unfinished").exists()


def test_a_model_of_the_hub_keeps_its_name(plain, tmp_path, run_python):
    shutil.copytree(plain / "plain", tmp_path / "hub" / "org" / "plain")
    with local_hub(tmp_path / "hub") as environment:
        done = run_python(
            f"""
            from gated_llama.scripts.cli import main
            text, small = {str(plain / "text.jsonl")!r}, {SMALL}
            main(["desink", "org/plain", {str(tmp_path / "out")!r}, "--text", text, *small, "--max-loss", "900%"])
            """,
            environment=environment,
        )
    assert done.returncode == 0 and (tmp_path / "out").exists(), done.stderr
    made = json.loads((tmp_path / "out" / "config.json").read_text())["conversion"]
    assert (made["source"], len(made["revision"])) == ("org/plain", 40)


def test_each_of_several_processes_takes_a_device_of_its_own(plain, monkeypatch):
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr(recipe, "PartialState", lambda **keywords: two)
    with pytest.raises(UserError, match="a device of its own: give --device cuda"):
        desink_checkpoint(
            plain / "plain", [plain / "text.jsonl"], plain / "no", DesinkSettings(length=128), device="cuda:0"
        )


def test_processes_that_do_not_write_tell_what_memory_is_for(plain, monkeypatch):
    monkeypatch.setattr("gated_llama.sinks.unfinished.process_of", lambda: (1, 2))
    run = Unfinished(plain / "other")
    said = pytest.raises(UserError, match="out of memory: give a smaller --length")
    with said, run.opened({}, resume=False, force=False):
        raise torch.OutOfMemoryError
    assert not run.folder.exists()


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_what_is_out_of_memory_or_cannot_be_put_in_place_goes_on(plain, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError

    @contextmanager
    def not_put_in_place(*args, **kwargs):
        with new_folder(*args, **kwargs) as folder:
            yield folder
            raise KeyboardInterrupt

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    options = ["--text", str(plain / "text.jsonl"), *SMALL, "--max-loss", "900%"]
    desink = ["desink", str(plain / "plain"), str(plain / "large"), *options]
    unfinished = plain / "large.unfinished"
    for place, failing, said, is_kept in (
        ("Windows.judge", fails, "out of memory: give a smaller --length", False),
        ("move_sinks", fails, "out of memory: --resume goes on", True),
        ("new_folder", not_put_in_place, "interrupted: --resume goes on", True),
        ("_write", full, "No space left on device; nothing was written: --resume goes on", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"gated_llama.sinks.recipe.{place}", failing)
            assert main([*desink, *(["--resume"] if unfinished.exists() else [])]) == 2
        assert said in capsys.readouterr().err and unfinished.exists() == is_kept and not (plain / "large").exists()
    assert main([*desink, "--resume", "--device", "nowhere"]) == 2  # a mistake costs nothing
    assert "'nowhere'" in capsys.readouterr().err and unfinished.exists()
    assert main([*desink, "--resume"]) == 0 and not unfinished.exists()


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_page_that_cannot_be_made_does_not_cost_the_run(plain, asked, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("nothing to see")

    monkeypatch.setattr(recipe, "measure", fails)
    settings = DesinkSettings(max_loss=9.0, move_tokens=512, heal_tokens=0, length=128, judged_tokens=256)
    said, output = [], plain / "pageless"
    desink_checkpoint(plain / "plain", [plain / "text.jsonl"], output, settings, progress=False, announce=said.append)
    assert "could not be made: nothing to see" in said[-1]
    assert (output / "config.json").exists() and not (output / "inspection").exists()


@pytest.mark.parametrize(
    ("given", "learned", "damping", "min_sink"),
    [
        ({}, [("gates", 0.0, 128)], 1.0, 0.2),
        ({"calm_tokens": 128}, [("layers", DistilSettings.penalty, 256)], 32.0, 0.05),
        (
            {"calm_tokens": 128, "heal_tokens": 128, "damping": 1.0},
            [("gates", 0.0, 128), ("layers", DistilSettings.penalty, 256)],  # which the model is made for
            1.0,
            0.05,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_layers_learn_on_longer_rows_with_a_penalty_behind_damped_neurons_and_gates_without(
    plain, asked, monkeypatch, given, learned, damping, min_sink
):
    found = []

    def distil(model, base, batches, lengths, settings, **keywords):
        found.append((settings.train, settings.penalty, max(ids.shape[1] for ids in batches)))
        return []

    monkeypatch.setattr(recipe, "distil", distil)
    settings = DesinkSettings(max_loss=9.0, move_tokens=512, length=128, judged_tokens=256, **given)
    output = plain / f"learned-{len(given)}"
    desink_checkpoint(plain / "plain", [plain / "text.jsonl"], output, settings, progress=False)
    assert found == learned
    assert (asked[0].damping, asked[0].min_sink) == (damping, min_sink)


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_step_that_was_left_out_is_not_made_up_for_once_others_were_done(plain, monkeypatch):
    """No head here fits, so no gate has anything to make good; calmed, all gates would."""
    settings = DesinkSettings(
        max_loss=9.0, calm_tokens=128, heal_tokens=128, move_tokens=512, length=128, judged_tokens=256
    )
    run = partial(desink_checkpoint, plain / "plain", [plain / "text.jsonl"], plain / "left-out", settings)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(UserError, match="interrupted"):
        patch.setattr(recipe.Windows, "quantization_costs", stop)
        run(progress=False)
    assert [step.name for step in run(resume=True, progress=False).steps] == ["moved", "calmed"]


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_budget_that_is_not_kept_leaves_nothing(plain, capsys, monkeypatch):
    def ruin(model, *args, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.mul_(-5)
        return []

    monkeypatch.setattr("gated_llama.sinks.recipe.distil", ruin)
    arguments = [str(plain / "plain"), str(plain / "none"), "--text", str(plain / "text.jsonl"), "--length", "128"]
    assert main(["desink", *arguments, "--calm-only", "--calm-tokens", "512"]) == 1
    assert "every step cost more than 5.00% of loss" in capsys.readouterr().err
    assert not (plain / "none").exists() and not list(plain.glob(".*")) and not list(plain.glob("none*"))


@pytest.mark.parametrize(
    ("name", "what"),
    [("far", "past the rows' length"), ("recalled", "of passages that come back"), ("short", "of short texts")],
)
@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_model_that_forgot_to_look_back_is_not_returned(plain, monkeypatch, name, what):
    """Held-out rows are as they were; what lies behind their length in longer texts is not, or what comes back."""
    real, asked = recipe.Windows.judge, []

    def judge(self, model, **settings):
        asked.append((self.far.shape[1], self.recalled.shape[1]))
        found = real(self, model, **settings)
        return replace(found, **{name: getattr(found, name) + (len(asked) > 1)})

    monkeypatch.setattr(recipe.Windows, "judge", judge)
    monkeypatch.setattr(recipe, "distil", lambda *args, **kwargs: [])
    told = []
    settings = DesinkSettings(calm_only=True, calm_tokens=512, move_tokens=2048, length=128)
    with pytest.raises(VerificationError, match="every step cost more"):
        desink_checkpoint(
            plain / "plain", [plain / "text.jsonl"], plain / "far", settings, progress=False, announce=told.append
        )
    assert f"calmed was undone: the loss {what} rose" in told[-1]
    assert asked[0][0] > 128 and asked[0][1] == 256 and not list(plain.glob("far*"))


@pytest.mark.parametrize(("healed", "is_undone"), [(0.3, False), (0.6, True), (float("nan"), True)])
@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_healing_is_kept_that_makes_more_good_than_it_costs(plain, monkeypatch, healed, is_undone):
    """What was moved is over its budget. Healed, it costs a little more behind the rows, and on them less; or more."""
    real_move, real_judge = recipe.move_sinks, recipe.Windows.judge
    costs = [(0.0, 0.0), (0.5, 0.2), (healed, 0.21)]

    def judge(self, model, **settings):
        loss, far = costs.pop(0)
        return replace(real_judge(self, model, **settings), loss=1 + loss, far=1 + far, recalled=1.0, short=1.0)

    anything = MoveSettings(min_sink=0.0, max_error=1e9)
    monkeypatch.setattr(recipe, "move_sinks", lambda model, ids, settings, **kw: real_move(model, ids, anything, **kw))
    monkeypatch.setattr(recipe, "distil", lambda *args, **keywords: [])
    monkeypatch.setattr(recipe.Windows, "judge", judge)
    told = []
    settings = DesinkSettings(move_tokens=512, heal_tokens=128, length=128, sliding_window=64)
    with pytest.raises(VerificationError, match="the loss on held-out text rose"):
        desink_checkpoint(
            plain / "plain", [plain / "text.jsonl"], plain / "healed", settings, progress=False, announce=told.append
        )
    assert any(line.startswith("healed was undone") for line in told) == is_undone and not costs


@pytest.mark.parametrize(
    ("budget", "restored"), [(9.0, None), (1.5, "1 of 6: layer 1 (1)"), (0.5, "2 of 6: layer 1"), (0.05, "all")]
)
@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_kv_heads_that_cost_too_much_are_restored(plain, monkeypatch, budget, restored):
    """Of a model whose loss tells which KV heads are not as they were, those of layer 1 above all."""
    old = load_file(plain / "plain" / "model.safetensors")
    real_move, real_judge = recipe.move_sinks, recipe.Windows.judge

    @torch.no_grad()
    def move(model, ids, settings, **keywords):
        assert settings.max_loss == float("inf")  # nothing is undone before healing had its turn
        found = real_move(model, ids, MoveSettings(min_sink=0.0, max_error=1e9), **keywords)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 1.1
            layer.self_attn.o_proj.weight *= 1.1
        return found

    def is_changed(weights: dict, number: int, head: int) -> bool:
        name, columns = f"model.layers.{number}.self_attn.o_proj.weight", slice(18 * head, 18 * (head + 1))
        return not torch.equal(weights[name][:, columns].bfloat16(), old[name][:, columns])

    def loss(self, model, name: str) -> float:
        weights = model.state_dict()
        costs = {(number, head): 1.0 if number == 1 else 0.1 for number in range(3) for head in range(2)}
        return 1.0 + sum(cost * is_changed(weights, *head) for head, cost in costs.items())

    def judged(self, model, **settings):
        return replace(real_judge(self, model, **settings), loss=loss(self, model, "loss"))

    dearest = {(1, 0): 1e3, (1, 1): 1e6}
    monkeypatch.setattr(recipe, "move_sinks", move)
    monkeypatch.setattr(
        KVHeads, "divergence_saved", lambda self, base, heads, **keywords: {h: dearest.get(h, 0.0) for h in heads}
    )
    monkeypatch.setattr(recipe.Windows, "loss", loss)
    monkeypatch.setattr(recipe.Windows, "judge", judged)
    settings = DesinkSettings(max_loss=budget, move_tokens=512, heal_tokens=0, length=128)
    output = plain / f"given-back-{budget}"
    run = partial(desink_checkpoint, plain / "plain", [plain / "text.jsonl"], output, settings, progress=False)
    if restored == "all":
        with pytest.raises(VerificationError, match="to move the sink of any KV head costs more than"):
            run()
        assert not list(plain.glob(f"{output.name}*"))
        return
    result = run()
    assert [step.note for step in result.steps] == ([""] if restored is None else ["", restored])
    made = load_file(output / "model.safetensors")
    changed = [is_changed(made, 1, head) for head in range(2)]
    assert changed == {9.0: [True, True], 1.5: [True, False], 0.5: [False, False]}[budget]
    assert all(is_changed(made, number, head) for number in (0, 2) for head in range(2))
    card = (output / "README.md").read_text()
    assert (f"| KV heads restored: {restored} |" in card) == (restored is not None)


@pytest.mark.filterwarnings("ignore:.* are few for regressions")
def test_a_model_from_which_no_sink_was_moved_is_not_returned(plain, monkeypatch):
    settings = DesinkSettings(move_tokens=512, heal_tokens=128, length=128, batch_size=2, judged_tokens=512)
    real = recipe.move_sinks
    none = MoveSettings(min_sink=2.0)
    monkeypatch.setattr(recipe, "move_sinks", lambda model, ids, settings, **kw: real(model, ids, none, **kw))
    with pytest.raises(VerificationError, match="no head has a sink that is large enough"):
        desink_checkpoint(plain / "plain", [plain / "text.jsonl"], plain / "same", settings, progress=False)
    assert not (plain / "same").exists()


def test_passages_come_back_in_another_order():
    windows = torch.arange(2 * (2 * PASSAGE + 9)).repeat(6, 1)
    half = windows.shape[1] // 2
    again = with_returns(windows, 0)
    assert torch.equal(again[:, :half], windows[:, :half])
    firsts = [0, PASSAGE, 2 * PASSAGE]
    for row in again[:, half:]:
        starts = [place for place, token in enumerate(row.tolist()) if token in firsts]
        found = [part.tolist() for part in row.tensor_split(starts[1:])]
        assert sorted(found) == [part.tolist() for part in windows[0, :half].split(PASSAGE)]
    assert len({tuple(row.tolist()) for row in again}) > 1


def windows_of(plain, settings, longest, progress=False, vocabulary=VOCAB, tokenizer=None) -> Windows:
    documents = read_documents([plain / "text.jsonl"])
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=longest)
    return Windows(tokenizer or tiny_tokenizer(), documents, settings, config, progress)


def test_texts_begin_with_tokens_that_the_tokenizer_has_and_end_where_the_model_does(plain):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<pad>"})
    settings = DesinkSettings(length=128)
    for longest in (300, 10_000):  # of 512, which four rows have
        windows = windows_of(plain, settings, longest)
        assert windows.beginnings == [1, 2] and windows.far.shape[1] == min(longest, len(windows.held_out) - 1)
    with pytest.raises(UserError, match=r"the model has 9: it is another model's tokenizer"):
        windows_of(plain, settings, longest, vocabulary=9)


def test_half_of_what_is_fitted_on_has_passages_that_come_back(plain):
    windows = windows_of(plain, DesinkSettings(length=128), 256)
    rows = windows.cut(8 * 128, "some")
    assert all(row[0] in windows.beginnings for row in rows[::2])
    assert [torch.equal(row[64:], row[:64]) for row in rows[1::2]] == [False, True, False, True]  # one passage


@pytest.mark.parametrize(
    ("length", "longest", "lengths"),
    [
        (2_048, 2_048, {2_048: 8, 512: 16, 128: 64}),
        (512, 2_048, {2_048: 8, 512: 16, 64: 128}),
        (128, 128, {128: 128, 64: 256}),
    ],
)
def test_steps_of_training_have_rows_of_several_lengths(plain, length, longest, lengths):
    """Half of the tokens in the longest, spread evenly; and a row for each process however few tokens are asked for."""
    windows = windows_of(plain, DesinkSettings(length=128), 512)
    windows.length = length
    batches = windows.batches(16 * 2 * 2_048, "some", 2, longest)
    assert all(len(ids) == 2 for ids in batches)
    found = [ids.shape[1] for ids in batches]
    assert {length: found.count(length) for length in found} == lengths
    third = len(found) // 3
    assert max(found[:third]) == max(found[third : 2 * third]) == max(found[2 * third :]) == longest
    assert sorted(ids.shape[1] for ids in windows.batches(1, "few", 3, longest)) == sorted(lengths)
    assert len({tuple(ids[0].tolist()) for ids in batches}) > len(batches) // 2


@pytest.mark.parametrize("lengths", [(6_000,), (40, 6_000), (6_000, 40), (3_000, 3_000), (*[9] * 20, *[2_000] * 3)])
def test_few_documents_are_cut_where_whole_ones_make_a_bad_share(lengths):
    documents = [Document("the cat " * (length // 2), "here") for length in lengths]
    for seed in range(4):
        settings, config = DesinkSettings(length=128, seed=seed), LlamaConfig(vocab_size=VOCAB)
        windows = Windows(tiny_tokenizer(), documents, settings, config, False)
        share = len(windows.held_out) / (len(windows.train) + len(windows.held_out))
        assert 0.04 < share < 0.2 and len(windows.held_out) > 2 * 128


def test_a_bar_changes_nothing_that_is_measured(plain, monkeypatch, capsys):
    model = gated_model(GatedLlamaForCausalLM)
    monkeypatch.setattr("gated_llama.sinks.windows.tqdm", partial(tqdm, mininterval=0))  # drawn at each forward
    settings = DesinkSettings(length=128)
    found = [windows_of(plain, settings, 256, progress).judge(model) for progress in (False, True)]
    assert found[0] == found[1] and "measuring" in capsys.readouterr().err


def test_the_command_refuses_in_a_sentence(plain, capsys):
    (plain / "short.txt").write_text("the cat. " * 20)
    for arguments, said in (
        ([str(plain / "short.txt"), "--length", "128"], "too few to fit on"),
        ([str(plain / "text.jsonl"), "--length", "129"], "twice as long as a row: give a --length of at most 128"),
        ([str(plain / "text.jsonl"), "--max-loss", "-1"], "must not be negative"),
        ([str(plain / "text.jsonl"), "--calm-only"], "leaves nothing to do: give calm_tokens"),
        ([str(plain / "text.jsonl"), "--sliding-window", "16"], "sliding_window must be at least 64, not 16"),
        ([str(plain / "text.jsonl"), "--length", "128", "--sliding-window", "65"], "--sliding-window of at most 64"),
        ([str(plain / "text.jsonl"), "--length", "128", "--device", "nowhere"], "put on the device 'nowhere'"),
        ([str(plain / "text.jsonl"), "--length", "100"], "length must be at least 128"),
        ([str(plain / "text.jsonl"), "--move-tokens", "100"], "at least two rows"),
        ([str(plain / "text.jsonl"), "--damping", "0"], "damping must be 1 or more, not 0.0"),
        ([str(plain / "text.jsonl"), "--seed", "-1"], "seed must be from 0 to 4,294,967,295, not -1"),
        ([str(plain / "text.jsonl"), "--calm-only", "--calm-tokens", "9", "--damping", "32"], "damping has no say"),
    ):
        assert main(["desink", str(plain / "plain"), str(plain / "no"), "--quiet", "--text", *arguments]) == 2
        assert said in capsys.readouterr().err
    (plain / "texts").mkdir()
    (plain / "texts" / "a.txt").write_text("the cat")
    half = published(plain / "half", gated_model(GatedLlamaForCausalLM, gate_strength=0.5), tokenizer=True)
    head = published(plain / "head", gated_model(GatedLlamaForSequenceClassification), tokenizer=True)
    slides = {"sliding_window": 70, "max_position_embeddings": 512}
    slides = published(plain / "slides", gated_model(GatedLlamaForCausalLM, **slides), tokenizer=True)
    text = ["--text", plain / "text.jsonl"]
    for arguments, said in (
        ([plain / "plain", plain / "texts", "--text", plain / "texts" / "a.txt", "--force"], "a.txt lies inside"),
        ([half, plain / "no", *text], "act at a part of their strength"),
        ([head, plain / "no", *text], "is no causal language model"),
        ([slides, plain / "no", *text, "--sliding-window", 71], "see the last 70 tokens: give a sliding_window"),
        ([slides, plain / "no", *text, "--sliding-window", 128, "--length", 128], "rows of 128 tokens never"),
    ):
        assert main(["desink", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["desink", str(plain / "plain"), str(plain / "no"), "--text", "a", "--max-loss", "5"])
    assert "5 would be 500%: write 5% or 0.05" in capsys.readouterr().err
    assert (plain / "texts" / "a.txt").exists()
    assert not (plain / "no").exists() and not (plain / "no.unfinished").exists()


def test_rows_are_as_long_as_suits_the_model():
    lengths = {longest: DesinkSettings().suited_to(longest).length for longest in (2_048, 8_192, 131_072)}
    assert lengths == {2_048: 1_024, 8_192: 4_096, 131_072: 4_096}
    budgets = [DesinkSettings(**given).suited_to(8_192) for given in ({}, {"calm_tokens": 9}, {"sliding_window": 64})]
    assert [settings.max_loss for settings in budgets] == [0.01, 0.05, 0.05]
    assert [settings.length for settings in budgets] == [4_096, 1_024, 256]
    assert DesinkSettings(length=256).suited_to(131_072).length == 256
    assert DesinkSettings(sliding_window=256).suited_to(131_072).length == 1_024


@pytest.mark.parametrize(
    ("has", "device", "multiplies"),
    [
        ({"avx512_bf16": True}, "cpu", True),
        ({"amx_bf16": True}, "cpu", True),
        ({"avx512_f": True}, "cpu", False),
        (None, "cpu", False),
        (None, "cuda", True),
        ({"avx512_bf16": True}, "mps", False),
    ],
)
def test_what_learns_multiplies_bf16_where_the_device_has_instructions_for_it(monkeypatch, has, device, multiplies):
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert multiplies_bf16(torch.device(device)) == multiplies
