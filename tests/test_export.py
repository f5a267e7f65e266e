# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Out of gated: the same function in the format of others."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import modeling_gated
from gated_llama import UserError, VerificationError, convert_checkpoint, export_checkpoint
from tiny import VARIANTS, gated_model, published, source_model, token_ids


def weights(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path, variant, shards):
    source = published(tmp_path / "source", source_model(variant), dtype=torch.bfloat16, shards=shards, tokenizer=True)
    convert_checkpoint(source, tmp_path / "gated", gate_type="elementwise", progress=False)
    result = export_checkpoint(tmp_path / "gated", tmp_path / "base", progress=False)
    assert result.verification.exact
    assert weights(tmp_path / "base") == weights(source)  # the same bytes under the same names
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "base"))
    assert type(after) is type(before)
    with torch.no_grad():
        assert torch.equal(before(token_ids()).logits, after(token_ids()).logits)
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_heads_come_back(tmp_path, head):
    source = published(tmp_path / "source", source_model("qwen3", head, num_labels=5))
    convert_checkpoint(source, tmp_path / "gated", gate_scale=3.0, gate_bias=True, progress=False)
    export_checkpoint(tmp_path / "gated", tmp_path / "base", progress=False)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["architectures"] == [f"Qwen3{head}"]
    assert weights(tmp_path / "base") == weights(source)


def test_a_checkpoint_saved_again_goes_back_too(tmp_path):
    """save_pretrained puts the gates into one file with the rest."""
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "gated", progress=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "gated").save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "base", progress=False)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "base"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_moved_gates_are_refused_with_their_distance(tmp_path):
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "gated", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    model.model.layers[2].self_attn.attn_gate.proj.weight.data[3, 4] = -0.25
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.attn_gate\.proj\.weight is up to 0\.25 away"):
        export_checkpoint(tmp_path / "tuned", tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()


def test_what_has_no_base_is_refused(tmp_path):
    gated_model(modeling_gated.GatedLlamaForCausalLM, trained=False).save_pretrained(tmp_path / "fresh")
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "random", gate_scale=1.0, gate_init="normal", progress=False)
    for name, message in (("fresh", "names no family"), ("source", "no gated model"), ("random", "did not start open")):
        with pytest.raises(UserError, match=message):
            export_checkpoint(tmp_path / name, tmp_path / "base", progress=False)
    with pytest.raises(UserError, match="no export to 'onnx'"):
        export_checkpoint(tmp_path / "fresh", tmp_path / "base", to="onnx", progress=False)


def test_control_a_wrong_weight_fails_verification(tmp_path, monkeypatch):
    source = published(tmp_path / "source", source_model("llama"), shards=2)
    convert_checkpoint(source, tmp_path / "gated", progress=False)

    def copy_wrongly(read, write, on_bytes=None):
        content = bytearray(read.read_bytes())
        content[-100] ^= 0x40
        write.write_bytes(content)

    monkeypatch.setattr("gated_llama.checkpoint.copy_file", copy_wrongly)
    with pytest.raises(VerificationError):
        export_checkpoint(tmp_path / "gated", tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()
