# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Load a checkpoint or an adapter for a command: a model with its tokenizer, no code of the checkpoint run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama.checkpoint import INDEX_NAME, WEIGHTS_NAME
from gated_llama.errors import UserError, first_line


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))


def refuse_adapter(source: str | os.PathLike) -> None:
    """
    Raises:
        UserError: `source` is an adapter, with no weights of a model beside it, where a whole checkpoint is needed.
    """
    if is_adapter(source) and not any((Path(source) / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise UserError(
            f"{source} is an adapter: make it whole first, with `gated-llama merge {source} OUT`, or, if its base has "
            "no gates, with merge_and_unload() of PEFT."
        )


def load(
    source: str | os.PathLike, *, revision: str | None = None, **settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model at `source`, gated or plain, or the adapter there on the base model that it names, at the revision that it
    names; `settings` are those of `from_pretrained`.

    Raises:
        UserError: there is no causal language model with a tokenizer at `source`, or the adapter's base is another.
    """
    if is_adapter(source):
        from gated_llama.adapters import base_of, base_revision, load_adapter

        model, tokenizer = load(base_of(source), revision=revision or base_revision(source), **settings)
        return load_adapter(model, source), tokenizer
    with _refusals(source, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, **settings)
    return model, load_tokenizer(source, revision)


def load_tokenizer(source: str | os.PathLike, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    Raises:
        UserError: there is no tokenizer at `source`.
    """
    with _refusals(source, "a tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision)


@contextmanager
def _refusals(source: str | os.PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source} cannot be loaded as {what}: {first_line(error)}") from error
