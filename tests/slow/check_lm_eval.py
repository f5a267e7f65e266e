# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-lm-eval`: the command line of lm-evaluation-harness, with our package and as remote code, scores checkpoints
and adapters as it scores the Llama that they were converted from, and as the models score by themselves.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import NOT_INSTALLED
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gated  # noqa: F401
from engines import record
from gated_llama import convert_checkpoint, gated_lora_config
from tiny import published, source_model, tiny_tokenizer


pytestmark = pytest.mark.lm_eval


CHOICES = [" mat", " red cat", " grumpy", " the cat, which was red"]
QUESTIONS = ["the grumpy cat sat on the", "which was", "the cat", "on the mat, which was", "sat"]
DOCUMENTS = [{"question": text, "choices": CHOICES, "answer": i % len(CHOICES)} for i, text in enumerate(QUESTIONS)]
TOKENS = 6
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "greedy": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
RUN = "`lm_eval --model hf`; choices, rolling log-likelihoods, greedy texts"
COMMAND = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"  # what the script `lm_eval` runs
WAYS = {
    "in-tree": ("", {}),
    "package": ("import modeling_gated\n", {}),
    "remote code": (NOT_INSTALLED, {"trust_remote_code": True}),
}


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    tasks = tmp_path_factory.mktemp("tasks")
    documents = tasks / "documents.json"
    documents.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
        }
        task = {"task": name, "doc_to_text": "question", **data, **task}
        (tasks / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML

    def run(way: str, pretrained, **arguments) -> dict[str, list]:
        """What was scored, in the form of `scores`."""
        before, trust = WAYS[way]
        arguments = ",".join(
            f"{name}={value}" for name, value in ({"pretrained": pretrained} | arguments | trust).items()
        )
        results = tmp_path_factory.mktemp("results")
        command = [sys.executable, "-c", before + COMMAND, "run", "--model", "hf", "--model_args", arguments]
        command += ["--tasks", *TASKS, "--include_path", tasks, "--batch_size", "3", "--device", "cpu"]
        done = subprocess.run(
            [*command, "--output_path", results, "--log_samples"],
            cwd=results,
            env=os.environ
            | {
                "HF_DATASETS_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(results / "datasets"),
                "HF_MODULES_CACHE": str(results / "modules"),
                "PYTHONWARNINGS": "ignore::FutureWarning",  # peft's use of a name that Transformers 5.23 deprecates
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        assert "warning" not in done.stderr.lower(), done.stderr
        samples = {}
        for name in TASKS:
            (path,) = results.rglob(f"samples_{name}_*.jsonl")
            lines = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["doc_id"])
            samples[name] = [line["filtered_resps"] for line in lines]
        (aggregated,) = results.rglob("results_*.json")
        accuracy = json.loads(aggregated.read_text())["results"]["choice"]["acc,none"]
        return {
            "choice": [[float(logprob) for logprob, _ in choices] for choices in samples["choice"]],
            "rolling": [float(logprob) for (logprob,) in samples["rolling"]],
            "greedy": [text for (text,) in samples["greedy"]],
            "accuracy": accuracy,
        }

    return run


@torch.no_grad()
def scores(model, tokenizer) -> dict[str, list]:
    """Computed here: log-likelihoods of choices and of whole texts, greedy texts, accuracy."""

    def logprob(ids: list[int], start: int) -> float:
        logprobs = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(ids[start:]).unsqueeze(-1)).sum().item()

    def greedy(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    encode = lambda text: tokenizer(text).input_ids  # noqa: E731
    choice = [[logprob(encode(text + choice), len(encode(text))) for choice in CHOICES] for text in QUESTIONS]
    right = [row.index(max(row)) == document["answer"] for row, document in zip(choice, DOCUMENTS, strict=True)]
    return {
        "choice": choice,
        "rolling": [logprob([tokenizer.bos_token_id, *encode(text)], 1) for text in QUESTIONS],
        "greedy": [greedy(text) for text in QUESTIONS],
        "accuracy": sum(right) / len(right),
    }


def assert_equal(actual: dict[str, list], expected: dict[str, list]) -> None:
    assert (actual["greedy"], actual["accuracy"]) == (expected["greedy"], expected["accuracy"])
    for name in ("choice", "rolling"):  # fp32, sums in another order
        torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(expected[name]), atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """With as many embeddings as tokens: for an adapter, lm-evaluation-harness cuts off the others."""
    model = source_model("llama", vocab_size=len(tiny_tokenizer()))
    return published(tmp_path_factory.mktemp("source") / "llama", model, tokenizer=True)


@pytest.fixture(scope="module")
def source_scores(evaluate, source):
    """By the harness: the control that what is computed here is what it computes."""
    found = evaluate("in-tree", source)
    assert_equal(found, scores(AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)))
    return found


@pytest.fixture(scope="module", params=["headwise", "elementwise"])
def gate_type(request):
    return request.param


@pytest.fixture(scope="module")
def converted(tmp_path_factory, source, gate_type):
    folder = tmp_path_factory.mktemp(gate_type) / "gated"
    convert_checkpoint(source, folder, gate_type=gate_type, progress=False)
    return folder


@torch.no_grad()
def move_gates(model) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "attn_gate" in name:
            parameter.normal_(0.0, 0.3)


@pytest.fixture(scope="module")
def trained(converted):
    """A folder with gates away from 1, and its scores."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    move_gates(model)
    folder = published(converted.parent / "trained", model, old_style=False, tokenizer=True)
    return folder, scores(model, tokenizer)


@pytest.fixture(scope="module")
def adapter(converted):
    """A folder with LoRA and gates, and the scores of the base under it."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    torch.manual_seed(0)
    model = get_peft_model(base, gated_lora_config(r=4, init_lora_weights=False))  # LoRA that does something
    move_gates(model)
    model.save_pretrained(converted.parent / "adapter")
    return converted.parent / "adapter", scores(model.eval(), tokenizer)


@pytest.mark.parametrize("way", ["package", "remote code"])
def test_whole_checkpoint(evaluate, source_scores, converted, trained, gate_type, way):
    assert evaluate(way, converted) == source_scores  # to the bit
    folder, expected = trained
    assert all(expected[name] != source_scores[name] for name in ("greedy", "accuracy"))  # control: the gates decide
    assert_equal(evaluate(way, folder), expected)
    result = "open gates: every score is the source's to the bit; trained: within 1e-4 of a direct computation"
    record("lm-evaluation-harness", f"{RUN}; checkpoint; {gate_type}; {way}", result, "lm_eval")


@pytest.mark.parametrize("way", ["package", "remote code"])
def test_adapter(evaluate, source_scores, converted, adapter, gate_type, way):
    folder, expected = adapter
    assert expected["greedy"] != source_scores["greedy"]  # control
    assert_equal(evaluate(way, converted, peft=folder), expected)
    result = "every score within 1e-4 of a direct computation"
    record("lm-evaluation-harness", f"{RUN}; adapter (`peft=`); {gate_type}; {way}", result, "lm_eval")
