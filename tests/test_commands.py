# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The `gated-llama` command as a user meets it: help, results, exit codes, one sentence for a mistake."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gated  # noqa: F401  (registers the Auto classes)
from fresh import run_command as command
from fresh import run_fresh
from gated_llama import convert_checkpoint, gated_lora_config
from gated_llama.scripts.cli import COMMANDS, main
from hub import local_hub
from tiny import published, source_model


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_imports_nothing_heavy(name):
    """Half a second is for the benchmark to time; torch and transformers alone take several."""
    code = """
import sys
from gated_llama.scripts.cli import main
try:
    main([*sys.argv[1:], "--help"])
finally:
    print(sorted({"torch", "transformers", "huggingface_hub", "safetensors", "psutil"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, *filter(None, [name])], capture_output=True, text=True)
    assert done.stdout.startswith("usage: gated-llama") and done.stdout.strip().endswith("[]"), done.stdout
    for other in COMMANDS if name is None else ():
        assert other in done.stdout


def test_convert_prints_what_it_did(tmp_path):
    source = published(tmp_path / "source", source_model("qwen3"))
    done = command("convert", source, tmp_path / "gated", "--gate-type", "elementwise")
    assert done.returncode == 0, done.stderr
    assert "equal to the bit in float32" in done.stdout and "elementwise" in done.stdout
    assert "model-00001-of-00001.safetensors" in done.stderr and "Traceback" not in done.stderr  # the progress bar
    again = command("convert", source, tmp_path / "gated", "--quiet", "--force")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    as_json = command("convert", source, tmp_path / "json", "--json", "--no-verify")
    result = json.loads(as_json.stdout)
    assert (result["gate_type"], result["verification"]) == ("headwise", None)
    assert result["gate_parameters"] == 3 * 6 * 36


def test_a_script_runs_by_itself(tmp_path):
    """`python scripts/convert_checkpoint.py`: its folder comes first on sys.path, so no name may hide a library's."""
    source = published(tmp_path / "source", source_model("llama"))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", source, tmp_path / "gated", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gated" / "model-gates.safetensors").exists()


def test_a_mistake_gets_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("convert", tmp_path / "empty", tmp_path / "gated")
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [
        f"gated-llama: {tmp_path}/empty/config.json is missing: {tmp_path}/empty is not a checkpoint folder."
    ]
    assert command("convert").returncode == 2  # argparse's own
    assert command("bogus").returncode == 2


def test_a_failed_verification_gets_exit_code_1(tmp_path):
    source = published(tmp_path / "source", source_model("llama"))
    code = f"""
import sys, modeling_gated
modeling_gated.AttentionGate.forward = lambda self, x, y: (y.flatten(-2) / 2, x.new_full((*x.shape[:2], 6), 0.5))
from gated_llama.scripts.cli import main
sys.exit(main(["convert", {str(source)!r}, {str(tmp_path / "gated")!r}, "--quiet"]))
"""
    done = run_fresh(code)
    assert done.returncode == 1
    assert "verification failed" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize("folder", ["readonly-file-system", "file-size-limit"])
def test_an_output_that_cannot_be_written_gets_one_sentence(tmp_path, folder):
    """Root is stopped by no permission: /proc takes no folders, and a file-size limit stops any write."""
    source = published(tmp_path / "source", source_model("llama"))
    output = "/proc/gated" if folder == "readonly-file-system" else tmp_path / "gated"
    limit = "" if folder == "readonly-file-system" else "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    code = f"""
import resource, sys
from gated_llama.scripts.cli import main
{limit}
sys.exit(main())
"""
    done = run_fresh(code, "convert", source, output, "--quiet")
    assert done.returncode == 2, done.stderr
    assert "; nothing was written." in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.fixture
def gated(tmp_path):
    source = published(tmp_path / "source", source_model("llama"), tokenizer=True)
    convert_checkpoint(source, tmp_path / "gated", progress=False)
    (tmp_path / "text.txt").write_text("the grumpy cat sat on the mat, which was red\n" * 60)
    return tmp_path / "gated"


def test_finetune_and_inspect(gated, tmp_path):
    text = tmp_path / "text.txt"
    quick = ("--steps", 4, "--length", 16, "--gate-lr", 0.1)
    done = command("finetune", gated, "--data", text, "--out", tmp_path / "tuned", *quick)
    assert done.returncode == 0, done.stderr
    assert "training 12,168 of " in done.stdout and "648 of gates" in done.stdout
    assert "on 688 tokens in 43 rows from 1 documents" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("The gates moved by ")
    assert "step 1: loss " in done.stderr and "| gates ▄▄▄ mean 1.000, |g-1| 0.0000" in done.stderr
    assert "tokens/s | peak " in done.stderr and "step 4: held-out loss" in done.stderr
    inspect = ("inspect", tmp_path / "source", "--compare", tmp_path / "tuned", "--text", text, "--length", 16)
    done = command(*inspect, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "45 windows of 16 tokens" in done.stdout and "Sink rate, 16 tokens" in done.stdout
    assert "tokens/s" in done.stderr and "Loss, gates inverted" in done.stdout
    base, tuned = json.loads((tmp_path / "report" / "measurements.json").read_text())
    assert (base["model"], tuned["model"]) == (str(tmp_path / "source"), str(tmp_path / "tuned"))
    assert base["gates"] is None and all(layer["moved"] > 0 for layer in tuned["gates"]["layers"])
    assert tuned["loss"] < base["loss"]
    for arguments, message in (
        (("finetune", gated, "--data", text, "--out", tmp_path / "tuned", "--length", 16), "not empty"),
        (("inspect", tmp_path / "none", "--text", text), "cannot be loaded"),
        (("inspect", gated, "--text", tmp_path / "none.txt"), "none.txt cannot be read"),
        (
            ("finetune", tmp_path / "source", "--data", text, "--out", tmp_path / "x", "--length", 16),
            "convert it first",
        ),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_inspect_refuses_in_a_sentence(gated, tmp_path, capsys):
    text, sources = tmp_path / "text.txt", {"source": tmp_path / "source"}
    for name, model in (
        ("classifier", source_model("llama", "ForSequenceClassification")),
        ("bare", source_model("llama", "Model")),
        ("cut off", source_model("llama")),
        ("of another tokenizer", source_model("llama")),
    ):
        sources[name] = published(tmp_path / name, model, tokenizer=True)
    with open(sources["cut off"] / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    tokenizer = json.loads((sources["of another tokenizer"] / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (sources["of another tokenizer"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    page = ["--out", str(tmp_path / "page")]
    for name, options, message in (
        ("classifier", [], "has no lm_head.weight, so it is no whole causal language model"),
        ("bare", [], "has no lm_head.weight"),
        ("cut off", [], "cannot be loaded as a causal language model"),
        ("source", ["--dtype", "flot32"], "cannot be loaded as a causal language model"),
        ("source", ["--device", "nowhere"], "cannot be loaded as a causal language model"),
        ("source", ["--batch-size", "0"], "batch_size must be at least 1"),
        ("source", ["--head", "0.0"], "give --out too"),
        ("source", ["--head", "9.9", *page], "no head 9.9: name one from 0.0 to 2.5"),
        ("source", ["--compare", str(sources["of another tokenizer"]), *page], "cuts the text into other tokens"),
    ):
        arguments = [str(sources[name]), "--text", str(text), "--length", "16", "--max-tokens", "64", "--quiet"]
        assert main(["inspect", *arguments, *options]) == 2, (name, options)
        assert message in capsys.readouterr().err, (name, options)
    assert not (tmp_path / "page").exists()
    for out in (tmp_path / "source", tmp_path):  # which the page would take the place of
        assert main(["inspect", str(tmp_path / "source"), "--text", str(text), "--out", str(out), "--force"]) == 2
        assert "source" in capsys.readouterr().err
    assert (tmp_path / "source" / "config.json").exists()


def test_merge(gated, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(gated), gated_lora_config(r=2)).save_pretrained(tmp_path / "a")
    done = command("merge", tmp_path / "a", tmp_path / "merged")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a on gated -> {tmp_path}/merged\n"), done.stderr
    again = command("merge", tmp_path / "a", tmp_path / "merged", "--force", "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    for arguments, message in (
        (("merge", gated, tmp_path / "x"), "nothing to merge"),
        (("serve", tmp_path / "a"), "gated-llama merge"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_local_source_can_have_its_hub_id(tmp_path):
    source = published(tmp_path / "source", source_model("llama"))
    done = command("convert", source, tmp_path / "gated", "--source-id", "org/base", "--no-verify", "--quiet")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "base_model: org/base" in card and "[org/base](https://huggingface.co/org/base)" in card
    assert "gated-llama convert org/base gated" in card
    assert json.loads((tmp_path / "gated" / "config.json").read_text())["conversion"]["source"] == "org/base"
    for arguments, message in (
        ((source, tmp_path / "x", "--source-id", "base"), "'base' is no id of a Hub repository"),
        (("org/name", tmp_path / "x", "--source-id", "org/base"), "org/name is no local folder"),
    ):
        done = command("convert", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_push(gated, tmp_path):
    (gated / "optimizer.pt").write_bytes(b"x")
    (gated / ".env").write_text("SECRET=1")
    with local_hub(tmp_path / "hub") as environment:
        for name, message in (("name", "give OWNER/NAME"), ("org/name", "--base OWNER/NAME")):
            dry = command("push", gated, name, "--dry-run", environment=environment)
            assert dry.returncode == 2 and message in dry.stderr, dry.stderr
        base = ("--base", "org/source")
        dry = command("push", gated, "org/name", *base, "--dry-run", environment=environment)
        assert dry.returncode == 0, dry.stderr
        assert " kB  model-gates.safetensors" in dry.stdout and not (tmp_path / "hub").exists()
        assert dry.stdout.splitlines()[-1] == "all checks passed"
        done = command("push", gated, "org/name", *base, environment=environment)
        assert done.returncode == 0, done.stderr
        sent = {path.name for path in (tmp_path / "hub" / "org" / "name").iterdir()}
        assert {path.name for path in gated.iterdir()} - sent == {"optimizer.pt", ".env"}
        (gated / "modeling_gated.py").unlink()
        done = command("push", gated, "org/name", environment=environment)
        assert done.returncode == 2 and "modeling_gated.py is missing" in done.stderr
        refused = command("push", tmp_path / "source", "org/name", environment=environment)
        assert refused.returncode == 2 and "no gated model" in refused.stderr


def test_serve(gated):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(gated), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "gated_llama.scripts.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    body = {"model": str(gated), "prompt": "the grumpy cat", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        for _ in range(240):
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError as error:
                assert server.poll() is None, server.stderr.read()
                assert not isinstance(error, urllib.error.HTTPError), error.read()
                time.sleep(0.25)
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()
    model, tokenizer = (cls.from_pretrained(gated) for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("the grumpy cat", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
