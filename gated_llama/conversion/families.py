# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The model families that a gated checkpoint can come from, as data: which config fields mean the same in both models,
which a family fixes without saying so, and which of its classes becomes which of ours. And the model types of ours.
"""

import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

import configuration_gated
import configuration_gated_moe
import modeling_gated
import modeling_gated_moe
from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.card import HEADS
from gated_llama.conversion.official import FLAGS, gate_type_of, is_official
from gated_llama.errors import UserError


# Mean the same in every family.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
)
# Keys of a config.json that are not carried over: what the result says anew, what was read into other fields, where
# the config was loaded from, and the paper authors' switches, which become fields of ours.
NOT_CARRIED = {
    *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"),
    *("rope_theta", "rope_scaling", "torch_dtype", "quantization_config"),
    *(*FLAGS, "qkv_bias", "use_qk_norm"),
}


# Fields of experts that mean the same in both families that have them.
EXPERT_FIELDS = ("num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")


@dataclass(frozen=True)
class GatedType:
    prefix: str  # of its classes
    config_class: type[GatedLlamaConfig]
    modeling: ModuleType
    code: tuple[ModuleType, ...]  # that a folder needs to be remote code

    @property
    def code_files(self) -> list[Path]:
        return [Path(module.__file__) for module in self.code]

    def copy_code(self, folder: Path) -> None:
        for file in self.code_files:
            shutil.copyfile(file, folder / file.name)


_DENSE = (configuration_gated, modeling_gated)
GATED_TYPES = {
    "gated_llama": GatedType("GatedLlama", GatedLlamaConfig, modeling_gated, _DENSE),
    "gated_moe": GatedType(
        "GatedMoe",
        configuration_gated_moe.GatedMoeConfig,
        modeling_gated_moe,
        (*_DENSE, configuration_gated_moe, modeling_gated_moe),
    ),
}


@dataclass(frozen=True)
class Family:
    prefix: str  # of its classes in Transformers
    own_fields: tuple[str, ...] = ()  # fields of its config that ours has too
    fixed: dict = field(default_factory=dict)  # what its code does and its config does not say
    becomes: str = "gated_llama"  # the model type of ours


FAMILIES = {
    "llama": Family("Llama", own_fields=("attention_bias", "mlp_bias", "pretraining_tp")),
    "mistral": Family("Mistral", own_fields=("sliding_window",)),
    "qwen2": Family(
        "Qwen2",
        own_fields=("sliding_window", "layer_types"),
        fixed={"attention_bias": True, "attention_out_bias": False},
    ),
    "qwen3": Family(
        "Qwen3",
        own_fields=("attention_bias", "sliding_window", "layer_types"),
        fixed={"use_qk_norm": True},
    ),
    "mixtral": Family(
        "Mixtral",
        own_fields=("sliding_window", *EXPERT_FIELDS, "router_jitter_noise"),
        fixed={"moe_type": "mixtral"},
        becomes="gated_moe",
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        own_fields=(
            *("attention_bias", "sliding_window", *EXPERT_FIELDS),
            *("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
        ),
        fixed={"use_qk_norm": True, "moe_type": "qwen3_moe"},
        becomes="gated_moe",
    ),
}

# What is written where nobody asks for anything else.
GATE_DEFAULTS = {"gate_type": "headwise", "gate_scale": 2.0, "gate_bias": False, "gate_init": "open"}


@dataclass(frozen=True)
class Origin:
    """The source checkpoint: its config, its class, and the class of ours that it becomes."""

    model_type: str
    layout: str  # "plain", "gated" (ours) or "official" (the paper authors')
    config: PreTrainedConfig
    model_class: type
    gated_class: type
    gates: dict | None = None  # the settings of the gates it has
    fixed: dict = field(default_factory=dict)


def recognise(raw_config: dict, where: str) -> Origin:
    """
    Read a config.json with its own family's class, whose defaults count for what the file leaves out.

    Raises:
        UserError: the family or the architecture is not supported, or the config contradicts itself. `where` names it.
    """
    model_type = raw_config.get("model_type")
    known = (*FAMILIES, *GATED_TYPES)  # not a set: a damaged file may have a list there
    if model_type not in known:
        supported = ", ".join(known)
        raise UserError(f"{where} has model_type {model_type!r}, which is not supported: {supported} are.")
    if raw_config.get("quantization_config"):
        raise UserError(
            f"{where} has a quantization_config: convert the unquantized checkpoint, and quantize the result."
        )
    is_gated = model_type in GATED_TYPES
    gated = GATED_TYPES[model_type if is_gated else FAMILIES[model_type].becomes]
    prefix = gated.prefix if is_gated else FAMILIES[model_type].prefix
    architectures = raw_config.get("architectures") or [f"{prefix}ForCausalLM"]
    head = next((head for head in HEADS if architectures == [prefix + head]), None)
    if head is None:
        supported = ", ".join(prefix + head for head in HEADS)
        raise UserError(f"{where} has architectures {architectures}, which is not supported: one of {supported} is.")
    config_class = gated.config_class if is_gated else getattr(transformers, f"{prefix}Config")
    try:
        config = config_class.from_dict(raw_config)
    except Exception as error:  # whatever a malformed value makes the config class do
        raise UserError(f"{where} is not a valid {model_type} config: {_reason(error)}") from error
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):  # which the config classes let pass
        raise UserError(f"{where} is not a valid {model_type} config: its dtype is {config.dtype!r}.")
    gated_class = getattr(gated.modeling, gated.prefix + head)
    if is_gated:
        gates = {name: getattr(config, name) for name in GATE_DEFAULTS}
        return Origin(model_type, "gated", config, gated_class, gated_class, gates)
    if is_official(raw_config):
        bias = bool(raw_config.get("qkv_bias", False))
        gates = {
            "gate_type": gate_type_of(raw_config, where),
            "gate_scale": 1.0,
            "gate_bias": bias,
            "gate_init": "normal",
        }
        fixed = {"attention_bias": bias, "use_qk_norm": bool(raw_config.get("use_qk_norm", True))}
        return Origin(model_type, "official", config, gated_class, gated_class, gates, fixed)
    fixed = FAMILIES[model_type].fixed
    return Origin(model_type, "plain", config, getattr(transformers, prefix + head), gated_class, fixed=fixed)


def read_gated_config(raw_config: dict, where: str) -> GatedLlamaConfig:
    """
    Read the config.json of a gated checkpoint.

    Raises:
        UserError: `where` is not the config.json of a gated checkpoint of ours.
    """
    origin = recognise(raw_config, where)
    if origin.layout != "gated":
        raise UserError(f"{where} has model_type {origin.model_type!r}: no gated model, so convert it first.")
    origin.config.architectures = [origin.gated_class.__name__]  # the default, if it was left out
    return origin.config


def gate_settings(origin: Origin, asked: dict, where: str) -> dict:
    """
    The gates' settings: what is asked for (None: nothing), else what the source has, else the defaults.

    Raises:
        UserError: the source's gates cannot be expressed with the settings asked for.
    """
    have = origin.gates or GATE_DEFAULTS
    settings = {name: value if asked[name] is None else asked[name] for name, value in have.items()}
    if origin.gates is not None:
        for name, value in have.items():
            widened = {"gate_type": "elementwise", "gate_bias": True}.get(name) if origin.layout == "gated" else value
            if settings[name] not in (value, widened):
                raise UserError(f"{where} has gates with {name} {value!r}, which {settings[name]!r} cannot express.")
    return settings


def gated_config(origin: Origin, settings: dict, *, where: str) -> GatedLlamaConfig:
    """
    The config of the gated model: everything `origin` says, and the gates' settings.

    Raises:
        UserError: the settings make no gate, or the sizes in the source's config contradict each other.
    """
    source, config_class = origin.config, origin.gated_class.config_class
    try:
        if origin.layout == "gated":
            return config_class.from_dict(source.to_dict() | settings)
        own = [name for name in FAMILIES[origin.model_type].own_fields if name not in origin.fixed]
        values = {name: getattr(source, name) for name in (*COMMON_FIELDS, *own)} | _undeclared(source)
        values["rope_parameters"] = {key: value for key, value in source.rope_parameters.items() if key != "type"}
        return config_class(
            **values | origin.fixed | settings | {"architectures": [origin.gated_class.__name__]},
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{where} and the settings asked for make no gated model: {_reason(error)}") from error


def base_config(model_type: str, config: GatedLlamaConfig, architecture: str) -> PreTrainedConfig:
    """The config of the family `model_type` that says what `config` says, but for the gates."""
    family = FAMILIES[model_type]
    types = {"layer_types": config.attention_types} if "layer_types" in family.own_fields else {}
    own = [name for name in family.own_fields if name not in types]
    values = {name: getattr(config, name) for name in (*COMMON_FIELDS, *own)} | _undeclared(config) | types
    if types:  # Qwen forgets a window that it is not told to use
        values["use_sliding_window"] = config.sliding_window is not None
    return getattr(transformers, f"{family.prefix}Config")(**values, architectures=[architecture])


def _undeclared(config: PreTrainedConfig) -> dict:
    """
    Fields that the config's class does not declare and code reads where they are set, such as `is_causal` or
    `original_max_position_embeddings`. What only ours declares is none of them, but for `head_dim`, which Qwen2 reads.
    """
    ours = GATED_TYPES["gated_moe"].config_class  # it has the fields of all
    declared = {field.name for kind in (type(config), ours) for field in fields(kind)} - {"head_dim"}
    left_out = declared | NOT_CARRIED | {"layer_types"}
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return {name: value for name, value in values.items() if value is not None}


def _reason(error: Exception) -> str:
    """The last, plainest line: validators wrap the sentence that matters in others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix("ValueError: ").removeprefix("TypeError: ")
