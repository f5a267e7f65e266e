# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-parallel`: the tensor-parallel, FSDP and pipeline plans at work, in two CPU processes (gloo). Each rank must
hold its part of the gates, and logits, greedy tokens and gates must be those of one process.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from engines import record
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, token_ids


pytestmark = pytest.mark.parallel


TOKENS = 12
NAMES = {"tp": "tensor parallel", "fsdp": "FSDP2", "pp": "pipeline parallel"}
WORKER = """
import json, sys
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
import modeling_gated

folder, kind, tokens = sys.argv[1:]
model = modeling_gated.GatedLlamaForCausalLM.from_pretrained(
    folder, distributed_config=DistributedConfig(**{kind + "_size": 2})
).eval()
local = sum(
    (p.to_local() if hasattr(p, "to_local") else p).numel() for n, p in model.named_parameters() if "attn_gate" in n
)
saved = torch.load(folder + "/expected.pt")
with torch.no_grad():
    outputs = model(saved["ids"], output_gates=True)
    generated = model.generate(
        saved["ids"], attention_mask=torch.ones_like(saved["ids"]), max_new_tokens=int(tokens), do_sample=False,
        eos_token_id=-1,
    )
rank, whole = dist.get_rank(), saved["gates"]
if kind == "tp":
    half = whole[0].shape[-1] // 2
    whole = [gate[..., rank * half : (rank + 1) * half] for gate in whole]
gates = getattr(outputs, "gates", None)
result = {
    "share": local / saved["gate_parameters"],
    "logits": (outputs.logits - saved["logits"]).abs().max().item(),
    "tokens": torch.equal(generated, saved["tokens"]),
    "gates": gates and max((a - b).abs().max().item() for a, b in zip(whole, gates, strict=True)),
}
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(result, file)
dist.destroy_process_group()
"""
GATES = {
    "tp": "`output_gates`: each rank those of its heads",
    "fsdp": "`output_gates`: every rank all of them",
    "pp": "no `output_gates`: Transformers' pipeline returns logits and cache alone",
}


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("kind", NAMES)
def test_two_processes_compute_what_one_does(tmp_path, kind, gate_type):
    model = gated_model(GatedLlamaForCausalLM, gate_type=gate_type, use_qk_norm=True, vocab_size=308)
    model.save_pretrained(tmp_path)
    ids = token_ids()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
    with torch.no_grad():
        outputs = model(ids, output_gates=True)
        expected = {
            "ids": ids,
            "logits": outputs.logits,
            "gates": outputs.gates,
            "tokens": model.generate(ids, eos_token_id=-1, **settings),
            "gate_parameters": sum(p.numel() for n, p in model.named_parameters() if "attn_gate" in n),
        }
        model.set_gate_strength(0)  # control: the gates decide over these tokens
        assert not torch.equal(model.generate(ids, eos_token_id=-1, **settings), expected["tokens"])
    torch.save(expected, tmp_path / "expected.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, tmp_path / "worker.py", tmp_path, kind, str(TOKENS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    print(f"\n{kind} {gate_type}: {ranks}")
    assert [rank["share"] for rank in ranks] == ([1 / 3, 2 / 3] if kind == "pp" else [1 / 2, 1 / 2])
    assert all(rank["tokens"] for rank in ranks)
    assert all((rank["gates"] is None) == (kind == "pp") for rank in ranks)
    difference = max(max(rank["logits"], rank["gates"] or 0) for rank in ranks)
    assert difference < 1e-5  # fp32, sums in another order
    result = f"logits within {difference:.0e}, greedy tokens equal; {GATES[kind]}"
    record("Transformers", f"{NAMES[kind]}, 2 processes (gloo); {gate_type}", result)
