# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a model class makes of a config or of a folder."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gated_llama.errors import UserError


def load_model(model_class: type[PreTrainedModel], folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load for a comparison: in the config's dtype, and from a folder that may have no config.json yet."""
    # The generation config is not compared, and looking for it needs a config.json.
    return model_class.from_pretrained(
        folder, config=config, generation_config=GenerationConfig(), local_files_only=True
    )


def shapes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, where: str) -> dict[str, tuple[int, ...]]:
    """
    Keys and shapes of the class's checkpoint, in which each expert's weights are by themselves.

    Raises:
        UserError: no model can be built from the config, which `where` names.
    """
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever an unknown rope type or activation makes the model class do
        raise UserError(f"{where} describes no model that can be built: {type(error).__name__} {error}.") from error
    tensors = revert_weight_conversion(model, model.state_dict())
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
