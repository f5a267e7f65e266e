# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Looking at gates, on small models with known answers."""

import math

import pytest
import torch

from gated_llama import UserError, gate_statistics, held_out_loss
from gated_llama.diagnose import token_kind
from modeling_gated import GatedLlamaForCausalLM
from tiny import VOCAB, gated_model, source_model, tiny_tokenizer, token_ids


def test_plain_models_have_no_gates_to_look_at():
    with pytest.raises(UserError, match="no gates to look at"):
        gate_statistics(source_model("llama"), tiny_tokenizer(), token_ids())


def test_held_out_loss_is_the_mean_over_tokens():
    model = gated_model(GatedLlamaForCausalLM)
    ids = token_ids(5, 9)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None]).mean().item()
    assert held_out_loss(model, ids, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert held_out_loss(model, ids) > 0.5 * math.log(VOCAB)


def test_gate_statistics_of_gates_with_a_known_value():
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True, trained=False)
    wanted = (1.0, 0.03, 1.9)
    for layer, value in zip(model.model.layers, wanted, strict=True):
        torch.nn.init.constant_(layer.self_attn.attn_gate.proj.bias, math.log(value / (2 - value)))
    blocks = token_ids(5, 9)
    report = gate_statistics(model, tiny_tokenizer(), blocks, batch_size=2)
    for statistics, value in zip(report.layers, wanted, strict=True):
        assert statistics.tokens == 45
        assert statistics.mean == pytest.approx(value, rel=1e-5)
        assert statistics.moved == pytest.approx(abs(value - 1), abs=1e-6)
        assert (statistics.nearly_shut, statistics.amplifying) == (value < 0.1, value > 1.5)
    assert report.kinds["first token"].tokens == 5
    assert sum(statistics.tokens for statistics in report.kinds.values()) == 45
    assert report.kinds["first token"].mean == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_gate_statistics_tell_tokens_apart():
    """The gate follows the hidden state: here it shuts on one token alone."""
    model = gated_model(GatedLlamaForCausalLM, trained=False)
    tokenizer = tiny_tokenizer()
    letters, comma = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (list("abcdefgh"), ","))
    ids = torch.tensor(letters)[torch.randint(8, (4, 12), generator=torch.Generator().manual_seed(0))]
    ids[:, 5] = comma
    gate = model.model.layers[0].self_attn.attn_gate
    states = model.model.layers[0].input_layernorm(model.get_input_embeddings()(torch.tensor([comma])))[0]
    gate.proj.weight.data = -states.expand_as(gate.proj.weight).clone()
    report = gate_statistics(model, tokenizer, ids)
    assert report.kinds["punctuation"].tokens == 4
    assert report.kinds["punctuation"].nearly_shut == pytest.approx(1 / 3)  # in one layer of three, every head
    assert report.kinds["other"].nearly_shut < 0.1
    assert report.kinds["number"].tokens == 0


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
