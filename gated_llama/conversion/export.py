# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Write a gated checkpoint in a format that others read:

    base       the family it was converted from, while its gates are open: the shards are carried over
    qwen3_5    Transformers' own Qwen3.5 text model, which has this gate: no custom code needed
    official   the paper authors' layout (see `gated_llama.conversion.official`)
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import modeling_gated
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
from gated_llama.checkpoints.shards import TensorPlan, carried, write_index, write_shards
from gated_llama.conversion import official
from gated_llama.conversion.classes import load_model, shapes_of
from gated_llama.conversion.families import FAMILIES, base_config, read_gated_config
from gated_llama.conversion.tokenizer import keep_tokenizer, name_class
from gated_llama.conversion.verify import Verification
from gated_llama.conversion.verify import verify as compare_models
from gated_llama.errors import UserError
from gated_llama.gates import is_gate
from gated_llama.loading import refuse_adapter


@dataclass(frozen=True)
class ExportResult:
    output: str
    source: str
    to: str
    architecture: str
    verification: Verification | None = None
    in_own_dtype: Verification | None = None  # where `verification` is in fp32 and the checkpoint is not

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Target:
    """A format: what is written, and how it is loaded to be compared (given the folder and a dtype)."""

    config: dict
    plans: dict[str, TensorPlan]
    load: Callable[[Path, torch.dtype | None], PreTrainedModel]
    expect: str
    gates_added: bool = False


def export_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to: str,
    revision: str | None = None,
    verify: bool = True,
    force: bool = False,
    progress: bool = True,
) -> ExportResult:
    """
    Write the gated checkpoint `source` as `to` (`"base"`, `"qwen3_5"` or `"official"`) in the folder `output`.

    Raises:
        UserError: the source is no gated checkpoint, or `to` cannot express it; nothing was written.
        VerificationError: the result does not compute what the source does; nothing was written.
    """
    refuse_adapter(source)
    if to not in TARGETS:
        raise UserError(f"there is no export to {to!r}: {', '.join(TARGETS)} are supported.")
    found = find_source(source, revision)
    refuse_nesting(found.folder, Path(output))
    checkpoint = read_checkpoint(found.folder)
    where = str(checkpoint.folder / CONFIG_NAME)
    config = read_gated_config(checkpoint.config, where)
    if config.gate_strength != 1:
        raise UserError(
            f"{where} has gate_strength {config.gate_strength:g}, which no other format can express: set it to 1."
        )
    gated_class = getattr(modeling_gated, config.architectures[0])
    shapes = shapes_of(gated_class, config, where)
    if missing := missing_tensors(shapes, checkpoint.tensors, tied=config.tie_word_embeddings):
        raise UserError(f"{checkpoint.folder} has no tensor {missing[0]}, which its config needs.")
    target = _target(to, checkpoint, config)

    with new_folder(output, force=force) as folder:
        write_shards(checkpoint, target.plans, folder, progress=progress)
        if {plan.info.file for plan in target.plans.values()} != {WEIGHTS_NAME}:
            write_index(folder, target.plans)
        checkpoint.copy_carried(folder)
        if to == "base" and "tokenizer_class" in (config.conversion or {}):  # as it was before the conversion
            name_class(folder, config.conversion["tokenizer_class"])
        keep_tokenizer(checkpoint.folder, config, folder, AutoConfig.for_model(**target.config))

        def compare(dtype: torch.dtype | None, expect: str) -> Verification:
            return compare_models(
                partial(target.load, folder, dtype),
                partial(_load, gated_class, config, checkpoint.folder, dtype),
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
            in_own = compare(None, "reported") if config.dtype not in (None, torch.float32) else None
        (folder / CONFIG_NAME).write_text(json.dumps(target.config, indent=2) + "\n", encoding="utf-8")
    return ExportResult(str(output), found.name, to, target.config["architectures"][0], in_fp32, in_own)


def _target(to: str, checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    """
    Raises:
        UserError: `to` cannot express the model; it names the formats that can.
    """
    try:
        return TARGETS[to](checkpoint, config)
    except UserError as error:
        others = []
        for other in TARGETS.keys() - {to}:
            with suppress(UserError):
                TARGETS[other](checkpoint, config)
                others.append(other)
        can = f"--to {' or '.join(sorted(others))} can" if others else "no other format can either: keep it as it is"
        raise UserError(f"{error}; {can}.") from None


def _without_gates(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """Everything but the gates, in its shards; alone in one, under the name that needs no index."""
    kept = {key: info for key, info in checkpoint.tensors.items() if not is_gate(key)}
    single = len({info.file for info in kept.values()}) == 1
    return {key: carried(key, info, file=WEIGHTS_NAME if single else info.file) for key, info in kept.items()}


# --- base -----------------------------------------------------------------------------------------------------------


def _to_base(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    where = checkpoint.folder / CONFIG_NAME
    model_type = (config.conversion or {}).get("source_model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where} names no family that it was converted from, so there is no base to go back to")
    _refuse_moved_gates(checkpoint, config)
    head = config.architectures[0].removeprefix("GatedLlama")
    base_class = getattr(transformers, FAMILIES[model_type].prefix + head)
    base = base_config(model_type, config, base_class.__name__)
    return Target(
        config=_saved(base),
        plans=_without_gates(checkpoint),
        load=partial(_load, base_class, base),
        expect="equal" if config.gate_scale == 2 else "rounding",
        gates_added=True,
    )


def _refuse_moved_gates(checkpoint: Checkpoint, config: GatedLlamaConfig) -> None:
    """Open is what a conversion writes: zero weights, and the bias at which the gate is 1."""
    if config.gate_init != "open":
        raise UserError(f"{checkpoint.folder} has gates that did not start open (gate_init is {config.gate_init!r})")
    for key, info in checkpoint.tensors.items():
        if not is_gate(key):
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
                "which a model without gates cannot express"
            )


# --- fused layouts --------------------------------------------------------------------------------------------------


def _require(config: GatedLlamaConfig, to: str, needs: dict[str, bool], folder: Path) -> None:
    for name, needed in needs.items():
        if (value := getattr(config, name)) != needed:
            raise UserError(f"{folder} has {name} {value!r}, which {to} cannot express")
    if config.architectures != ["GatedLlamaForCausalLM"]:
        raise UserError(f"{folder} is a {config.architectures[0]}, and {to} is for causal language models")
    if "sliding_attention" in config.attention_types:
        raise UserError(f"{folder} has sliding-window layers, which {to} cannot express")


def _has_bias(config: GatedLlamaConfig) -> bool:
    """A fused layout has a bias on q, k, v, o and the gate, or on none of them; one that ours lacks is zero there."""
    return config.attention_bias or config.attention_out_bias or config.gate_bias


def _fused_plans(
    checkpoint: Checkpoint,
    config: GatedLlamaConfig,
    fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: int,
) -> dict[str, TensorPlan]:
    """q_proj takes the gate's rows in, and o_proj the gate's scale (which a σ of its own does not have)."""
    plans = _without_gates(checkpoint)
    for key in [key for key in plans if key.endswith(".q_proj.weight")]:
        attention, file = key.removesuffix("q_proj.weight"), plans[key].info.file
        for kind in ("weight", "bias") if _has_bias(config) else ("weight",):
            plans[f"{attention}q_proj.{kind}"] = _fused(checkpoint, attention, kind, file, fuse, rows)
        for name in ("k_proj", "v_proj", "o_proj") if _has_bias(config) else ():
            weight = checkpoint.tensors[f"{attention}{name}.weight"]
            zero = replace(weight, file=file, shape=weight.shape[:1])
            plans.setdefault(f"{attention}{name}.bias", TensorPlan(zero, make=partial(torch.zeros, zero.shape)))
        if config.gate_scale != 1:
            output = f"{attention}o_proj.weight"
            plans[output] = replace(plans[output], make=partial(torch.mul, other=config.gate_scale))
    return plans


def _fused(
    checkpoint: Checkpoint, attention: str, kind: str, file: str, fuse: Callable[..., torch.Tensor], rows: int
) -> TensorPlan:
    """The weight or bias of the queries and of the gates in one; a bias that one of them lacks is zero."""
    parts = [f"{attention}{name}" for name in ("q_proj", "attn_gate.proj")]
    weights = [checkpoint.tensors[f"{part}.weight"] for part in parts]
    have = [f"{part}.{kind}" in checkpoint.tensors for part in parts]

    def make(*found: torch.Tensor) -> torch.Tensor:
        left = iter(found)
        return fuse(*(next(left) if own else torch.zeros(w.shape[0]) for own, w in zip(have, weights, strict=True)))

    shape = (rows, *weights[0].shape[1:]) if kind == "weight" else (rows,)
    inputs = tuple(f"{part}.{kind}" for part, own in zip(parts, have, strict=True) if own)
    return TensorPlan(replace(weights[0], file=file, shape=shape), inputs, make)


def _to_official(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    _require(config, "official", {"mlp_bias": False}, checkpoint.folder)
    fuse = partial(official.fuse, config=config)
    plans = _fused_plans(checkpoint, config, fuse, official.fused_rows(config))
    saved = _saved(base_config("qwen3", config, "Qwen3ForCausalLM"))
    rope = saved.pop("rope_parameters")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    saved |= {flag: config.gate_type == kind for flag, kind in official.FLAGS.items()}
    saved |= {"use_qk_norm": config.use_qk_norm, "qkv_bias": _has_bias(config)}
    saved |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "torch_dtype": saved.pop("dtype", None),
    }
    scaled = deepcopy(config)
    scaled.gate_scale, scaled.gate_init = 1.0, "normal"
    # The projections are compared as the authors' code runs them: fused, on the tensors that were written.
    return Target(saved, plans, partial(_load_official, scaled, checkpoint, plans), expect="rounding")


def _load_official(
    config: GatedLlamaConfig,
    checkpoint: Checkpoint,
    plans: dict[str, TensorPlan],
    folder: Path,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    model = _load(modeling_gated.GatedLlamaForCausalLM, config, checkpoint.folder, dtype)
    for name, module in model.named_modules():
        if isinstance(module, modeling_gated.GatedLlamaAttention):
            read = partial(_read, plans, folder, model.dtype)
            weight, bias = read(f"{name}.q_proj.weight"), read(f"{name}.q_proj.bias")
            official.use_fused(module, weight, bias, config)
            module.o_proj.weight.data = read(f"{name}.o_proj.weight")
    return model


def _read(plans: dict[str, TensorPlan], folder: Path, dtype: torch.dtype, key: str) -> torch.Tensor | None:
    if key not in plans:
        return None
    with safe_open(folder / plans[key].info.file, framework="pt") as file:
        return file.get_tensor(key).to(dtype)


def _to_qwen3_5(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    _require(config, "qwen3_5", {"use_qk_norm": True, "mlp_bias": False}, checkpoint.folder)

    def fuse(queries: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        if config.gate_type == "headwise":
            gates = gates.repeat_interleave(config.head_dim, dim=0)
        heads = [part.unflatten(0, (config.num_attention_heads, -1)) for part in (queries, gates)]
        return torch.cat(heads, dim=1).flatten(0, 1)  # of each head [H query rows | H gate rows]

    rows = 2 * config.num_attention_heads * config.head_dim
    plans = _fused_plans(checkpoint, config, fuse, rows)
    for key, plan in plans.items():
        if key.endswith("norm.weight"):  # stored as their distance from 1, which fp32 holds for every bf16 weight
            plans[key] = replace(plan, info=replace(plan.info, dtype="F32"), make=lambda weight: weight.float() - 1)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings "
        "attention_dropout head_dim pad_token_id bos_token_id eos_token_id dtype"
    ).split()
    qwen = Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in names},
        attention_bias=_has_bias(config),
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        layer_types=["full_attention"] * config.num_hidden_layers,
        architectures=["Qwen3_5ForCausalLM"],
    )
    return Target(_saved(qwen), plans, partial(_load, Qwen3_5ForCausalLM, qwen), expect="rounding")


def _saved(config: PreTrainedConfig) -> dict:
    return json.loads(config.to_json_string())


def _load(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    own = deepcopy(config)
    own.dtype = dtype or config.dtype
    return load_model(model_class, folder, own)


TARGETS = {"base": _to_base, "qwen3_5": _to_qwen3_5, "official": _to_official}
