# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Train the gates of a converted checkpoint, or all of it, on text files.

Plain next-token prediction with Transformers' Trainer. Without --train full everything but the gates is frozen.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a gated checkpoint: a folder, or the id of a Hub repository")
    parser.add_argument("--data", nargs="+", required=True, help='text files, or .jsonl files of {"text": …} lines')
    parser.add_argument("--out", required=True, help="the folder to write the trained model to")
    parser.add_argument("--train", choices=("gates", "full"), default="gates", help="what to train (default: gates)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--length", type=int, default=512, help="tokens a block (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks a step (default: 8)")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate of the weights (default: 2e-5)")
    parser.add_argument("--gate-lr", type=float, help="learning rate of the gates (default: 50 times --lr)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and nothing on stdout")


def run(args: argparse.Namespace) -> None:
    from gated_llama.checkpoint import new_folder
    from gated_llama.finetune import read_texts, token_blocks, train, train_only_gates
    from gated_llama.loading import load

    texts = read_texts(args.data)
    model, tokenizer = load(args.model)
    blocks = token_blocks(tokenizer, texts, args.length)
    if args.train == "gates":
        train_only_gates(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not args.quiet:
        print(f"training {trained:,} of {model.num_parameters():,} parameters on {blocks.numel():,} tokens")
    with new_folder(args.out) as folder:
        loss = train(
            model,
            blocks,
            folder,
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            gate_lr=args.gate_lr,
            progress=not args.quiet,
        )
        tokenizer.save_pretrained(folder)
    if not args.quiet:
        print(f"mean training loss {loss:.4f}; saved to {args.out}")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
