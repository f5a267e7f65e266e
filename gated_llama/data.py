# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text to train on: documents from files or from the Hub, tokens from documents, rows of equal length from tokens."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gated_llama.checkpoints.card import is_hub_id
from gated_llama.errors import UserError, first_line


PASSAGE = 96  # tokens that come back as a whole


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a conversation, and where it came from."""

    content: str | list[dict]
    where: str


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset):
    """Rows of token ids (T,) to train on, and what cutting them cost."""

    rows: Sequence[torch.Tensor]
    documents: int
    truncated: int = 0  # documents that lost their end
    dropped: int = 0  # tokens that are in no row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids = self.rows[number].tolist()
        return {"input_ids": ids, "labels": ids}

    def first(self, tokens: int) -> "Rows":
        """The first rows, of `tokens` tokens at the most, but one row at least."""
        ends = accumulate(len(row) for row in self.rows)
        count = max(1, sum(end <= tokens for end in ends))
        return replace(self, rows=self.rows[:count])

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def __str__(self) -> str:
        cut = f"; {self.truncated:,} of them cut, {self.dropped:,} tokens left out" if self.dropped else ""
        return f"{self.tokens:,} tokens in {len(self):,} rows from {self.documents:,} documents{cut}"


def read_documents(sources: Iterable[str | Path]) -> list[Document]:
    """
    The documents of local files and Hub datasets. A `.jsonl` file has one a line, `{"text": …}` or `{"messages": …}`;
    any other file but a `.json` is one; what is no file is the id of a Hub dataset with such columns, `:SPLIT` after it
    if it is not `train` (this takes the `datasets` package).

    Raises:
        UserError: a file or dataset cannot be read, or a line has neither text nor messages.
    """
    documents = []
    for source in sources:
        path = Path(source)
        if path.suffix == ".jsonl":
            documents += _read_lines(path)
        elif path.suffix == ".json" and path.exists():
            raise UserError(
                f"{path} is one JSON value, syntax and all: give a .jsonl file, which has a document a line."
            )
        elif path.exists() or (path.suffix and not is_hub_id(str(source).partition(":")[0])):
            documents.append(Document(_read_text(path), str(path)))
        else:
            documents += _read_hub(str(source))
    return documents


def digest_of(documents: Iterable[Document]) -> str:
    """Hexadecimal digits that stand for these texts in this order, so that a run is gone on with on the same."""
    found = sha256()
    for document in documents:
        found.update(json.dumps(document.content).encode() + b"\n")
    return found.hexdigest()[:12]


def check_tokens(largest: int, vocabulary: int) -> None:
    """
    Check that a model with so many embeddings has the `largest` of some token ids.

    Raises:
        UserError: it does not.
    """
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer made token {int(largest)}, and the model has {vocabulary}: it is another model's tokenizer."
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}.") from None


def _read_lines(path: Path) -> Iterator[Document]:
    lines = _read_text(path).removesuffix("\n").split("\n")  # not splitlines(): JSON strings may hold other line ends
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}).") from None
        yield _document(record, f"{path}, line {number}")


def _document(record, where: str) -> Document:
    record = record if isinstance(record, dict) else {}
    text, messages = record.get("text"), record.get("messages")
    try:
        json.dumps([text, messages], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # which no tokenizer takes
        raise UserError(f"{where}: holds half of a character (a lone surrogate), as cut text does: mend it.") from None
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return Document(messages, where)
    if isinstance(text, str) and text and messages is None:
        return Document(text, where)
    raise UserError(
        f'{where}: needs a "text", such as {{"text": "…"}}, or "messages", such as '
        '{"messages": [{"role": "user", "content": "…"}]}.'
    )


def _is_message(message) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _read_hub(source: str) -> Iterator[Document]:
    name, _, split = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source} is no file; for a dataset of the Hub, `pip install datasets`.") from None
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the Hub, the network or a file of the dataset may be at fault for
        raise UserError(f"{source} is no file, and no dataset that the Hub gave: {first_line(error)}") from error
    for number, record in enumerate(dataset):
        yield _document(record, f"{source}, row {number}")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document | str], *, progress: bool = False
) -> list[list[int]]:
    """
    Token ids of each document: a text with the special tokens that the tokenizer gives it and an end-of-text token,
    a conversation as the chat template writes it.

    Raises:
        UserError: there are messages and no chat template, or the template does not take them.
    """
    ids = []
    for document in tqdm(documents, desc="tokenizing", unit=" documents", disable=not progress):
        content = document.content if isinstance(document, Document) else document
        if isinstance(content, str):
            tokens = list(tokenizer(content, verbose=False).input_ids)
            if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
                tokens.append(tokenizer.eos_token_id)
            ids.append(tokens)
            continue
        if tokenizer.chat_template is None:
            raise UserError(f"{document.where}: has messages, and the tokenizer has no chat template: give text.")
        try:
            ids.append(tokenizer.apply_chat_template(content, return_dict=False))
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{document.where}: the chat template refuses it: {first_line(error)}") from None
    return ids


def pack(documents: Sequence[list[int]], length: int) -> Rows:
    """All tokens one after the other, cut into rows of `length`; what does not fill the last row is left out."""
    tokens = torch.tensor([token for document in documents for token in document])
    rows = len(tokens) // length
    dropped = len(tokens) - rows * length
    return Rows(tokens[: rows * length].view(rows, length), len(documents), min(dropped, 1), dropped)


def one_row_each(documents: Sequence[list[int]], length: int) -> Rows:
    """A row for each document, cut off at `length` tokens; a single token, which predicts nothing, makes no row."""
    rows = [torch.tensor(document[:length]) for document in documents if len(document) > 1]
    lost = [max(0, len(document) - length) if len(document) > 1 else len(document) for document in documents]
    return Rows(rows, len(documents), sum(cut > 0 for cut in lost), sum(lost))


def token_windows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document | str], length: int) -> torch.Tensor:
    """
    All tokens one after the other, cut into windows `(windows, length)`, each of which begins as the tokenizer begins a
    text: with the beginning-of-text token if it adds one.

    Raises:
        UserError: the documents do not fill one window.
    """
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
    ids = [token for document in tokenize(tokenizer, documents) for token in document if [token] != begin]
    content = length - len(begin)
    count = len(ids) // content if content > 0 else 0
    if count == 0:
        raise UserError(f"the text has {len(ids)} tokens, which fill no window of {length}: give more text.")
    rows = torch.tensor(ids[: count * content]).view(count, content)
    return torch.cat([torch.tensor(begin, dtype=rows.dtype).expand(count, len(begin)), rows], dim=1)


def cut_windows(tokens: torch.Tensor, count: int, length: int, seed: int | str) -> torch.Tensor:
    """Windows (count, length) of a long row of tokens, cut anywhere."""
    drawn = random.Random(seed)
    starts = [drawn.randrange(len(tokens) - length) for _ in range(count)]
    return torch.stack([tokens[start : start + length] for start in starts])


def with_returns(windows: torch.Tensor, seed: int | str) -> torch.Tensor:
    """
    Windows (B, T) in whose second half the passages of the first come back, in another order: what comes next there
    stood far back.
    """
    if not len(windows):
        return windows
    drawn, half = random.Random(seed), windows.shape[1] // 2
    passages = windows[:, :half].split(PASSAGE, dim=1)
    orders = (drawn.sample(passages, len(passages)) for _ in windows)
    again = [torch.cat([passage[row] for passage in order]) for row, order in enumerate(orders)]
    return torch.cat([windows[:, :-half], torch.stack(again)], dim=1)


def begun(windows: torch.Tensor, beginnings: Sequence[int]) -> torch.Tensor:
    """Windows (B, T) moved on by one for a token in front, of which there may be several: each in turn."""
    first = torch.tensor([beginnings[row % len(beginnings)] for row in range(len(windows))], dtype=windows.dtype)
    return torch.cat([first[:, None], windows[:, :-1]], dim=1)


def mixed_windows(
    tokens: torch.Tensor,
    count: int,
    length: int,
    seed: int | str,
    beginnings: Sequence[int],
    *,
    returns: bool = False,
) -> torch.Tensor:
    """
    Windows (count, length) of a long row of tokens, every other one with a token in front with which texts may begin,
    the rest cut anywhere. With `returns`, in half of either kind passages come back.
    """
    windows = cut_windows(tokens, count, length, seed)
    if returns:
        chosen = [row for row in range(count) if row // 2 % 2]
        windows[chosen] = with_returns(windows[chosen], seed)
    if beginnings:
        windows[::2] = begun(windows[::2], beginnings)
    return windows


def split_off(rows: Rows, share: float, most: int) -> tuple[Rows, Rows | None]:
    """
    The rows to train on, and the last `share` of them, held out: None if that makes no row, and no more of them than
    have `most` tokens.
    """
    held_out = int(len(rows) * share)
    if held_out == 0:
        return rows, None
    held_out = len(replace(rows, rows=rows.rows[-held_out:]).first(most))
    kept = len(rows) - held_out
    return Rows(rows.rows[:kept], rows.documents, rows.truncated, rows.dropped), Rows(rows.rows[kept:], rows.documents)


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """In an order of its own for each seed, so that held-out rows are of the kind that is trained on."""
    return random.Random(seed).sample(documents, len(documents))
