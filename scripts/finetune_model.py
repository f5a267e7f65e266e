# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Fine-tune a converted checkpoint: LoRA with the gates whole beside it, the gates alone, or everything.

Plain next-token prediction with Transformers' Trainer. On several processes or machines:
  torchrun --nproc-per-node 8 -m gated_llama.scripts.finetune_model MODEL --data … --out …
  accelerate launch -m gated_llama.scripts.finetune_model MODEL --data … --out …
"""

import argparse
import sys

from gated_llama.scripts.convert_checkpoint import LINK
from gated_llama.training.ways import WAYS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a converted checkpoint: a folder, or the id of a Hub repository")
    add(
        "--data",
        nargs="+",
        required=True,
        help='.jsonl files of {"text": …} or {"messages": […]} lines, text files, or Hub datasets (ORG/NAME:SPLIT)',
    )
    add("--eval-data", nargs="+", default=(), help="the same, to measure on (default: 5%% of the rows of --data)")
    add("--eval-tokens", type=int, default=50_000, help="tokens to measure on at the most (default: 50000)")
    add("--out", required=True, help="the folder of the run: what was trained, a record, and checkpoints")
    add("--train", choices=tuple(WAYS), default="lora", help="what to train (default: lora, and gates)")
    add("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--length", type=int, default=512, help="tokens a row (default: 512)")
    add("--no-packing", dest="packing", action="store_false", help="one document a row, cut at --length")
    add("--batch-size", type=int, default=8, help="rows a process takes at once (default: 8)")
    add("--accumulate", type=int, default=1, help="batches a step (default: 1)")
    add("--lr", type=float, help="learning rate of the weights (default: 2e-4 for lora, 2e-5 for full)")
    add("--gate-lr", type=float, default=1e-3, help="learning rate of the gates (default: 1e-3)")
    add("--weight-decay", type=float, default=0.0, help="of the weights, never of gates (default: 0)")
    add("--lora-rank", type=int, default=16, help="rank of LoRA (default: 16)")
    add("--lora-mlp", action="store_true", help="LoRA on the MLP too")
    add("--quantize", choices=("4bit", "8bit"), help="hold the frozen weights in 4 or 8 bits (bitsandbytes; lora)")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--fsdp-size", type=int, default=1, help="processes to shard the weights over (default: 1)")
    add("--tp-size", type=int, default=1, help="processes to split each layer over (default: 1)")
    add("--save-steps", type=int, help="steps between checkpoints (default: a quarter of the run)")
    add("--log-steps", type=int, help="steps between logs (default: a twentieth of the run)")
    add("--report-to", default="none", help="where else to log: tensorboard, wandb, …")
    add("--seed", type=int, default=0, help="of the data's order and of what starts at random (default: 0)")
    add("--link", action="store_true", help=f"with --train gates: {LINK}")
    add("--resume", action="store_true", help="go on from the last whole checkpoint in --out")
    add("--quiet", action="store_true", help="no progress bar and no live view, and nothing on stdout")
    add("--json", action="store_true", help="print the result as one line of JSON on stdout")


def run(args: argparse.Namespace) -> None:
    import os
    from dataclasses import fields

    from gated_llama.training.finetune import FinetuneSettings, finetune_checkpoint

    settings = {
        field.name: getattr(args, field.name) for field in fields(FinetuneSettings) if hasattr(args, field.name)
    }
    settings["eval_data"] = tuple(args.eval_data)
    first = os.environ.get("RANK", "0") == "0"
    say = print if first and not (args.quiet or args.json) else lambda line: None
    result = finetune_checkpoint(
        args.model,
        args.data,
        args.out,
        FinetuneSettings(**settings),
        resume=args.resume,
        link=args.link,
        progress=not args.quiet,
        announce=say,
    )
    if args.json and first:
        print(result.to_json())
    if result.held_out_after is not None:
        say(f"held-out loss {result.held_out_before:.4f} before, {result.held_out_after:.4f} after, in nats a token")
    trained_on = f"{result.steps} steps and {result.tokens:,} tokens"
    say(f"mean training loss {result.loss:.4f} over {trained_on}; saved to {result.output}")
    say(result.verdict)


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
