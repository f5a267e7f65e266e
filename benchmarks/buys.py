# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a model without its sink can do that its base cannot, and whether it still can what its base can: attention to the
last tokens of long texts, also with a cache of constant size; the last words of passages; copying from far back. A
record a model in benchmarks/results/buys.jsonl; `--write` makes the table of docs/sinks.md.

    python benchmarks/buys.py --text HELD-OUT.jsonl build/models/smollm2-135m OUT-OF-DESINK [--name NAME …]
    python benchmarks/buys.py --write
"""

import argparse
import random
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from sinks import read_texts, token_row
from tqdm import tqdm
from transformers import DynamicCache

from gated_llama import convert_checkpoint
from gated_llama.data import cut_windows
from gated_llama.loading import load
from gated_llama.sinks.judge import losses
from gated_llama.sinks.stream import FIRST, keeping_first, last_tokens
from measured import RESULTS, circumstances, digest, keep_record, models_parser, named, read_records, write_table


RECORDS = RESULTS / "buys.jsonl"
LENGTH, WINDOW = 4_096, 256
STREAM, PART, BLOCK = 20_000, 4_000, 256  # tokens of one row, of each that a loss is told of, and read at once
BEFORE = 1_024  # tokens in front of a block that are read again where the first are kept
PASSAGES, NEEDLES = 100, 20
SHOWN = {  # records, and how the table calls them
    "SmolLM2-135M": "SmolLM2-135M",
    "SmolLM2-135M, `desink --sliding-window 256`": "`desink --sliding-window 256`",
    "SmolLM2-135M, `desink`, small sinks left": "`desink`",
    "SmolLM2-135M, `desink`": "`desink`, small sinks moved too",
    "SmolLM2-135M, `desink` on rows of 2,048": "`desink --length 2048`",
    "SmolLM2-135M without its sink": "calmed first, `--length 256`, 360k tokens",
    "SmolLM2-135M, `desink --calm-tokens 98304`": "`--calm-tokens 98304`",
    "Qwen2.5-Coder-0.5B": "Qwen2.5-Coder-0.5B",
    "Qwen2.5-Coder-0.5B, `desink --sliding-window 256`": "`desink --sliding-window 256`",
    "Qwen2.5-Coder-0.5B, `desink` on rows of 1,024, small sinks left": "`desink --length 1024`",
    "Qwen2.5-Coder-0.5B, `desink` on rows of 1,024": "`desink --length 1024`, small sinks moved too",
    "Qwen2.5-Coder-0.5B, `desink --calm-tokens 49152`": "`--calm-tokens 49152`",
}
FILLER = "The weather stayed the same that day, and nobody in the town had anything to say about it. "


@torch.no_grad()
def short_window(model, rows: torch.Tensor) -> dict[str, float]:
    """
    What attention to the last `WINDOW` of `LENGTH` tokens costs, with and without the first, and what it costs to reset
    all gates to open; in nats a token.
    """
    full = losses(model, rows, 1)[:, WINDOW:]
    found = {"loss of 4,096 tokens": full.mean().item()}
    for first, name in enumerate(("cost of the last 256", "… and the first")):
        seen = last_tokens(rows.shape[1], WINDOW, first)
        found[name] = (losses(model, rows, 1, seen)[:, WINDOW:] - full).mean().item()
    own = model.config.gate_strength
    model.set_gate_strength(0.0)
    found["cost of open gates"] = (losses(model, rows, 1)[:, WINDOW:] - full).mean().item()
    model.set_gate_strength(own)
    return found


def by_part(found: list[torch.Tensor]) -> list[float]:
    """Means of the losses of each `PART` of a stream, of those of its blocks."""
    return [part.mean().item() for part in torch.cat(found).split(PART)]


@torch.no_grad()
def stream(model, row: torch.Tensor) -> list[float]:
    """The loss of each `PART` of `STREAM` tokens, read in blocks by a cache that holds the last `WINDOW`."""
    cache, found, last = DynamicCache(config=model.config), [], None
    for ids in tqdm(row.split(BLOCK), desc="streaming", unit=" blocks"):
        logits = model(ids[None].to(model.device), past_key_values=cache, use_cache=True).logits[0].float().cpu()
        before = logits[:-1] if last is None else torch.cat([last[None], logits[:-1]])
        found.append(torch.nn.functional.cross_entropy(before, ids[len(ids) - len(before) :], reduction="none"))
        last = logits[-1]
    return by_part(found)


@torch.no_grad()
def stream_with_first(model, row: torch.Tensor) -> list[float]:
    """
    The same of a model that sees the `FIRST` tokens too, right in front of the others, as StreamingLLM puts them. For
    each block what stood before is read again, four windows of it, in place of a cache.
    """
    found = []
    with keeping_first(model, WINDOW):
        for start in tqdm(range(0, len(row), BLOCK), desc="streaming, first kept", unit=" blocks"):
            begin, end = max(FIRST, start - BEFORE), min(start + BLOCK, len(row))
            ids = torch.cat([row[:FIRST], row[begin:end]]) if start else row[:end]
            found.append(losses(model, ids[None])[0, -(end - max(1, start)) :])
    return by_part(found)


@torch.no_grad()
def likelihood(model, tokenizer, context: str, answer: str) -> tuple[float, bool]:
    """Nats of the answer's tokens, and whether each is the likeliest."""
    start = tokenizer(context, verbose=False).input_ids
    end = tokenizer(answer, add_special_tokens=False).input_ids
    logits = model(torch.tensor([start + end], device=model.device)).logits[0, len(start) - 1 : -1].float().cpu()
    wanted = torch.tensor(end)
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item(), bool(
        (logits.argmax(1) == wanted).all()
    )


def last_words(texts: list[str]) -> list[tuple[str, str]]:
    """Passages of 80 to 120 words without their last one, which is a name or a noun that stood in them before."""
    drawn, found = random.Random(0), []
    while len(found) < PASSAGES:
        words = drawn.choice(texts).split()
        if len(words) < 200:
            continue
        start, length = drawn.randrange(len(words) - 150), drawn.randrange(80, 120)
        last = words[start + length]
        if re.fullmatch(r"[A-Za-z]{5,}", last) and last in words[start : start + length - 5]:
            found.append((" ".join(words[start : start + length]), f" {last}"))
    return found


def needles(tokens: int) -> list[tuple[str, str]]:
    """A number told once, `tokens` or so before it is asked for."""
    drawn, found = random.Random(1), []
    for _ in range(NEEDLES):
        number = str(drawn.randrange(10_000, 100_000))
        place = drawn.choice(("the castle", "the harbour", "the library", "the museum", "the station"))
        before, after = FILLER * 3, FILLER * (tokens // 20)
        told = f"The secret number of {place} is {number}. "
        found.append((f"{before}{told}{after}Remember: the secret number of {place} is", f" {number}"))
    return found


def measure(folder: Path, args: argparse.Namespace) -> dict:
    model, tokenizer = load(folder, dtype=torch.float32)
    model = model.to(args.device)
    texts = read_texts(args.text)
    row = token_row(tokenizer, args.text, 400_000)
    found = {"text": digest(row[:STREAM]), "short window": short_window(model, cut_windows(row, args.rows, LENGTH, 7))}
    for name, asked in (
        ("last words", last_words(texts)),
        *((f"needle, {far} tokens", needles(far)) for far in (200, 1_500)),
    ):
        scores = [likelihood(model, tokenizer, *pair) for pair in tqdm(asked, desc=name)]
        nats, right = zip(*scores, strict=True)
        found[name] = {"nats": sum(nats) / len(nats), "right": sum(right) / len(right)}
    found["stream, first kept"] = stream_with_first(model, row[:STREAM])
    sliding, _ = load(folder, dtype=torch.float32, sliding_window=WINDOW)
    found["stream"] = stream(sliding.to(args.device), row[:STREAM])
    return found


def table(records: list[dict]) -> str:
    """A column a model; a table for those that one tokenizer makes the text of, since nats are of its tokens."""
    of = {record["name"]: record for record in records}
    records = [of[name] for name in SHOWN if name in of]
    texts = dict.fromkeys(record["text"] for record in records)
    return "\n".join(table_of([record for record in records if record["text"] == text]) for text in texts)


def table_of(records: list[dict]) -> str:
    needle = [name for name in records[0] if name.startswith("needle")]

    def cost(record: dict, name: str) -> str:
        value = record["short window"].get(name)  # older records have no cost of open gates
        return "" if value is None else f"{value:+.3f}"

    def streamed(part: int, record: dict) -> str:
        kept = record.get("stream, first kept")  # older records have none
        return f"{record['stream'][part]:.3f}" + (f"; {kept[part]:.3f}" if kept else "")

    rows = [
        ("loss of 4,096 tokens, past the first 256", lambda r: f"{r['short window']['loss of 4,096 tokens']:.3f}"),
        ("last 256 of 4,096 tokens only, cost", lambda r: cost(r, "cost of the last 256")),
        ("… with the first kept", lambda r: cost(r, "… and the first")),
        ("gates reset to open, cost", lambda r: cost(r, "cost of open gates")),
        *(
            (
                f"stream, tokens {start // 1_000} to {(start + PART) // 1_000}k: loss; first 4 kept",
                partial(streamed, part),
            )
            for part, start in enumerate(range(0, STREAM, PART))
        ),
        ("last words: nats; right", lambda r: f"{r['last words']['nats']:.3f}; {r['last words']['right']:.0%}"),
        *((f"{name}: nats; right", lambda r, n=name: f"{r[n]['nats']:.3f}; {r[n]['right']:.0%}") for name in needle),
    ]
    lines = [f"| | {' | '.join(SHOWN[record['name']] for record in records)} |", f"|---|{'---|' * len(records)}"]
    lines += [f"| {name} | {' | '.join(value(record) for record in records)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = models_parser(__doc__)
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--rows", type=int, default=2, help="of 4,096 tokens (default: 2)")
    args = parser.parse_args()
    if args.write:
        write_table("buys", table(read_records(RECORDS)))
        return
    for name, folder in named(args):
        with tempfile.TemporaryDirectory() as work:
            gated = Path(work) / "gated"
            convert_checkpoint(folder, gated, link=True, verify=False, progress=False)
            record = {"name": name, **measure(gated, args), **circumstances()}
        keep_record(RECORDS, record, "name")
        print(f"{name}: {record['short window']}, {record['stream']}, {record['last words']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
