# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the gate costs, by the last record that bench_speed.py wrote on a CPU, against the goals: `python
benchmarks/speed_table.py` writes the README's table anew.
"""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "speed.jsonl"
TABLE = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- /speed -->)", re.DOTALL)
COLUMNS = ("headwise", "elementwise", "afmoe", "qwen3_5", "hook-headwise", "hook-elementwise")


def read(on: str = "cpu") -> dict:
    """The last record of that device."""
    return [record for record in map(json.loads, open(RECORDS, encoding="utf-8")) if record["on"] == on][-1]


def goal_of(result: dict, gate_type: str, on: str) -> float | None:
    """The largest ratio to Llama that was aimed at; None where there was no aim."""
    limit = result["contestants"][gate_type]["limit"]
    if result["work"].startswith("memory of"):
        return None if result["work"] == "memory of prefill" else 1.01 if gate_type == "headwise" else 1.01 * limit
    if result["work"] == "load":
        return None
    if result["work"] != "decode":
        return 1.01 if gate_type == "headwise" else 1.02 * limit
    if on == "cuda" and result["compiled"]:
        return 1.01 if gate_type == "headwise" else 1.01 * limit
    return (1.02 if on == "cpu" else 1.03) if gate_type == "headwise" else 1.03 * limit


def noise_of(result: dict) -> float:
    """How far the quartiles of Llama's ratio to itself are from 1."""
    ratio = result["contestants"]["llama-again"]["ratio"]
    return max(abs(1 - ratio.get(quartile, ratio["median"])) for quartile in ("q25", "q75"))


def verdict(result: dict, gate_type: str, on: str) -> tuple[bool, list[str]]:
    """Whether the goal is met, to the noise; and the peers that are faster, or smaller, by more than the noise."""
    ours, goal, noise = result["contestants"][gate_type], goal_of(result, gate_type, on), noise_of(result)
    better = [peer for peer, ratio in ours["to_peers"].items() if ratio["median"] > 1.0005 + noise]
    return goal is None or ours["ratio"]["median"] <= goal + noise, better


def name_of(result: dict) -> str:
    parts = [result["work"], f"{result['tokens']} tokens" if result["tokens"] and result["work"] != "decode" else ""]
    parts += [f"batch {result['batch']}" if result["work"] == "decode" else ""]
    parts += [f"{result['cache']} cache" if result["cache"] else "", "compiled" if result["compiled"] else ""]
    parts += ["checkpointing" if result["checkpointing"] else ""]
    return ", ".join(filter(None, parts))


def cells(result: dict, on: str) -> list[str]:
    row = [f"±{noise_of(result):.3f}"]
    for name in COLUMNS:
        contestant = result["contestants"].get(name)
        if contestant is None:
            row.append("")
            continue
        cell = f"{contestant['ratio']['median']:.3f}"
        if "limit" in contestant:
            met, better = verdict(result, name, on)
            cell += f" ({contestant['limit']:.3f})" + ("" if met else " ✗") + (" ▼" if better else "")
        row.append(cell)
    return row


def plain_head() -> str:
    return f"{'':60}{'noise':>8}" + "".join(f"{name:>18}" for name in COLUMNS)


def plain_row(result: dict, on: str) -> str:
    noise, *ratios = cells(result, on)
    return f"{result['shape'] + ': ' + name_of(result):60}{noise:>8}" + "".join(f"{ratio:>18}" for ratio in ratios)


def table() -> str:
    record = read()
    head = ("", "noise", "headwise", "elementwise", "AFMoE", "Qwen3.5", "hooks, headwise", "hooks, elementwise")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    shape = None
    for result in record["results"]:
        if result["shape"] != shape:
            shape = result["shape"]
            rows.append(
                f"| **{shape}**, {result['layers']} layer{'s'[: result['layers'] > 1]} |" + " |" * len(COLUMNS) + " |"
            )
        rows.append("| " + " | ".join([name_of(result), *cells(result, "cpu")]) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda match: table(), readme.read_text(encoding="utf-8")), encoding="utf-8")
