# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Serve a gated model with an OpenAI-compatible API: `transformers serve`, made to know our classes.

Options after the model go to `transformers serve` as they are, for example --port 8001 or --continuous-batching; it
needs `pip install "transformers[serving]"`.
"""

import argparse
import signal
import sys

from gated_llama.scripts.cli import on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a gated checkpoint: a folder, or the id of a Hub repository")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="for transformers serve")


def run(args: argparse.Namespace) -> None:
    from gated_llama.serve import serve

    on_sigterm(signal.SIG_DFL)  # the threads of a server would outlive an interrupt
    serve(args.model, args.options)


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
