# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-quantized`: bitsandbytes in 4 and 8 bits and torchao int8 load, generate, save and load again, gates whole,
asked for by a config or by a dict; what quantizing costs a gated model beside what it costs its base.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from engines import record
from gated_llama import convert_checkpoint
from gated_llama.gates import gate_parameters
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, published, source_model, token_ids


pytestmark = pytest.mark.quantized
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig


QUANTIZATIONS = {
    "bitsandbytes 4-bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@torch.no_grad()
def loss(model, ids: torch.Tensor) -> float:
    """Nats per token."""
    return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
def test_gates_stay_whole(tmp_path, name, gate_type):
    base = published(tmp_path / "base", source_model("llama", **SHAPE), dtype=torch.bfloat16)
    convert_checkpoint(base, tmp_path / "gated", gate_type=gate_type, progress=False, verify=False)
    plain = AutoModelForCausalLM.from_pretrained(base)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    # samples of the base, where it has something to lose
    ids = plain.generate(token_ids(4, 8), do_sample=True, max_new_tokens=56, eos_token_id=-1)
    torch.manual_seed(3)
    for _, parameter in gate_parameters(gated):
        parameter.data.normal_(0, 0.3)
    gated.save_pretrained(tmp_path / "trained")
    deltas = []
    for folder, whole in ((base, plain), (tmp_path / "trained", gated)):
        quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTIZATIONS[name]())
        # Before a forward, in which bitsandbytes 0.50 packs weights anew on CPUs with AVX512-BF16; unpacked again,
        # they are another model's, whatever the class.
        quantized.save_pretrained(tmp_path / f"{folder.name}-saved")
        weight = quantized.model.layers[0].self_attn.q_proj.weight
        assert type(weight) is not torch.nn.Parameter or weight.dtype != torch.bfloat16
        deltas.append(loss(quantized, ids) - loss(whole, ids))
    for (_, own), (key, kept) in zip(gate_parameters(gated), gate_parameters(quantized), strict=True):
        assert torch.equal(own, kept), key
    first = quantized.generate(ids[:, :8], do_sample=False, max_new_tokens=8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained-saved")
    assert torch.equal(first, again.generate(ids[:, :8], do_sample=False, max_new_tokens=8))
    print(f"\n{name}, {gate_type}: loss base {deltas[0]:+.4f}, gated {deltas[1]:+.4f}")
    assert abs(deltas[1]) < 10 * max(abs(deltas[0]), 0.01)  # quantized gates would be another model
    result = f"gates equal to the bit, saved and loaded alike; loss {deltas[1]:+.4f} (base: {deltas[0]:+.4f})"
    record(name, f"load, generate, save, load; {gate_type}", result, name.split()[0])


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_a_dict_is_as_good_as_a_config(tmp_path, name):
    model = gated_model(GatedLlamaForCausalLM, **SHAPE)
    model.save_pretrained(tmp_path)
    asked = ({name: True}, BitsAndBytesConfig(**{name: True}))
    by_dict, by_config = (AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how) for how in asked)
    assert by_dict.model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    for (_, own), (key, kept) in zip(gate_parameters(model), gate_parameters(by_dict), strict=True):
        assert torch.equal(own, kept), key
    assert torch.equal(by_dict(token_ids()).logits, by_config(token_ids()).logits)
