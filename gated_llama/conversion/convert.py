# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Turn a checkpoint into a gated one by adding to it: the source's shards are carried over byte for byte, the gates come
in one small shard of their own, and a new index joins them. Only what must change is written anew: the fused
projections of the paper authors' layout, gates that get another form, all weights when another dtype or shard size is
asked for.
"""

import json
import math
import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_gated
from configuration_gated import GatedLlamaConfig
from gated_llama import __version__
from gated_llama.checkpoints.card import conversion_card, is_hub_id
from gated_llama.checkpoints.folder import (
    CONFIG_NAME,
    GATES_NAME,
    SINGLE_SHARD,
    WEIGHTS_NAME,
    Checkpoint,
    Source,
    TensorInfo,
    find_source,
    missing_tensors,
    new_folder,
    read_checkpoint,
    refuse_nesting,
    refuse_replacing,
)
from gated_llama.checkpoints.shards import (
    DTYPE_NAMES,
    DTYPES,
    TensorPlan,
    carried,
    split_by_size,
    write_index,
    write_shards,
)
from gated_llama.conversion import official
from gated_llama.conversion.classes import load_model, shapes_of
from gated_llama.conversion.dequantize import dequantized
from gated_llama.conversion.families import GATED_TYPES, Origin, gate_settings, gated_config, recognise
from gated_llama.conversion.tokenizer import Kept, keep_tokenizer
from gated_llama.conversion.verify import Verification
from gated_llama.conversion.verify import verify as compare
from gated_llama.errors import UserError
from gated_llama.gates import is_gate
from gated_llama.loading import refuse_adapter


# Keys that published checkpoints carry and no model needs. With tied embeddings lm_head.weight is another.
NOT_NEEDED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ConversionResult:
    """What `convert_checkpoint` did; `to_json()` is what `--json` prints."""

    output: str
    source: str
    revision: str | None
    source_model_type: str
    source_layout: str
    gate_type: str
    gate_scale: float
    gate_bias: bool
    gate_init: str
    gate_parameters: int
    other_parameters: int
    carried_bytes: int = 0  # of shards that were carried over whole
    dtype: str | None = None  # if the weights were written in another
    max_shard_size: str | int | None = None
    gguf_file: str | None = None  # that the source's weights were in
    quantized: str | None = None  # how, before they were made dense
    carried: list[str] = field(default_factory=list)  # other files
    left_behind: list[str] = field(default_factory=list)
    tokenizer: str = "none"  # what became of it
    verification: Verification | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    source_id: str | None = None,
    gate_type: str | None = None,
    gate_scale: float | None = None,
    gate_bias: bool | None = None,
    gate_init: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    link: bool = False,
    verify: bool | None = None,
    force: bool = False,
    progress: bool = True,
) -> ConversionResult:
    """
    Write to `output` the gated form of the checkpoint `source`.

    Args:
        source: a folder with safetensors weights, or a Hub id (then `revision` may name a branch, tag or commit).
            Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE; the paper authors' gated Qwen3; or a gated checkpoint
            again. Or a GGUF of a Llama, Qwen2 or Qwen3, whose weights are made dense (bf16, or `dtype`).
        gguf_file: of a folder or a Hub id, the GGUF in it to convert.
        output: the folder to write; it appears only when it is complete.
        source_id: of a local source, the Hub id under which others know it: card and config then name that.
        gate_type, gate_scale, gate_bias, gate_init: as in [`GatedLlamaConfig`]. None: what a gated source has, else
            headwise, 2.0, no bias, open. `gate_init="normal"` draws the same weights every time.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, to write the weights in it.
        max_shard_size: bytes, or such as `"5GB"`, to write the weights in shards of at most this size.
        link: link to the source's shards instead of copying them; they are then the same bytes on disk.
        verify: run source and result on the same inputs (see [`verify`]), and keep the result only if it
            computes what the source computes. None: if the memory suffices.
        force: replace an `output` that is not empty.
        progress: show a bar on stderr.

    Raises:
        UserError: something about source, output or settings is wrong; nothing was written.
        VerificationError: the result does not compute what the source does; nothing was written.
    """
    if source_id is not None and not is_hub_id(source_id):
        raise UserError(f"{source_id!r} is no id of a Hub repository: give --source-id as ORG/NAME.")
    if source_id is not None and not Path(source).exists():
        raise UserError(f"{source} is no local folder, which alone needs another name: leave --source-id out.")
    refuse_adapter(source)
    asked = {"gate_type": gate_type, "gate_scale": gate_scale, "gate_bias": gate_bias, "gate_init": gate_init}
    written = None if dtype is None else _torch_dtype(dtype)
    settings = {"max_shard_size": max_shard_size, "link": link, "verify": verify, "force": force, "progress": progress}
    if gguf_file is None and Path(source).suffix != ".gguf":
        found = find_source(source, revision)
        refuse_nesting(found.folder, Path(output))
        return _convert(found, output, source_id, asked, written, **settings)
    if link:
        raise UserError("a GGUF has no weights to link to: leave --link out.")
    if Path(source).exists():
        refuse_replacing(Path(source, gguf_file or ""), output)
    with dequantized(source, gguf_file, revision, Path(output), written or torch.bfloat16, force=force) as found:
        return _convert(found, output, source_id, asked, written, **settings)


def _convert(
    found: Source,
    output: str | os.PathLike,
    source_id: str | None,
    asked: dict,
    dtype: torch.dtype | None,
    *,
    max_shard_size: str | int | None,
    link: bool,
    verify: bool | None,
    force: bool,
    progress: bool,
) -> ConversionResult:
    checkpoint = read_checkpoint(found.folder)
    where = str(checkpoint.folder / CONFIG_NAME)
    origin = recognise(checkpoint.config, where)
    settings = gate_settings(origin, asked, where)
    config = gated_config(origin, settings, where=where)
    if dtype is not None:
        config.dtype = dtype
    plans = _plans(checkpoint, origin, config, None if dtype is None else DTYPE_NAMES[config.dtype])
    if max_shard_size is not None:
        plans = split_by_size(plans, _bytes(max_shard_size), keep=GATES_NAME)
    if verify is None:
        verify = _fits_in_memory(checkpoint)
    sizes = {key: math.prod(plan.info.shape) for key, plan in plans.items()}
    gates = sum(size for key, size in sizes.items() if is_gate(key))
    result = ConversionResult(
        output=str(output),
        source=source_id or found.name,
        revision=found.revision,
        source_model_type=origin.model_type,
        source_layout=origin.layout,
        **settings,
        gate_parameters=gates,
        other_parameters=sum(sizes.values()) - gates,
        dtype=dtype and str(dtype).removeprefix("torch."),
        max_shard_size=max_shard_size,
        gguf_file=found.gguf_file,
        quantized=found.quantized,
        carried=checkpoint.carried,
        left_behind=checkpoint.left_behind,
    )

    with new_folder(output, force=force) as folder:
        carried_bytes = write_shards(checkpoint, plans, folder, link=link, progress=progress)
        write_index(folder, plans)
        checkpoint.copy_carried(folder)
        GATED_TYPES[config.model_type].copy_code(folder)
        kept = keep_tokenizer(checkpoint.folder, _named(origin.config, found), folder, config)
        verification = _verify(checkpoint, origin, config, folder, progress) if verify else None
        result = replace(result, carried_bytes=carried_bytes, verification=verification, tokenizer=kept.said)
        card = conversion_card(result, found, checkpoint.folder, origin.gated_class.__name__)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config.conversion = _record(result, origin, kept)
        # Last of all: without it nothing takes the folder for a checkpoint, whatever happened before.
        (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    return result


def _named(config: PreTrainedConfig, found: Source) -> PreTrainedConfig:
    """A copy that says where it is from: for some Hub ids `AutoTokenizer` has rules of their own."""
    config = deepcopy(config)
    config.name_or_path = found.name if found.on_hub else str(found.folder)
    return config


def _record(result: ConversionResult, origin: Origin, kept: Kept) -> dict:
    """The `conversion` entry of config.json. After several conversions it still names the first source's family."""
    names = ("source", "revision", "source_layout", "gate_type", "gate_scale", "gate_bias", "gate_init")
    earlier = getattr(origin.config, "conversion", None) or {}
    # What the tokenizer's file said before: an export to the family it came from says it again.
    earlier_class = {name: earlier[name] for name in ("tokenizer_class",) if name in earlier}
    return {
        **{name: getattr(result, name) for name in names},
        **({"tokenizer_class": kept.class_before} if kept.renamed else earlier_class),
        "source_model_type": earlier.get("source_model_type", origin.model_type),
        **({name: getattr(result, name) for name in ("gguf_file", "quantized")} if result.gguf_file else {}),
        "gated_llama_version": __version__,
        "verification": result.verification and asdict(result.verification),
    }


def _torch_dtype(name: str) -> torch.dtype:
    choices = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name not in choices:
        raise UserError(f"{name!r} is no dtype to write: {', '.join(choices)} are.")
    return choices[name]


def _bytes(size: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(size), re.IGNORECASE)
    value = int(float(match[1]) * SIZE_UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if value <= 0:
        raise UserError(f"{size!r} is no shard size: give bytes, or such as 500MB or 5GB.")
    return value


def _plans(
    checkpoint: Checkpoint, origin: Origin, config: GatedLlamaConfig, dtype: str | None
) -> dict[str, TensorPlan]:
    """How every tensor of the result is made, once every key of the source has proved to be one that the model has."""
    where = str(checkpoint.folder / CONFIG_NAME)
    prefix = origin.gated_class.base_model_prefix + "."
    bare = not any(key.startswith(prefix) for key in checkpoint.tensors)  # a base model under a head's name

    def keys_of(config: GatedLlamaConfig) -> dict[str, tuple[int, ...]]:
        shapes = shapes_of(origin.gated_class, config, where)
        return {key.removeprefix(prefix) if bare else key: shape for key, shape in shapes.items()}

    wanted = keys_of(config)
    if origin.layout == "gated":
        have = keys_of(origin.config)
    else:
        have = {key: shape for key, shape in wanted.items() if not is_gate(key)}
    if origin.layout == "official":
        fused = official.fused_rows(config)
        have |= {key: (fused, *shape[1:]) for key, shape in have.items() if ".q_proj." in key}
    _check_keys(checkpoint, origin, have, tied=config.tie_word_embeddings)

    plans = {}
    for key, info in checkpoint.tensors.items():
        if key in wanted or NOT_NEEDED.fullmatch(key):
            file = GATES_NAME if is_gate(key) else SINGLE_SHARD if info.file == WEIGHTS_NAME else info.file
            plans[key] = carried(key, info, file=file, dtype=dtype if dtype and key in wanted else info.dtype)
    if origin.layout == "official":
        for key in [key for key in plans if ".q_proj." in key]:
            info = replace(plans[key].info, shape=wanted[key])
            plans[key] = TensorPlan(info, inputs=(key,), make=partial(official.split_queries, config=config))
    gate_dtype = dtype or next(info.dtype for key, info in checkpoint.tensors.items() if key.endswith(".q_proj.weight"))
    generator = torch.Generator().manual_seed(0)
    for key, shape in wanted.items():
        if is_gate(key):
            info = TensorInfo(GATES_NAME, dtype or getattr(checkpoint.tensors.get(key), "dtype", gate_dtype), shape)
            plans[key] = _gate_plan(key, info, checkpoint, origin, config, generator)
    return plans


def _gate_plan(
    key: str, info: TensorInfo, checkpoint: Checkpoint, origin: Origin, config: GatedLlamaConfig, generator
) -> TensorPlan:
    if origin.layout == "official":
        fused = key.replace(".attn_gate.proj.", ".q_proj.")
        return TensorPlan(info, inputs=(fused,), make=partial(official.split_gates, config=config))
    if key in checkpoint.tensors:
        if checkpoint.tensors[key].shape == info.shape:
            return TensorPlan(info, inputs=(key,))
        return TensorPlan(info, inputs=(key,), make=lambda headwise: headwise.repeat_interleave(config.head_dim, dim=0))
    if origin.layout == "gated":  # a bias that it did not have
        return TensorPlan(info, make=lambda: torch.zeros(info.shape))
    return TensorPlan(info, make=lambda: _new_gate(key, info.shape, config, generator))


def _new_gate(key: str, shape: tuple[int, ...], config: GatedLlamaConfig, generator: torch.Generator) -> torch.Tensor:
    gate = torch.zeros(shape)
    if config.gate_init == "normal" and key.endswith(".weight"):
        gate.normal_(0.0, config.initializer_range, generator=generator)
    if config.gate_init == "open" and key.endswith(".bias"):
        gate.fill_(config.open_gate_logit)
    return gate


def _check_keys(checkpoint: Checkpoint, origin: Origin, have: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    name, kind = checkpoint.folder, f"{origin.model_type} model"
    if missing := missing_tensors(have, checkpoint.tensors, tied=tied):
        raise UserError(f"{name} has no tensor {missing[0]}, which a {kind} of its config needs.")
    for key, info in checkpoint.tensors.items():
        if key not in have and not NOT_NEEDED.fullmatch(key):
            raise UserError(f"{name / info.file} holds {key}, which a {kind} does not have.")
        if key in have and info.shape != have[key]:
            raise UserError(
                f"{name / info.file} holds {key} of shape {list(info.shape)}; its config asks for {list(have[key])}."
            )
        if key in have and info.dtype not in DTYPES:
            raise UserError(f"{name / info.file} holds {key} as {info.dtype}; {', '.join(DTYPES)} can be converted.")


def _fits_in_memory(checkpoint: Checkpoint) -> bool:
    """One model after the other is loaded; a fifth more than the weights covers gates and activations."""
    return checkpoint.size() * 1.2 + 5e8 < psutil.virtual_memory().available


def _verify(
    checkpoint: Checkpoint, origin: Origin, config: GatedLlamaConfig, folder: Path, progress: bool
) -> Verification:
    load_gated = partial(load_model, origin.gated_class, folder, config)
    source_config = deepcopy(origin.config)
    source_config.dtype = config.dtype
    load_source: Callable[[], PreTrainedModel] = partial(
        load_model, origin.model_class, checkpoint.folder, source_config
    )
    if origin.layout == "official":
        load_source = partial(_official_reference, checkpoint, load_gated)
        expect = "rounding"
    elif origin.layout == "gated":
        same = all(origin.gates[name] == getattr(config, name) for name in ("gate_type", "gate_bias"))
        expect = "equal" if same else "rounding"
    elif config.gate_init == "open":
        expect = "equal" if config.gate_scale == 2 else "rounding"
    else:
        expect = "reported"
    return compare(load_source, load_gated, expect, gates_added=origin.layout == "plain", progress=progress)


def _official_reference(checkpoint: Checkpoint, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model as the authors' code runs it: the source's fused projections, their activations regrouped."""
    model = load()

    def fused(key: str) -> torch.Tensor | None:
        if key not in checkpoint.tensors:
            return None
        with safe_open(checkpoint.folder / checkpoint.tensors[key].file, framework="pt") as file:
            return file.get_tensor(key).to(model.dtype)

    for name, module in model.named_modules():
        if isinstance(module, modeling_gated.GatedLlamaAttention):
            key = name if f"{name}.q_proj.weight" in checkpoint.tensors else name.split(".", 1)[1]
            weight, bias = fused(f"{key}.q_proj.weight"), fused(f"{key}.q_proj.bias")
            official.use_fused(module, weight, bias, model.config)
    return model
