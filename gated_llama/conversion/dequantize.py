# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A GGUF as a source: Transformers reads it and makes its weights dense; what it would leave out is read here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gated_llama.checkpoints.folder import Source, hub_file, work_folder
from gated_llama.conversion.targets.gguf import rope_factors
from gated_llama.conversion.verify import no_bars_of_transformers
from gated_llama.errors import UserError, first_line


ARCHITECTURES = ("llama", "qwen2", "qwen3")
# What a GGUF keeps of Llama 3's scaled RoPE is a factor for each frequency; these are the published settings.
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_FACTORS, LLAMA3_CONTEXT = (8.0, 32.0), 8192  # Llama 3.1 and 3.3; Llama 3.2


@contextmanager
def dequantized(
    source: str | os.PathLike,
    gguf_file: str | None,
    revision: str | None,
    output: Path,
    dtype: torch.dtype,
    *,
    force: bool = False,
) -> Iterator[Source]:
    """
    In the block, a folder beside `output` with what is in a GGUF: the file `source`, or `gguf_file` in that folder or
    Hub repository.

    Raises:
        UserError: there is none, or it cannot be read whole; or `output` may not be written.
    """
    path, on_hub, commit = Path(source), False, None
    if gguf_file is None:
        gguf_file, path = path.name, path.parent
    elif not path.is_dir():
        found = hub_file(str(source), gguf_file, revision=revision)
        path, on_hub, commit = found.parent, True, found.parent.name
    if not on_hub and revision is not None:
        raise UserError(f"{source} is local and has no revision {revision!r}: leave --revision out.")
    if not (path / gguf_file).is_file():
        raise UserError(f"{path / gguf_file} is no file.")
    with work_folder(output, "dense", force=force) as folder:
        quantized = dequantize(path / gguf_file, folder, dtype)
        yield Source(folder, str(source) if on_hub else gguf_file, commit, on_hub, gguf_file, quantized)


def dequantize(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """
    Write the model and the tokenizer in a GGUF as a folder of Transformers. It takes memory for the whole model.

    Returns:
        How the weights were quantized, as GGUF names it.

    Raises:
        UserError: it is no GGUF of an architecture that is read, or has something that would be left out.
    """
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise UserError("a GGUF is read with the gguf package: `pip install gguf`.") from error
    try:
        file = GGUFReader(gguf)
    except (OSError, ValueError, IndexError, KeyError) as error:  # the last two of a file that was cut off
        raise UserError(f"{gguf} cannot be read as a GGUF: {first_line(error)}") from error

    def key(name: str, default=None):
        return file.fields[name].contents() if name in file.fields else default

    architecture = key("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{gguf} is of the architecture {architecture!r}: {', '.join(ARCHITECTURES)} are read.")
    rope = _rope(gguf, architecture, key, {tensor.name: tensor.data for tensor in file.tensors})
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    settings = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks packed, which cannot be saved, unless told
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with no_bars_of_transformers():
            config = AutoConfig.from_pretrained(**where)
            config.rope_parameters = {**config.rope_parameters, **rope}
            if size := key(f"{architecture}.attention.key_length"):
                config.head_dim = size
            model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=dtype, **settings)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever a damaged or unusual file makes the reader do
        raise UserError(f"{gguf} cannot be read by Transformers: {type(error).__name__} {first_line(error)}") from error
    config = model.config
    config.quantization_config = None
    read = {
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    for name, value in read.items():
        told = key(f"{architecture}.{name}", value)
        if told != value:
            raise UserError(f"{gguf} has {name} {told}, and Transformers reads {value}: it would be another model.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = key("general.file_type")
    return "an unknown type" if kind is None else LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _rope(gguf: Path, architecture: str, key, tensors: dict) -> dict:
    """The settings of scaled RoPE, which Transformers does not read; none if there are none."""
    kind = key(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(key(f"{architecture}.rope.scaling.factor"))}
    if kind != "none":
        raise UserError(f"{gguf} has RoPE scaled by {kind!r}, which is not read: convert the original checkpoint.")
    if "rope_freqs.weight" not in tensors:
        return {}
    found = torch.tensor(tensors["rope_freqs.weight"].copy(), dtype=torch.float64)
    for factor in LLAMA3_FACTORS:
        rope = {**LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": LLAMA3_CONTEXT}
        settings = rope | {"rope_theta": key(f"{architecture}.rope.freq_base", 10000.0)}
        expected, _ = rope_factors(LlamaConfig(rope_parameters=settings, head_dim=2 * len(found)))
        if torch.allclose(found, expected, rtol=1e-4):
            return rope
    raise UserError(f"{gguf} has RoPE factors that are not Llama 3's: convert the original checkpoint.")
