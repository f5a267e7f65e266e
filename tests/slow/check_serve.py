# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-serve`: `gated-llama serve` with the `openai` client over loopback, with and without continuous batching,
and the other ways in which Transformers generates.
"""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.request import urlopen

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import modeling_gated
from engines import record
from tiny import VOCAB, gated_model, published, tiny_tokenizer


pytestmark = pytest.mark.serve


PROMPTS = ["the grumpy cat", "on the mat", "which was red", "sat"]
MESSAGES = [{"role": "user", "content": "the grumpy cat"}]
TOKENS = 6
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False}
ENGINE = "Transformers"


@pytest.fixture(scope="module", params=["headwise", "elementwise"])
def gate_type(request):
    return request.param


@pytest.fixture(scope="module")
def gated(gate_type, tmp_path_factory):
    model, tokenizer = (
        gated_model(modeling_gated.GatedLlamaForCausalLM, gate_type=gate_type, head_dim=32),
        tiny_tokenizer(),
    )
    for token in range(VOCAB):  # none that ends the text, or only a part of a character: streams hold that back
        if not (tokenizer.decode([token]).isascii() and token > 2):
            model.lm_head.weight.data[token] = 0
    return published(tmp_path_factory.mktemp(gate_type) / "gated", model, old_style=False, tokenizer=True)


@pytest.fixture(scope="module")
def loaded(gated):
    return AutoModelForCausalLM.from_pretrained(gated), AutoTokenizer.from_pretrained(gated)


def greedy(loaded, text: str, **settings) -> str:
    model, tokenizer = loaded
    ids = tokenizer(text, return_tensors="pt", **settings)
    out = model.generate(**ids, **GREEDY)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(loaded):
    """By prompt. Other gates would say something else, which makes these tokens worth comparing."""
    expected = {prompt: greedy(loaded, prompt) for prompt in PROMPTS}
    loaded[0].set_gate_strength(0)
    assert all(greedy(loaded, prompt) != text for prompt, text in expected.items())
    loaded[0].set_gate_strength(1)
    return expected


@contextmanager
def server(folder, *options: str):
    """The client of a server that answers; a machine that has never used the Hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gated_llama.scripts.cli", "serve", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", *options]
    environment = os.environ | {"HF_HOME": str(folder.parent / "hf_home")}
    log = folder.parent / "server.log"
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:  # no answer yet
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        except BaseException:
            print(log.read_text()[-5000:])
            raise
        finally:
            process.terminate()


@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["one by one", "continuous batching"])
def test_served_over_http(gated, gate_type, loaded, expected, options):
    with server(gated, *options) as client:

        def complete(prompt: str, **settings):
            return client.completions.create(
                model=str(gated), prompt=prompt, max_tokens=TOKENS, temperature=0, **settings
            )

        def text_of(prompt: str) -> str:
            return complete(prompt).choices[0].text

        client.models.list()
        assert text_of(PROMPTS[0]) == expected[PROMPTS[0]]
        assert "".join(c.choices[0].text for c in complete(PROMPTS[1], stream=True)) == expected[PROMPTS[1]]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(text_of, PROMPTS)) == [expected[prompt] for prompt in PROMPTS]

        prompt = loaded[1].apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        reply = greedy(loaded, prompt, add_special_tokens=False)
        arguments = {"model": str(gated), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
        assert client.chat.completions.create(**arguments).choices[0].message.content == reply
        stream = client.chat.completions.create(**arguments, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == reply
        # For messages that are no list the server of Transformers has an exception, and may close the line on it.
        bad = {"model": openai.APIStatusError, "no_such_option": openai.APIStatusError, "messages": openai.APIError}
        for wrong, refusal in bad.items():
            with pytest.raises(refusal):
                client.chat.completions.create(**{**arguments, "extra_body": {wrong: "none/such"}})
        assert text_of(PROMPTS[0]) == expected[PROMPTS[0]]  # and it still serves
    way = ", continuous batching" if options else ""
    run = f"`gated-llama serve`{way}; {gate_type}; completion, chat, streaming, 4 requests at once, bad requests"
    record(ENGINE, run, "tokens equal `generate`'s; bad requests are refused", "openai")


def test_pipeline(gate_type, loaded, expected):
    generate = pipeline("text-generation", model=loaded[0], tokenizer=loaded[1])
    for prompt in PROMPTS:
        assert generate(prompt, return_full_text=False, **GREEDY)[0]["generated_text"] == expected[prompt]
    record(ENGINE, f"`pipeline`; {gate_type}", "tokens equal `generate`'s")


def test_generate_batch(gate_type, loaded, expected):
    model, tokenizer = loaded
    model.generation_config.update(**GREEDY)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    outputs = model.generate_batch(ids, generation_config=model.generation_config, progress_bar=False)
    texts = [tokenizer.decode(output.generated_tokens, skip_special_tokens=True) for output in outputs.values()]
    assert sorted(texts) == sorted(expected.values())
    record(ENGINE, f"`generate_batch`; {gate_type}", "tokens equal `generate`'s")
