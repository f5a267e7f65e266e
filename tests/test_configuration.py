# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""GatedLlamaConfig: what it refuses, derives and keeps."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from configuration_gated import AUTO_MAP, GatedLlamaConfig
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_config


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gate_type": "rowwise"}, "gate_type"),
        ({"gate_scale": "2"}, "gate_scale"),
        ({"gate_scale": 0.0}, "positive"),
        ({"gate_scale": -2.0}, "positive"),
        ({"gate_scale": math.nan}, "positive"),
        ({"gate_scale": math.inf, "gate_bias": True}, "positive"),
        ({"gate_bias": 1}, "gate_bias"),
        ({"gate_init": "ones"}, "gate_init"),
        ({"gate_strength": math.nan}, "gate_strength must be a finite number"),
        ({"gate_scale": 1.0}, "no gate reaches 1"),
        ({"gate_scale": 1.0, "gate_bias": True}, "no gate reaches 1"),
        ({"gate_scale": 3.0}, "which is 1.5 here"),
        ({"hidden_size": 37}, "give head_dim"),
        ({"num_attention_heads": 0, "head_dim": 8}, "at least 1"),
        ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "give sliding_window"),
    ],
)
def test_refuses_what_no_model_can_have(fields, reason):
    with pytest.raises((ValueError, StrictDataclassError), match=reason):
        gated_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate_scale": 2},
        {"gate_scale": 1.0, "gate_init": "normal"},
        {"gate_scale": 3.0, "gate_bias": True},
        {"hidden_size": 37, "head_dim": 8},
    ],
)
def test_accepts_what_a_model_can_have(fields):
    gated_config(**fields)


@pytest.mark.parametrize("scale", [1.001, 1.5, 2.0, 3.0, 100.0])
def test_open_gate_logit_makes_a_gate_of_one(scale):
    logit = gated_config(gate_scale=scale, gate_bias=True).open_gate_logit
    assert scale / (1 + math.exp(-logit)) == pytest.approx(1, rel=1e-12)


def test_derived_fields():
    config = gated_config(attention_bias=True)
    assert (config.head_dim, config.attention_out_bias) == (6, True)
    assert gated_config(attention_bias=True, attention_out_bias=False).attention_out_bias is False


def test_layer_types_are_written_where_they_say_more_than_the_window():
    full, sliding = ["full_attention"] * 3, ["sliding_attention"] * 3
    mixed = [*full[:1], *sliding[:2]]
    for fields, types in (({}, full), ({"sliding_window": 5}, sliding)):
        for given in ({}, {"layer_types": None}, {"layer_types": types}):  # a config.json of before wrote them out
            config = gated_config(**fields, **given)
            assert config.attention_types == types
            assert not hasattr(config, "layer_types") and "layer_types" not in config.to_dict()
            config.num_hidden_layers = 5
            assert GatedLlamaConfig.from_dict(config.to_dict()).attention_types == types[:1] * 5
    config = gated_config(sliding_window=5, layer_types=mixed)
    assert config.attention_types == config.layer_types == config.to_dict()["layer_types"] == mixed
    assert gated_config(sliding_window=5, layer_types=full).attention_types == full


def test_tensor_parallel_plan_names_the_norms_only_where_they_are():
    plain, normed = gated_config(), gated_config(use_qk_norm=True)
    for config in (plain, normed):
        assert config.base_model_tp_plan["layers.*.self_attn.attn_gate.proj"] == "colwise"
    assert not any("norm" in key for key in plain.base_model_tp_plan)
    assert normed.base_model_tp_plan["layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert "base_model_tp_plan" not in normed.to_dict()


def test_round_trip(tmp_path):
    config = gated_config(
        gate_type="elementwise", gate_scale=3.0, gate_bias=True, use_qk_norm=True, sliding_window=5, conversion={"a": 1}
    )
    config.save_pretrained(tmp_path)
    assert GatedLlamaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_auto_map_is_always_whole_and_local(tmp_path):
    gated_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    saved["auto_map"] = {"AutoConfig": "org/name--configuration_gated.GatedLlamaConfig"}  # as read from the Hub
    assert GatedLlamaConfig.from_dict(saved).auto_map == AUTO_MAP


def test_reads_configs_in_the_style_of_transformers_4():
    config = GatedLlamaConfig.from_dict(
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    )
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rope_parameters["rope_type"] == "linear"
    assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("field", "quantization"),
    [
        ("llm_int8_skip_modules", {"load_in_8bit": True}),
        ("modules_to_not_convert", {"quant_method": "quanto", "weights": "int8"}),
    ],
)
@pytest.mark.parametrize("as_object", [True, False])
def test_quantizers_are_told_to_leave_the_gates_alone(monkeypatch, field, quantization, as_object):
    gate, head = "model.layers.1.self_attn.attn_gate.proj", "lm_head"
    told = {}
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kw: told.update(kw)))
    for asked in (None, ["model.layers.0"]):
        given = {**quantization, field: asked}
        given = AutoQuantizationConfig.from_dict(given) if as_object else given
        GatedLlamaForCausalLM.from_pretrained("anywhere", quantization_config=given)
        patterns = getattr(told["quantization_config"], field)
        assert not should_convert_module(gate, patterns) and not should_convert_module(gate + ".weight", patterns)
        assert should_convert_module("model.layers.1.self_attn.q_proj", patterns)
        assert should_convert_module(head, patterns) == (asked is not None)  # who names modules has named them all
        assert (getattr(given, field) if as_object else given[field]) == asked  # the caller's own stays as it is
        GatedLlamaForCausalLM.from_pretrained("anywhere", quantization_config=told["quantization_config"])
        assert getattr(told["quantization_config"], field) == patterns
    # The controls: nothing named, and the gate named in the obvious way.
    assert should_convert_module(gate, []) and should_convert_module(gate, ["attn_gate"])
    told.clear()
    GatedLlamaForCausalLM.from_pretrained("anywhere")
    assert "quantization_config" not in told
    saved = {"quant_method": "bitsandbytes", field: ["lm_head"]}
    assert gated_config(quantization_config=saved).quantization_config == saved
