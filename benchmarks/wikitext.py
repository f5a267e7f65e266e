# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What 8 bits cost on WikiText-2, simulated and by torchao's integer kernels: perplexity in rows of 2,048 tokens, as
the papers on quantization give it, of a base and of what became of it. A record a model in
benchmarks/results/wikitext.jsonl; `--write` makes the table of docs/sinks.md.

    .venv-finetune/bin/python benchmarks/wikitext.py --test FILE --calibration FILE MODEL … [--name NAME …]
    python benchmarks/wikitext.py --write
"""

import math
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

from gated_llama.inspection.quantization import QUANTIZATIONS, quantized, quantized_linears, rounded
from gated_llama.loading import load
from gated_llama.sinks.judge import losses
from measured import RESULTS, circumstances, digest, keep_record, models_parser, named, read_records, write_table


RECORDS = RESULTS / "wikitext.jsonl"
LENGTH, CALIBRATED = 2_048, 2  # tokens of a row; rows from which static scales are taken
WEIGHTS = "W8, per tensor"  # inputs as they are: what no change of activations can save
SIMULATED = {name: how for name, (how, bits) in QUANTIZATIONS.items() if bits == 8}
TORCHAO = "torchao, dynamic per tensor"
SHOWN = {  # records, and how the table calls them
    "SmolLM2-135M": "SmolLM2-135M",
    "SmolLM2-135M, `desink`": "… `desink`",
    "SmolLM2-135M, `desink --calm-tokens 98304`": "… `desink --calm-tokens 98304`",
    "Qwen2.5-Coder-0.5B": "Qwen2.5-Coder-0.5B",
    "Qwen2.5-Coder-0.5B, `desink`": "… `desink`",
    "Qwen2.5-Coder-0.5B, `desink --calm-tokens 49152`": "… `desink --calm-tokens 49152`",
}


def rows_of(tokenizer, path: Path, most: int) -> torch.Tensor:
    """The file's tokens in a row, cut into rows (B, 2,048)."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:most]


@torch.no_grad()
def perplexity(model, rows: torch.Tensor) -> float:
    return math.exp(losses(model, rows, 1).mean().item())


@torch.no_grad()
def measure(model, rows: torch.Tensor, calibration: torch.Tensor) -> dict[str, float]:
    """Perplexities, by the columns of the table."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor, quantize_

    found = {"fp32": perplexity(model, rows)}
    for name, how in SIMULATED.items():
        with quantized(model, how, partial(losses, model, calibration, 1)):
            found[name] = perplexity(model, rows)
    integer = deepcopy(model)
    chosen = set(quantized_linears(integer))
    config = Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())
    quantize_(integer, config, filter_fn=lambda module, name: module in chosen)
    found[TORCHAO] = perplexity(integer, rows)
    for linear in quantized_linears(model):
        linear.weight.copy_(rounded(linear.weight, linear.weight.abs().amax()))
    return found | {WEIGHTS: perplexity(model, rows)}


def table(records: list[dict]) -> str:
    of = {record["name"]: record["perplexity"] for record in records}
    columns = ["fp32", WEIGHTS, *SIMULATED, TORCHAO]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, title in SHOWN.items():
        if name in of:
            lines.append(f"| {title} | {' | '.join(f'{of[name][column]:,.2f}' for column in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = models_parser(__doc__)
    parser.add_argument("--test", type=Path, help="wiki.test.raw or its like")
    parser.add_argument("--calibration", type=Path, help="wiki.valid.raw or its like")
    parser.add_argument("--rows", type=int, default=8, help="of 2,048 tokens (default: 8)")
    args = parser.parse_args()
    if args.write:
        write_table("wikitext", table(read_records(RECORDS)))
        return
    for name, folder in named(args):
        model, tokenizer = load(folder, dtype=torch.float32)
        rows = rows_of(tokenizer, args.test, args.rows)
        calibration = rows_of(tokenizer, args.calibration, CALIBRATED)
        found = measure(model.to(args.device).eval(), rows, calibration)
        record = {"name": name, "text": digest(rows), "rows": len(rows), "perplexity": found}
        keep_record(RECORDS, record | circumstances("torchao"), "name")
        print(f"{name}: {found}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
