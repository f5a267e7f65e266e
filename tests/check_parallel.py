# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-parallel`: the tensor-parallel and FSDP plans at work, in two CPU processes (gloo). Each rank must hold a
part of every sharded weight, the gates' among them, and the logits must be those of one process.
"""

import os
import subprocess
import sys

import pytest
import torch

from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, token_ids


WORKER = """
import sys
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
import modeling_gated

folder, kind = sys.argv[1:]
model = modeling_gated.GatedLlamaForCausalLM.from_pretrained(
    folder, distributed_config=DistributedConfig(**{kind + "_size": 2})
).eval()
weight = model.model.layers[0].self_attn.attn_gate.proj.weight
weight = weight.to_local() if hasattr(weight, "to_local") else weight
saved = torch.load(folder + "/expected.pt")
with torch.no_grad():
    outputs = model(saved["ids"], output_gates=True)
difference = (outputs.logits - saved["logits"]).abs().max().item()
if dist.get_rank() == 0:
    print("RESULT", weight.numel() * 2 == saved["gate"].numel(), tuple(outputs.gates[0].shape), difference)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_two_processes_compute_what_one_does(tmp_path, kind, gate_type):
    model = gated_model(GatedLlamaForCausalLM, gate_type=gate_type, use_qk_norm=True, vocab_size=308)
    model.save_pretrained(tmp_path)
    gate = model.model.layers[0].self_attn.attn_gate.proj.weight
    with torch.no_grad():
        torch.save({"ids": token_ids(), "logits": model(token_ids()).logits, "gate": gate}, tmp_path / "expected.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", tmp_path / "worker.py", tmp_path, kind],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr
    print(f"\n{kind} {gate_type}: {lines[0]}")
    sharded, difference = lines[0].split()[1], float(lines[0].split()[-1])
    assert sharded == "True"
    assert difference < 1e-5  # fp32, sums in another order
