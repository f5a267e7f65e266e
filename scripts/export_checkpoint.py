# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a gated checkpoint in a format that others read.

base: the Llama, Mistral, Mixtral or Qwen checkpoint it was converted from, while its gates are open. qwen3_5 and lfm3:
Transformers' own Qwen3.5 text model, and its LFM3 for headwise gates with QK norm; they run without custom code.
official: the paper authors' layout. gguf: for llama.cpp, of headwise gates without biases.
"""

import argparse
import sys

from gated_llama.conversion.targets import GGUF_TYPES, TARGETS
from gated_llama.scripts.cli import add_writing_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a gated checkpoint: a folder, or the id of a Hub repository")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument("--gguf-type", choices=GGUF_TYPES, help="of a GGUF's weights (default: as they are)")
    parser.add_argument("--no-verify", action="store_false", dest="verify", help="do not run source and result")
    add_writing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from gated_llama.conversion.export import export_checkpoint

    result = export_checkpoint(
        args.source,
        args.output,
        to=args.to,
        gguf_type=args.gguf_type,
        revision=args.revision,
        verify=args.verify,
        force=args.force,
        progress=not args.quiet,
    )
    if args.json:
        print(result.to_json())
    elif not args.quiet:
        print(f"{result.source} -> {result.output} ({result.architecture})")
        print(f"  verified  {result.verification or 'no'}")
        if result.note:
            print(f"  note      {result.note}")
        if result.in_own_dtype:
            print(f"  measured  {result.in_own_dtype}")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
