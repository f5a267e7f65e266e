# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The script for whoever has a GPU for ten minutes, end to end at toy size on a CPU: it must work when it counts."""

import json
import os
import site
import subprocess
import sys

import gpu
import pytest
import torch

from measured import read_records
from tiny import published, source_model, tiny_tokenizer


@pytest.fixture
def data(tmp_path):
    """What --pack makes, unpacked: a model with a token that is a sink, and text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    model = source_model(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("<|endoftext|>")] *= 1000
    folder = published(tmp_path / "data" / gpu.MODEL, model)
    tokenizer.save_pretrained(folder)
    for name in ("text", "held-out"):
        texts = ({"text": f"the grumpy cat sat on {number} mats, which were red. " * 9} for number in range(60))
        (folder.parent / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder.parent


def test_a_rehearsal_leaves_every_record(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data", str(data), "--out", str(out), "--rehearse"])
    code = gpu.main()
    said = capsys.readouterr().out
    assert code == 0, said + "".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert said.count(": done after") == len(gpu.NAMES)
    assert "check_gpu.py: " in (out / "tests.log").read_text()
    (speed,) = read_records(out / "speed.jsonl")
    assert [result["work"] for result in speed["results"]] == ["training", "decode"]
    assert [record["recipe"] for record in read_records(out / "sinks.jsonl")] == [
        "base",
        "moved, gates distilled, healed on text",
    ]
    (desinked,) = read_records(out / "desink.jsonl")
    assert desinked["steps"] and desinked["versions"]
    assert [record["length"] for record in read_records(out / "measure.jsonl")] == [64, 64]
    assert {record["kind"] for record in read_records(out / "pretrain.jsonl")} == {"ungated", "headwise", "elementwise"}


def test_what_is_left_out_for_time_is_named_with_its_command(data, tmp_path, capsys):
    steps = [gpu.Step("slow", ["-c", "import time; print('begun', flush=True); time.sleep(60)"])]
    steps += [gpu.Step("wrong", ["-c", "raise SystemExit(3)"]), gpu.Step("missing", ["-c", ""], package="no_such")]
    assert gpu.run(steps[1:], tmp_path, minutes=1) == 1
    said = capsys.readouterr().out
    assert "wrong: FAILED with code 3" in said and "missing: left out, no_such is not installed" in said
    gpu_enough, gpu.ENOUGH = gpu.ENOUGH, 1
    try:
        assert gpu.run(steps[:1], tmp_path, minutes=0.1) == 0
    finally:
        gpu.ENOUGH = gpu_enough
    said = capsys.readouterr().out
    assert "slow: stopped, the time is over" in said and "left out for time:" in said and "time.sleep" in said
    assert "begun" in (tmp_path / "slow.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_wrong_device_is_refused_in_a_sentence(data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data", str(data)])
    assert gpu.main() == 2 and "there is no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 100))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert gpu.main() == 2 and "A card is busy: 10% of its memory is free" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data", os.devnull])
    assert gpu.main() == 2 and "--data needs a folder" in capsys.readouterr().err


def test_nothing_need_be_installed(tmp_path):
    """With -S Python finds what is installed by its path alone, so not this project, which is installed as editable."""
    (tmp_path / f"{gpu.MODEL}.gguf.00").write_bytes(b"no GGUF")

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(site.getsitepackages())}
        return subprocess.run(
            [sys.executable, "-S", *command], cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    assert "No module named 'gated_llama'" in run("-c", "import torch, gated_llama").stderr
    assert "cannot be read as a GGUF" in run(gpu.__file__, "--data", str(tmp_path), "--rehearse").stderr


def test_pieces_are_joined(tmp_path, monkeypatch):
    pieces = [b"GGUF", b" of a ", b"model"]
    for number, piece in enumerate(pieces):
        (tmp_path / f"{gpu.MODEL}.gguf.{number:02}").write_bytes(piece)
    seen = []

    def dequantize(path, folder):
        seen.append(path.read_bytes())
        folder.mkdir()

    monkeypatch.setattr("models.dequantize", dequantize)
    gpu.unpack(tmp_path)
    gpu.unpack(tmp_path)
    assert seen == [b"".join(pieces)] and (tmp_path / gpu.MODEL).is_dir()
