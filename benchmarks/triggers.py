# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A text in which most tokens need nothing from attention, so that heads which learn it have a sink."""

import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


LETTERS = 56  # the most frequent characters of Python sources


@dataclass(frozen=True)
class Task:
    length: int = 64
    kinds: int = 4  # of triggers


DEEP = Task()


class Tokenizer:
    """As much of one as `measure` asks for."""

    bos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


@cache
def python_files() -> list[Path]:
    """The standard library's and those of installed packages, in an order that stays the same while they do."""
    folders = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    random.Random(0).shuffle(paths)
    return paths


def python_sources(limit: int) -> Iterator[str]:
    """Their texts, up to `limit` characters."""
    for path in python_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text
        limit -= len(text)
        if limit < 0:
            return


class Triggers:
    """
    Characters as a bigram model of Python sources makes them, behind a beginning-of-text token 0. One in ten is a
    trigger, 1 to `kinds`, and what follows a trigger k is the token k places before it. So no other token needs
    anything from attention: its query is idle.
    """

    def __init__(self, task: Task = DEEP):
        text = "".join(python_sources(2 * 10**6))
        number = {character: n for n, (character, _) in enumerate(Counter(text).most_common(LETTERS))}
        letters = torch.tensor([number[character] for character in text if character in number])
        pairs = torch.full((LETTERS, LETTERS), 0.1)
        self.bigrams = pairs.index_put((letters[:-1], letters[1:]), torch.ones(len(letters) - 1), accumulate=True)
        self.kinds, self.length, self.vocab = task.kinds, task.length, 1 + task.kinds + LETTERS

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """Windows (count, T), the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        first = 1 + self.kinds  # number of the first letter
        ids = torch.zeros(count, self.length, dtype=torch.long)
        letter = torch.randint(LETTERS, (count,), generator=random)
        ids[:, 1] = first + letter
        triggers = torch.rand(count, self.length, generator=random) < 0.1
        kinds = torch.randint(1, first, (count, self.length), generator=random)
        triggers[:, : self.kinds + 2] = False
        rows, kind = torch.arange(count), torch.zeros(count, dtype=torch.long)  # 0: the last was no trigger
        for place in range(2, self.length):
            drawn = first + torch.multinomial(self.bigrams[letter], 1, generator=random)[:, 0]
            copied = ids[rows, (place - 1 - kind).clamp_min(1)]
            new = triggers[:, place] & (kind == 0)
            ids[:, place] = torch.where(kind > 0, copied, torch.where(new, kinds[:, place], drawn))
            kind = torch.where(new, kinds[:, place], 0)
            letter = torch.where(ids[:, place] >= first, ids[:, place] - first, letter)
        return ids
