# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a gated checkpoint in a format that others read: one of `gated_llama.conversion.targets`."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoConfig

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    find_source,
    missing_tensors,
    new_folder,
    read_checkpoint,
    refuse_nesting,
)
from gated_llama.checkpoints.shards import write_index, write_shards
from gated_llama.conversion.classes import shapes_of
from gated_llama.conversion.families import GATED_TYPES, read_gated_config
from gated_llama.conversion.targets import TARGETS
from gated_llama.conversion.targets.target import Target, load_as
from gated_llama.conversion.tokenizer import keep_tokenizer, name_class
from gated_llama.conversion.verify import Verification
from gated_llama.conversion.verify import verify as compare_models
from gated_llama.errors import UserError
from gated_llama.loading import refuse_adapter


@dataclass(frozen=True)
class ExportResult:
    output: str
    source: str
    to: str
    architecture: str
    verification: Verification | None = None
    note: str | None = None  # what one should know of it
    in_own_dtype: Verification | None = None  # where `verification` is in fp32 and the checkpoint is not

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def export_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to: str,
    gguf_type: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    force: bool = False,
    progress: bool = True,
) -> ExportResult:
    """
    Write the gated checkpoint `source` to the folder `output` as `to`, one of `TARGETS`.

    Args:
        gguf_type: `"f32"`, `"f16"`, `"bf16"` or `"q8_0"`, of a GGUF's weights; as in `source` if None.

    Raises:
        UserError: the source is no gated checkpoint, or `to` cannot express it; nothing was written.
        VerificationError: the result does not compute what the source does; nothing was written.
    """
    refuse_adapter(source)
    if to not in TARGETS:
        raise UserError(f"there is no export to {to!r}: {', '.join(TARGETS)} are supported.")
    if gguf_type is not None and to != "gguf":
        raise UserError(f"gguf_type is for the export to gguf, not to {to}.")
    found = find_source(source, revision)
    refuse_nesting(found.folder, Path(output))
    checkpoint = read_checkpoint(found.folder)
    where = str(checkpoint.folder / CONFIG_NAME)
    config = read_gated_config(checkpoint.config, where)
    if config.gate_strength != 1:
        raise UserError(
            f"{where} has gate_strength {config.gate_strength:g}, which no other format can express: set it to 1."
        )
    gated_class = getattr(GATED_TYPES[config.model_type].modeling, config.architectures[0])
    shapes = shapes_of(gated_class, config, where)
    if missing := missing_tensors(shapes, checkpoint.tensors, tied=config.tie_word_embeddings):
        raise UserError(f"{checkpoint.folder} has no tensor {missing[0]}, which its config needs.")
    target = _target(to, checkpoint, config, {"kind": gguf_type} if gguf_type else {})

    with new_folder(output, force=force) as folder:
        if target.write:
            target.write(folder, progress)
        else:
            _write_checkpoint(target, checkpoint, config, to, folder, progress)

        def compare(dtype: torch.dtype | None, expect: str) -> Verification:
            return compare_models(
                partial(target.load, folder, dtype),
                partial(load_as, gated_class, config, checkpoint.folder, dtype),
                expect,
                gates_added=target.gates_added,
                greedy=expect == "rounding" and gated_class.can_generate(),
                progress=progress,
            )

        in_fp32 = in_own = None
        if verify and target.expect == "equal":
            in_fp32 = compare(None, "equal")
        elif verify:  # another order of sums: judged where rounding is small, and told in the checkpoint's own dtype
            in_fp32 = compare(torch.float32, target.expect)
            if target.expect == "rounding" and config.dtype not in (None, torch.float32):
                in_own = compare(None, "reported")
        if target.config:  # last: without it nothing loads
            (folder / CONFIG_NAME).write_text(json.dumps(target.config, indent=2) + "\n", encoding="utf-8")
    architecture = target.config["architectures"][0] if target.config else to
    return ExportResult(str(output), found.name, to, architecture, in_fp32, target.note, in_own)


def _write_checkpoint(
    target: Target, checkpoint: Checkpoint, config: GatedLlamaConfig, to: str, folder: Path, progress: bool
) -> None:
    """Shards, and what goes along."""
    write_shards(checkpoint, target.plans, folder, progress=progress)
    if {plan.info.file for plan in target.plans.values()} != {WEIGHTS_NAME}:
        write_index(folder, target.plans)
    checkpoint.copy_carried(folder)
    if to == "base" and "tokenizer_class" in (config.conversion or {}):  # as it was before the conversion
        name_class(folder, config.conversion["tokenizer_class"])
    keep_tokenizer(checkpoint.folder, config, folder, AutoConfig.for_model(**target.config))


def _target(to: str, checkpoint: Checkpoint, config: GatedLlamaConfig, options: dict) -> Target:
    """
    Build the target `to`, and name the alternatives if it cannot express the model.

    Raises:
        UserError: `to` cannot express the model; it names the formats that can.
    """
    try:
        return _in(to).target(checkpoint, config, **options)
    except UserError as error:
        others = []
        for other in set(TARGETS) - {to}:
            with suppress(UserError):
                _in(other).target(checkpoint, config)
                others.append(other)
        can = f"--to {' or '.join(sorted(others))} can" if others else "no other format can either: keep it as it is"
        raise UserError(f"{error}; {can}.") from None


def _in(target: str) -> ModuleType:
    """The file of that format."""
    return import_module(f"gated_llama.conversion.targets.{target}")
