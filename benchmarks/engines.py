# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What was run on which engine, and the README's table of it: `python benchmarks/engines.py` writes the table anew."""

from measured import RESULTS, circumstances, keep_record, read_records, write_table


RECORDS = RESULTS / "engines.jsonl"


def record(engine: str, run: str, result: str, *packages: str) -> None:
    """Keep a result, in place of an older one of the same run, with the versions of `packages`."""
    line = {"engine": engine, "run": run, "result": result, **circumstances(*packages)}
    keep_record(RECORDS, line, "engine", "run")


def read() -> list[dict]:
    return read_records(RECORDS)


def table() -> str:
    rows = ["| engine | what was run | result |", "|---|---|---|"]
    for line in sorted(read(), key=lambda line: (line["engine"], line["run"])):
        rows.append(f"| {line['engine']} | {line['run']} | {line['result']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    write_table("engines", table())
