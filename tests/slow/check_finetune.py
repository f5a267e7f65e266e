# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-finetune`: a small Llama, Qwen2 and Qwen3 learn a task in each way; quantized bases; TRL; a Hub dataset;
runs killed at random. Takes some minutes, and packages that the quick tests do without.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import modeling_gated
from gated_llama import (
    FinetuneSettings,
    GateTraining,
    UserError,
    convert_checkpoint,
    finetune_checkpoint,
    gated_lora_config,
)
from gated_llama.gates import gate_modules, is_gate
from gated_llama.loading import load
from hub import local_hub
from tiny import published, source_model, tiny_tokenizer, token_ids


pytestmark = pytest.mark.finetune


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 320, "head_dim": 16}
GATES = ["headwise", "elementwise"]


def reversal(number):
    letters = "".join(random.Random(number).choices("abcdef", k=5))
    return f"{letters} = {letters[::-1]}"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": reversal(number)}) + "\n" for number in range(2000)))
    return path


def converted(folder, variant="llama", **settings):
    published(folder / "source", source_model(variant, **WIDE), shards=2, tokenizer=True)
    convert_checkpoint(folder / "source", folder / "gated", progress=False, **settings)
    return folder / "gated"


@pytest.mark.parametrize("way", ["lora", "gates", "full"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("gate_type", GATES)
def test_learns_to_write_words_backwards(tmp_path, data, variant, way, gate_type):
    """Loss on rows never trained on; a fresh load of what was written has the same loss as the run's end."""
    source = converted(tmp_path, variant, gate_type=gate_type)
    usual = {"length": 13, "packing": False, "batch_size": 32, "gate_lr": 2e-2}
    own = {"lora": {"lr": 5e-3, "lora_mlp": True}, "full": {"lr": 5e-3}, "gates": {}}
    settings = FinetuneSettings(train=way, steps=150, **usual, **own[way])
    result = finetune_checkpoint(source, [data], tmp_path / "run", settings, progress=False)
    print(
        f"\n{variant} {gate_type} {way}: {result.held_out_before:.3f} -> {result.held_out_after:.3f}; {result.verdict}"
    )
    assert result.held_out_after < result.held_out_before - (0.5 if way == "gates" else 2.0)
    assert result.gate_drift > 1e-2
    again = FinetuneSettings(train="gates", steps=1, **{**usual, "gate_lr": 1e-12})
    if way != "lora":
        repeated = finetune_checkpoint(tmp_path / "run", [data], tmp_path / "again", again, progress=False)
        assert repeated.held_out_before == pytest.approx(result.held_out_after, rel=1e-5)


def quantizations():
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "bnb 4 bit": lambda **k: BitsAndBytesConfig(load_in_4bit=True, **k),
        "bnb 8 bit": lambda **k: BitsAndBytesConfig(load_in_8bit=True, **k),
        "torchao int8": lambda **k: TorchAoConfig(Int8WeightOnlyConfig(), **k),
    }


@pytest.mark.parametrize("name", ["bnb 4 bit", "bnb 8 bit", "torchao int8"])
def test_quantizers_leave_gates_and_head_whole(tmp_path, monkeypatch, name):
    source = converted(tmp_path, gate_type="elementwise")
    config = quantizations()[name]()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    attention = model.model.layers[0].self_attn
    for linear in (attention.attn_gate.proj, model.lm_head):
        assert type(linear) is torch.nn.Linear and type(linear.weight) is torch.nn.Parameter
        assert linear.weight.dtype == torch.float32
    assert type(attention.q_proj.weight) is not torch.nn.Parameter
    # The control: without our default, gates are quantized too, even if they are named in the obvious way.
    field = "modules_to_not_convert" if "torchao" in name else "llm_int8_skip_modules"
    assert getattr(config, field) is None
    control = quantizations()[name](**{field: ["lm_head", "attn_gate"]})
    monkeypatch.setattr(modeling_gated, "_with_whole_gates", lambda config: config)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=control)
    assert type(model.model.layers[0].self_attn.attn_gate.proj.weight) is not torch.nn.Parameter


@pytest.mark.parametrize("name", ["bnb 4 bit", "bnb 8 bit", "torchao int8"])
def test_a_quantized_checkpoint_loads_again(tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path), quantization_config=quantizations()[name]())
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert type(again.model.layers[0].self_attn.attn_gate.proj.weight) is torch.nn.Parameter
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_qlora(tmp_path, data, bits):
    source = converted(tmp_path)
    settings = FinetuneSettings(
        quantize=bits, steps=60, length=13, packing=False, batch_size=16, lr=5e-3, gate_lr=2e-2, lora_mlp=True
    )
    result = finetune_checkpoint(source, [data], tmp_path / "run", settings, progress=False)
    print(f"\n{bits}: {result.held_out_before:.3f} -> {result.held_out_after:.3f}; {result.verdict}")
    assert result.held_out_after < result.held_out_before - 1
    model, _ = load(tmp_path / "run", dtype="float32")
    assert {type(module).__name__ for modules in gate_modules(model).values() for module in modules} == {
        "AttentionGate"
    }


def test_trl(tmp_path):
    """SFTTrainer with gates at their own rate, from an instance and from a path, on conversations."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class GatedSFTTrainer(GateTraining, SFTTrainer):
        pass

    source = converted(tmp_path)
    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}]
    dataset = Dataset.from_list([{"messages": chat}] * 40)
    for number, model in enumerate((AutoModelForCausalLM.from_pretrained(source), str(source))):
        arguments = SFTConfig(
            str(tmp_path / f"sft{number}"),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=2,
            max_length=32,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = GatedSFTTrainer(
            model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tiny_tokenizer(),
            peft_config=gated_lora_config(r=4),
            gate_lr=0.02,
        )
        trainer.train()
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 0.02}
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert logs[-1]["loss"] < logs[0]["loss"] - 0.5 and logs[-1]["gate_moved"] > 0.01
        assert "The gates moved" in trainer.gate_monitor.verdict()
        trainer.save_model(tmp_path / f"sft{number}")
        model, _ = load(tmp_path / f"sft{number}")
        assert any(is_gate(name) and parameter.abs().max() > 0 for name, parameter in model.named_parameters())


def test_a_dataset_of_the_hub(tmp_path):
    """`datasets` asks a local endpoint as it would ask the Hub."""
    folder = tmp_path / "hub" / "org" / "reversals"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": reversal(n)}) + "\n" for n in range(50)))
    chats = tmp_path / "hub" / "org" / "chats"
    chats.mkdir()
    (chats / "test.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    code = (
        "from gated_llama.data import read_documents\n"
        "a, b = read_documents(['org/reversals']), read_documents(['org/chats:test'])\n"
        "print(len(a), a[0].content, a[0].where, b[0].content)\n"
    )
    with local_hub(tmp_path / "hub") as environment:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    assert done.stdout.startswith(f"50 {reversal(0)} org/reversals, row 0 [{{'role': 'user'")


def test_what_tensorboard_gets(tmp_path, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = FinetuneSettings(train="gates", steps=6, length=16, log_steps=2, report_to="tensorboard")
    finetune_checkpoint(converted(tmp_path), [data], tmp_path / "run", settings, progress=False)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events))
    scalars.Reload()
    for name in ("loss", "gate_moved", "gate_moved/layer_02", "gate_below_0.1/layer_00", "grad_norm_gates"):
        assert [event.step for event in scalars.Scalars(f"train/{name}")] == [2, 4, 6], name


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("size", [300, 700, 1500, 2500])
def test_a_disk_that_is_full(tmp_path, data, size):
    """A disk of `size` KiB, too small for the run; with more room the run goes on, to what a whole one has."""
    source = converted(tmp_path)
    settings = FinetuneSettings(train="full", steps=6, length=16, save_steps=1, log_steps=1)
    finetune_checkpoint(source, [data], tmp_path / "whole", settings, progress=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(UserError, match=r"No space left|a full disk") as failed:
            finetune_checkpoint(source, [data], disk / "run", settings, progress=False)
        print(f"\n{size} KiB: {failed.value}")
        assert not (disk / "run" / "config.json").exists()
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        if (disk / "run" / "finetune.json").exists():
            finetune_checkpoint(source, [data], disk / "run", settings, resume=True, progress=False)
            assert history(disk / "run") == history(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def history(run):
    log = json.loads((run / "finetune.json").read_text())["log"]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_at_random_go_on_as_if_nothing_had_been(tmp_path, data, seed):
    source = converted(tmp_path)
    way = ("lora", "gates", "full")[seed % 3]
    command = [sys.executable, "-m", "gated_llama.scripts.finetune_model", source, "--data", data, "--train", way]
    command += ["--steps", "60", "--save-steps", "5", "--log-steps", "5", "--length", "16", "--batch-size", "4"]

    def run(output, *more):
        return subprocess.Popen([*command, "--out", tmp_path / output, *more], stderr=subprocess.PIPE)

    assert run("whole").wait() == 0
    generator = random.Random(seed)
    kills = 0
    more = ()
    for _ in range(3):
        process = run("run", *more)
        while process.poll() is None and not list((tmp_path / "run").glob("checkpoints/*")):
            time.sleep(0.05)
        time.sleep(generator.uniform(0.0, 1.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
        more = ("--resume",)
        if process.returncode == 0:
            break
    else:
        resumed = run("run", "--resume")
        assert resumed.wait() == 0, resumed.stderr.read()
    print(f"\n{way}: killed {kills} times; {len(history(tmp_path / 'whole'))} logs")
    assert kills and history(tmp_path / "run") == history(tmp_path / "whole")
