# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Measure attention sinks, massive activations and gates of a model on a text.

Windows of --length tokens, each beginning as the tokenizer begins a text, are measured one by one. For gates, 1 is
open, 0 shut, gate_scale the most a gate can be. Works on plain Llama, Mistral and Qwen, on gated models, on adapters.
"""

import argparse
import os
import sys

from gated_llama.inspection import SENTENCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a checkpoint or an adapter: a folder, or the id of a Hub repository")
    add("--compare", help="another, to measure on the same windows")
    add("--text", nargs="+", required=True, help="text files, .jsonl files or Hub datasets, as for finetune --data")
    add("--length", type=int, default=512, help="tokens a window (default: 512)")
    add("--max-tokens", type=int, default=20_000, help="tokens measured (default: 20000)")
    add("--batch-size", type=int, default=1, help="windows at once (default: 1)")
    add("--dtype", help="to load the model in, such as float32 (default: as it was saved)")
    add("--device", help="to run it on, such as cpu (default: an accelerator if there is one)")
    add("--sentence", default=SENTENCE, help=f"to look at token by token (default: {SENTENCE!r})")
    add("--query", help="the word of it whose attention is shown (default: its last; of the default sentence: which)")
    add("--head", help="LAYER.HEAD whose attention map opens the page (default: one with half a sink)")
    add("--out", help="a new folder, for a page with figures (index.html) and measurements.json")
    add("--force", action="store_true", help="replace an --out that is not empty")
    add("--quiet", action="store_true", help="no progress bar, and nothing on stdout")
    add("--json", action="store_true", help="print the measurements as JSON on stdout, a line for each model")


def run(args: argparse.Namespace) -> None:
    from contextlib import ExitStack
    from dataclasses import replace

    import torch

    from gated_llama.checkpoints.folder import new_folder, refuse_replacing
    from gated_llama.data import read_documents, token_windows
    from gated_llama.errors import UserError
    from gated_llama.inspection.measure import measure
    from gated_llama.loading import load

    if args.out:
        from gated_llama.checkpoints.measurements import read_measurements, write_measurements
        from gated_llama.inspection.page import chosen_head, draw

        for source in filter(None, (args.model, args.compare, *args.text)):
            refuse_replacing(source, args.out)
    elif args.head or args.force:
        raise UserError("--head and --force are of a page: give --out too.")

    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    documents = read_documents(args.text)
    measured, first = [], None  # windows of the first model
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(args.out, force=args.force)) if args.out else None
        for source in filter(None, (args.model, args.compare)):
            model, tokenizer = load(source, dtype=args.dtype or "auto", device_map=args.device or device)
            windows = token_windows(tokenizer, documents, args.length)[: max(1, args.max_tokens // args.length)]
            if first is None:
                first = windows
                if args.head:
                    chosen_head(args.head, model.config.num_hidden_layers, model.config.num_attention_heads)
            elif not torch.equal(first, windows):
                raise UserError(
                    f"{source} cuts the text into other tokens than {args.model}, so nothing of them can be compared: "
                    "inspect each by itself."
                )
            result = measure(
                model,
                tokenizer,
                windows,
                batch_size=args.batch_size,
                sentence=args.sentence,
                query=args.query,
                progress=not args.quiet,
            )
            measured.append(replace(result, model=source))
            del model
        if folder:
            draw(read_measurements([write_measurements(measured, folder)]), folder, args.head)
    if args.json:
        for measurements in measured:
            print(measurements.to_json())
    elif not args.quiet:
        print_models(measured)
        for measurements in measured:
            if measurements.gates:
                print_gates(measurements)
        if folder:
            print(f"page: {os.path.join(args.out, 'index.html')}")


def print_models(measured) -> None:
    from dataclasses import asdict

    from gated_llama.checkpoints.measurements import differences, summary_rows

    names = [m.model.rstrip("/").rpartition("/")[2][-24:] for m in measured]
    print(f"{measured[0].windows} windows of {measured[0].length} tokens")
    print(f"{'':34}" + "".join(f"{name:>26}" for name in names))
    models = [asdict(m) for m in measured]
    for (name, _, values), changes in zip(summary_rows(models), differences(models), strict=True):
        print(f"{name:34}" + "".join(f"{value:>26}" for value in values) + "".join(f"{c:>20}" for c in changes))
    print()


def print_gates(measurements) -> None:
    report = measurements.gates
    _print_table([(f"layer {number}", row) for number, row in enumerate(report.layers)])
    _print_table([(kind, row) for kind, row in report.kinds.items() if row.tokens])
    for name, heads in (("always open", report.always_open), ("always shut", report.always_shut)):
        all_of_them = len(heads) == sum(map(len, report.heads))
        listed = f"all {len(heads)}" if all_of_them else ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"
        print(f"heads {name}: {listed}")


def _print_table(rows) -> None:
    print(f"{'':14}{'tokens':>8}{'mean':>8}{'|g - 1|':>9}{'< 0.1':>8}{'> 1.5':>8}")
    for name, row in rows:
        print(
            f"{name:14}{row.tokens:8,}{row.mean:8.3f}{row.moved:9.3f}{row.nearly_shut:8.1%}{row.amplifying:8.1%}"
            f"  {'█' * round(10 * row.mean)}"
        )
    print()


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
