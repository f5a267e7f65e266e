# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Draw measurements that `gated-llama inspect --out` wrote, without a model; several files stand beside each other."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measurements", nargs="+", help="measurements.json files")
    parser.add_argument("--head", help="LAYER.HEAD whose attention map opens the page (default: one with half a sink)")
    parser.add_argument("--out", required=True, help="a new folder, for index.html and its figures")


def run(args: argparse.Namespace) -> None:
    from gated_llama.checkpoints.folder import new_folder
    from gated_llama.checkpoints.measurements import read_measurements
    from gated_llama.inspection.page import draw

    measured = read_measurements(args.measurements)
    with new_folder(args.out) as folder:
        draw(measured, folder, args.head)
    print(f"{args.out}/index.html")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
