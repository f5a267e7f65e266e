# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Training a gated model in each way, stopping and resuming, watching the run, on small models that can learn."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from gated_llama import (
    FinetuneSettings,
    GatedTrainer,
    GateMonitor,
    UserError,
    convert_checkpoint,
    finetune_checkpoint,
    gate_parameter_groups,
    train_only_gates,
)
from gated_llama.checkpoints.folder import GATES_NAME
from gated_llama.gates import gate_modules, is_gate
from gated_llama.loading import load
from gated_llama.scripts.cli import main
from gated_llama.training import finetune as finetune_module
from gated_llama.training.finetune import last_checkpoint
from gated_llama.training.monitor import LossGuard, log_line
from gated_llama.training.trainer import training_arguments
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, published, source_model, tiny_tokenizer, token_ids


SENTENCE = "the grumpy cat sat on the mat, which was red"
QUICK = {"steps": 8, "length": 16, "batch_size": 4, "lr": 1e-2, "gate_lr": 3e-2, "save_steps": 4, "log_steps": 2}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCE[: 20 + n % 20]}) + "\n" for n in range(60)))
    return path


def converted(folder, variant="llama", **settings):
    published(folder / "source", source_model(variant), shards=2, tokenizer=True)
    convert_checkpoint(folder / "source", folder / "gated", progress=False, **settings)
    return folder / "gated"


def tensors(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def finetune(source, data, output, *, resume=False, link=False, **settings):
    quick = {name: value for name, value in QUICK.items() if name != "lr" or settings.get("train") != "gates"}
    settings = FinetuneSettings(**{**quick, **settings})
    return finetune_checkpoint(source, [data], output, settings, resume=resume, link=link, progress=False)


def test_gates_of_a_checkpoint_with_the_keys_of_a_bare_model(tmp_path, data):
    published(tmp_path / "source", source_model("llama", "Model", tie_word_embeddings=True), tokenizer=True)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    convert_checkpoint(tmp_path / "source", tmp_path / "gated", progress=False)
    finetune(tmp_path / "gated", data, tmp_path / "run", train="gates")
    made = load_file(tmp_path / "run" / GATES_NAME)
    assert "layers.0.self_attn.attn_gate.proj.weight" in made and all(gate.any() for gate in made.values())
    load(tmp_path / "run")


@pytest.mark.parametrize("way", ["lora", "gates", "full"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_every_way_learns_and_loads(tmp_path, data, variant, way):
    source = converted(tmp_path, variant)
    result = finetune(source, data, tmp_path / "run", train=way)
    assert result.held_out_after < result.held_out_before - 0.05
    assert result.gate_drift > 1e-3 and "The gates moved by" in result.verdict
    card = (tmp_path / "run" / "README.md").read_text()
    assert result.tokens == 8 * 4 * 16 and "| steps | 8 |\n| tokens seen in training | 512 |" in card
    model, _ = load(tmp_path / "run")
    assert (result.parameters.gates, result.parameters.rest == 0) == (3 * 6 * 36, way == "gates")
    gates = {name: tensor for name, tensor in model.state_dict().items() if is_gate(name) and "original" not in name}
    assert len(gates) == 3 and all(tensor.abs().max() > 0 for tensor in gates.values())


def test_gates_alone_rewrite_one_file_that_makes_another_copy_the_trained_model(tmp_path, data):
    source = converted(tmp_path)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    finetune(source, data, tmp_path / "run", train="gates")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert after.keys() - before.keys() == {"finetune.json"}
    assert {name for name in before if before[name] != after[name]} == {GATES_NAME, "README.md"}
    card = after["README.md"].decode()
    assert re.search(r"gated-llama finetune gated --out run --data \S+ --train gates --gate-lr \S+ --", card)
    assert "added to source by" in card and "| gate lr |" in card and str(tmp_path) not in card
    convert_checkpoint(tmp_path / "source", tmp_path / "copy", progress=False)
    (tmp_path / "copy" / GATES_NAME).write_bytes(after[GATES_NAME])
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(token_ids()).logits for name in ("copy", "run")]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], AutoModelForCausalLM.from_pretrained(source)(token_ids()).logits)
    finetune(source, data, tmp_path / "linked", train="gates", link=True)
    linked = {name for name in before if (tmp_path / "linked" / name).samefile(source / name)}
    assert linked == {name for name in before if name.startswith("model-0")} and len(linked) == 2
    assert (tmp_path / "linked" / GATES_NAME).read_bytes() == after[GATES_NAME]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_gates_alone_of_a_checkpoint_in_one_file(tmp_path, data):
    source = converted(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "joined")
    for path in source.glob("tokenizer*"):
        (tmp_path / "joined" / path.name).write_bytes(path.read_bytes())
    finetune(tmp_path / "joined", data, tmp_path / "run", train="gates")
    old, new = tensors(tmp_path / "joined"), tensors(tmp_path / "run")
    assert old.keys() == new.keys()
    assert {key for key in old if not torch.equal(old[key], new[key])} == {key for key in old if is_gate(key)}
    assert set(load_file(tmp_path / "run" / GATES_NAME)) == {key for key in old if is_gate(key)}


def test_weights_come_back_in_the_dtype_of_the_checkpoint(tmp_path, data):
    source = converted(tmp_path, dtype="bfloat16")
    for way in ("gates", "full", "lora"):
        finetune(source, data, tmp_path / way, train=way)
    for way in ("gates", "full"):
        assert {tensor.dtype for tensor in tensors(tmp_path / way).values()} == {torch.bfloat16}
    dtypes = {is_gate(key): tensor.dtype for key, tensor in tensors(tmp_path / "lora").items()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}


def test_plain_models_have_no_gates_to_train(tmp_path, data):
    with pytest.raises(UserError, match="no gates to train"):
        train_only_gates(source_model("llama"))
    published(tmp_path / "source", source_model("llama"), tokenizer=True)
    with pytest.raises(UserError, match="convert it first"):
        finetune(tmp_path / "source", data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gates_have_their_own_rate_and_no_decay():
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True)
    gates, matrices, vectors = gate_parameter_groups(model, lr=2e-5, weight_decay=0.1)
    assert (gates["lr"], gates["weight_decay"]) == (pytest.approx(1e-3), 0.0)
    assert (matrices["lr"], matrices["weight_decay"], vectors["weight_decay"]) == (2e-5, 0.1, 0.0)
    assert len(gates["params"]) == 6 and all(p.dim() == 1 for p in vectors["params"])
    grouped = [p for group in (gates, matrices, vectors) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(set(grouped))
    train_only_gates(model)
    assert [group["lr"] for group in gate_parameter_groups(model, lr=2e-5, gate_lr=0.5)] == [0.5]


# --- stopping and resuming


class StopAt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def history(run):
    log = json.loads((run / "finetune.json").read_text())["log"]
    return [(entry["step"], entry["loss"], entry["gate_mean"]) for entry in log if "loss" in entry]


def tokens_seen(run):
    return json.loads((run / "finetune.json").read_text())["result"]["tokens"]


def with_callback(monkeypatch, callback):
    plain = GatedTrainer.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.add_callback(callback)

    monkeypatch.setattr(GatedTrainer, "__init__", init)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from gated_llama import FinetuneSettings, GatedTrainer, finetune_checkpoint

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

plain = GatedTrainer.__init__

def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Kill())

GatedTrainer.__init__ = init
finetune_checkpoint({source!r}, [{data!r}], {output!r}, FinetuneSettings(**{settings!r}), progress=False)
"""


@pytest.mark.parametrize(("way", "kill"), [("lora", True), ("gates", False), ("full", False)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, data, monkeypatch, run_python, way, kill):
    source = converted(tmp_path)
    settings = {"train": way, "accumulate": 2}
    if not kill:  # by default they are shares of the run, of which the Trainer keeps the steps
        settings |= {"save_steps": None, "log_steps": None}
    finetune(source, data, tmp_path / "whole", **settings)
    if kill:
        code = KILLED.format(
            source=str(source), data=str(data), output=str(tmp_path / "run"), settings=QUICK | settings
        )
        assert run_python(code).returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            with_callback(patch, StopAt(6, ZeroDivisionError()))
            with pytest.raises(ZeroDivisionError):
                finetune(source, data, tmp_path / "run", **settings)
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-4"
    warned = []
    monkeypatch.setattr("transformers.trainer_utils.logger.warning_once", warned.append)
    finetune(source, data, tmp_path / "run", resume=True, **settings)
    assert not [line for line in warned if "arguments do not match" in line]
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert 0 < tokens_seen(tmp_path / "run") == tokens_seen(tmp_path / "whole")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_interrupted_runs_keep_the_last_whole_checkpoint(tmp_path, data, monkeypatch):
    source = converted(tmp_path)
    with monkeypatch.context() as patch:
        with_callback(patch, StopAt(6, KeyboardInterrupt()))
        with pytest.raises(UserError, match=r"interrupted after step 6\. .*checkpoint-4 is whole: --resume"):
            finetune(source, data, tmp_path / "run", train="gates")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match=r"gate_lr 0.03, not 0.5"):
        finetune(source, data, tmp_path / "run", train="gates", gate_lr=0.5, resume=True)
    with pytest.raises(UserError, match=r"is not empty: .* --resume"):
        finetune(source, data, tmp_path / "run", train="gates")
    text = data.read_text()
    data.write_text(text + '{"text": "more"}\n')
    with pytest.raises(UserError, match="began with digest of the text"):
        finetune(source, data, tmp_path / "run", train="gates", resume=True)
    data.write_text(text)
    finetune(source, data, tmp_path / "run", train="gates", resume=True)
    with pytest.raises(UserError, match="is finished"):
        finetune(source, data, tmp_path / "run", train="gates", resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        finetune(source, data, tmp_path / "none", train="gates", resume=True)


@pytest.mark.parametrize("full_at", ["weights", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path, data, monkeypatch, full_at):
    source = converted(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def torch_save(state, path, *args, **kwargs):
        path = Path(path)
        if "optimizer" in str(path) and "checkpoint-8" in str(path):
            path.write_bytes(b"part")
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/7")
        return save(state, path, *args, **kwargs)

    class FullAt8(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8 and full_at == "weights":
                monkeypatch.setattr("gated_llama.training.trainer.save_file", full)
            if state.global_step == 8 and full_at == "trainer_state.json":
                monkeypatch.setattr(type(state), "save_to_json", full)

    save = torch.save
    if full_at == "optimizer.pt":
        monkeypatch.setattr(torch, "save", torch_save)
    with_callback(monkeypatch, FullAt8())
    with pytest.raises(UserError, match=r"no checkpoint could be written after step 8.*checkpoint-4 is whole"):
        finetune(source, data, tmp_path / "run", train="gates")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_result_that_cannot_be_written_leaves_nothing_that_loads(tmp_path, data, monkeypatch):
    source = converted(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gated_llama.gates.write_with_gates", full)
    with pytest.raises(UserError, match=r"the result could not be written: .*No space left.*checkpoint-8 is whole"):
        finetune(source, data, tmp_path / "run", train="gates")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"finetune.json", "checkpoints"}


@pytest.mark.parametrize("asked", [{}, {"steps": None, "epochs": 1.0}], ids=["steps", "epochs"])
def test_a_run_that_lacks_its_result_alone_is_gone_on_with_without_a_step(tmp_path, data, monkeypatch, asked):
    source = converted(tmp_path)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    whole = finetune(source, data, tmp_path / "whole", train="gates", **asked)
    with monkeypatch.context() as patch:
        patch.setattr("gated_llama.gates.write_with_gates", stopped)
        with pytest.raises(UserError, match=rf"written: interrupted. .*checkpoint-{whole.steps} is whole"):
            finetune(source, data, tmp_path / "run", train="gates", **asked)
    resumed = finetune(source, data, tmp_path / "run", train="gates", resume=True, **asked)
    assert resumed.verdict == whole.verdict.replace("from step 0 to", "up to step")
    assert replace(resumed, output=whole.output, verdict=whole.verdict) == whole
    gates = [load_file(tmp_path / run / GATES_NAME) for run in ("whole", "run")]
    assert all(map(torch.equal, gates[0].values(), gates[1].values()))


def test_damaged_checkpoints_are_passed_over(tmp_path, data):
    source = converted(tmp_path)
    finetune(source, data, tmp_path / "run", train="gates")
    folder = tmp_path / "run" / "checkpoints"
    assert last_checkpoint(folder).name == "checkpoint-8"
    weights = folder / "checkpoint-8" / GATES_NAME
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    assert last_checkpoint(folder).name == "checkpoint-4"
    weights.write_bytes(content)
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-9-mine")
    assert last_checkpoint(folder).name == "checkpoint-8"
    (folder / "checkpoint-8" / "rng_state.pth").unlink()
    assert last_checkpoint(folder).name == "checkpoint-4"
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert last_checkpoint(folder) is None


# --- runs that go wrong


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, data):
    source = converted(tmp_path)
    with pytest.raises(UserError, match=r"loss of step \d+ is nan.*learning rate.*1e\+38.*lower it"):
        finetune(source, data, tmp_path / "run", train="full", lr=1e38)
    published(tmp_path / "bad", source_model("llama"), tokenizer=True)
    convert_checkpoint(tmp_path / "bad", tmp_path / "bad-gated", progress=False, verify=False)
    path = next((tmp_path / "bad-gated").glob("model-0*"))
    weights = load_file(path)
    weights["model.norm.weight"][3] = math.nan
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss of step 1 is nan.*the likely cause is the checkpoint"):
        finetune(tmp_path / "bad-gated", data, tmp_path / "run2", train="gates", held_out=0)
    assert not (tmp_path / "run2").exists()  # nothing came of it


def test_a_run_that_went_wrong_leaves_nothing_behind(tmp_path):
    model = gated_model(GatedLlamaForCausalLM)
    norm = model.model.norm.weight
    good = norm.detach().clone()
    trainer = trainer_of(model, tmp_path)
    for wrong in (math.nan, 1.0):
        with torch.no_grad():
            norm.copy_(good * wrong)
        if wrong == 1:
            trainer.train()  # as if nothing had been
        else:
            with pytest.raises(UserError, match="loss of step 1 is nan"):
                trainer.train()
        assert not any(gate._forward_hooks for gate in model.modules() if type(gate).__name__ == "AttentionGate")


def test_a_diverged_loss_ends_the_run():
    guard = LossGuard()
    for step, loss in enumerate([4.0] * 10 + [3.0, 9.0, 2.0] * 10, 1):  # noisy, and going down
        guard.check(loss, step, "")
    with pytest.raises(UserError, match=r"diverged: .* before step \d+, up from .*\(0.5\)"):
        for step in range(41, 60):
            guard.check(11.0, step, "0.5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "some"}, "no way to train 'some'"),
        ({"steps": 0}, "steps must be more than 0"),
        ({"gate_lr": -1.0}, "gate_lr must not be negative"),
        ({"report_to": "nowhere"}, "report_to 'nowhere' needs a package"),
        ({"length": 1}, "length must be at least 2"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"link": True}, "link needs weights that stay as they are: use train='gates', not 'lora'"),
        ({"train": "full", "quantize": "4bit"}, "quantized weights cannot be trained"),
        ({"fsdp_size": 2}, "LoRA with gates cannot be trained on sharded weights"),
        ({"quantize": "2bit"}, "no quantization '2bit'"),
        ({"train": "gates", "lr": 1e-4}, "lr has no say with train='gates'"),
        ({"train": "full", "lora_mlp": True}, "lora_mlp has no say with train='full'"),
        ({"length": 10_000}, "fill no row of 10000"),
        ({"seed": -1}, "seed must be from 0 to"),
    ],
)
def test_settings_that_cannot_be(tmp_path, data, settings, message):
    source = converted(tmp_path)
    with pytest.raises(UserError, match=message):
        finetune(source, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_model_is_made_for_are_told_of(tmp_path, data):
    source, said = converted(tmp_path), []
    longest = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    for length in (longest, longest + 1):
        settings = FinetuneSettings(**QUICK | {"steps": 1, "length": length})
        finetune_checkpoint(source, [data], tmp_path / str(length), settings, progress=False, announce=said.append)
    assert sum(f"longer than the {longest} that" in line for line in said) == 1


def test_sharding_is_refused_where_transformers_has_none(monkeypatch):
    FinetuneSettings(train="full", fsdp_size=2).check()
    monkeypatch.setattr(finetune_module, "PreTrainedModel", object)
    with pytest.raises(UserError, match="cannot train sharded weights: take a newer one"):
        FinetuneSettings(train="full", fsdp_size=2).check()


def test_tokens_that_the_model_does_not_have(tmp_path, data):
    """Its padding token is passed over, as where a tokenizer's was added; any other is refused."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    published(tmp_path / "source", source_model(vocab_size=size))
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path / "source")
    source = tmp_path / "gated"
    convert_checkpoint(tmp_path / "source", source, progress=False)
    said = []
    settings = FinetuneSettings(**{**QUICK, "packing": False})
    finetune_checkpoint(source, [data], tmp_path / "run", settings, progress=False, announce=said.append)
    assert any("padding token that the model knows: rows are padded with " in line for line in said)
    data.write_text('{"text": "the cat <added>"}\n' * 60)
    with pytest.raises(UserError, match=f"made token {size}, and the model has {size}"):
        finetune(source, data, tmp_path / "other")


# --- watching


def trainer_of(model, tmp_path, *, trainer=GatedTrainer, steps=4, **kwargs):
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 12)]
    arguments = training_arguments(
        tmp_path, max_steps=steps, per_device_train_batch_size=2, logging_steps=2, save_strategy="no", disable_tqdm=True
    )
    return trainer(model, arguments, train_dataset=rows, **kwargs)


def run_trainer(*args, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return trainer


def test_every_log_tells_what_the_gates_do(tmp_path):
    model = gated_model(GatedLlamaForCausalLM, gate_bias=True, trained=False)
    wanted = (1.0, 0.03, 1.9)
    for layer, value in zip(model.model.layers, wanted, strict=True):
        torch.nn.init.constant_(layer.self_attn.attn_gate.proj.bias, math.log(value / (2 - value)))
    reported = []

    class Report(TrainerCallback):  # stands where report_to's callbacks stand
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = run_trainer(model, tmp_path, gate_lr=0.0, callbacks=[Report()])
    log = trainer.state.log_history[1]
    assert reported[1].items() <= log.items()
    for layer, value in enumerate(wanted):
        name = f"layer_{layer:02}"
        assert log[f"gate_mean/{name}"] == pytest.approx(value, rel=1e-5)
        assert log[f"gate_moved/{name}"] == pytest.approx(abs(value - 1), abs=1e-6)
        assert (log[f"gate_below_0.1/{name}"], log[f"gate_above_1.5/{name}"]) == (value < 0.1, value > 1.5)
    assert log["gate_mean"] == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert math.hypot(log["grad_norm_gates"], log["grad_norm_rest"]) == pytest.approx(log["grad_norm"], rel=1e-5)
    assert log["grad_norm_gates"] > 0
    assert log["tokens_per_second"] > 0 and log["peak_memory_gb"] > 0.1
    line = log_line(4, log)
    assert "gates ▄▁▇ mean 0.977" in line and "tokens/s" in line
    assert log["gate_drift"] == 0
    assert "The gates did not move" in trainer.gate_monitor.verdict()


def test_gates_that_move_and_gates_that_are_frozen_are_told(tmp_path):
    model = gated_model(GatedLlamaForCausalLM)
    gates = [gate for (gate,) in gate_modules(model).values()]
    start = [gate.proj.weight.clone() for gate in gates]
    trainer = run_trainer(model, tmp_path, gate_lr=0.1)
    assert trainer.gate_monitor.drift > 0.01
    assert "The gates moved" in trainer.gate_monitor.verdict()
    assert all(
        (gate[0].proj.weight - old).abs().max() > 0
        for gate, old in zip(gate_modules(model).values(), start, strict=True)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not is_gate(name)
    assert run_trainer(model, tmp_path).gate_monitor.verdict() == "The gates were frozen."


def test_watching_changes_nothing(tmp_path):
    """The same losses and weights as the plain Trainer with the same optimizer; a hook that stayed would be seen."""
    from transformers import Trainer

    results = []
    for cls in (GatedTrainer, Trainer):
        model = gated_model(GatedLlamaForCausalLM)
        optimizer = torch.optim.AdamW(gate_parameter_groups(model, 1e-3), betas=(0.9, 0.95))
        trainer = run_trainer(model, tmp_path, trainer=cls, optimizers=(optimizer, None))
        assert not any(module._forward_hooks for module in model.modules())
        results.append(([log["loss"] for log in trainer.state.log_history if "loss" in log], model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])


def test_the_monitor_serves_any_trainer(tmp_path):
    from transformers import Trainer

    monitor = GateMonitor()
    trainer = run_trainer(gated_model(GatedLlamaForCausalLM), tmp_path, trainer=Trainer, callbacks=[monitor])
    assert trainer.state.log_history[0]["gate_mean/layer_02"] > 0
    assert monitor.drift is not None


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_kill_of_the_command(tmp_path, data, sent):
    source = converted(tmp_path)
    command = [sys.executable, "-m", "gated_llama.scripts.finetune_model", source, "--data", data]
    command += ["--out", tmp_path / "run", "--train", "gates", "--steps", "100000", "--save-steps", "5"]
    command += ["--length", "16"]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as running:
        while running.poll() is None and not list((tmp_path / "run").glob("checkpoints/checkpoint-1*")):
            time.sleep(0.1)
        os.kill(running.pid, sent)
        _, errors = running.communicate()
    assert running.returncode == 2
    assert "interrupted after step" in errors and "--resume" in errors and "Traceback" not in errors
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_the_command_as_json(tmp_path, data, capsys):
    source = converted(tmp_path)
    words = ["finetune", source, "--data", data, "--eval-data", data, "--out", tmp_path / "run", "--train", "gates"]
    words += ["--steps", 2, "--length", 8, "--no-packing", "--gradient-checkpointing", "--json"]
    assert main([str(word) for word in words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2 and result["parameters"]["gates"] == 648 and result["held_out_after"] > 0
    assert "from 60 documents; " in result["data"] and " of them cut, " in result["data"]
    assert main([str(word) for word in words]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_gradient_checkpointing_changes_no_loss(tmp_path, data):
    source = converted(tmp_path)
    for name, checkpointing in (("plain", False), ("saving", True)):
        finetune(source, data, tmp_path / name, gradient_checkpointing=checkpointing)
    assert history(tmp_path / "plain") == history(tmp_path / "saving")
    plain, saving = tensors(tmp_path / "plain"), tensors(tmp_path / "saving")
    assert all(torch.equal(plain[key], saving[key]) for key in plain)
