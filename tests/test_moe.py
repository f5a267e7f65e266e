# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Mixtures of experts: what they have beyond dense models. That they compute what the real classes do, convert and come
back is tested beside the dense families, in test_modeling.py, test_convert.py, test_export.py and test_auto_classes.py.
"""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from test_modeling import as_gated
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

from configuration_gated_moe import GatedMoeConfig
from gated_llama import (
    DesinkSettings,
    FinetuneSettings,
    UserError,
    convert_checkpoint,
    desink_checkpoint,
    export_checkpoint,
    finetune_checkpoint,
    gated_lora_config,
    measure,
    move_sinks,
)
from gated_llama.checkpoints.measurements import summary_rows
from modeling_gated_moe import GatedMoeForCausalLM, GatedMoeModel
from tiny import SHAPE, VOCAB, gated_model, left_padding, published, source_model, tiny_tokenizer, token_ids


FAMILIES = ("mixtral", "qwen3-moe-mixed")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_as_in_tree_however_they_are_implemented(family, dtype, implementation):
    source = source_model(family).to(dtype)
    gated = as_gated(source)
    for model in (source, gated):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
    with torch.no_grad():
        assert torch.equal(source(token_ids()).logits, gated(token_ids()).logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_and_losses_are_the_real_ones(family, padded):
    source = source_model(family)
    gated = as_gated(source)
    ids = token_ids()
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": left_padding(ids) if padded else None}
    expected, actual = (model(**inputs, output_router_logits=True) for model in (source, gated))
    assert torch.equal(expected.loss, actual.loss) and torch.equal(expected.aux_loss, actual.aux_loss)
    assert len(actual.router_logits) == (2 if family == "qwen3-moe-mixed" else 3)
    assert all(map(torch.equal, expected.router_logits, actual.router_logits))
    plain = gated(**inputs)
    assert plain.aux_loss is None and plain.router_logits is None
    coefficient = gated.config.router_aux_loss_coef
    torch.testing.assert_close(actual.loss - plain.loss, coefficient * actual.aux_loss)
    gated.config.output_router_logits = True  # asked for by the config
    assert torch.equal(gated(**inputs).aux_loss, actual.aux_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_between_which_a_router_cannot_choose(family):
    source = source_model(family)
    for name, parameter in source.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data[1:] = parameter.data[:1]  # the same logit for each
    with torch.no_grad():
        assert torch.equal(source(token_ids()).logits, as_gated(source)(token_ids()).logits)


def test_gradients_and_jitter_are_the_real_ones():
    source = source_model("mixtral", router_jitter_noise=0.1)
    gated = as_gated(source)
    for model in (source, gated):
        torch.manual_seed(0)
        model.train()
        model(token_ids(), labels=token_ids(), output_router_logits=True).loss.backward()
    own = dict(gated.named_parameters())
    assert all(torch.equal(parameter.grad, own[name].grad) for name, parameter in source.named_parameters())
    gates = [parameter.grad for name, parameter in own.items() if "attn_gate" in name]
    assert len(gates) == 3 and all(gate.abs().max() > 0 for gate in gates)
    torch.manual_seed(1)  # the control: noise is at work
    again = gated(token_ids(), labels=token_ids()).loss
    assert not torch.equal(again, gated.eval()(token_ids(), labels=token_ids()).loss)


NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.4.w2.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.4.down_proj.weight",
}


@pytest.mark.parametrize("moe_type", NAMES)
def test_a_model_is_saved_by_the_names_of_its_family_and_loaded(tmp_path, moe_type):
    model = gated_model(GatedMoeForCausalLM, moe_type=moe_type)
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once").eval()
    again.save_pretrained(tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert NAMES[moe_type] in first
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_plans_reach_attention_gates_and_experts():
    model = gated_model(GatedMoeModel, use_qk_norm=True, mlp_only_layers=[0])
    plan = model.config.base_model_tp_plan
    assert plan["layers.*.self_attn.attn_gate.proj"] == "colwise"
    assert plan["layers.*.mlp.experts.gate_up_proj"] == "packed_colwise"
    assert "layers.*.mlp.experts" in model.config.base_model_ep_plan
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    for pattern in {**plan, **model.config.base_model_ep_plan}:
        assert any(pattern == name.replace(f"layers.{n}.", "layers.*.") for name in names for n in range(3)), pattern


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 9, "num_local_experts": 8}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_type": "bogus"}, "moe_type"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_what_no_model_can_be_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        GatedMoeConfig(**{**SHAPE, **fields})


# --- what is done to them ----------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def converted(request, tmp_path):
    source = published(tmp_path / "source", source_model(request.param), tokenizer=True)
    convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    return tmp_path / "gated"


@pytest.mark.parametrize("train", ["gates", "lora", "full"])
def test_fine_tuning(converted, tmp_path, train):
    (tmp_path / "text.txt").write_text("the grumpy cat sat on the mat, which was red. " * 200)
    rate = {} if train == "gates" else {"lr": 1e-2}
    settings = FinetuneSettings(train=train, steps=4, length=32, batch_size=2, held_out=0.2, **rate)
    result = finetune_checkpoint(converted, [tmp_path / "text.txt"], tmp_path / "tuned", settings, progress=False)
    assert result.held_out_after < result.held_out_before
    if train == "gates":  # experts keep their names and bytes
        before, after = (load_file(f / "model-00001-of-00001.safetensors") for f in (converted, tmp_path / "tuned"))
        assert all(torch.equal(before[key], after[key]) for key in before)
    if train == "full":
        names = load_file(tmp_path / "tuned" / "model.safetensors").keys()
        assert any("experts.0." in name for name in names) and not any("gate_up_proj" in name for name in names)


def test_lora_is_put_on_attention_and_not_on_experts(converted, tmp_path):
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(converted), gated_lora_config(2))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert any("attn_gate" in name for name in trained) and any("q_proj.lora_A" in name for name in trained)
    assert not any(".mlp." in name for name in trained)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="experts, which LoRA is not put on"):
        finetune_checkpoint(
            converted, [tmp_path / "text.txt"], tmp_path / "x", FinetuneSettings(train="lora", lora_mlp=True)
        )


def test_measured_but_for_what_experts_hide(converted):
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    windows = token_ids(4, 64)
    found = measure(model, tiny_tokenizer(), windows, progress=False)
    rows = {name for name, _, _ in summary_rows([json.loads(found.to_json())])}
    dense_layer = model.config.mlp_only_layers == [1]
    kurtosis = found.activations.input_kurtosis["down_proj"]
    assert [value is None for value in kurtosis] == ([True, False, True] if dense_layer else [True] * 3)
    assert ("Kurtosis into down_proj, largest" in rows) == dense_layer
    assert found.quantization == {} and found.attention.first_token > 0


def test_the_card_says_how_it_is_loaded(converted):
    card = (converted / "README.md").read_text()
    assert "import modeling_gated_moe  # registers" in card and "runs the four Python files" in card


def test_sinks_are_left_where_they_are(converted, tmp_path):
    with pytest.raises(UserError, match="mixture of experts"):
        desink_checkpoint(converted, ["text"], tmp_path / "out", DesinkSettings())
    with pytest.raises(UserError, match="mixtures of experts"):
        move_sinks(AutoModelForCausalLM.from_pretrained(converted), token_ids(4, 64))


@pytest.mark.parametrize("to", ["qwen3_5", "official", "gguf"])
def test_dense_formats_refuse_and_name_the_base(converted, tmp_path, to):
    with pytest.raises(UserError, match=r"dense causal language model.*base can"):
        export_checkpoint(converted, tmp_path / "out", to=to, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_collator_and_generation_know_it(converted):
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    batch = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)([{"input_ids": [3, 4, 5]}] * 2)
    assert model(**batch).loss.isfinite()
    out = model.generate(token_ids(), attention_mask=left_padding(token_ids()), max_new_tokens=5, do_sample=False)
    assert out.shape == (3, 22) and out.max() < VOCAB
    assert sum(isinstance(module, nn.Linear) for module in model.model.layers[0].mlp.modules()) == 0
