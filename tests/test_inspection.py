# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Models built so that the answer is known are measured right; and so are those without what is looked for."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from gated_llama import UserError, measure
from gated_llama.inspection import SENTENCE, collectors
from gated_llama.inspection.collectors import FIRST_QUERIES, token_kind
from gated_llama.inspection.text import look_at_sentence
from modeling_gated import GatedLlamaForCausalLM
from tiny import VOCAB, gated_model, source_model, tiny_tokenizer, token_ids


WINDOWS = token_ids(4, 90)
BOS = 1


def measured(model, windows=WINDOWS, **settings):
    return measure(model, tiny_tokenizer(), windows, **settings)


@torch.no_grad()
def sink_model(logits):
    """A Llama without positions, whose head n of every layer gives the token BOS the logit `logits[n]`, others 0."""
    model = source_model("llama", num_key_value_heads=6)
    model.model.rotary_emb.inv_freq.zero_()
    embeddings = model.get_input_embeddings().weight
    embeddings.zero_()[:, 1] = 1.0
    embeddings[BOS] = 0.0
    embeddings[BOS, 0] = 1.0
    for layer in model.model.layers:
        layer.input_layernorm.weight.fill_(1.0)  # (1, 0, …) becomes (6, 0, …)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.zero_()
        for head, logit in enumerate(logits):
            layer.self_attn.q_proj.weight[6 * head, :2] = 1 / 6
            layer.self_attn.k_proj.weight[6 * head, 0] = logit / 6 / layer.self_attn.scaling
    return model


def windows_from_bos():
    windows = token_ids(2, 90)
    windows[:, 0] = BOS
    return windows


def test_attention_of_a_known_size_to_the_first_token():
    logits = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0]
    report = measured(sink_model(logits), windows_from_bos()).attention
    queries = torch.arange(90.0)
    share = torch.stack([math.exp(logit) / (math.exp(logit) + queries) for logit in logits])  # (heads, queries)
    torch.testing.assert_close(torch.tensor(report.heads), share.mean(1).expand(3, 6), rtol=1e-4, atol=1e-6)
    assert report.first_token == pytest.approx(share.mean().item(), rel=1e-4)
    assert report.first_token_later == pytest.approx(share[:, FIRST_QUERIES:].mean().item(), rel=1e-4)
    for length in (64, 90):
        sinks = (share[:, :length].mean(1) > 0.3).float()
        assert 0 < sinks.mean() < 1  # some heads are, some are not
        assert report.sink_rate[length] == pytest.approx(sinks.mean().item())
    assert report.sink_heads == [sinks.tolist()] * 3
    assert report.sink_positions[0] == (0, pytest.approx(sinks.mean().item()))
    assert len(report.sink_positions) == 1
    assert report.sink_tokens == [("<s>", 2, pytest.approx(sinks.mean().item()))]


def test_control_attention_without_a_sink():
    report = measured(sink_model([0.0] * 6), windows_from_bos()).attention
    assert report.sink_rate == {64: 0.0, 90: 0.0} and report.sink_positions == []
    assert report.first_token == pytest.approx((1 / torch.arange(1.0, 91)).mean().item(), rel=1e-4)


def test_a_sink_in_another_place():
    windows = token_ids(2, 90)
    windows[:, 5] = BOS
    report = measured(sink_model([9.0] * 6), windows).attention
    assert report.sink_rate[90] == 0.0
    assert report.sink_positions == [(5, 1.0)]


@pytest.mark.parametrize("variant", ["gated", "qwen3", "mistral"])
def test_attention_and_loss_are_those_of_the_eager_maps(variant):
    model = gated_model(GatedLlamaForCausalLM) if variant == "gated" else source_model(variant)
    report = measured(model, batch_size=3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(WINDOWS, output_attentions=True, labels=WINDOWS)
    maps = torch.stack(outputs.attentions)  # (L, B, N, T, T)
    torch.testing.assert_close(torch.tensor(report.attention.heads), maps[..., 0].mean((1, 3)), rtol=1e-4, atol=1e-6)
    for length in (64, 90):
        sinks = (maps[:, :, :, :length, 0].mean(3) > 0.3).float()
        assert report.attention.sink_rate[length] == pytest.approx(sinks.mean().item())
    assert report.loss == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(outputs.loss.item()), rel=1e-4)
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), WINDOWS[:, 1:], reduction="none")
    assert report.loss_by_position[0] == (1, pytest.approx(losses[:, :16].mean().item(), rel=1e-5))
    assert report.loss_by_position[-1] == (65, pytest.approx(losses[:, 64:].mean().item(), rel=1e-5))


@torch.no_grad()
def planted(value):
    model = source_model("llama")
    embeddings = model.get_input_embeddings().weight
    embeddings.copy_(torch.where(embeddings < 0, -1.0, 1.0))
    embeddings[BOS, 7] = value
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


def test_a_planted_activation_is_found_in_every_layer():
    report = measured(planted(-5000.0), windows_from_bos()).activations
    assert report.top3 == [[5000.0, 1.0, 1.0]] * 3 and report.median == [1.0] * 3
    assert (report.above_100, report.massive, report.m_act) == (1.0, 1.0, 5000.0)


def test_control_without_massive_activations():
    report = measured(planted(1.0), windows_from_bos()).activations
    assert (report.above_100, report.massive, report.m_act) == (0.0, 0.0, 1.0)
    report = measured(planted(500.0), windows_from_bos()).activations
    assert (report.above_100, report.massive) == (1.0, 0.0)  # large, but not a thousand medians


def test_inputs_of_linears_are_those_that_pass():
    model = gated_model(GatedLlamaForCausalLM)
    seen = {}
    for name in ("o_proj", "down_proj"):
        parent = model.model.layers[1].self_attn if name == "o_proj" else model.model.layers[1].mlp
        getattr(parent, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0].double())
        )
    with torch.no_grad():
        model(WINDOWS)
    inputs = {name: values[0] for name, values in seen.items()}
    report = measured(model).activations
    for name, x in inputs.items():
        centred = x - x.mean()
        assert report.input_max[name][1] == pytest.approx(x.abs().max().item(), rel=1e-5)
        assert report.input_size[name][1] == pytest.approx(x.abs().mean().item(), rel=1e-5)
        kurtosis = centred.pow(4).mean() / centred.pow(2).mean() ** 2
        assert report.input_kurtosis[name][1] == pytest.approx(kurtosis.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_in_the_stream_are_those_that_pass(dtype):
    model, windows, seen = source_model("llama").to(dtype), token_ids(3, 61), []
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.abs().float()))
    report = measured(model, windows, batch_size=3).activations
    sizes = seen[0].flatten(1).double()  # (B, T·E), an even number: torch takes the lower of two in the middle
    assert report.median[1] == sizes.median(1).values.mean().item()
    assert report.top3[1] == sizes.topk(3).values.mean(0).tolist()


def with_gates(*values):
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True, trained=False)
    for layer, value in zip(model.model.layers, values, strict=True):
        nn.init.constant_(layer.self_attn.attn_gate.proj.bias, math.log(value / (2 - value)))
    return model


def test_gates_with_a_known_value():
    wanted = (1.0, 0.03, 1.9)
    result = measured(with_gates(*wanted), batch_size=2)
    for layer, (statistics, value) in enumerate(zip(result.gates.layers, wanted, strict=True)):
        assert statistics.tokens == 360
        assert statistics.mean == pytest.approx(value, rel=1e-5)
        assert statistics.moved == pytest.approx(abs(value - 1), abs=1e-6)
        assert (statistics.nearly_shut, statistics.amplifying) == (value < 0.1, value > 1.5)
        assert result.gates.heads[layer] == [pytest.approx(value, rel=1e-5)] * 6
        assert sum(result.gates.histogram[layer]) == 360 * 6 == max(result.gates.histogram[layer])
        before, after = result.attention.output_size[layer], result.activations.input_size["o_proj"][layer]
        assert after == pytest.approx(before * value, rel=1e-4)
    assert result.gates.kinds["first token"].tokens == 4
    assert sum(statistics.tokens for statistics in result.gates.kinds.values()) == 360
    assert result.gates.kinds["first token"].mean == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert result.gates.always_open == [(0, head) for head in range(6)]
    assert result.gates.always_shut == [(1, head) for head in range(6)]


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
def test_gates_that_are_summed_up_in_parts(monkeypatch, gate_type):
    monkeypatch.setattr(collectors, "TOKENS_AT_ONCE", 7)
    unit = 2**-23  # of fp32, in which seven tokens are added up; counts are exact
    model = gated_model(GatedLlamaForCausalLM, gate_type=gate_type)
    with torch.no_grad():
        layers = [gate.reshape(360, 6, -1) for gate in model(WINDOWS, output_gates=True).gates]  # (B·T, N, G)
    report = measured(model, batch_size=3).gates
    for layer, gate in enumerate(layers):
        statistics = report.layers[layer]
        assert statistics.nearly_shut == (gate < 0.1).double().mean().item()
        assert statistics.amplifying == (gate > 1.5).double().mean().item()
        wanted = [values.double().mean().item() for values in (gate, (gate - 1).abs())]
        assert [statistics.mean, statistics.moved] == pytest.approx(wanted, rel=unit)
        assert report.heads[layer] == pytest.approx(gate.double().mean((0, 2)).tolist(), rel=unit)
        assert report.histogram[layer] == gate.histc(40, 0, 2).tolist()
    first = torch.stack([gate.unflatten(0, WINDOWS.shape)[:, 0] for gate in layers])
    assert report.kinds["first token"].mean == pytest.approx(first.double().mean().item(), rel=unit)


def test_what_the_gates_are_worth():
    model = with_gates(1.0, 0.03, 1.9)
    result = measured(model, compared_windows=2)
    assert model.config.gate_strength == 1
    trained, opened, inverted = (result.without_gates[name] for name in ("trained", "open", "inverted"))
    for (loss, _), other in ((trained, model), (opened, with_gates(1, 1, 1)), (inverted, with_gates(1, 1.97, 0.1))):
        assert loss == pytest.approx(other(WINDOWS[:2], labels=WINDOWS[:2]).loss.item(), rel=1e-5)
    assert trained[1] == 0 and opened[1] > 0.01 and inverted[1] > 0.01
    control = measured(with_gates(1, 1, 1)).without_gates  # open gates are worth nothing
    assert {state: divergence for state, (_, divergence) in control.items()} == dict.fromkeys(control, 0.0)
    assert len({loss for loss, _ in control.values()}) == 1


def test_gates_tell_tokens_apart():
    """The gate follows the hidden state: here it shuts on one token alone."""
    model = gated_model(GatedLlamaForCausalLM, trained=False)
    tokenizer = tiny_tokenizer()
    letters, comma = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (list("abcdefgh"), ","))
    ids = torch.tensor(letters)[torch.randint(8, (4, 12), generator=torch.Generator().manual_seed(0))]
    ids[:, 5] = comma
    gate = model.model.layers[0].self_attn.attn_gate
    states = model.model.layers[0].input_layernorm(model.get_input_embeddings()(torch.tensor([comma])))[0]
    gate.proj.weight.data = -states.expand_as(gate.proj.weight).clone()
    kinds = measured(model, ids).gates.kinds
    assert kinds["punctuation"].tokens == 4
    assert kinds["punctuation"].nearly_shut == pytest.approx(1 / 3)  # in one layer of three, every head
    assert kinds["other"].nearly_shut < 0.1
    assert kinds["number"].tokens == 0


def test_plain_models_are_measured_without_gates():
    result = measured(source_model("qwen2"))
    assert not result.gated and result.gates is None and result.without_gates is None
    assert json.loads(result.to_json())["attention"]["sink_rate"].keys() == {"64", "90"}


def test_measuring_leaves_the_model_as_it_was():
    model = gated_model(GatedLlamaForCausalLM)
    before = model(WINDOWS).logits
    measured(model)
    assert torch.equal(model(WINDOWS).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError


def test_what_cannot_be_measured_is_refused(monkeypatch):
    model = source_model("llama")
    with pytest.raises(UserError, match="windows of 1 tokens are too short"):
        measured(model, WINDOWS[:, :1])
    with pytest.raises(UserError, match=rf"token {VOCAB}, and the model has {VOCAB}: it is another model's"):
        measured(model, WINDOWS + VOCAB - WINDOWS.max())
    tiny = {"vocab_size": VOCAB, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    for other in (GPT2LMHeadModel(GPT2Config(**tiny)), PhiForCausalLM(PhiConfig(**tiny, intermediate_size=8))):
        with pytest.raises(UserError, match=r"are not built as Llama's"):
            measured(other)
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", out_of_memory)
        with pytest.raises(UserError, match="out of memory with 1 windows of 90 tokens at once"):
            measured(model)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="loss of LlamaForCausalLM on this text is no number"):
        measured(model)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" ", "whitespace"),
        ("\n\n", "whitespace"),
        (" ,", "punctuation"),
        ("__(", "punctuation"),
        (" 12.5", "number"),
        (" The", "function word"),
        ("cat", "other"),
        ("über", "other"),
        ("x1", "other"),
    ],
)
def test_token_kinds(text, kind):
    assert token_kind(text) == kind


@torch.no_grad()
def test_massive_tokens_are_found_wherever_they_stand():
    """One is written by the MLP of layer 1 and taken away by that of layer 2; one is massive from its embedding on."""
    model = source_model("llama", tie_word_embeddings=False)
    common = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    special, loud = 40, 50
    table = model.model.embed_tokens.weight
    table[loud] *= 200 * table.norm(dim=1).median() / table[loud].norm()
    ids = token_ids(4, 70)
    ids[(ids == special) | (ids == loud)] = 60
    ids[:, 5] = special
    ids[:2, 0] = loud
    add = {1: 500.0, 2: -500.0}

    def write(size):
        def hook(module, inputs, output):
            if output.shape[:2] == ids.shape:  # the text itself, not what is looked at besides
                output = output + size * (ids[:, :, None] == special) * common / common.norm()
            return output

        return hook

    hooks = [model.model.layers[layer].mlp.register_forward_hook(write(size)) for layer, size in add.items()]
    found = {(token.text, token.first): token for token in measured(model, ids, batch_size=4).massive}
    for hook in hooks:
        hook.remove()
    decode = tiny_tokenizer().decode
    assert set(found) == {(decode([special]), False), ("", True)}
    written, whole = found[decode([special]), False], found["", True]
    assert (written.written_by, written.removed_by) == ("the MLP of layer 1", "the MLP of layer 2")
    assert (written.seen, written.positions) == (4, (5, 5)) and written.ratios[1] > 8 > max(written.ratios[::2])
    assert (whole.written_by, whole.removed_by) == ("the attention of layer 0", None) and whole.seen == 2
    assert measured(source_model("llama"), token_ids(2, 70)).massive == []


def test_a_tokenizer_without_the_word_that_is_looked_at_shows_the_last_one():
    model = gated_model(GatedLlamaForCausalLM)
    found = look_at_sentence(model, tiny_tokenizer(), SENTENCE, None)
    assert "which".startswith(found.tokens[found.query].strip())

    class Unknowing:
        bos_token_id = None

        def __call__(self, text, **keywords):
            return SimpleNamespace(input_ids=[5, 6, 7])

        def decode(self, ids):
            return "?"

    assert look_at_sentence(model, Unknowing(), SENTENCE, None).query == 2
    with pytest.raises(UserError, match="has no token that begins 'which'"):
        look_at_sentence(model, Unknowing(), SENTENCE, "which")
