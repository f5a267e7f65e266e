# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-distributed`: fine-tuning in two CPU processes (gloo), as data parallelism (DDP, FSDP2) and as tensor
parallelism: the losses and the result of one process on the same rows a step, stopped and resumed too; and `desink`.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gated_llama import convert_checkpoint
from tiny import published, source_model


pytestmark = pytest.mark.distributed


# In front of the command, in every process: it says which part of each trained weight the process holds, and with
# STOP_AT dies at that step.
WRAPPER = """
import os, sys
from transformers import TrainerCallback
from gated_llama import GatedTrainer
from gated_llama.scripts import cli, finetune_model

class Spy(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        held = whole = 0
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            held, whole = held + local.numel(), whole + parameter.numel()
        print(f"HELD {held / whole:.3f} of processes {args.world_size}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("STOP_AT", -1)):
            os._exit(9)

if "--tp-size" in sys.argv:  # accelerate refuses tensor parallelism on CPUs, with this check and nothing else
    from accelerate import ParallelismConfig
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None

plain = GatedTrainer.__init__

def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Spy())

GatedTrainer.__init__ = init
sys.exit(cli.run_alone(finetune_model))
"""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2"],
    # accelerate starts several processes for GPUs only (or by MPI); they find none here, and use gloo.
    "accelerate": (
        "-m accelerate.commands.launch --multi_gpu --num_machines=1 --num_processes=2 --mixed_precision=no "
        "--dynamo_backend=no"
    ).split(),
}


@pytest.fixture
def folder(tmp_path):
    model = source_model("qwen3", vocab_size=308, tie_word_embeddings=False)
    published(tmp_path / "source", model, shards=2, tokenizer=True)
    convert_checkpoint(tmp_path / "source", tmp_path / "gated", progress=False)
    text = "".join(json.dumps({"text": f"the grumpy cat sat on {number} mats"}) + "\n" for number in range(80))
    (tmp_path / "train.jsonl").write_text(text)
    (tmp_path / "run.py").write_text(WRAPPER)
    return tmp_path


def run(folder, output, *options, launcher=None, stop_at=None, rows=4):
    command = [sys.executable, *LAUNCHERS.get(launcher, []), folder / "run.py", folder / "gated"]
    command += ["--data", folder / "train.jsonl", "--out", folder / output, "--batch-size", str(rows)]
    command += ["--steps", "8", "--length", "16", "--save-steps", "4", "--log-steps", "1", "--quiet"]
    command += ["--gate-lr", "1e-2", *options, *([] if "gates" in options else ["--lr", "1e-2"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if stop_at:
        environment["STOP_AT"] = str(stop_at)
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (stop_at is None), done.stderr
    return re.findall(r"HELD (\S+) of processes (\d)", done.stdout)


def losses(run):
    log = json.loads((run / "finetune.json").read_text())["log"]
    return torch.tensor([entry["loss"] for entry in log if "loss" in entry])


def result(run):
    return json.loads((run / "finetune.json").read_text())["result"]


def tensors(run):
    return {key: tensor for path in run.glob("*.safetensors") for key, tensor in load_file(path).items()}


CASES = {
    "DDP, torchrun": ([], "torchrun", 2, "1.000"),
    "DDP, accelerate": ([], "accelerate", 2, "1.000"),
    "FSDP2": (["--fsdp-size", "2"], "torchrun", 2, "0.500"),
    "TP": (["--tp-size", "2"], "torchrun", 4, None),
}


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for case in CASES for way in ("full", "gates", "lora") if way != "lora" or "DDP" in case],
)
def test_two_processes_learn_what_one_does(folder, case, way):
    options, launcher, rows, held = CASES[case]
    options = ["--train", way, *options]
    run(folder, "one", "--train", way)
    said = run(folder, "two", *options, launcher=launcher, rows=rows)
    assert len(said) == 2
    for part, processes in said:
        assert processes == "2" and (part == held if held else 0.5 <= float(part) < 0.75), said
    run(folder, "stopped", *options, launcher=launcher, rows=rows, stop_at=6)
    assert not list((folder / "stopped").glob("*.safetensors"))
    run(folder, "stopped", *options, "--resume", launcher=launcher, rows=rows)
    one, two, resumed = (losses(folder / name) for name in ("one", "two", "stopped"))
    difference, gap = (one - two).abs().max().item(), (two - resumed).abs().max().item()
    print(
        f"\n{case}, {way}: {one[0]:.4f} -> {one[-1]:.4f}, two processes off by {difference:.1e}, resumed by {gap:.1e}"
    )
    assert one[-1] < one[0] - 0.1
    assert difference < 2e-3 and gap < 2e-3
    one, two, resumed = (result(folder / name) for name in ("one", "two", "stopped"))
    assert two["held_out_after"] == pytest.approx(one["held_out_after"], abs=2e-3)
    assert one["tokens"] == two["tokens"] == resumed["tokens"] == 8 * 4 * 16
    expected, got = tensors(folder / "one"), tensors(folder / "two")
    assert expected.keys() == got.keys()
    assert all(expected[key].shape == got[key].shape and expected[key].dtype == got[key].dtype for key in expected)


def test_two_processes_desink_as_one_does(tmp_path):
    model = source_model(vocab_size=308, max_position_embeddings=256, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1000  # the beginning-of-text token is massive
    published(tmp_path / "plain", model, tokenizer=True)
    texts = ({"text": f"the grumpy cat sat on {number} mats, which were red. " * 4} for number in range(160))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    # In fp32, since in bf16 a sum of two rows is not that of one and the other; and any sink is moved, however it fits.
    desink = tmp_path / "desink.py"
    desink.write_text(
        "import sys, torch\n"
        "from dataclasses import replace\n"
        "from gated_llama.scripts.cli import main\n"
        "from gated_llama.sinks import recipe\n"
        "torch.cpu.get_capabilities = dict\n"
        "real = recipe.move_sinks\n"
        "recipe.move_sinks = lambda model, ids, settings, **keywords: real(\n"
        "    model, ids, replace(settings, min_sink=0.0, max_error=1e9), **keywords\n"
        ")\n"
        "sys.exit(main(['desink', *sys.argv[1:]]))\n"
    )
    made = {}
    for processes, launcher in ((1, []), (2, LAUNCHERS["torchrun"])):
        output = tmp_path / f"by-{processes}"
        command = [sys.executable, *launcher, desink, tmp_path / "plain", output]
        command += ["--text", tmp_path / "text.jsonl", "--calm-tokens", "2048", "--move-tokens", "2048"]
        command += ["--heal-tokens", "1024", "--length", "128", "--batch-size", str(4 // processes)]
        command += ["--max-loss", "900%", "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()  # one of the processes speaks
        said = json.loads(line)
        judged = [said["before"], *(step["judgement"] for step in said["steps"])]
        made[processes] = tensors(output), [judgement["loss"] for judgement in judged]
        assert not list(tmp_path.glob("*unfinished"))
    (one, losses_of_one), (two, losses_of_two) = made[1], made[2]
    print(f"\ndesink: {losses_of_one} in one process, {losses_of_two} in two")
    assert len(set(losses_of_one)) == 4  # before, moved, healed, calmed
    assert losses_of_two == pytest.approx(losses_of_one, abs=1e-6)  # the order of a sum
    assert one.keys() == two.keys()
