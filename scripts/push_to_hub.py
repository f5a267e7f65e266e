# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Publish a gated checkpoint on the Hub.

What is sent is listed first; --dry-run stops there. The token is the one that `hf auth login` stored, or HF_TOKEN.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the checkpoint to publish")
    parser.add_argument("repository", help="where to, such as you/Llama-3.2-1B-gated")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and stop")


def run(args: argparse.Namespace) -> None:
    from gated_llama.publish import files_to_publish, publish

    files = files_to_publish(args.folder)
    for name, size in files.items():
        print(f"{size / 1e6:12,.3f} MB  {name}")
    print(f"{sum(files.values()) / 1e6:12,.3f} MB  in {len(files)} files")
    if not args.dry_run:
        url = publish(
            args.folder, args.repository, private=args.private, create_pr=args.create_pr, revision=args.revision
        )
        print(f"published: {url}")


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
