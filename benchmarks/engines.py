# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What was run on which engine, and docs/serve.md's table of it, which `python benchmarks/engines.py` writes anew."""

from itertools import combinations

from measured import RESULTS, circumstances, keep_record, read_records, write_table


RECORDS = RESULTS / "engines.jsonl"


def record(engine: str, run: str, result: str, *packages: str) -> None:
    """Keep a result, in place of an older one of the same run, with the versions of `packages`."""
    line = {"engine": engine, "run": run, "result": result, **circumstances(*packages)}
    keep_record(RECORDS, line, "engine", "run")


def read() -> list[dict]:
    return read_records(RECORDS)


def table() -> str:
    """Runs with one result that differ in one of their parts share a row: `plain; TP 1 / TP 2`."""
    rows = ["| engine | what was run | result |", "|---|---|---|"]
    by_result = {}
    for line in sorted(read(), key=lambda line: (line["engine"], line["run"])):
        by_result.setdefault((versioned(line), line["result"]), []).append([{part} for part in line["run"].split("; ")])
    for (engine, result), runs in by_result.items():
        for run in merged(runs):
            rows.append(f"| {engine} | {'; '.join(' / '.join(sorted(part)) for part in run)} | {result} |")
    return "\n".join(rows) + "\n"


def versioned(line: dict) -> str:
    """The engine with its version, and with that of Transformers."""
    versions, engine = line["versions"], line["engine"]
    if engine == "Transformers":
        return f"{engine} {versions['transformers']}"
    return f"{engine} {list(versions.values())[-1]}, Transformers {versions['transformers']}"


def merged(runs: list[list[set[str]]]) -> list[list[set[str]]]:
    for first, second in combinations(runs, 2):
        differ = [a != b for a, b in zip(first, second, strict=False)]
        if len(first) == len(second) and sum(differ) == 1:
            both = [a | b for a, b in zip(first, second, strict=True)]
            return merged([both, *(run for run in runs if run is not first and run is not second)])
    return runs


if __name__ == "__main__":
    write_table("engines", table())
