# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-big`: checkpoints of 30 GB, and of a mixture of experts of 61 GB, convert within 500 MB of resident memory.
Their shards are files with holes, so that the source takes no room on disk; a copied output takes 30 GB, and goes when
the check is done.
"""

import json
import shutil
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gated_llama.checkpoints.folder import read_checkpoint
from gated_llama.conversion.classes import shapes_of
from measured import run_measured


pytestmark = pytest.mark.big


LIMIT_MB = 500
LLAMA = LlamaConfig(  # 68 layers of 436 MB each in bf16
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=68,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
QWEN3_30B_A3B = Qwen3MoeConfig(  # 18,432 matrices of experts
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_hidden_layers=48,
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
)


def write_sparse(folder, model_class, config):
    """Five layers a shard; the tensors are all zeros, and not on disk."""
    folder.mkdir()
    shards = {}
    for key, shape in shapes_of(model_class, config, "config").items():
        number = int(key.split(".")[2]) // 5 if ".layers." in key else 99
        shards.setdefault(f"model-{number:05d}.safetensors", {})[key] = shape
    weight_map = {key: name for name, shapes in shards.items() for key in shapes}
    for name, shapes in shards.items():
        header, offset = {}, 0
        for key, shape in shapes.items():
            count = 2
            for length in shape:
                count *= length
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + count]}
            offset += count
        encoded = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(config.to_json_string())


@pytest.mark.parametrize(
    ("model_class", "config", "least", "options"),
    [
        (LlamaForCausalLM, LLAMA, 29e9, []),
        (LlamaForCausalLM, LLAMA, 29e9, ["--link"]),
        (Qwen3MoeForCausalLM, QWEN3_30B_A3B, 60e9, ["--link"]),
    ],
    ids=["Llama, copied", "Llama, linked", "Qwen3-30B-A3B, linked"],
)
def test_memory_is_independent_of_size(tmp_path, model_class, config, least, options):
    write_sparse(tmp_path / "source", model_class, config)
    size = read_checkpoint(tmp_path / "source").size()
    assert size > least
    command = [sys.executable, "-m", "gated_llama.scripts.cli", "convert", tmp_path / "source", tmp_path / "gated"]
    seconds, peak = run_measured([*command, "--no-verify", "--quiet", *options])
    assert {key: info.shape for key, info in read_checkpoint(tmp_path / "source").tensors.items()}.items() <= {
        key: info.shape for key, info in read_checkpoint(tmp_path / "gated").tensors.items()
    }.items()
    shutil.rmtree(tmp_path)
    print(f"\n{size / 1e9:.1f} GB {options}: {seconds:.1f} s, {peak:.0f} MiB resident at most")
    assert peak < LIMIT_MB
