# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-gpu`: on an NVIDIA card, open gates change no bit of any attention implementation at hand (flash attention
where its package is installed), and the compiled model agrees with the eager one.
"""

import pytest
import torch
from test_modeling import as_gated, logits_of, move_gates
from transformers.utils import is_flash_attn_2_available

from tiny import source_model, token_ids


pytestmark = pytest.mark.gpu


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@pytest.fixture(autouse=True)
def on_cuda():
    """Fails without a card."""
    if not torch.cuda.is_available():
        pytest.fail("make check-gpu needs a CUDA device")
    # Not set_default_device: the factory of models and inputs draws them with generators of the CPU.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2-sliding", "qwen3"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_open_gates_change_no_bit(implementation, variant, gate_type):
    source = source_model(variant, **SHAPE).to("cuda", torch.bfloat16)
    gated = as_gated(source, gate_type=gate_type).to("cuda")
    for model in (source, gated):
        model.set_attn_implementation(implementation)
    expected = logits_of(source)
    assert all(map(torch.equal, expected, logits_of(gated)))
    move_gates(gated)
    assert not any(map(torch.equal, expected, logits_of(gated)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
def test_compiled_agrees(gate_type):
    gated = as_gated(source_model("llama", **SHAPE), gate_type=gate_type).to("cuda")
    move_gates(gated, to=0.01)
    with torch.no_grad():
        compiled = torch.compile(gated, fullgraph=True)(token_ids().cuda(), output_gates=True)
        torch.testing.assert_close(compiled.logits, gated(token_ids().cuda()).logits, rtol=1e-3, atol=1e-3)
