# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The spotlight that cannot be switched off: softmax makes a head that has nothing to look at look somewhere all the same.

In the task, bigram text in which a trigger token is followed by what stood before it, attention is needed at triggers
and nowhere else. One layer with one head learns it without a gate, with a gate, and without one that is then converted
and plainly fine-tuned; what is measured is where the queries of the other tokens look, and what the gates let through.
Writes a table for people, a figure to docs/ and one JSON line a seed to benchmarks/results/.

    python benchmarks/spotlight.py [--seeds 0 1 2] [--steps 9000] [--finetune-steps 500]
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from configuration_gated import GatedLlamaConfig
from gated_llama import convert_checkpoint
from measured import RESULTS, circumstances, keep_record, read_records
from modeling_gated import GatedLlamaForCausalLM
from training import train


RECORDS = RESULTS / "spotlight.jsonl"
BOS, TRIGGERS, VOCAB, LENGTH = 0, (1, 2, 3), 64, 64
TRIGGER_SHARE = 0.1  # how often a trigger follows a token that is not one
RATE, BATCH, POOL = 3e-3, 64, 2**16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Language:
    """What follows what: `follow[a, b]` is the probability of b after a, which is no trigger. (VOCAB, VOCAB)"""

    follow: torch.Tensor

    @classmethod
    def made(cls, seed: int) -> "Language":
        generator = torch.Generator().manual_seed(seed)
        follow = torch.zeros(VOCAB, VOCAB)
        words = torch.arange(len(TRIGGERS) + 1, VOCAB)
        follow[:, words] = (1.5 * torch.randn(VOCAB, len(words), generator=generator)).softmax(-1)
        follow[1:] *= 1 - TRIGGER_SHARE  # a window does not begin with a trigger: there is nothing to copy
        follow[1:, TRIGGERS] = TRIGGER_SHARE / len(TRIGGERS)
        return cls(follow)

    def windows(self, count: int, seed: int) -> torch.Tensor:
        """Token ids (count, LENGTH), each window from BOS on."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.full((count, LENGTH), BOS)
        for place in range(1, LENGTH):
            last = ids[:, place - 1]
            drawn = torch.multinomial(self.follow[last], 1, generator=generator)[:, 0]
            ids[:, place] = torch.where(is_trigger(last), ids[:, place - 2], drawn)
        return ids


def is_trigger(ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(TRIGGERS))
