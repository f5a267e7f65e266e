# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The paint mixer: from a value to the output there are two linear maps, and two linear maps are one.

In the task a window is a paint and a question, and the answer is one of the paint's features: the question says which
is to be kept. All features share their answers, so that adding what the question says to what the paint holds cannot
separate them; the two must be multiplied. One layer without an MLP, one head, with and without gates, and with as many
parameters more that are linear. Writes a table for people, a figure to docs/ and one JSON line a run to
benchmarks/results/.

    python benchmarks/paint_mixer.py [--seeds 0 1 2] [--steps 3000]
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.models.llama.modeling_llama import LlamaAttention

from configuration_gated import GatedLlamaConfig
from measured import RESULTS, circumstances, keep_record, read_records
from modeling_gated import GatedLlamaForCausalLM
from training import train


RECORDS = RESULTS / "paint_mixer.jsonl"
FEATURES, VALUES = 4, 4
PAINTS = VALUES**FEATURES  # every combination is a paint, with a token of its own
BOS, QUESTION, ANSWER, PAINT = 0, 1, 1 + FEATURES, 1 + FEATURES + VALUES  # the first token of each kind
RATE, BATCH, WIDTH = 1e-2, 256, 32
SHAPE = {
    "vocab_size": PAINT + PAINTS,
    "hidden_size": WIDTH,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


def windows() -> torch.Tensor:
    """Every paint with every question: token ids (PAINTS · FEATURES, 4), beginning, paint, question, answer."""
    rows = []
    for number, features in enumerate(itertools.product(range(VALUES), repeat=FEATURES)):
        rows += [[BOS, PAINT + number, QUESTION + n, ANSWER + value] for n, value in enumerate(features)]
    return torch.tensor(rows)


class WithAddedPath(LlamaAttention):
    """Control: as many parameters as an elementwise gate, on the same input, added instead of multiplied: Y + X W."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.added = nn.Linear(config.hidden_size, self.o_proj.in_features, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output + self.o_proj(self.added(hidden_states)), weights


def make(kind: str) -> PreTrainedModel:
    """A model of one layer whose MLP adds exactly nothing, being zero at its end and not trained."""
    if kind in ("headwise", "elementwise"):
        config = GatedLlamaConfig(**SHAPE, gate_type=kind, gate_scale=1.0, gate_init="normal")
        model = GatedLlamaForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer = model.model.layers[0]
    if kind == "added path":
        layer.self_attn = WithAddedPath(model.config, 0)
        layer.self_attn.apply(model._init_weights)
    elif kind == "longer path":
        extra = nn.Linear(WIDTH, WIDTH, bias=False)
        model._init_weights(extra)
        layer.self_attn.o_proj = nn.Sequential(extra, layer.self_attn.o_proj)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    layer.mlp.requires_grad_(False)
    return model
