# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The `gated-llama` command: one sub-command a file of this folder. Imports nothing heavy, so that --help is quick."""

import argparse
import importlib
import signal
import sys
from contextlib import suppress

from gated_llama import __version__


OWN = ("gated_llama", "modeling_gated", "modeling_gated_moe", "configuration_gated", "configuration_gated_moe")
COMMANDS = {
    "convert": "convert_checkpoint",
    "desink": "desink_model",
    "export": "export_checkpoint",
    "finetune": "finetune_model",
    "inspect": "inspect_model",
    "merge": "merge_adapter",
    "push": "push_to_hub",
    "report": "draw_report",
    "serve": "serve_model",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gated-llama", description="Gated attention for Llama, Mistral and Qwen checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"gated-llama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"gated_llama.scripts.{module_name}")
        summary = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return run(parser.parse_args(argv))


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that makes one checkpoint of another."""
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--force", action="store_true", help="replace an output that is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and nothing on stdout")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the chosen command: 0 done; 1 a verification failed; 2 the input or the environment is at fault."""
    from gated_llama.errors import UserError, VerificationError

    on_sigterm(signal.default_int_handler)  # what schedulers send ends a run as Ctrl-C does
    for stream in (sys.stdout, sys.stderr):  # what an ASCII terminal cannot show, it shows as "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args.run(args)
    except UserError as error:
        print(f"gated-llama: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"gated-llama: verification failed, so nothing was kept: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in OWN:
            raise
        print(f"gated-llama: this needs the package {error.name}, which is not installed: install it.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gated-llama: interrupted; nothing was left half-written.", file=sys.stderr)
        return 2
    return 0


def on_sigterm(handler) -> None:
    with suppress(ValueError):  # in a thread, which hears no signals
        signal.signal(signal.SIGTERM, handler)


def run_alone(module) -> int:
    """`python scripts/NAME.py …`: one command without its name."""
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
