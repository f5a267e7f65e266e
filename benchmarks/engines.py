# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What was run on which engine, and the README's table of it: `python benchmarks/engines.py` writes the table anew."""

import json
import re
from pathlib import Path

from measured import circumstances


ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "engines.jsonl"
TABLE = re.compile(r"(?<=<!-- engines -->\n).*?(?=<!-- /engines -->)", re.DOTALL)


def record(engine: str, run: str, result: str, *packages: str) -> None:
    """Keep a result, in place of an older one of the same run, with the versions of `packages`."""
    line = {"engine": engine, "run": run, "result": result, **circumstances(*packages)}
    lines = [old for old in read() if (old["engine"], old["run"]) != (engine, run)] + [line]
    RECORDS.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read() -> list[dict]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()] if RECORDS.exists() else []


def table() -> str:
    rows = ["| engine | what was run | result |", "|---|---|---|"]
    for line in sorted(read(), key=lambda line: (line["engine"], line["run"])):
        rows.append(f"| {line['engine']} | {line['run']} | {line['result']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda match: table(), readme.read_text(encoding="utf-8")), encoding="utf-8")
