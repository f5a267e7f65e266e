# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the gate costs, by the last records that bench_speed.py wrote on a CPU and on a GPU, against the goals: `python
benchmarks/speed_table.py` writes the tables of docs/speed.md and docs/speed.png anew.
"""

from pathlib import Path

from contestants import NARROW
from measured import RESULTS, ROOT, read_records, write_table


RECORDS = RESULTS / "speed.jsonl"
COLUMNS = ("headwise", "elementwise", "afmoe", "qwen3_5", "hook-headwise", "hook-elementwise")


def read(on: str = "cpu") -> dict:
    """The last record of that device."""
    return [record for record in read_records(RECORDS) if record["on"] == on][-1]


def goal_of(result: dict, gate_type: str, on: str) -> float | None:
    """The largest ratio to Llama that was aimed at; None where there was no aim."""
    if result.get("shape") == NARROW:  # FLOPs are next to nothing there: the leanest gate in-tree is the goal
        return result["contestants"]["afmoe"]["ratio"]["median"]
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


def table(on: str = "cpu") -> str:
    record = read(on)
    head = ("", "noise", "headwise", "elementwise", "AFMoE", "Qwen3.5", "hooks, headwise", "hooks, elementwise")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for shape, results in by_shape(record):
        rows.append(f"| **{shape}** |{' |' * (len(head) - 1)}")
        rows += [f"| {' | '.join([name_of(result), *cells(result, record['on'])])} |" for result in results]
    return "\n".join([*rows, "", made_on(record)]) + "\n"


def made_on(record: dict) -> str:
    noises = [result["contestants"]["llama-again"]["ratio"] for result in record["results"]]
    rounds = " or ".join(str(n) for n in sorted({noise["n"] for noise in noises if "n" in noise}, reverse=True))
    versions = f"torch {record['versions']['torch']}, Transformers {record['versions']['transformers']}"
    threads = f"{record['threads']} thread{'s'[: record['threads'] > 1]}"
    device = f"{record['gpu']}, bf16" if record["on"] == "cuda" and "gpu" in record else record["device"]
    return f"({device}, {threads}; medians of {rounds} rounds; {versions}; commit {record['commit'][:7]}.)"


def by_shape(record: dict) -> list[tuple[str, list[dict]]]:
    shapes = dict.fromkeys(result["shape"] for result in record["results"])
    return [(shape, [result for result in record["results"] if result["shape"] == shape]) for shape in shapes]


def draw(record: dict, path: Path) -> None:
    """Ratios to Llama by gate type: ours with quartiles, the peers', and the limit of each."""
    from matplotlib.figure import Figure

    results = [(shape, result) for shape, results in by_shape(record) for result in results]
    names = [f"{shape}: {name_of(result)}" for shape, result in results]
    figure = Figure(figsize=(11, 0.28 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    markers = {"afmoe": "s", "qwen3_5": "^", "hook-headwise": "x", "hook-elementwise": "x"}
    for panel, kind in zip(panels, ("headwise", "elementwise"), strict=True):
        for place, (_, result) in enumerate(results):
            ours, ratio = result["contestants"][kind], result["contestants"][kind]["ratio"]
            panel.plot([ours["limit"]] * 2, [place - 0.4, place + 0.4], color="0.6", lw=2)
            panel.plot([ratio.get("q25", ratio["median"]), ratio.get("q75", ratio["median"])], [place] * 2, color="C0")
            panel.plot(ratio["median"], place, "o", color="C0")
            for peer in ours["to_peers"]:
                median = result["contestants"][peer]["ratio"]["median"]
                panel.plot(median, place, markers[peer], color="C1", mfc="none", ms=5)
        panel.set_xlabel(f"{kind}: ratio to Llama")
        panel.axvline(1, color="0.8", lw=0.8, zorder=0)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    keys = {"ours": "o", "AFMoE": "s", "Qwen3.5": "^", "hooks": "x", "limit": "|"}
    colors = {"ours": "C0", "limit": "0.6"}
    handles = [
        panels[1].plot([], [], marker, color=colors.get(name, "C1"), mfc=colors.get(name, "none"))[0]
        for name, marker in keys.items()
    ]
    figure.legend(handles, keys, loc="outside upper center", ncols=len(keys))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    write_table("speed", table())
    write_table("speed on a GPU", table("cuda"))
    write_table("speed where launches cost", table("cpu, narrow"))
    draw(read(), ROOT / "docs" / "speed.png")
