# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Show what the gates of a model do on a text, by layer and by kind of token.

1 is open, 0 shut, gate_scale the most a gate can be. The text is cut into blocks; the model sees one at a time.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a gated checkpoint: a folder, or the id of a Hub repository")
    parser.add_argument("--text", nargs="+", required=True, help='text files, or .jsonl files of {"text": …} lines')
    parser.add_argument("--length", type=int, default=128, help="tokens a block (default: 128)")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="tokens looked at (default: 20000)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON on stdout")


def run(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from gated_llama.data import read_documents, token_blocks
    from gated_llama.diagnose import gate_statistics, held_out_loss
    from gated_llama.loading import load

    documents = read_documents(args.text)
    model, tokenizer = load(args.model)
    blocks = token_blocks(tokenizer, documents, args.length)[: max(1, args.max_tokens // args.length)]
    report = gate_statistics(model, tokenizer, blocks)
    loss = held_out_loss(model, blocks)
    if args.json:
        print(json.dumps({**asdict(report), "loss": loss}))
    else:
        print_gates(report)
        print(f"loss {loss:.4f} nats a token over {blocks.numel():,} tokens in blocks of {args.length}")


def print_gates(report) -> None:
    _print_table([(f"layer {number}", row) for number, row in enumerate(report.layers)])
    _print_table([(kind, row) for kind, row in report.kinds.items() if row.tokens])


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
