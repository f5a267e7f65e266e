# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-serve`: `gated-llama serve` with the `openai` client over loopback, with and without continuous batching,
and the other ways in which Transformers generates.
"""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import modeling_gated
from engines import record
from tiny import gated_model, tiny_tokenizer


PROMPTS = ["the grumpy cat", "on the mat", "which was red", "sat"]
ENGINE = "Transformers"


@pytest.fixture(scope="module", params=["headwise", "elementwise"])
def gated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "gated"
    gated_model(modeling_gated.GatedLlamaForCausalLM, gate_type=request.param, head_dim=32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def greedy(folder, text: str, tokens: int = 6) -> str:
    model, tokenizer = (cls.from_pretrained(folder) for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module", params=[(), ("--continuous-batching",)], ids=["one by one", "continuous batching"])
def client(request, gated):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gated_llama.scripts.cli", "serve", gated, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", *request.param]
    with open(gated.parent / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        try:
            for _ in range(240):
                try:
                    client.completions.create(model=str(gated), prompt="the", max_tokens=1)
                    break
                except openai.APIConnectionError:
                    assert server.poll() is None, (gated.parent / "log").read_text()
                    time.sleep(0.5)
            yield client
        finally:
            server.terminate()


def test_served_over_http(client, gated):
    model = str(gated)

    def complete(prompt: str) -> str:
        return client.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0).choices[0].text

    expected = [greedy(gated, prompt) for prompt in PROMPTS]
    assert complete(PROMPTS[0]) == expected[0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(complete, PROMPTS)) == expected
    messages = [{"role": "user", "content": "the grumpy cat"}]
    arguments = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    tokenizer = AutoTokenizer.from_pretrained(gated)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = AutoModelForCausalLM.from_pretrained(gated).generate(**ids, max_new_tokens=6, do_sample=False)
    assert whole == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    stream = client.chat.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole
    for wrong in ({"model": "none/such"}, {"messages": "no list"}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**{**arguments, **wrong})
    assert complete(PROMPTS[0]) == expected[0]  # and it still serves


def test_recorded_server(request, gated):
    """After both servers: what they did goes into the table."""
    gate_type = "headwise" if "headwise" in str(gated) else "elementwise"
    if not request.session.testsfailed:
        for way in ("", ", continuous batching"):
            run = f"`gated-llama serve`{way}; {gate_type}; completion, chat, streaming, 4 at once, bad requests"
            record(ENGINE, run, "tokens equal `generate`'s", "openai")


def test_pipeline_and_generate_batch(gated):
    gate_type = "headwise" if "headwise" in str(gated) else "elementwise"
    expected = [greedy(gated, prompt) for prompt in PROMPTS]
    model, tokenizer = (cls.from_pretrained(gated) for cls in (AutoModelForCausalLM, AutoTokenizer))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [
        generate(p, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"] for p in PROMPTS
    ]
    assert texts == expected
    record(ENGINE, f"`pipeline`; {gate_type}", "tokens equal `generate`'s")
    model.generation_config.max_new_tokens, model.generation_config.do_sample = 6, False
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    outputs = model.generate_batch(ids, generation_config=model.generation_config, progress_bar=False)
    batch = [tokenizer.decode(o.generated_tokens, skip_special_tokens=True) for o in outputs.values()]
    assert sorted(batch) == sorted(expected)
    model.set_gate_strength(0)  # control
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    other = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert not torch.equal(other, torch.tensor([])) and tokenizer.decode(other, skip_special_tokens=True) != expected[0]
    record(ENGINE, f"`generate_batch`; {gate_type}", "tokens equal `generate`'s")
