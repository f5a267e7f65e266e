# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The tasks of the benchmarks are what they say, their controls are linear, and their verdicts can fail."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import paint_mixer
import pretrain
import spotlight
from measured import keep_record, read_records
from training import train


def test_triggers_copy_and_words_follow_the_language():
    language = spotlight.Language.made(0)
    ids = language.windows(2000, seed=1)
    triggers = spotlight.is_trigger(ids)
    assert (ids[:, 0] == spotlight.BOS).all() and (ids[:, 1:] != spotlight.BOS).all()
    rows, places = triggers[:, :-1].nonzero(as_tuple=True)
    assert len(rows) > 5000 and places.min() >= 2
    assert torch.equal(ids[rows, places + 1], ids[rows, places - 1])
    assert not (triggers[:, 1:] & triggers[:, :-1]).any()
    torch.testing.assert_close(language.follow[spotlight.BOS].sum(), torch.tensor(1.0))
    follow = (ids[:, 1:][ids[:, :-1] == 9]).bincount(minlength=spotlight.VOCAB)
    torch.testing.assert_close(follow / follow.sum(), language.follow[9], rtol=0, atol=0.05)
    assert not torch.equal(ids, language.windows(2000, seed=2))


def spotlight_record() -> dict:
    def found(first: float, *gates: float) -> dict:
        return {"first": first, **dict(zip(("gate_idle", "gate_trigger"), gates, strict=False))}

    models = {"ungated": found(0.6), "gated from scratch": found(0.1, 0.02, 0.2), spotlight.MODELS[3]: found(0.6)}
    return {"models": models}


@pytest.mark.parametrize(
    ("model", "name", "value", "fails"),
    [
        ("ungated", "first", 0.29, 0),
        ("gated from scratch", "first", 0.2, 1),
        ("gated from scratch", "gate_idle", 0.1, 2),
        (spotlight.MODELS[3], "first", 0.3, 3),
    ],
)
def test_one_seed_can_break_a_claim_of_the_spotlight(model, name, value, fails):
    records = [spotlight_record(), spotlight_record()]
    assert all(claim.holds for claim in spotlight.claims(records))
    records[1]["models"][model][name] = value
    assert not spotlight.claims(records)[fails].holds


def test_the_spotlight_is_measured_where_it_is():
    """A head that is made to look at the first token alone, and one that looks at all alike."""
    ids = spotlight.Language.made(0).windows(8, seed=1)
    model = LlamaForCausalLM(LlamaConfig(**spotlight.SHAPE)).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    evenly = torch.arange(1, spotlight.LENGTH + 1).reciprocal()
    found, shown, gates = spotlight.look(model, ids)
    torch.testing.assert_close(shown[:, 0], evenly)
    idle = ~spotlight.is_trigger(ids[:, 1:])
    assert found["first"] == pytest.approx(evenly[1:].expand(8, -1)[idle].mean().item(), rel=1e-5)
    assert gates is None and "gate_idle" not in found


def test_paints_are_every_combination_and_the_question_picks():
    rows = paint_mixer.windows()
    assert len(rows) == paint_mixer.PAINTS * paint_mixer.FEATURES and len(rows.unique(dim=0)) == len(rows)
    answers = (rows[:, 3] - paint_mixer.ANSWER).view(paint_mixer.PAINTS, paint_mixer.FEATURES)
    assert len(answers.unique(dim=0)) == paint_mixer.PAINTS
    assert answers.min() == 0 and answers.max() == paint_mixer.VALUES - 1
    # Neither the question alone nor the paint alone tells the answer.
    for question in range(paint_mixer.FEATURES):
        assert answers[:, question].bincount().tolist() == [paint_mixer.PAINTS // paint_mixer.VALUES] * 4
    loss, accuracy = paint_mixer.paint_alone()
    assert 0.5 < accuracy < 0.6 and 0.9 < loss < math.log(paint_mixer.VALUES)


@torch.no_grad()
def output_parts(kind: str, attention: str) -> float:
    """How far the attention's output for (paint, question) is from a sum of a part of each: 0 for what is linear."""
    torch.manual_seed(0)
    model = paint_mixer.make(kind, attention)
    layer = model.model.layers[0]
    for parameter in layer.self_attn.parameters():
        if parameter.abs().sum() > 0:  # not the queries and keys of even attention
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    outputs = []
    layer.self_attn.register_forward_hook(lambda module, inputs, output: outputs.append(output[0][:, -1]))
    mlp = []
    layer.mlp.register_forward_hook(lambda module, inputs, output: mlp.append(output))
    ids = paint_mixer.windows()[:, :3].view(paint_mixer.PAINTS, paint_mixer.FEATURES, 3)
    model(ids[[3, 200]][:, [0, 2]].flatten(0, 1))
    assert not mlp[0].any()
    (a, b), (c, d) = outputs[0].view(2, 2, -1)
    return ((a - b) - (c - d)).abs().max().item()


@pytest.mark.parametrize("kind", paint_mixer.KINDS)
def test_only_gates_multiply(kind):
    if kind in paint_mixer.LINEAR:
        assert output_parts(kind, "even") < 1e-4
    else:
        assert output_parts(kind, "even") > 0.1
    assert output_parts(kind, "learned") > 0.1  # softmax is a gate too


def test_controls_have_as_many_parameters_as_the_gate():
    def trained(kind: str, attention: str) -> int:
        return sum(p.numel() for p in paint_mixer.make(kind, attention).parameters() if p.requires_grad)

    for attention in paint_mixer.ATTENTION:
        counts = {trained(kind, attention) for kind in ("elementwise", "longer path", "added path")}
        assert counts == {trained("ungated", attention) + paint_mixer.WIDTH**2}


def test_a_claim_of_the_paint_mixer_can_fail():
    lines = [
        {"kind": kind, "attention": attention, "accuracy": 0.5, "loss": 0.95}
        for kind in paint_mixer.LINEAR
        for attention in paint_mixer.ATTENTION
    ]
    lines += [{"kind": "elementwise", "attention": a, "accuracy": 1.0, "loss": 0.0} for a in paint_mixer.ATTENTION]
    assert all(claim.holds for claim in paint_mixer.claims(lines))
    for number, change, broken in ((0, {"accuracy": 1.0}, 1), (0, {"loss": 0.5}, 2), (-1, {"accuracy": 0.9}, 3)):
        changed = copy.deepcopy(lines)
        changed[number].update(change)
        assert [claim.holds for claim in paint_mixer.claims(changed)].index(False) == broken


def test_the_loop_learns_and_gates_have_their_rate():
    torch.manual_seed(0)
    model = paint_mixer.make("elementwise", "even")
    gate = model.model.layers[0].self_attn.attn_gate.proj.weight
    before = gate.detach().clone()
    curve = train(model, paint_mixer.batches(0), steps=50, rate=1e-2, gate_rate=0.0)
    assert [step for step, _ in curve] == list(range(1, 51))
    assert curve[-1][1] < curve[0][1] - 1 and torch.equal(gate, before)


def pretrain_records(**changes) -> list[dict]:
    """Three seeds, three rates: every goal met. `changes` are losses or other fields of `kind_rate_seed`."""
    lines = []
    for kind in pretrain.KINDS:
        for rate in (1.0, 2.0, 4.0):
            for seed in range(3):
                gated = kind != "ungated"
                loss = {1.0: 3.0, 2.0: 2.9, 4.0: 5.0}[rate] if not gated else 2.8
                line = {"loss": loss, "f_attn": 0.05 if gated else 0.5, "m_act": 50.0 if gated else 500.0}
                line |= {"kind": kind, "rate": rate, "seed": seed, "gate": 0.2 if gated else None}
                lines.append(line | changes.get(f"{kind}_{rate:g}_{seed}", {}))
    return lines


def verdicts(records: list[dict]) -> list[str]:
    return [goal.verdict.split(":")[0] for goal in pretrain.goals(records, "headwise")]


def test_goals_of_pretraining_can_fail():
    assert verdicts(pretrain_records()) == ["met"] * 4
    assert verdicts(pretrain_records(headwise_2_0={"f_attn": 0.4}))[0] == "not met"
    assert verdicts(pretrain_records(headwise_2_0={"m_act": 400.0}))[1] == "not met"
    assert verdicts(pretrain_records(headwise_2_1={"loss": 2.95}))[2] == "not met"
    assert verdicts([line for line in pretrain_records() if line["seed"] < 2])[2] == "not shown"
    # Without a sink or a massive activation in the ungated model there is nothing to take away.
    without = {f"ungated_2_{seed}": {"f_attn": 0.1, "m_act": 20.0} for seed in range(3)}
    assert verdicts(pretrain_records(**without))[:2] == ["not shown"] * 2


def test_what_counts_as_trained():
    broken = {f"headwise_4_{seed}": {"loss": None, "f_attn": None, "m_act": None} for seed in (1,)}
    records = pretrain_records(**broken)
    rows = pretrain.summed(records)
    assert [row["trains"] for row in rows["headwise"].values()] == [True, True, False]  # one seed without a loss
    assert [row["trains"] for row in rows["ungated"].values()] == [True, True, False]
    assert verdicts(records)[3] == "not met"
    slow = pretrain_records(headwise_4_2={"loss": 1.06 * 2.8})
    assert not pretrain.summed(slow)["headwise"][4.0]["trains"]
    # Where all of the sweep trains, it does not tell which is the highest rate.
    everything = {f"ungated_4_{seed}": {"loss": 2.95} for seed in range(3)}
    assert verdicts(pretrain_records(**everything))[3] == "not shown"
    assert "| 4 | headwise | inf (inf) | – | – | 0.200 | no |" in pretrain.results_table(records)


def test_only_what_all_kinds_were_trained_with_is_compared():
    size = {"data": "text", "text": "", "length": 16, "width": 8, "layers": 1, "tokens": 100, "device": "x"}
    lines = [line | size for line in pretrain_records()]
    missing = [line for line in lines if (line["kind"], line["rate"], line["seed"]) != ("elementwise", 2.0, 1)]
    (whole,) = pretrain.sizes(missing).values()
    assert len(whole) == len(lines) - 3
    assert len(pretrain.sizes(lines + [line | {"data": "triggers"} for line in lines])) == 2
    assert pretrain.sizes([line for line in lines if line["kind"] == "ungated"]) == {}


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    plan = pretrain.Plan("text", width=32, layers=1, tokens=5 * 2048, length=128)
    assert (plan.rows, plan.steps) == (16, 5)
    rows = torch.randint(2, plan.vocabulary, (48, plan.length), generator=torch.Generator().manual_seed(0))

    def run(name: str, ends: float):
        sweep = pretrain.Sweep(tqdm(disable=True), 2048, ends)
        return pretrain.train(plan, "headwise", 1e-2, 3, rows, tmp_path / name, sweep, cpu=True)

    whole, curve = run("whole", math.inf)
    for stop in range(1, 5):
        stopped, _ = run("stopped", time.monotonic())  # after one step more
        assert stopped is None and (tmp_path / "stopped" / f"checkpoint-{stop}").exists()
    resumed, resumed_curve = run("stopped", math.inf)
    assert curve[-1] == resumed_curve[-1]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trigger_text_is_a_plan_of_its_own(tmp_path):
    plan = pretrain.Plan("triggers", width=32, layers=1, tokens=32 * 2048, length=64)
    tokenizer, rows, held_out = pretrain.prepare(plan, tmp_path)
    assert torch.equal(pretrain.prepare(plan, tmp_path)[1], rows)
    assert rows.shape == (plan.steps * plan.rows, plan.length) == (32 * 32, 64)
    assert rows.max() < plan.vocabulary and not (held_out[:, None] == rows).all(2).any()
    sweep = pretrain.Sweep(tqdm(disable=True), 2048, math.inf)
    model, curve = pretrain.train(plan, "elementwise", 1e-2, 3, rows, tmp_path / "run", sweep, cpu=True)
    learned = math.log(plan.vocabulary) - 0.5  # bigrams alone give more; the text is this machine's
    assert curve[0][1] > learned > curve[-1][1] and learned > pretrain.look(model, tokenizer, held_out)["loss"]
    assert model.config.vocab_size == pretrain.Triggers(pretrain.DEEP).vocab and not model.config.tie_word_embeddings


def test_text_is_made_into_windows(monkeypatch):
    folder = Path(json.__file__).parent.parent / "email"
    monkeypatch.setattr(
        pretrain.sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), folder)
    )
    texts = pretrain.documents(60_000)
    assert sum(map(len, texts)) >= 60_000 and len(set(texts)) == len(texts) and texts == pretrain.documents(60_000)
    tokenizer = pretrain.make_tokenizer(texts, 400)
    windows = pretrain.windows(tokenizer, texts[:2], 64)
    assert (windows[:, 0] == tokenizer.bos_token_id).all() and not (windows[:, 1:] == tokenizer.bos_token_id).any()
    assert tokenizer.decode(windows[0, 1:]) == tokenizer.decode(tokenizer(texts[0]).input_ids[1:64])
    assert (windows == tokenizer.eos_token_id).sum() >= 1


def test_a_record_takes_the_place_of_that_of_the_same_run(tmp_path):
    path = tmp_path / "records.jsonl"
    for seed, value in ((0, 1), (1, 2), (0, 3)):
        keep_record(path, {"seed": seed, "value": value}, "seed")
    assert read_records(path) == [{"seed": 1, "value": 2}, {"seed": 0, "value": 3}]
