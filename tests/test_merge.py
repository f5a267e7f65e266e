# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Merging an adapter into its base: a whole checkpoint that computes the same, or a refusal and nothing written."""

import json

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from gated_llama import UserError, convert_checkpoint, finetune_checkpoint, gated_lora_config, merge_adapter
from gated_llama.conversion.export import export_checkpoint
from gated_llama.publish import check_loads
from gated_llama.serve import serve
from modeling_gated import GatedLlamaForCausalLM
from tiny import published, source_model, token_ids


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request, tmp_path):
    source = published(tmp_path / "source", source_model("qwen3"), tokenizer=True, dtype=request.param)
    (source / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    (source / "LICENSE").write_text("theirs")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.9}')  # which 5.16 refuses to save
    convert_checkpoint(source, tmp_path / "base", source_id="org/source", progress=False, verify=False)
    return tmp_path / "base"


@torch.no_grad()
def adapter_of(base, folder, config=None):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or gated_lora_config(r=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits.float()


def test_what_is_merged_computes_what_the_adapter_does(base, tmp_path):
    tuned = adapter_of(base, tmp_path / "adapter")
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert json.loads(result.to_json())["base"] == "base"
    settings = [tmp_path / name / "generation_config.json" for name in ("source", "merged")]
    assert settings[0].read_text() == settings[1].read_text()
    plain, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    assert type(merged) is GatedLlamaForCausalLM and {p.dtype for p in merged.parameters()} == {plain.dtype}
    wanted = logits(tuned)
    error, moved = (logits(merged) - wanted).abs().max(), (logits(plain) - wanted).abs().max()
    assert error < (1e-3 if plain.dtype is torch.float32 else 0.1) * moved
    assert merged.config.conversion == plain.config.conversion
    if plain.dtype is torch.float32:  # of which the names and shapes do not depend
        check_loads(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat").input_ids
    assert (tmp_path / "merged" / "LICENSE").read_text() == "theirs"
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == "base" and card.data.license == "llama3.2"
    assert "The adapter `adapter`, merged into base, a model with gated attention" in card.text
    assert "added to org/source by" in card.text
    with pytest.raises(UserError, match="merged is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False, force=True)


@pytest.mark.parametrize("base", [torch.float32], indirect=True)
def test_what_cannot_be_merged_is_refused(base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="base is a whole model: there is nothing to merge"):
        merge_adapter(base, out)
    with pytest.raises(UserError, match="nowhere is no adapter's folder"):
        merge_adapter(tmp_path / "nowhere", out)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapter_of(base, tmp_path / "prompt", config)
    with pytest.raises(UserError, match="prompt cannot be merged into its base"):
        merge_adapter(tmp_path / "prompt", out, progress=False)
    adapter_of(base, tmp_path / "adapter")
    with pytest.raises(UserError, match="lies inside"):
        merge_adapter(tmp_path / "adapter", tmp_path / "adapter" / "merged")
    own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    own["base_model_name_or_path"] = str(tmp_path / "source")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="no gated model"):
        merge_adapter(tmp_path / "adapter", out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_where_a_whole_model_is_needed_an_adapter_is_told_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    out = tmp_path / "out"
    for refused in (
        lambda: convert_checkpoint(tmp_path, out),
        lambda: export_checkpoint(tmp_path, out, to="base"),
        lambda: finetune_checkpoint(tmp_path, ["train.jsonl"], out),
        lambda: serve(str(tmp_path)),
    ):
        with pytest.raises(UserError, match=rf"is an adapter: .*`gated-llama merge {tmp_path} OUT`"):
            refused()
    assert not out.exists()
    published(tmp_path / "whole", source_model("llama"))
    (tmp_path / "whole" / "adapter_config.json").write_text("{}")
    convert_checkpoint(tmp_path / "whole", out, progress=False, verify=False)
