# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The record of a run that may be stopped and gone on with: a JSON file of what it was asked to do, and with what."""

import json
from pathlib import Path

import torch
import transformers

from gated_llama import __version__
from gated_llama.checkpoints.folder import read_json
from gated_llama.errors import UserError


def check_seed(seed: int) -> None:
    """
    Check that every generator of random numbers takes `seed`.

    Raises:
        UserError: NumPy's does not.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1:,}, not {seed}.")


def begin_record(record: Path, asked: dict) -> None:
    """Write it into the folder of a new run, which is made if need be."""
    versions = {"gated_llama": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"asked": asked, "versions": versions}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or record}: {error.strerror}.") from error


def resume_record(record: Path, asked: dict) -> dict:
    """
    The record of a run to go on with.

    Raises:
        UserError: there is none, it is of a run that is finished, or of one that was asked for something else.
    """
    folder = record.parent
    if not record.is_file():
        raise UserError(f"{folder} holds no run to resume: {record.name} is missing there.")
    begun = read_json(record)
    if "result" in begun:
        raise UserError(f"the run in {folder} is finished: there is nothing to resume.")
    asked = json.loads(json.dumps(asked))
    was = begun.get("asked", {})
    if other := [name for name in asked if was.get(name) != asked[name]]:
        raise UserError(
            f"the run in {folder} began with {other[0]} {was.get(other[0])!r}, not {asked[other[0]]!r}: resume it with "
            "what it began with, or begin another."
        )
    return begun
