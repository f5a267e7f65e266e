# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Load a checkpoint for a command: a gated or plain model with its tokenizer, no code of the checkpoint run."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama.errors import UserError, first_line


def load(source: str | os.PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Raises:
        UserError: there is no causal language model with a tokenizer at `source`.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} cannot be loaded as a causal language model with a tokenizer: {first_line(error)}"
        ) from error
