# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-big`: a 30 GB checkpoint converts within 500 MB of resident memory. Its shards are files with holes, so that
the source takes no room on disk; the output takes 30 GB, and goes when the check is done.
"""

import json
import shutil
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gated_llama.checkpoints.folder import read_checkpoint
from gated_llama.conversion.classes import shapes_of
from measured import run_measured


pytestmark = pytest.mark.big


LAYERS = 68  # of 436 MB each in bf16
LIMIT_MB = 500


def write_sparse(folder):
    """Llama shapes of 30 GB, five layers a shard; the tensors are all zeros, and not on disk."""
    folder.mkdir()
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=LAYERS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    shards = {}
    for key, shape in shapes_of(LlamaForCausalLM, config, "config").items():
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


@pytest.mark.parametrize("options", [[], ["--link"]], ids=["copy", "link"])
def test_memory_is_independent_of_size(tmp_path, options):
    write_sparse(tmp_path / "source")
    size = read_checkpoint(tmp_path / "source").size()
    assert size > 29e9
    command = [sys.executable, "-m", "gated_llama.scripts.cli", "convert", tmp_path / "source", tmp_path / "gated"]
    seconds, peak = run_measured([*command, "--no-verify", "--quiet", *options])
    assert {key: info.shape for key, info in read_checkpoint(tmp_path / "source").tensors.items()}.items() <= {
        key: info.shape for key, info in read_checkpoint(tmp_path / "gated").tensors.items()
    }.items()
    shutil.rmtree(tmp_path)
    print(f"\n{size / 1e9:.1f} GB {options}: {seconds:.1f} s, {peak:.0f} MiB resident at most")
    assert peak < LIMIT_MB
