# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Make a whole gated checkpoint of an adapter and the base that it names.

What is merged computes what the adapter on its base does, to rounding in the base's dtype; it can be exported, served
and published as any other checkpoint. The output appears only when it is complete.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="the adapter's folder, such as the --out of finetune")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an output that is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and nothing on stdout")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON on stdout")


def run(args: argparse.Namespace) -> None:
    from gated_llama.merge import merge_adapter

    result = merge_adapter(args.adapter, args.output, force=args.force, progress=not args.quiet)
    if args.json:
        print(result.to_json())
    elif not args.quiet:
        print(f"{result.adapter} on {result.base} -> {result.output}")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
