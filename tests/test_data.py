# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From files to rows of tokens: nothing lost unsaid, broken lines refused by file and number."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from gated_llama import UserError, token_windows
from gated_llama.data import Document, Rows, one_row_each, pack, read_documents, shuffled, split_off, tokenize
from tiny import tiny_tokenizer


TEXTS = ["the grumpy cat", "sat on the mat, which was red"] * 3
CHAT = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "red"}]


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    lines = ['{"text": "three\u2028still three"}', '{"text": "four", "n": 1}', json.dumps({"messages": CHAT})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [document.content for document in documents] == ["one\ntwo", "three\u2028still three", "four", CHAT]
    assert documents[3].where.endswith("b.jsonl, line 3")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"texts": "x"}',
        '{"text": 1}',
        '{"text": ""}',
        "",
        '{"messages": []}',
        '{"messages": [{"role": 1}]}',
        '{"messages": [{"role": "user"}]}',
        '{"text": "x", "messages": []}',
        '{"text": "x"} {"text": "y"}',
        r'{"text": "half of a smile: \ud83d"}',
        r'{"messages": [{"role": "user", "content": "\ud83d"}]}',
    ],
)
def test_a_broken_line_is_refused_by_file_and_number(tmp_path, line):
    (tmp_path / "b.jsonl").write_text(f'{{"text": "three"}}\n{line}\n{{"text": "five"}}\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: "):
        read_documents([tmp_path / "b.jsonl"])


def test_what_cannot_be_read_is_refused(tmp_path):
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            read_documents([tmp_path / name])
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt cannot be read as text"):
        read_documents([tmp_path / "latin.txt"])
    (tmp_path / "texts.json").write_text('[{"text": "the cat"}]')
    with pytest.raises(UserError, match=r"texts\.json is one JSON value.*\.jsonl"):
        read_documents([tmp_path / "texts.json"])
    with pytest.raises(UserError, match=r"org/dataset is no file"):
        read_documents(["org/dataset"])
    with pytest.raises(UserError, match=r"org/Open-2\.5:train is no file, and no dataset|for a dataset of the Hub"):
        read_documents(["org/Open-2.5:train"])


def test_conversations_are_written_by_the_chat_template():
    tokenizer = tiny_tokenizer()
    text, chat = tokenize(tokenizer, [Document("the cat", "a"), Document(CHAT, "b")])
    assert text == [*tokenizer("the cat").input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(chat) == "<s>user: the cat?</s><s>assistant: red</s>"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"x\.jsonl, line 7: the chat template refuses it: roles must alternate"):
        tokenize(tokenizer, [Document(CHAT, "x.jsonl, line 7")])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"x\.jsonl, line 7: has messages, and the tokenizer has no chat template"):
        tokenize(tokenizer, [Document(CHAT, "x.jsonl, line 7")])


def test_packing_keeps_every_token_in_order_and_counts_the_rest():
    ids = tokenize(tiny_tokenizer(), TEXTS)
    flat = [token for document in ids for token in document]
    rows = pack(ids, 7)
    assert rows.rows.flatten().tolist() == flat[: len(flat) // 7 * 7]
    assert (rows.documents, rows.dropped, rows.tokens) == (6, len(flat) % 7, len(flat) // 7 * 7)


def test_one_row_each_counts_what_it_cuts():
    rows = one_row_each([[1, 2, 3], [4, 5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6]], 4)
    assert [row.tolist() for row in rows.rows] == [[1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 4]]
    assert (rows.documents, rows.truncated, rows.dropped) == (4, 3, 1 + 1 + 2)
    assert str(rows) == "11 tokens in 3 rows from 4 documents; 3 of them cut, 4 tokens left out"
    assert rows[0] == {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}


def test_held_out_rows_are_the_last_and_are_not_trained_on():
    rows = Rows(torch.arange(40).view(20, 2), 5)
    for most, count in ((1000, 2), (4, 2), (3, 1), (1, 1)):  # one row at least, whatever is allowed
        kept, held_out = split_off(rows, 0.1, most)
        assert torch.cat([kept.rows, held_out.rows]).equal(rows.rows) and len(held_out) == count
    assert split_off(rows, 0.04, 1000) == (rows, None)


def test_shuffling_is_the_same_for_the_same_seed():
    documents = [Document(str(n), "") for n in range(20)]
    assert shuffled(documents, 1) == shuffled(documents, 1) != shuffled(documents, 2)
    assert sorted(shuffled(documents, 1), key=lambda d: int(d.content)) == documents


def test_windows_begin_as_the_tokenizer_begins_a_text():
    tokenizer = tiny_tokenizer()
    ids = [token for document in tokenize(tokenizer, TEXTS) for token in document]
    assert token_windows(tokenizer, TEXTS, 7).flatten().tolist() == ids[: len(ids) // 7 * 7]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    windows = token_windows(tokenizer, TEXTS, 7)
    assert windows[:, 0].tolist() == [1] * len(windows)
    assert windows[:, 1:].flatten().tolist() == ids[: len(ids) // 6 * 6]
    with pytest.raises(UserError, match="fill no window of 1000: give more text"):
        token_windows(tokenizer, ["cat"], 1000)
