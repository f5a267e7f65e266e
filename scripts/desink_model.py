# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Move a checkpoint's attention sink into gates; if asked, calm its massive activations.

Each step is measured on held-out text. Keys, values and gates are fitted so that no head needs its sink. Then gates are
distilled from the base. Last, KV heads are restored until the loss rose by no more than --max-loss: on short texts, on
rows like those that were fitted on, past their length in longer texts, and on passages that come back. Where that takes
all of them nothing is written.

With --calm-tokens, for whoever quantizes, the neurons that make a sink massive write 32 times less, and in place of the
gates alone all layers are distilled, from the base's states too, with a penalty on massive ones. Then no KV head is
restored, unless that training was undone.

With --sliding-window every layer sees the last tokens only, for streams in constant memory; all of it is compared with
the base that keeps its first four tokens as well, as StreamingLLM reads a stream, and no KV head is restored either.
`accelerate launch` spreads the training over several processes.
"""

import argparse
import os
import sys

from gated_llama.scripts.cli import add_writing_arguments


def share(value: str) -> float:
    found = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    if found >= 1 and not value.endswith("%"):
        raise argparse.ArgumentTypeError(f"{value} would be {found:.0%}: write {value}% or {found / 100:g}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a plain or gated checkpoint, a folder or the id of a Hub repository")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or Hub datasets, as finetune's --data, of all kinds of text that the model is for: others pay more",
    )
    parser.add_argument(
        "--calm-only", action="store_true", help="leave the sink, and only calm massive activations, on --calm-tokens"
    )
    parser.add_argument(
        "--max-loss",
        type=share,
        help="by how much the loss may rise (default: 1%%, or 5%% for what slides or is calmed)",
    )
    parser.add_argument("--calm-tokens", type=int, default=0, help="to distil all layers on (default: 0)")
    parser.add_argument(
        "--damping",
        type=float,
        metavar="TIMES",
        help="the neurons that make a sink massive write so many times less (default: 1, or 32 with --calm-tokens)",
    )
    parser.add_argument("--move-tokens", type=int, default=32_768, help="to move the sink on (default: 32768)")
    parser.add_argument(
        "--heal-tokens", type=int, help="to distil gates on (default: 65536, or none with --calm-tokens)"
    )
    parser.add_argument("--sliding-window", type=int, metavar="W", help="see the last W tokens only")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens of a row (default: 4096, 1024 with --calm-tokens, 4 W with --sliding-window W; at most half of "
        "what the model is made for)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a training step (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of text (default: 0)")
    parser.add_argument("--device", help="such as cuda (default: a GPU if there is one)")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was stopped")
    add_writing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from gated_llama.sinks.recipe import desink_checkpoint
    from gated_llama.sinks.settings import DesinkSettings

    first = os.environ.get("RANK", "0") == "0"
    result = desink_checkpoint(
        args.model,
        args.text,
        args.output,
        DesinkSettings(**{f.name: getattr(args, f.name) for f in fields(DesinkSettings) if hasattr(args, f.name)}),
        revision=args.revision,
        device=args.device,
        resume=args.resume,
        force=args.force,
        progress=not args.quiet,
        announce=(lambda line: print(line, file=sys.stderr)) if first and not args.quiet else lambda line: None,
    )
    if args.json and first:
        print(result.to_json())
    elif first and not args.quiet:
        rows = [("", *result.columns), *result.rows()]
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        for name, *values in rows:
            print(f"{name:<{wide[0]}}  {values[0]:>{wide[1]}}  {values[1]:>{wide[2]}}")
        print(f"{result.source} -> {result.output}: {result.verdict()}")
        page = os.path.join(result.output, "inspection", "index.html")
        if os.path.exists(page):  # it takes matplotlib
            print(f"page: {page}")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
