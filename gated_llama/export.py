# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Turn a gated checkpoint into one that others read: back to the family it came from, while its gates are open."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import modeling_gated
from gated_llama.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    carry_shards,
    copy_file,
    find_source,
    new_folder,
    read_checkpoint,
    refuse_nesting,
    write_index,
)
from gated_llama.errors import UserError
from gated_llama.families import FAMILIES, base_config, read_gated_config
from gated_llama.verify import Verification, verify_conversion


TARGETS = ("base",)


@dataclass(frozen=True)
class ExportResult:
    output: str
    source: str
    model_type: str
    verification: Verification | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def export_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to: str = "base",
    revision: str | None = None,
    verify: bool = True,
    force: bool = False,
    progress: bool = True,
) -> ExportResult:
    """
    Write the gated checkpoint `source` in another format. `to="base"`: as the Llama, Mistral or Qwen model it was
    converted from, its weights carried over; only while every gate is open.

    Raises:
        UserError: the source is no such checkpoint, or `to` cannot express it; nothing was written.
        VerificationError: the result does not compute what the source does; nothing was written.
    """
    if to not in TARGETS:
        raise UserError(f"there is no export to {to!r}: {', '.join(TARGETS)} is supported.")
    found = find_source(source, revision)
    refuse_nesting(found.folder, Path(output))
    checkpoint = read_checkpoint(found.folder)
    where = str(checkpoint.folder / CONFIG_NAME)
    config = read_gated_config(checkpoint.config, where)
    model_type = (config.conversion or {}).get("source_model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where} names no family that it was converted from, so there is no base to go back to.")
    gated_class = getattr(modeling_gated, config.architectures[0])
    head = config.architectures[0].removeprefix("GatedLlama")
    base_class = getattr(transformers, FAMILIES[model_type].prefix + head)
    base = base_config(model_type, config, base_class.__name__)
    _refuse_moved_gates(checkpoint, config)

    with new_folder(output, force=force) as folder:
        _write_base_weights(checkpoint, folder, progress)
        for name in checkpoint.carried:
            copy_file(checkpoint.folder / name, folder / name)
        verification = None
        if verify:
            verification = verify_conversion(
                folder, base_class, base, checkpoint.folder, gated_class, config, progress=progress
            )
        (folder / CONFIG_NAME).write_text(base.to_json_string(), encoding="utf-8")
    return ExportResult(str(output), found.name, model_type, verification)


def _is_gate(key: str) -> bool:
    return ".attn_gate." in key


def _refuse_moved_gates(checkpoint: Checkpoint, config) -> None:
    """Open is what a conversion writes: zero weights, and the bias at which the gate is 1."""
    if config.gate_init != "open":
        raise UserError(f"{checkpoint.folder} has gates that did not start open (gate_init is {config.gate_init!r}).")
    for key, info in checkpoint.tensors.items():
        if not _is_gate(key):
            continue
        with safe_open(checkpoint.folder / info.file, framework="pt") as file:
            tensor = file.get_tensor(key)
        start = torch.zeros_like(tensor)
        if key.endswith(".bias"):
            start.fill_(config.open_gate_logit)
        distance = (tensor.double() - start.double()).abs().max().item()
        if not distance == 0:
            raise UserError(
                f"the gates of {checkpoint.folder} are no longer open ({key} is up to {distance:.3g} away), "
                "which a model without gates cannot express."
            )


def _write_base_weights(checkpoint: Checkpoint, folder: Path, progress: bool) -> None:
    """Shards without gates are carried over; a shard that mixes both, as save_pretrained writes it, is written anew."""
    kept = {key: info for key, info in checkpoint.tensors.items() if not _is_gate(key)}
    with_gates = {info.file for key, info in checkpoint.tensors.items() if _is_gate(key)}
    shards = sorted({info.file for info in kept.values()})
    single = len(shards) == 1
    new_names = {shard: WEIGHTS_NAME if single else shard for shard in shards}
    carry_shards(checkpoint, folder, {s: n for s, n in new_names.items() if s not in with_gates}, progress=progress)
    for shard in sorted(with_gates & set(shards)):
        with safe_open(checkpoint.folder / shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key, info in kept.items() if info.file == shard}
        save_file(tensors, folder / new_names[shard], metadata={"format": "pt"})
    if not single:
        write_index(folder, {key: replace(info, file=new_names[info.file]) for key, info in kept.items()})
