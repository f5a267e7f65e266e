# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Turn a checkpoint of a Llama-like model into a gated one by adding to it: the source's shards are carried over byte for
byte, the gates come in one small shard of their own, and a new index joins them.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

import configuration_gated
import modeling_gated
from configuration_gated import GatedLlamaConfig
from gated_llama import __version__
from gated_llama.card import conversion_card
from gated_llama.checkpoint import (
    CONFIG_NAME,
    GATES_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    carry_shards,
    copy_file,
    find_source,
    new_folder,
    read_checkpoint,
    read_header,
    refuse_nesting,
    write_index,
)
from gated_llama.errors import UserError
from gated_llama.families import Origin, gated_config, recognise
from gated_llama.verify import Verification, verify_conversion


SINGLE_SHARD = "model-00001-of-00001.safetensors"  # a file called model.safetensors hides the index beside it
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Keys that published checkpoints carry and no model needs. With tied embeddings lm_head.weight is another.
NOT_NEEDED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class ConversionResult:
    """What `convert_checkpoint` did; `to_json()` is what `--json` prints."""

    output: str
    source: str
    revision: str | None
    source_model_type: str
    gate_type: str
    gate_scale: float
    gate_bias: bool
    gate_init: str
    gate_parameters: int
    source_parameters: int
    carried_bytes: int
    carried: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    verification: Verification | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    gate_type: str | None = None,
    gate_scale: float = 2.0,
    gate_bias: bool = False,
    gate_init: str = "open",
    verify: bool | None = None,
    force: bool = False,
    progress: bool = True,
) -> ConversionResult:
    """
    Write to `output` the gated form of the checkpoint `source`.

    Args:
        source: a folder with safetensors weights, or a Hub id (then `revision` may name a branch, tag or commit).
        output: the folder to write; it appears only when it is complete.
        gate_type: `"headwise"` (if None) or `"elementwise"`; `gate_scale`, `gate_bias` and `gate_init` as in
            [`GatedLlamaConfig`]. `gate_init="normal"` draws the same weights every time.
        verify: run source and result on the same inputs (see `gated_llama.verify`), and keep the result only if it
            computes what the source computes. None: if the memory suffices.
        force: replace an `output` that is not empty.
        progress: show a bar on stderr.

    Raises:
        UserError: something about source, output or settings is wrong; nothing was written.
        VerificationError: the result does not compute what the source does; nothing was written.
    """
    found = find_source(source, revision)
    refuse_nesting(found.folder, Path(output))
    checkpoint = read_checkpoint(found.folder)
    where = str(checkpoint.folder / CONFIG_NAME)
    origin = recognise(checkpoint.config, where)
    settings = {
        "gate_type": gate_type or "headwise",
        "gate_scale": float(gate_scale),
        "gate_bias": gate_bias,
        "gate_init": gate_init,
    }
    record = {
        "source": found.name,
        "revision": found.revision,
        "source_model_type": origin.model_type,
        "gated_llama_version": __version__,
        **settings,
    }
    config = gated_config(origin, where=where, **settings)
    gate_keys = _match_keys(checkpoint, origin, config)
    should_verify = _fits_in_memory(checkpoint) if verify is None else verify

    with new_folder(output, force=force) as folder:
        gates = _make_gates(gate_keys, config, _gate_dtype(checkpoint))
        _write_weights(checkpoint, gates, folder, progress)
        for name in checkpoint.carried:
            copy_file(checkpoint.folder / name, folder / name)
        for module in (configuration_gated, modeling_gated):
            copy_file(Path(module.__file__), folder / Path(module.__file__).name)
        verification = None
        if should_verify:
            verification = verify_conversion(
                found.folder, origin.model_class, origin.config, folder, origin.gated_class, config, progress=progress
            )
        result = ConversionResult(
            output=str(output),
            source=found.name,
            revision=found.revision,
            source_model_type=origin.model_type,
            **settings,
            gate_parameters=sum(gate.numel() for gate in gates.values()),
            source_parameters=sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            carried_bytes=checkpoint.size(),
            carried=checkpoint.carried,
            left_behind=checkpoint.left_behind,
            verification=verification,
        )
        card = conversion_card(result, found, checkpoint.folder, origin.gated_class.__name__)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config.conversion = {**record, "verification": verification and asdict(verification)}
        # Last of all: without it nothing takes the folder for a checkpoint, whatever happened before.
        (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    return result


def _match_keys(checkpoint: Checkpoint, origin: Origin, config: GatedLlamaConfig) -> dict[str, tuple[int, ...]]:
    """The gates' keys and shapes, once every key of the source has proved to be one that the model has."""
    try:
        with torch.device("meta"):
            model = origin.gated_class(config)
    except Exception as error:  # whatever an unknown rope type or activation makes the model class do
        where = checkpoint.folder / CONFIG_NAME
        raise UserError(f"{where} describes no model that can be built: {type(error).__name__} {error}.") from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix + "."
    if not any(key.startswith(prefix) for key in checkpoint.tensors):  # a bare base model under a head's name
        expected = {key.removeprefix(prefix): shape for key, shape in expected.items()}
    gates = {key: shape for key, shape in expected.items() if ".attn_gate." in key}
    needed = expected.keys() - gates.keys()
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()

    name = checkpoint.folder
    if missing := sorted(needed - checkpoint.tensors.keys() - optional):
        raise UserError(f"{name} has no tensor {missing[0]}, which a {origin.model_type} model of its config needs.")
    for key, info in checkpoint.tensors.items():
        if key not in needed | optional and not NOT_NEEDED.fullmatch(key):
            raise UserError(f"{name / info.file} holds {key}, which a {origin.model_type} model does not have.")
        if key in expected and info.shape != expected[key]:
            raise UserError(
                f"{name / info.file} holds {key} of shape {list(info.shape)}; "
                f"its config asks for {list(expected[key])}."
            )
        if key in expected and info.dtype not in FLOATS:
            raise UserError(f"{name / info.file} holds {key} as {info.dtype}; {', '.join(FLOATS)} can be converted.")
    return gates


def _gate_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of the projection beside it."""
    return FLOATS[next(info.dtype for key, info in checkpoint.tensors.items() if key.endswith(".q_proj.weight"))]


def _make_gates(
    keys: dict[str, tuple[int, ...]], config: GatedLlamaConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    gates = {key: torch.zeros(shape, dtype=dtype) for key, shape in keys.items()}
    generator = torch.Generator().manual_seed(0)
    for key, gate in gates.items():
        if config.gate_init == "normal" and key.endswith(".weight"):
            gate.normal_(0.0, config.initializer_range, generator=generator)
        if config.gate_init == "open" and key.endswith(".bias"):
            gate.fill_(config.open_gate_logit)
    return gates


def _write_weights(checkpoint: Checkpoint, gates: dict[str, torch.Tensor], folder: Path, progress: bool) -> None:
    new_names = {shard: SINGLE_SHARD if shard == WEIGHTS_NAME else shard for shard in checkpoint.shards}
    carry_shards(checkpoint, folder, new_names, progress=progress)
    save_file(gates, folder / GATES_NAME, metadata={"format": "pt"})
    tensors = {key: replace(info, file=new_names[info.file]) for key, info in checkpoint.tensors.items()}
    write_index(folder, tensors | read_header(folder, GATES_NAME))


def _fits_in_memory(checkpoint: Checkpoint) -> bool:
    """One model after the other is loaded; a fifth more than the weights covers gates and activations."""
    return checkpoint.size() * 1.2 + 5e8 < psutil.virtual_memory().available
