# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Make a whole gated checkpoint of an adapter and the base that it names."""

import json
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from gated_llama.checkpoints.card import merged_card
from gated_llama.checkpoints.folder import (
    CONFIG_NAME,
    find_source,
    new_folder,
    read_checkpoint,
    refuse_nesting,
    save_model,
)
from gated_llama.conversion.families import read_gated_config
from gated_llama.conversion.verify import no_bars_of_transformers
from gated_llama.errors import UserError, first_line
from gated_llama.loading import TASKS, is_adapter


@dataclass(frozen=True)
class MergeResult:
    output: str
    adapter: str
    base: str
    revision: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def merge_adapter(
    adapter: str | os.PathLike, output: str | os.PathLike, *, force: bool = False, progress: bool = True
) -> MergeResult:
    """
    Write to `output` the base of the adapter folder `adapter` with the adapter merged into its weights, in its dtype.

    Raises:
        UserError: `adapter` is none that can be merged, or its base is not there or another; nothing was written.
    """
    if not is_adapter(adapter):
        whole = (Path(adapter) / CONFIG_NAME).is_file()
        what = "a whole model: there is nothing to merge" if whole else "no adapter's folder"
        raise UserError(f"{adapter} is {what}; give a folder with adapter_config.json, such as finetune's --out.")
    from peft import PeftConfig

    from gated_llama.loading import base_of, load_adapter

    settings = PeftConfig.from_pretrained(adapter)
    base = find_source(base_of(adapter), settings.revision)
    for source in (base.folder, Path(adapter)):
        refuse_nesting(source, Path(output))
    checkpoint = read_checkpoint(base.folder)
    read_gated_config(checkpoint.config, str(base.folder / CONFIG_NAME))  # refuses what is not gated
    with nullcontext() if progress else no_bars_of_transformers(), new_folder(output, force=force) as folder:
        model = TASKS.get(settings.task_type, AutoModelForCausalLM).from_pretrained(base.folder, dtype="auto")
        dtype = model.dtype
        tuned = load_adapter(model, adapter)
        try:
            merged = tuned.merge_and_unload(progressbar=progress)
        except (AttributeError, NotImplementedError, ValueError) as error:  # such as a soft prompt's
            raise UserError(f"{adapter} cannot be merged into its base: {first_line(error)}.") from error
        save_model(merged.to(dtype), folder)
        checkpoint.copy_carried(folder)
        card = merged_card(merged.config, base, Path(adapter), Path(output))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return MergeResult(str(output), str(adapter), base.name, base.revision)
