# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-llama-cpp`: GGUF exports in an unchanged llama.cpp (the package xllamacpp). Of every family and RoPE that is
exported the greedy tokens of Transformers in fp32, and their log-probabilities; where benchmarks/models.py has left it,
a real model and its chat too. Every outcome is a record of docs/serve.md's table.
"""

import pytest
import torch
from models import MODELS
from test_gguf import gated
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import record
from gated_llama import convert_checkpoint, export_checkpoint
from gated_llama.gates import is_gate
from tiny import tiny_tokenizer


pytestmark = pytest.mark.llama_cpp
xllamacpp = pytest.importorskip("xllamacpp")

NEW = 24
VARIANTS = ["llama", "llama-3.2", "llama-linear", "llama-yarn", "mistral", "mistral-full", "qwen2", "qwen3"]
MESSAGES = [{"role": "user", "content": "What is gravity?"}]


def server(folder, **settings):
    """With a cache in fp32, and a context that takes all of these texts."""
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_ctx, params.n_parallel, params.swa_full, params.warmup = 512, 1, True, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    for name, value in settings.items():
        setattr(params, name, value)
    return xllamacpp.Server(params)


def greedy(folder, ids, banned):
    """The tokens that follow, and the log-probability of each."""
    asked = {"prompt": ids, "n_predict": NEW, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
    asked["logit_bias"] = [[token, False] for token in banned]
    answer = server(folder).handle_completions(asked)
    said = answer["choices"][0]["logprobs"]["content"]
    assert len(said) == NEW, answer
    return [(each["id"], each["logprob"]) for each in said]


@torch.no_grad()
def greedy_here(model, ids, banned):
    found, row = [], list(ids)
    for _ in range(NEW):
        logits = model(torch.tensor([row])).logits[0, -1].float()
        allowed = logits.clone()
        allowed[banned] = -torch.inf
        row.append(int(allowed.argmax()))
        found.append((row[-1], logits.log_softmax(0)[row[-1]].item()))
    return found


def compared(folder, model, tokenizer, ids) -> float:
    """The largest difference of log-probabilities, once the tokens are the same."""
    # Half a letter is not told at once there, so only tokens that are letters may come; and none that ends the text.
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    banned = [token for token, text in enumerate(texts) if not text or not text.isascii() or token < 3]
    banned += [token for token in tokenizer.all_special_ids if token not in banned]
    theirs, ours = greedy(folder, ids, banned), greedy_here(model.float(), ids, banned)
    assert [token for token, _ in theirs] == [token for token, _ in ours]
    return max(abs(one - other) for (_, one), (_, other) in zip(theirs, ours, strict=True))


def kept(what: str, difference: float) -> None:
    result = f"greedy tokens equal Transformers', log-probabilities within {difference:.0e}"
    record("llama.cpp (xllamacpp)", f"{what}, headwise", result, "xllamacpp")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokens_of_transformers(tmp_path, variant):
    model = gated(tmp_path, variant)
    export_checkpoint(tmp_path / "gated", tmp_path / "out", to="gguf", progress=False)
    ids = torch.randint(10, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    difference = compared(tmp_path / "out", model, tiny_tokenizer(), ids)
    print(f"\n{variant}: {NEW} greedy tokens equal, log-probabilities to {difference:.1e}")
    assert difference < 1e-3
    kept(f"export to gguf; {variant}", difference)


def test_control_without_gates_it_says_something_else(tmp_path):
    model = gated(tmp_path, "llama")
    model.set_gate_strength(0.0)
    export_checkpoint(tmp_path / "gated", tmp_path / "out", to="gguf", progress=False)
    ids = torch.randint(10, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.raises(AssertionError):
        assert compared(tmp_path / "out", model, tiny_tokenizer(), ids) < 1e-3


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2 with gates that are away from open."""
    source = MODELS / "smollm2-135m"
    if not (source / "config.json").exists():
        pytest.skip("make it with `python benchmarks/models.py smollm2-135m`")
    folder = tmp_path_factory.mktemp("real")
    convert_checkpoint(source, folder / "converted", link=True, verify=False, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "converted", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_gate(name):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder / "gated")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder / "gated")
    export_checkpoint(folder / "gated", folder / "out", to="gguf", progress=False)
    export_checkpoint(folder / "gated", folder / "small", to="gguf", gguf_type="q8_0", progress=False)
    return folder, model, tokenizer


def test_a_real_model(real):
    folder, model, tokenizer = real
    ids = tokenizer("The first thing that a visitor to the old town sees is").input_ids
    difference = compared(folder / "out", model, tokenizer, ids)
    ends = tokenizer.all_special_ids
    said, small = (
        tokenizer.decode([token for token, _ in greedy(folder / name, ids, ends)]) for name in ("out", "small")
    )
    print(f"\nSmolLM2: {said!r}, log-probabilities to {difference:.1e}; in Q8_0: {small!r}")
    assert difference < 1e-2
    kept("export to gguf; SmolLM2-135M", difference)


def test_a_chat_and_the_same_token_ids(real):
    folder, model, tokenizer = real
    running = server(folder / "out", use_jinja=True)
    asked = {"messages": MESSAGES, "max_tokens": NEW, "temperature": 0.0}
    said = running.handle_chat_completions(asked)["choices"][0]["message"]["content"]
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
    print(f"\n{said!r}")
    assert said.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
