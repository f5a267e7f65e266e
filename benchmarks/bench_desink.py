# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`desink` on a real model, from start to end, with a record of all that it measured in benchmarks/results/desink.jsonl;
`--write` makes the table of docs/sinks.md of those that `SHOWN` names. It does what `gated-llama desink` does, and
takes a checkout on the PYTHONPATH for an installation.

    python benchmarks/bench_desink.py build/models/smollm2-135m --text FILE.jsonl [--settings '{"max_loss": 0.05}']
    python benchmarks/bench_desink.py --write
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from gated_llama.inspection.quantization import QUANTIZATIONS
from gated_llama.sinks.recipe import desink_checkpoint
from gated_llama.sinks.settings import LONGEST, DesinkSettings
from measured import RESULTS, ROOT, append_record, circumstances, read_records, write_table


RECORDS = RESULTS / "desink.jsonl"
SHOWN = {  # outputs, and how the table calls what made them
    "desinked-small-left": "SmolLM2-135M",
    "desinked-default": "SmolLM2-135M, small sinks moved too",
    "desinked-sliding": "SmolLM2-135M, `--sliding-window 256`",
    "desinked-elementwise": "SmolLM2-135M, elementwise gates",
    "desinked-small-calm": "SmolLM2-135M, `--calm-tokens 98304`",
    "desinked-qwen-small-left": "Qwen2.5-Coder-0.5B",
    "desinked-qwen": "Qwen2.5-Coder-0.5B, small sinks moved too",
    "desinked-qwen-sliding": "Qwen2.5-Coder-0.5B, `--sliding-window 256`",
    "desinked-qwen-calm": "Qwen2.5-Coder-0.5B, `--calm-tokens 49152`",
}
RESTORED = ("KV heads restored", "key heads given back")  # the step, now and in older records
SHARE, TIMES, NATS, FROM_TO = "{change:+.2%}", "× {times:.2f}", "{rise:+.3f}", "{then:+.3f} → {now:+.3f}"
MEASURES = (  # how each is shown that a judgement has, or its penalties
    ("loss", "loss", SHARE),
    ("… of short texts", "short", SHARE),
    ("… past the rows' length", "far", SHARE),
    ("… of passages that come back, nats", "recalled", NATS),
    ("attention to the first token", "first_token", TIMES),
    ("… to the most attended key", "most_attended", TIMES),
    ("sink rate", "sink_rate", "{then:.1%} → {now:.1%}"),
    ("M-Act", "m_act", TIMES),
    *((f"{name}, cost", name, FROM_TO) for name in QUANTIZATIONS),
    ("last 64 tokens only, cost", "short_window", FROM_TO),
    ("… and the first", "short_window_and_first", FROM_TO),
)


def table(records: list[dict]) -> str:
    """A column a run; in brackets what stood there before KV heads were restored."""
    runs = {name: record for name in SHOWN for record in records if Path(record["output"]).name == name}
    rows = [["", *(SHOWN[name] for name in runs)], ["---"] * (1 + len(runs))]
    for title, of_run in (
        ("rows of; judged windows", rows_of),
        ("tokens", lambda run: f"{sum(step['tokens'] for step in run['steps']):,}"),
        ("minutes", lambda run: f"{run['seconds'] / 60:.0f}"),
        (RESTORED[0], restored),
        *((title, partial(cell, key=key, form=form)) for title, key, form in MEASURES),
    ):
        rows.append([title, *map(of_run, runs.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(run: dict, key: str, form: str) -> str:
    judged = [step["judgement"] for step in run["steps"]]
    judged = judged[-2:] if restored(run) else judged[-1:]
    then, *found = [{**values, **values["penalties"]}.get(key) for values in (run["before"], *judged)]
    if then is None:  # older records have no short texts
        return ""
    base, arrow, form = form.rpartition(" → ")
    shown = [
        form.format(now=now, change=now / then - 1, times=now / then, rise=now - then)
        for now in reversed(found)
        if now is not None
    ]
    return base.format(then=then) + arrow + shown[0] + "".join(f" ({value})" for value in shown[1:])


def rows_of(run: dict) -> str:
    settings = dict(run["settings"])
    windows = settings.pop("judged_windows", None)  # of older records
    settings = DesinkSettings(**settings).suited_to(2 * LONGEST)  # both models are made for as much, or more
    return f"{settings.length:,}; {windows or settings.judged_windows}"


def restored(run: dict) -> str:
    """As "9 of 72", or nothing."""
    last = run["steps"][-1]
    return last["note"].partition(":")[0] if last["name"] in RESTORED else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder")
    parser.add_argument("--text", help="a text or .jsonl file")
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of DesinkSettings, as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "desinked", help="for the checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--write", action="store_true", help="run nothing: write the table from the records")
    args = parser.parse_args()
    if args.write:
        write_table("desink", table(read_records(RECORDS)))
        return
    if args.model is None or args.text is None:
        parser.error("give a model and --text, or --write")
    settings, since = DesinkSettings(**args.settings), time.monotonic()
    result = desink_checkpoint(
        args.model,
        [args.text],
        args.out,
        settings,
        force=True,
        progress=not args.quiet,
        announce=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for row in result.rows():
        print(*row, sep=" | ")
    record = asdict(result) | {"settings": asdict(settings), "seconds": time.monotonic() - since}
    append_record(args.records, record | {"threads": torch.get_num_threads(), **circumstances()})


if __name__ == "__main__":
    main()
