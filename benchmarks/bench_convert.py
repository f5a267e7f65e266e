# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a conversion costs: against `cp -r` of the same folder, and against the way people do it now, `from_pretrained` and
`save_pretrained`. Pairs are run interleaved on the same disk; each result is first proved right. Writes a table for
people and one JSON line to benchmarks/results/.

    python benchmarks/bench_convert.py [--gigabytes 2.8] [--pairs 7]
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gated_llama.convert import shapes_of


RESULTS = Path(__file__).parent / "results"
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


def run(command: list[str], output: Path) -> tuple[float, float]:
    """Seconds and peak memory in MB of one process, which writes `output` anew."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what was written before is not this one's to flush
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return seconds, usage.ru_maxrss / 1024


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(source: Path, output: Path) -> None:
    """The gate before any number: every source shard is there, byte for byte."""
    for shard in source.glob("*.safetensors"):
        assert digest(shard) == digest(output / shard.name), shard.name
    assert (output / "model-gates.safetensors").exists()


def summary(values: list[float]) -> dict:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": quartiles[1], "q25": quartiles[0], "q75": quartiles[2], "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.8, help="size of the checkpoint (default: 2.8)")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved runs of each (default: 7)")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        write_checkpoint(work / "tiny", 0)
        write_checkpoint(work / "source", args.gigabytes)
        source, output = work / "source", work / "output"
        size = sum(path.stat().st_size for path in source.iterdir())
        commands = {
            "start-up (a tiny checkpoint)": [*CONVERT, work / "tiny", output],
            "cp -r": ["cp", "-r", source, output],
            "convert": [*CONVERT, source, output],
            "convert --link": [*CONVERT, "--link", source, output],
            "load and save": [sys.executable, "-c", LOAD_AND_SAVE, source, output],
        }
        for kind in ("convert", "convert --link"):  # and it warms the page cache, for all alike
            run(commands[kind], output)
            check(source, output)
        seconds = {kind: [] for kind in commands}
        memory = {kind: [] for kind in commands}
        for pair in range(args.pairs):
            for kind in [*commands][pair % len(commands) :] + [*commands][: pair % len(commands)]:  # rotating order
                taken, peak = run(commands[kind], output)
                seconds[kind].append(taken)
                memory[kind].append(peak)
                print(f"\rround {pair + 1} of {args.pairs}: {kind:30}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    start_up = statistics.median(seconds["start-up (a tiny checkpoint)"])
    ratios = [(c - start_up) / cp for c, cp in zip(seconds["convert"], seconds["cp -r"], strict=True)]
    noise = [b / a for a, b in zip(seconds["cp -r"], seconds["cp -r"][1:], strict=False)]
    against_saving = [c / s for c, s in zip(seconds["convert"], seconds["load and save"], strict=True)]
    print(f"{size / 1e9:.2f} GB, {args.pairs} interleaved rounds\n")
    print(f"{'':30}{'seconds':>9}{'q25':>8}{'q75':>8}{'peak MB':>9}")
    for kind in commands:
        row = summary(seconds[kind])
        print(f"{kind:30}{row['median']:9.2f}{row['q25']:8.2f}{row['q75']:8.2f}{max(memory[kind]):9.0f}")
    copy_ratio, saving_ratio = summary(ratios), summary(against_saving)
    print(f"\n(convert - start-up) / cp -r   {copy_ratio['median']:.3f} (goal: at most 1.10)")
    print(f"cp -r / the cp -r before it    {summary(noise)['median']:.3f} (the noise)")
    print(f"convert / load and save        {saving_ratio['median']:.3f}")
    record = {
        "benchmark": "convert",
        "bytes": size,
        "seconds": {kind: summary(values) for kind, values in seconds.items()},
        "peak_mb": {kind: max(values) for kind, values in memory.items()},
        "ratio_to_cp": copy_ratio,
        "noise_of_cp": summary(noise),
        "ratio_to_load_and_save": saving_ratio,
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "convert.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
