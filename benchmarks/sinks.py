# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Real models without their sink, and the controls: each recipe from the same base, judged on held-out windows that begin
with a special token ("begun") and on windows cut anywhere ("cut"), and on what stands far back. Rows that are fitted on
are such as `desink` takes: in half of them passages come back. Keeps a record of each in benchmarks/results/
sinks.jsonl; `--write` makes the table of docs/sinks.md of them.

    python benchmarks/sinks.py --text TRAIN.jsonl --held-out HELD-OUT.jsonl [--wikitext FILE] [--model smollm2-135m]
    python benchmarks/sinks.py --write
"""

import argparse
import json
import lzma
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from models import PACKAGED, real_model

from gated_llama import convert_checkpoint
from gated_llama.data import begun, cut_windows, mixed_windows, with_returns
from gated_llama.loading import load
from gated_llama.sinks.distil import DistilSettings, distil
from gated_llama.sinks.judge import judge, losses
from gated_llama.sinks.layers import sink_tokens, state_lengths
from gated_llama.sinks.move import MoveSettings, add_biases, move_sinks
from measured import RESULTS, ROOT, circumstances, digest, keep_record, read_records, write_table


RECORDS = RESULTS / "sinks.jsonl"
BEGINNING = "<|endoftext|>"
BASE = "base"
WINDOWS, LENGTH = 32, 256  # of each kind that are judged
BEFORE = {"rows": 256, "gate_type": "headwise"}  # of the records that do not say so


ANY_PRICE = MoveSettings(max_loss=9.0, batch_size=1)  # which is what is asked
DAMPED = replace(ANY_PRICE, damping=32.0)


@dataclass(frozen=True)
class Move:
    tokens: int = 65_536
    settings: MoveSettings = ANY_PRICE


@dataclass(frozen=True)
class Distil:
    tokens: int
    settings: DistilSettings
    batch_size: int = 1
    teacher: bool = True  # the base's predictions are learned, not those of the text


AS_RECORDED = partial(DistilSettings, states=0.0, penalty=0.02)  # defaults have changed since
CALM = Distil(196_608, AS_RECORDED("layers", lr=0.035))
GATES = Distil(98_304, AS_RECORDED("gates"))
NOT_CALM = replace(GATES, settings=replace(GATES.settings, penalty=0.0))
NO_GATES = ("attn_gate", "_proj.bias")


def healed_on_text(*frozen: str, tokens: int = 4_587_520, **settings) -> Distil:
    """All weights trained on the text itself. Queries and keys are kept, or the sink comes back."""
    return Distil(tokens, AS_RECORDED("layers", lr=0.0105, frozen=frozen, **settings), 2, teacher=False)


def all_distilled(**settings) -> Distil:
    return Distil(4_587_520, DistilSettings("layers", lr=0.0175, frozen=("q_proj", "k_proj"), **settings), 2)


RECIPES = {
    "moved, neither values nor outputs": [Move(16_384, replace(ANY_PRICE, values=False, outputs=False))],
    "moved, values shifted": [Move(16_384, replace(ANY_PRICE, outputs=False))],
    "moved, 16k tokens": [Move(16_384)],
    "moved": [Move()],
    "moved, gates distilled": [Move(), NOT_CALM],
    "damped, moved": [Move(settings=DAMPED)],
    "damped, moved, gates distilled": [Move(settings=DAMPED), NOT_CALM],
    "calmed": [CALM],
    "calmed, without gates": [replace(CALM, settings=replace(CALM.settings, frozen=NO_GATES))],
    "calmed, moved, gates distilled": [CALM, Move(), GATES],
    "calmed harder, moved, gates distilled": [
        Distil(262_144, AS_RECORDED("layers", lr=0.0525, times=2.0)),
        Move(),
        replace(GATES, settings=replace(GATES.settings, gate_lr=0.35, bias_lr=3.2e-4, times=2.0)),
    ],
    "calmed, moved, gates distilled, healed on text": [CALM, Move(), GATES, healed_on_text("q_proj", "k_proj")],
    "moved, gates distilled, healed on text": [Move(), NOT_CALM, healed_on_text("q_proj", "k_proj", penalty=0.0)],
    "moved, gates distilled, all distilled": [Move(), NOT_CALM, all_distilled(penalty=0.0)],
    "damped, moved, gates distilled, all distilled and calmed": [Move(settings=DAMPED), NOT_CALM, all_distilled()],
    "trained on text, without gates": [healed_on_text(*NO_GATES, tokens=4_915_200, penalty=0.0)],
}


def read_texts(path: Path) -> list[str]:
    """Of a `.jsonl` file, perhaps compressed, or of one text."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file] if ".jsonl" in path.name else [file.read()]


def token_row(tokenizer, path: Path, limit: int) -> torch.Tensor:
    """The tokens of a file's texts in a random order, up to `limit`, the beginning-of-text token before each."""
    texts, row = read_texts(path), []
    random.Random(0).shuffle(texts)
    for text in texts:
        row += [tokenizer.convert_tokens_to_ids(BEGINNING), *tokenizer(text, verbose=False).input_ids]
        if len(row) > limit:
            break
    return torch.tensor(row[:limit])


def known(path: Path) -> list[dict]:
    """The records that were kept, each with all that tells it from others."""
    return [{**BEFORE, **record} for record in read_records(path)]


def follow(recipe: list[Move | Distil], model, base, mixed: Callable[[int, int], torch.Tensor], seed: int) -> dict:
    """Edit and train `model` as a recipe says, on rows that are `mixed` of a number of tokens and a seed."""
    said, tokens = [], 0
    lengths = state_lengths(base, mixed(16_384, 11))
    for number, step in enumerate(recipe):
        windows = mixed(step.tokens, 11 if isinstance(step, Move) else 100 * (seed + 1) + number)
        tokens += windows.numel()
        if isinstance(step, Move):
            sinks = sink_tokens(state_lengths(base, windows))
            said.append(str(move_sinks(model, windows, step.settings, sinks=sinks, progress=True)))
        else:
            batches = windows.split(step.batch_size)
            distil(model, base if step.teacher else None, batches, lengths, step.settings, progress=True)
    return {"tokens": tokens, "said": said}


def run(args: argparse.Namespace) -> None:
    from gated_llama.conversion.verify import no_bars_of_transformers

    with tempfile.TemporaryDirectory() as work, no_bars_of_transformers():
        gated = Path(work) / "gated"
        source = real_model(args.model)
        convert_checkpoint(source, gated, gate_type=args.gate_type, link=True, verify=False, progress=False)
        base, tokenizer = load(gated, dtype=torch.float32)
        base = base.to(args.device)
        rows, held_out = (token_row(tokenizer, path, args.tokens) for path in (args.text, args.held_out))
        beginning = tokenizer.convert_tokens_to_ids(BEGINNING)
        judged = {
            "begun": begun(cut_windows(held_out, args.windows, args.length, 1), [beginning]),
            "cut": cut_windows(held_out, args.windows, args.length, 2),
        }
        wikitext = None
        if args.wikitext:
            row = token_row(tokenizer, args.wikitext, args.tokens)
            wikitext = begun(cut_windows(row, 48, args.length, 3), [beginning])

        def mixed(count: int, seed: int, length: int = args.rows, *, returns: bool = True) -> torch.Tensor:
            number = max(2, count // args.scale // length)
            return mixed_windows(rows, number, length, seed, [beginning], returns=returns)

        long = cut_windows(held_out, 2, 16 * args.length, 4)
        far = {"far": long, "recalled": with_returns(long, 4)}

        def look(model) -> dict:
            found = {kind: asdict(judge(model, windows, calibration)) for kind, windows in judged.items()}
            for name, windows in far.items():
                behind = losses(model, windows, 1)[:, windows.shape[1] // 2 :].mean().item()
                for kind in judged:
                    found[kind][name] = behind
            return found | ({} if wikitext is None else {"wikitext": losses(model, wikitext).mean().item()})

        calibration = mixed(4_096, 5, args.length, returns=False)
        for name in (BASE, *args.recipes):
            key = {"model": Path(args.model).name, "text": digest(judged["cut"]), "rows": args.rows, "recipe": name}
            # The base is not trained, and its gates are open.
            key |= {"seed": 0 if name == BASE else args.seed}
            key |= {"gate_type": BEFORE["gate_type"] if name == BASE else args.gate_type}
            if any(key.items() <= record.items() for record in known(args.records)):
                continue
            since, model, found = time.monotonic(), base, {"tokens": 0, "said": []}
            if name != BASE:
                model, _ = load(gated, dtype=torch.float32)
                model = model.to(args.device)
                add_biases(model)
                found = follow(RECIPES[name], model, base, mixed, args.seed)
            entry = {**key, **found, "seconds": time.monotonic() - since, **look(model)}
            entry["machine"] = torch.cuda.get_device_name() if args.device == "cuda" else "2 CPU cores"
            keep_record(args.records, entry | circumstances(), *key)
            print(f"{args.model}, {name}: {entry['seconds']:.0f} s, loss {entry['cut']['loss']:.4f}", flush=True)


# What is compared: its name, where it stands in a judgement, how it is shown, and whether recipes show it as a ratio.
COLUMNS = (
    ("loss", "loss", ".4f", "percent"),
    ("attention to the most attended key", "most_attended", ".3f", "ratio"),
    ("sink rate", "sink_rate", ".3f", ""),
    ("M-Act", "m_act", ",.0f", "ratio"),
    ("W8A8 cost, dynamic per tensor", "W8A8, dynamic per tensor", ".3f", "ratio"),
    ("… static", "W8A8, static per tensor", ".3f", "ratio"),
    ("… per token", "W8A8, per token", ".3f", ""),
    ("W4A4 cost, per token", "W4A4, per token", ".3f", ""),
    ("last 64 tokens only", "short_window", "+.3f", ""),
    ("… and the first", "short_window_and_first", "+.3f", ""),
    ("loss past 2,048 tokens", "far", ".4f", "percent"),
    ("… of passages that come back", "recalled", ".4f", "percent"),
)


def cell(now: dict, base: dict, key: str, form: str, how: str) -> str:
    """Of windows that were begun and of windows cut anywhere; nothing where a recipe was not asked."""
    shown = []
    for kind in ("begun", "cut"):
        value, was = ({**of[kind], **of[kind]["penalties"]}.get(key) for of in (now, base))
        if value is None:
            return ""
        shown.append(
            format(value, form)
            if now is base or not how
            else f"{100 * (value / was - 1):+.2f} %"
            if how == "percent"
            else f"× {value / was:.3f}"
        )
    return "; ".join(shown)


def setting(record: dict) -> tuple:
    """What records must share to be compared."""
    return record["model"], record["text"], record["rows"]


def table(records: list[dict]) -> str:
    """A row a recipe, below the base of its model and text."""
    lines = [
        f"| recipe | rows | tokens | {' | '.join(name for name, *_ in COLUMNS)} | WikiText-2 |",
        f"|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]

    bases = {setting(record): record for record in records if record["recipe"] == BASE}
    for record in records:
        base = bases[setting(record)]
        name = f"*{record['model']}* ({record['machine']})" if record is base else record["recipe"]
        name += f", seed {record['seed']}" if record["seed"] else ""
        name += f", {record['gate_type']}" if record["gate_type"] != BEFORE["gate_type"] else ""
        name += f" ({record['machine']})" if record["machine"] != base["machine"] else ""
        cells = [cell(record, base, *column) for _, *column in COLUMNS]
        wikitext = record.get("wikitext")
        if wikitext is not None:
            wikitext = f"{wikitext:.4f}" if record is base else f"{100 * (wikitext / base['wikitext'] - 1):+.2f} %"
        rows = "" if record is base else f"{setting(record)[2]:,}"
        lines.append(f"| {name} | {rows} | {record['tokens'] / 1000:,.0f}k | {' | '.join(cells)} | {wikitext or ''} |")
    return "\n".join(lines) + "\n"


DRAWN = (BASE, "moved, gates distilled", "calmed", "calmed, moved, gates distilled")
PANELS = (("sink rate", "sink_rate"), ("M-Act", "m_act"), ("W8A8 cost, nats", "W8A8, dynamic per tensor"))
PANELS += (("last 64 tokens only, nats", "short_window"),)


def draw(records: list[dict], path: Path) -> None:
    """What is left of the sink and of what it costs, by recipe, for the model and text of the first record."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6), layout="constrained")
    of = {record["recipe"]: record for record in records if setting(record) == setting(records[0])}
    for axes, (name, key) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for offset, kind in ((-0.2, "begun"), (0.2, "cut")):
            values = [{**of[recipe][kind], **of[recipe][kind]["penalties"]}[key] for recipe in DRAWN]
            axes.barh([place + offset for place in range(len(DRAWN))], values, height=0.38, label=f"windows {kind}")
        axes.set(title=name, yticks=range(len(DRAWN)))
        axes.set_yticklabels(DRAWN)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"{', '.join(PACKAGED)}, a folder or an id")
    parser.add_argument("--text", type=Path, help="to fit on and to train on")
    parser.add_argument("--held-out", type=Path, help="to judge on")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2, whose loss is then recorded too")
    parser.add_argument("--recipes", choices=RECIPES, nargs="*", default=list(RECIPES), help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text (default: 0)")
    parser.add_argument("--gate-type", choices=("headwise", "elementwise"), default="headwise", help="of all recipes")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="of a file that are read (default: 6000000)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"that are judged (default: {WINDOWS})")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"of a window (default: {LENGTH})")
    parser.add_argument("--rows", type=int, default=2_048, help="tokens of a row that is fitted on (default: 2048)")
    parser.add_argument("--scale", type=int, default=1, help="take so much less text, for a rehearsal (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--write", action="store_true", help="run nothing: write the table from the records")
    args = parser.parse_args()
    if args.write:
        write_table("sinks", table(known(RECORDS)))
        draw(known(RECORDS), ROOT / "docs" / "recipes.png")
    elif args.text is None or args.held_out is None:
        parser.error("give --text and --held-out, or --write")
    else:
        run(args)


if __name__ == "__main__":
    sys.exit(main())
