# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
PEFT and gated models. Importing this file makes `gated_llama` known to PEFT's default target modules, so that
`LoraConfig()` and its like work without `target_modules`.
"""

import json
import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel
from peft.utils import constants
from safetensors import SafetensorError
from transformers import PreTrainedModel

from gated_llama.checkpoint import HTTPError, read_header, read_json
from gated_llama.errors import UserError, first_line
from gated_llama.gates import gate_parameters, is_gate
from gated_llama.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS


PEFT_PREFIX = "base_model.model."  # of every key in an adapter's file

ATTENTION = r".*\.self_attn\.(q|k|v|o)_proj"
ATTENTION_AND_MLP = r".*\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj"

# Every method's defaults are a table from model type to module names; a gated Llama's modules are named as a Llama's.
for _table in vars(constants).values():
    if isinstance(_table, dict) and "llama" in _table:
        _table.setdefault("gated_llama", _table["llama"])


def gated_lora_config(r: int = 16, *, mlp: bool = False, **settings) -> LoraConfig:
    """
    LoRA of rank `r` on q, k, v and o, with `mlp` on the MLP too, and the gates trained whole beside it.

    Args:
        settings: any other field of [`~peft.LoraConfig`], such as `use_dora=True` or `task_type="SEQ_CLS"`.
    """
    defaults = {
        "lora_alpha": 2 * r,
        "target_modules": ATTENTION_AND_MLP if mlp else ATTENTION,
        "modules_to_save": ["attn_gate.proj"],  # the linear: of those PEFT mixes the adapters of a batch
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(r=r, **{**defaults, **settings})


def base_of(adapter: str | os.PathLike) -> str:
    """
    The checkpoint that an adapter folder names as its base: a folder, or a Hub id.

    Raises:
        UserError: it names none.
    """
    where = Path(adapter) / ADAPTER_CONFIG
    base = read_json(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{where} names no base model: set base_model_name_or_path to the converted checkpoint.")
    return base


def base_revision(adapter: str | os.PathLike) -> str | None:
    """The commit of the base, on the Hub, that an adapter folder was trained on."""
    return read_json(Path(adapter) / ADAPTER_CONFIG).get("revision")


def _folder_of(adapter: str | os.PathLike, settings: dict) -> Path:
    """Where the adapter's two files are: in a local folder, or in the Hub's cache, downloaded if need be."""
    subfolder = settings.get("subfolder")
    if Path(adapter).is_dir():
        return Path(adapter, subfolder or "")
    names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
    where = {name: settings[name] for name in names if name in settings}
    try:
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            path = hf_hub_download(str(adapter), name, subfolder=subfolder, **where)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise UserError(
            f"{adapter} is no local folder, and the Hub did not give its adapter: {first_line(error)}"
        ) from error
    return Path(path).parent


def load_adapter(model: PreTrainedModel, adapter: str | os.PathLike, **settings) -> PeftModel:
    """
    [`~peft.PeftModel.from_pretrained`], which by itself leaves out gates that find no place in the model.

    Args:
        model: the converted checkpoint that the adapter was trained on.
        adapter: a folder, or the id of a Hub repository.
        settings: as for `PeftModel.from_pretrained`, such as `is_trainable=True`, `subfolder` or `revision`.

    Raises:
        UserError: the adapter is not whole, or `model` is not a model like the one it was trained on.
    """
    folder = _folder_of(adapter, settings)
    gates = {key: info.shape for key, info in read_header(folder, ADAPTER_WEIGHTS).items() if is_gate(key)}
    have = {PEFT_PREFIX + name: tuple(parameter.shape) for name, parameter in gate_parameters(model)}
    name = model.config.name_or_path or type(model).__name__
    for key, shape in gates.items():
        if key not in have:
            raise UserError(
                f"{adapter} was trained with gates on {base_of(folder)}, but {name} has no "
                f"{key.removeprefix(PEFT_PREFIX)}: load it on that converted checkpoint."
            )
        if have[key] != shape:
            raise UserError(
                f"{adapter} has gates of shape {list(shape)} where {name} has {list(have[key])}: load it on the "
                f"converted checkpoint that it was trained on, {base_of(folder)}."
            )
    try:
        return PeftModel.from_pretrained(model, adapter, **settings)
    except (OSError, RuntimeError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{adapter} does not fit {name}: {first_line(error)}") from error
