# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`desink` on a real model, from start to end, with a record of all that it measured in benchmarks/results/desink.jsonl.
It does what `gated-llama desink` does, and takes a checkout on the PYTHONPATH for an installation.

    python benchmarks/bench_desink.py build/models/smollm2-135m --text FILE.jsonl [--settings '{"max_loss": 0.05}']
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from gated_llama.sinks.recipe import desink_checkpoint
from gated_llama.sinks.settings import DesinkSettings
from measured import RESULTS, ROOT, append_record, circumstances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder")
    parser.add_argument("--text", required=True, help="a text or .jsonl file")
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of DesinkSettings, as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "desinked", help="for the checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--records", type=Path, default=RESULTS / "desink.jsonl")
    args = parser.parse_args()
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
