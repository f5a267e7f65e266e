# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Serve a gated model over HTTP."""

import os
import sys
from collections.abc import Sequence

from huggingface_hub.constants import HF_HUB_CACHE

import modeling_gated
import modeling_gated_moe
from gated_llama.errors import UserError


def serve(model: str, options: Sequence[str] = ()) -> None:
    """
    Run `transformers serve MODEL OPTIONS`, which looks the model's class up as an attribute of `transformers`.

    Raises:
        UserError: the model is an adapter, or what `transformers serve` needs is not installed.
    """
    from gated_llama.loading import refuse_adapter  # not for vLLM's plugin

    refuse_adapter(model)
    sys.argv = ["transformers", "serve", model, *options]
    os.makedirs(HF_HUB_CACHE, exist_ok=True)  # /v1/models looks through it
    try:
        from transformers.cli.serving import model_manager
        from transformers.cli.transformers import main

        for modeling in (modeling_gated, modeling_gated_moe):
            for model_class in modeling.AUTO_CLASSES.values():  # its `transformers` need not be the one imported here
                setattr(model_manager.transformers, model_class.__name__, model_class)
        main()
    except ImportError as error:
        raise UserError(f"transformers serve cannot start: {error}.") from error


def register_with_vllm() -> None:
    """
    vLLM's plugin (entry point `vllm.general_plugins`): our causal LMs, run by its Transformers backend. From that vLLM
    makes what it needs for the bare model and the classification head, pooling the last token as they do.
    """
    from vllm import ModelRegistry

    backend = "vllm.model_executor.models.transformers"
    ModelRegistry.register_model("GatedLlamaForCausalLM", f"{backend}:TransformersForCausalLM")
    ModelRegistry.register_model("GatedMoeForCausalLM", f"{backend}:TransformersMoEForCausalLM")
