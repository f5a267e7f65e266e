# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Turn a Llama, Mistral or Qwen checkpoint into a gated one that computes the same.

The source's weights are carried over byte for byte and never touched; the gates are added in a file of their own. The
output appears only when it is complete and, if memory suffices, has been run against the source. Sources with gates,
ours or in the paper authors' layout, keep them.
"""

import argparse
import sys

from gated_llama.scripts.cli import add_writing_arguments


LINK = (
    "link to the source's weights instead of copying them: no time and no space, but they are then the same bytes, so "
    "do not write to the source's files in place (default: copy)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder with safetensors weights, a GGUF, or the id of a Hub repository")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--gguf-file", metavar="NAME", help="of a folder or a Hub repository, the GGUF to convert")
    parser.add_argument("--source-id", metavar="ORG/NAME", help="the Hub id of a local source, for card and config")
    parser.add_argument(
        "--gate-type", choices=("headwise", "elementwise"), help="one gate a head (default) or one a channel"
    )
    parser.add_argument(
        "--gate-scale",
        type=float,
        help="largest value of a gate (default: 2; another needs --gate-bias or --gate-init)",
    )
    parser.add_argument("--gate-bias", action="store_true", default=None, help="give the gates' projection a bias")
    parser.add_argument(
        "--gate-init",
        choices=("open", "normal"),
        help="open: every gate starts at 1 and the model computes what it did (default); normal: random weights",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="write the weights in this dtype (default: as they are)",
    )
    parser.add_argument("--max-shard-size", help="write the weights in shards of at most this size, such as 5GB")
    parser.add_argument("--link", action="store_true", help=LINK)
    verify = parser.add_mutually_exclusive_group()
    verify.add_argument(
        "--verify", action="store_true", default=None, help="run source and result (default: if memory suffices)"
    )
    verify.add_argument("--no-verify", action="store_false", dest="verify", help="do not run them; the card says so")
    add_writing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from gated_llama.conversion.convert import convert_checkpoint

    result = convert_checkpoint(
        args.source,
        args.output,
        revision=args.revision,
        gguf_file=args.gguf_file,
        source_id=args.source_id,
        gate_type=args.gate_type,
        gate_scale=args.gate_scale,
        gate_bias=args.gate_bias,
        gate_init=args.gate_init,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        link=args.link,
        verify=args.verify,
        force=args.force,
        progress=not args.quiet,
    )
    if args.json:
        print(result.to_json())
    elif not args.quiet:
        share = result.gate_parameters / result.other_parameters
        print(f"{result.source} ({result.source_model_type}) -> {result.output}")
        print(f"  gates     {result.gate_type}, {result.gate_parameters:,} parameters (+{share:.2%})")
        print(f"  carried   {result.carried_bytes / 1e6:,.1f} MB of weights as they are; {', '.join(result.carried)}")
        if result.left_behind:
            print(f"  left      {', '.join(result.left_behind)}")
        print(f"  tokenizer {result.tokenizer}")
        print(f"  verified  {result.verification or 'no'}")
        print(f"next: gated-llama finetune {result.output} --data YOUR.jsonl --out RUN")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
