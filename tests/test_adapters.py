# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""PEFT on gated models: every default, every way to save and load, to the bit; and bases that are not theirs."""

import shutil
import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_llama import UserError, gated_lora_config, load_adapter
from gated_llama.loading import base_of, load
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, tiny_tokenizer, token_ids


IDS = token_ids(2, 11)


@pytest.fixture
def base(tmp_path):
    model = gated_model(GatedLlamaForCausalLM, use_qk_norm=True)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def moved(model, seed=0):
    """As training leaves it: LoRA's B starts at zero, where nothing that goes wrong is seen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    "settings", [{}, {"mlp": True}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "mlp", "dora", "rslora"]
)
def test_round_trips_are_equal_to_the_bit(tmp_path, base, settings):
    model = moved(peft.get_peft_model(loaded(base), gated_lora_config(r=4, **settings)))
    before, after = logits(loaded(base)), logits(model)
    assert not torch.allclose(before, after, atol=1e-2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("attn_gate.proj.modules_to_save" in name for name in trained) == 3
    assert not any("attn_gate" in name and "lora" in name for name in trained)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    ways = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter"),
        "AutoPeft": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        "Auto": lambda: loaded(tmp_path / "adapter"),
        "ours": lambda: load_adapter(loaded(base), tmp_path / "adapter"),
        "ours by name": lambda: load(tmp_path / "adapter")[0],
    }
    if settings.get("use_dora"):  # Transformers 5.23 drops DoRA's magnitudes there, for a plain Llama as well
        del ways["Auto"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tokenizer is with the base
        for name, way in ways.items():
            assert torch.equal(logits(way()), after), name
    assert base_of(tmp_path / "adapter") == str(base)
    gates = [gate.clone() for gate in model(IDS, output_gates=True).gates]
    merged = model.merge_and_unload()
    assert type(merged) is GatedLlamaForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    whole = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), after, rtol=0, atol=2e-4)  # weights summed before the product
    assert torch.equal(whole(IDS, output_gates=True).gates[0], gates[0])


def test_the_base_is_loaded_at_the_revision_that_the_adapter_names(tmp_path, base, monkeypatch):
    """From the Hub's cache, where `main` is another model and has no tokenizer."""
    cache = tmp_path / "hub" / "models--org--base"
    shutil.copytree(base, cache / "snapshots" / ("a" * 40))
    gated_model(GatedLlamaForCausalLM, use_qk_norm=True, seed=1).save_pretrained(cache / "snapshots" / ("b" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = loaded(base)
    model.name_or_path = "org/base"
    model = moved(peft.get_peft_model(model, gated_lora_config(r=2, revision="a" * 40)))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter")[0]), logits(model))


def test_several_adapters_are_switched(tmp_path, base):
    outputs = {}
    for number, name in enumerate(("one", "two")):
        model = moved(peft.get_peft_model(loaded(base), gated_lora_config(r=2)), seed=number)
        outputs[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = load_adapter(loaded(base), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval()), outputs[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(loaded(base)))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2),
        peft.LoraConfig(r=2, use_dora=True),
        peft.LoraConfig(r=2, use_rslora=True),
        peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["attn_gate"]),
        peft.IA3Config(),
        peft.AdaLoraConfig(total_step=10),
        peft.VeraConfig(r=2),
        peft.OFTConfig(r=3, oft_block_size=0),
        peft.PromptTuningConfig(num_virtual_tokens=3),
        peft.PrefixTuningConfig(num_virtual_tokens=3),
    ],
    ids=lambda config: f"{config.peft_type.value}-{getattr(config, 'target_modules', None)}",
)
def test_every_method_trains_with_its_default_targets(tmp_path, base, config):
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(loaded(base), config)
    assert any(parameter.requires_grad for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad), config.peft_type
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter").eval()), logits(model))


def test_targets_are_those_of_llama():
    from peft.utils import constants

    tables = [table for table in vars(constants).values() if isinstance(table, dict) and "llama" in table]
    assert len(tables) > 5
    assert all(table["gated_llama"] == table["llama"] for table in tables)


def test_other_bases_are_refused(tmp_path, base):
    model = moved(peft.get_peft_model(loaded(base), gated_lora_config(r=2)))
    model.save_pretrained(tmp_path / "adapter")
    # The control: PEFT itself takes a plain model, and leaves the gates out without a word.
    peft.PeftModel.from_pretrained(source_model("qwen3", head_dim=6), tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"trained with gates on {base}, but Qwen3ForCausalLM has no .*attn_gate"):
        load_adapter(source_model("qwen3", head_dim=6), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"gates of shape \[6, 36\] where .* has \[36, 36\]"):
        load_adapter(gated_model(GatedLlamaForCausalLM, gate_type="elementwise"), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has no .*layers\.2.*attn_gate"):
        load_adapter(gated_model(GatedLlamaForCausalLM, num_hidden_layers=2), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit GatedLlamaForCausalLM: Error\(s\) in loading"):
        load_adapter(gated_model(GatedLlamaForCausalLM, head_dim=8), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(loaded(base), tmp_path / "base")


def test_sequence_classification_trains_its_head_too(tmp_path):
    from modeling_gated import GatedLlamaForSequenceClassification

    model = gated_model(GatedLlamaForSequenceClassification, num_labels=3)
    model = peft.get_peft_model(model, gated_lora_config(r=2, task_type="SEQ_CLS"))
    trained = " ".join(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert "score" in trained and "attn_gate" in trained and "q_proj.lora_A" in trained


def test_the_strength_of_an_adapters_gates(base):
    model = moved(peft.get_peft_model(loaded(base), peft.LoraConfig(r=2, modules_to_save=["attn_gate"])))
    trained = logits(model)
    model.set_gate_strength(0.0)
    assert all((gate == 1).all() for gate in model(IDS, output_gates=True).gates)
    model.set_gate_strength(1.0)
    assert torch.equal(logits(model), trained)
