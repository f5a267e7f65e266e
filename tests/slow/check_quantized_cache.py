# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`make check-quantized-cache`: quantized key/value caches, with the backends that Transformers has (hqq, quanto)."""

import pytest
import torch
from test_modeling import as_gated

from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, left_padding, source_model, token_ids


pytestmark = pytest.mark.quantized_cache


BACKENDS = {"hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1}, "quanto": {"nbits": 4, "axis_key": 0, "axis_value": 0}}
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}


@pytest.mark.filterwarnings("ignore")  # of the backends
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_tokens_as_the_source_from_a_quantized_cache(backend):
    """Lossy, but losing the same: with open gates every token is the source's, and trained gates generate others."""
    source = source_model("llama", **SHAPE)
    ids = token_ids(2, 70)
    arguments = {
        "attention_mask": left_padding(ids),
        "max_new_tokens": 80,
        "do_sample": False,
        "cache_implementation": "quantized",
        "cache_config": {"backend": backend, "residual_length": 64, "q_group_size": 64, **BACKENDS[backend]},
    }
    trained = gated_model(GatedLlamaForCausalLM, **SHAPE)
    expected, actual, other = (model.generate(ids, **arguments) for model in (source, as_gated(source), trained))
    assert torch.equal(expected, actual)
    assert not torch.equal(expected, other)
