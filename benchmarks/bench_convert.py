# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a conversion costs: against `cp -r` of the same folder, and against the way people do it now, `from_pretrained` and
`save_pretrained`. Pairs are run interleaved on one disk, once each result has proved right. `cp -r` is compared with
the conversion beyond start-up (inside one process, after its imports); everything else is timed as whole processes.
Writes a table for people and one JSON line to benchmarks/results/.

    python benchmarks/bench_convert.py [--gigabytes 2.8] [--pairs 15] [--rounds 5]
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from gated_llama.conversion.convert import convert_checkpoint, shapes_of
from measured import RESULTS, append_record, circumstances, run_measured, seconds_of, summary


CONVERT = [sys.executable, "-m", "gated_llama.scripts.cli", "convert", "--no-verify", "--quiet", "--force"]
LOAD_AND_SAVE = """
import sys
from configuration_gated import GatedLlamaConfig
from modeling_gated import GatedLlamaForCausalLM
from transformers import LlamaConfig
fields = LlamaConfig.from_pretrained(sys.argv[1]).to_dict()
config = GatedLlamaConfig(**{key: fields[key] for key in fields.keys() - {"model_type", "architectures"}})
GatedLlamaForCausalLM.from_pretrained(sys.argv[1], config=config).save_pretrained(sys.argv[2])
"""


def write_checkpoint(folder: Path, gigabytes: float, shard_bytes: int = 10**9) -> None:
    """A Llama checkpoint of about this size, in bf16 and in shards; `gigabytes=0`: a tiny one."""
    folder.mkdir()
    hidden = 2048 if gigabytes else 32
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 32,
        num_hidden_layers=max(2, round((gigabytes * 1e9 - 4 * 32000 * hidden) / (2 * 15 * hidden**2))),
        vocab_size=32000 if gigabytes else 64,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    shards: list[dict] = [{}]
    for key, shape in shapes_of(LlamaForCausalLM, config, "config").items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][key] = torch.randn(shape).bfloat16()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(config.to_json_string())


def fresh(output: Path) -> None:
    """Nothing there, and nothing of the last run left for the next one to flush."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    time.sleep(1)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(source: Path, output: Path) -> None:
    """The gate before any number: every source shard is there, byte for byte."""
    for shard in source.glob("*.safetensors"):
        assert digest(shard) == digest(output / shard.name), shard.name
    assert (output / "model-gates.safetensors").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.8, help="size of the checkpoint (default: 2.8)")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs with cp -r (default: 15)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of whole processes (default: 5)")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        write_checkpoint(work / "tiny", 0)
        write_checkpoint(work / "source", args.gigabytes)
        source, output = work / "source", work / "output"
        size = sum(path.stat().st_size for path in source.iterdir())
        copying = {
            "cp -r": lambda: subprocess.run(["cp", "-r", source, output], check=True),
            "convert": lambda: convert_checkpoint(source, output, verify=False, progress=False),
        }
        commands = {
            "start-up (a tiny checkpoint)": [*CONVERT, work / "tiny", output],
            "convert": [*CONVERT, source, output],
            "convert --link": [*CONVERT, "--link", source, output],
            "load and save": [sys.executable, "-c", LOAD_AND_SAVE, source, output],
        }
        for kind in ("convert", "convert --link"):  # and it warms the page cache, for all alike
            fresh(output)
            run_measured(commands[kind])
            check(source, output)
        seconds, memory, pairs = ({kind: [] for kind in kinds} for kinds in (commands, commands, copying))
        for number in tqdm(range(args.pairs), desc="pairs"):
            for kind in sorted(copying, reverse=number % 2 == 1):
                fresh(output)
                pairs[kind].append(seconds_of(copying[kind]))
        for number in tqdm(range(args.rounds), desc="rounds"):
            turn = number % len(commands)
            for kind in [*commands][turn:] + [*commands][:turn]:
                fresh(output)
                taken, peak = run_measured(commands[kind])
                seconds[kind].append(taken)
                memory[kind].append(peak)

    copy_ratio = summary([ours / theirs for ours, theirs in zip(pairs["convert"], pairs["cp -r"], strict=True)])
    noise = summary([later / one for one, later in pairwise(pairs["cp -r"])])
    saving_ratio = summary([c / s for c, s in zip(seconds["convert"], seconds["load and save"], strict=True)])
    print(f"{size / 1e9:.2f} GB\n\n{'whole processes':30}{'seconds':>9}{'q25':>8}{'q75':>8}{'peak MiB':>10}")
    for kind in commands:
        row = summary(seconds[kind])
        print(f"{kind:30}{row['median']:9.2f}{row['q25']:8.2f}{row['q75']:8.2f}{max(memory[kind]):10.0f}")
    print(f"\n{'ratios, pairwise':30}{'median':>9}{'q25':>8}{'q75':>8}")
    for kind, row in (
        ("convert / cp -r (goal 1.10)", copy_ratio),
        ("cp -r / cp -r (the noise)", noise),
        ("convert / load and save", saving_ratio),
    ):
        print(f"{kind:30}{row['median']:9.3f}{row['q25']:8.3f}{row['q75']:8.3f}")
    record = {
        "benchmark": "convert",
        "bytes": size,
        "seconds": {kind: summary(values) for kind, values in seconds.items()},
        "peak_mib": {kind: max(values) for kind, values in memory.items()},
        "copying_seconds": {kind: summary(values) for kind, values in pairs.items()},
        "ratio_to_cp": copy_ratio,
        "noise_of_cp": noise,
        "ratio_to_load_and_save": saving_ratio,
        **circumstances(),
    }
    append_record(RESULTS / "convert.jsonl", record)


if __name__ == "__main__":
    main()
