# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A tokenizer keeps its meaning when its model changes its `model_type`. `AutoTokenizer` chooses a class by that type, by
rules that know `mistral` and `qwen2` and not us, before it believes what tokenizer_config.json says: the same files
then make other token ids, or pad on the other side.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gated_llama.checkpoints.folder import TOKENIZER_CONFIG, read_json
from gated_llama.errors import VerificationError, first_line


# Any of them makes a tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# Words, numbers, white space, other scripts, code, and special tokens spelled out: where tokenizer classes differ.
SAMPLES = (
    "The grumpy cat sat on the mat, which was red.",
    " leading, trailing and  double  spaces ",
    "12345 + 678,90 = 3.14e-2\n\n\tdef f(x): return x",
    "don't we'll I'VE naïve café Straße 東京 привет 😀",
    "a {} b",  # with a special token between
)
COMPARED = ("padding_side", "truncation_side", "model_max_length", "chat_template", "special_tokens_map")


@dataclass(frozen=True)
class Kept:
    """What was done with a tokenizer, and the class that its file named before if that had to change."""

    said: str
    renamed: bool = False
    class_before: str | None = None


def keep_tokenizer(source: Path, source_config: PreTrainedConfig, folder: Path, config: PreTrainedConfig) -> Kept:
    """
    See that `AutoTokenizer` makes of `folder`, whose model's config is `config`, what it makes of `source`: the same
    class, by naming it in tokenizer_config.json if need be, and the same of some texts.

    Raises:
        VerificationError: it does not.
    """
    if not any((source / name).is_file() for name in FILES):
        return Kept("none")
    if _has_code(source):
        return Kept("not compared: it has code of its own, which a conversion does not run")
    try:
        tokenizer = _load(source, source_config)
    except Exception as error:  # a damaged file, a package that is missing: the source has no tokenizer here either
        return Kept(f"not compared: the source's does not load ({first_line(error)})")
    other, wanted, before = _load(folder, config), type(tokenizer).__name__, None
    renamed = type(other).__name__ != wanted
    if renamed:
        before = name_class(folder, wanted)
        other = _load(folder, config)
    _compare(tokenizer, other)
    return Kept("gives the token ids that the source's gives", renamed, before)


def name_class(folder: Path, tokenizer_class: str | None) -> str | None:
    """Write the tokenizer's class (None: no such key) to tokenizer_config.json; returns what it was."""
    path = folder / TOKENIZER_CONFIG
    contents = read_json(path) if path.is_file() else {}
    before = contents.pop("tokenizer_class", None)
    contents |= {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return before


def _compare(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    special = tokenizer.eos_token or tokenizer.bos_token or ""
    for text in (sample.format(special) if "{}" in sample else sample for sample in SAMPLES):
        expected, actual = tokenizer(text).input_ids, other(text).input_ids
        if expected != actual:
            raise VerificationError(f"the tokenizer makes {actual} of {text!r} where the source's makes {expected}.")
    for name in COMPARED:
        if getattr(tokenizer, name) != getattr(other, name):
            raise VerificationError(
                f"the tokenizer has {name} {getattr(other, name)!r}, the source's {getattr(tokenizer, name)!r}."
            )


def _has_code(folder: Path) -> bool:
    path = folder / TOKENIZER_CONFIG
    return path.is_file() and bool(read_json(path).get("auto_map"))


def _load(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
