# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Publish a gated checkpoint, or an adapter, on the Hub.

It is checked first: complete, without secrets, and loading in a fresh process that cannot import this package (an
adapter: fitting the base that it names), with a card whose base is on the Hub. What is sent is listed; --dry-run stops
there. Numbers that `gated-llama inspect BASE --compare FOLDER --text … --out FOLDER/inspection` left there go into the
card. The token is the one that `hf auth login` stored, or HF_TOKEN.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the checkpoint or adapter to publish")
    parser.add_argument("repository", help="where to, such as you/Llama-3.2-1B-gated")
    parser.add_argument("--base", help="the Hub id of what it was made of; an adapter: the checkpoint it belongs to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--token", help="a token of the Hub, instead of the stored one")
    parser.add_argument("--dry-run", action="store_true", help="check, list what would be sent, and stop")
    parser.add_argument("--pin", action="store_true", help="print how to load exactly this commit")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the check run code files that are not this version's"
    )


def run(args: argparse.Namespace) -> None:
    from gated_llama.publish import (
        check_loads,
        check_repository,
        contents_to_publish,
        loading_snippet,
        publish,
        readable,
        sizes_of,
    )

    check_repository(args.repository)
    files = sizes_of(contents_to_publish(args.folder, base=args.base))
    check_loads(args.folder, trust_remote_code=args.trust_remote_code)
    for name, size in files.items():
        print(f"{readable(size):>12}  {name}")
    print(f"{readable(sum(files.values())):>12}  in {len(files)} files")
    if args.dry_run:
        print("all checks passed")
        return
    upload = publish(
        args.folder,
        args.repository,
        base=args.base,
        private=args.private,
        create_pr=args.create_pr,
        revision=args.revision,
        token=args.token,
        announce=lambda line: print(line, file=sys.stderr),
    )
    print(f"published: {upload.url}")
    if args.pin:
        print(loading_snippet(args.folder, args.repository, upload.commit))


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
