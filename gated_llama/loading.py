# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Load a checkpoint or an adapter for a command: a model with its tokenizer, no code of the checkpoint run."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_gated_moe  # noqa: F401  (registers the Auto classes, those of modeling_gated too)
from gated_llama.checkpoints.folder import INDEX_NAME, WEIGHTS_NAME, hub_file, read_header, read_json
from gated_llama.errors import UserError, first_line
from gated_llama.gates import gate_parameters, is_gate


if TYPE_CHECKING:
    from peft import PeftModel


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of adapters, by PEFT's name of the task.
TASKS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
PEFT_PREFIX = "base_model.model."  # of every key in an adapter's file


def is_adapter(folder: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))


def refuse_adapter(source: str | os.PathLike) -> None:
    """
    Check that `source` is not just an adapter.

    Raises:
        UserError: `source` is an adapter, with no weights of a model beside it, where a whole checkpoint is needed.
    """
    if is_adapter(source) and not any((Path(source) / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise UserError(
            f"{source} is an adapter: make it whole first, with `gated-llama merge {source} OUT`, or, if its base has "
            "no gates, with merge_and_unload() of PEFT."
        )


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
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        path = hub_file(str(adapter), name, what="adapter", subfolder=subfolder, **where)
    return path.parent


def load_adapter(model: PreTrainedModel, adapter: str | os.PathLike, **settings) -> "PeftModel":
    """
    [`~peft.PeftModel.from_pretrained`], which by itself leaves out gates that find no place in the model.

    Args:
        model: the converted checkpoint that the adapter was trained on.
        adapter: a folder, or the id of a Hub repository.
        settings: as for `PeftModel.from_pretrained`, such as `is_trainable=True`, `subfolder` or `revision`.

    Raises:
        UserError: the adapter is not whole, or `model` is not a model like the one it was trained on.
    """
    from peft import PeftModel

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


def load(
    source: str | os.PathLike, *, revision: str | None = None, **settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model at `source`, gated or plain, or the adapter there on the base model that it names, at the revision that it
    names; `settings` are those of `from_pretrained`.

    Raises:
        UserError: there is no whole causal language model with a tokenizer at `source`, or the adapter's base is
            another.
    """
    if is_adapter(source):
        model, tokenizer = load(base_of(source), revision=revision or base_revision(source), **settings)
        return load_adapter(model, source), tokenizer
    with _refusals(source, "a causal language model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, output_loading_info=True, **settings
        )
    if missing := sorted(info["missing_keys"]):  # which Transformers would make up
        raise UserError(f"{source} has no {missing[0]}, so it is no whole causal language model: take one that is.")
    return model, load_tokenizer(source, revision)


def load_tokenizer(source: str | os.PathLike, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer at `source`.

    Raises:
        UserError: there is no tokenizer at `source`.
    """
    with _refusals(source, "a tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision)


@contextmanager
def _refusals(source: str | os.PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, AssertionError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded as {what}: {first_line(error)}") from error
