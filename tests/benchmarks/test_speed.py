# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The speed benchmark tells no number of models that compute something else, and tells the truth of those it times."""

import torch
from pytest import approx, fixture, mark, raises
from torch import nn
from transformers import DynamicCache

import bench_speed
import speed_table
from bench_speed import Case, in_rounds, limit_of
from contestants import GATE_TYPES, NAMES, CorrectnessError, check, llama_config, make_contestants
from measured import peak_of


TINY = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 16, "head_dim": 4}


@fixture
def models():
    return make_contestants(llama_config({**TINY, "initializer_range": 0.2}, 2))


def test_contestants_compute_the_same_on_the_same_tensors(models):
    distances = check(models)
    assert distances.keys() == set(NAMES) - {"llama"}
    assert max(distances.values()) < 1e-6
    weights = [model.model.layers[1].mlp.up_proj.weight for model in models.values()]
    assert all(weight is weights[0] for weight in weights)


def scaled(models):
    models["headwise"].model.layers[1].self_attn.attn_gate.scale = 1.999


def other_gate(models):
    attention = models["afmoe"].model.layers[0].self_attn
    attention.gate_proj.weight = nn.Parameter(attention.gate_proj.weight * 1.01)


def wrong_layout(models):
    attention = models["qwen3_5"].model.layers[1].self_attn
    queries, gates = attention.q_proj.weight.detach().unflatten(0, (16, 2, 4)).unbind(1)
    attention.q_proj.weight = nn.Parameter(torch.cat([queries.flatten(0, 1), gates.flatten(0, 1)]))


def no_hook(models):
    models["hook-headwise"].model.layers[0].self_attn.o_proj._forward_pre_hooks.clear()


def other_llama(models):
    models["llama-again"].model.layers[0].self_attn.scaling *= 1.01


def not_a_number(models):
    models["hook-elementwise"].model.norm.weight = nn.Parameter(torch.full((48,), float("nan")))


@mark.parametrize(
    ("sabotage", "message"),
    [
        (scaled, "headwise: open gates are not Llama to the bit"),
        (other_gate, "afmoe differs"),
        (wrong_layout, "qwen3_5 differs"),
        (no_hook, "hook-headwise differs"),
        (other_llama, "llama-again differs"),
        (not_a_number, "hook-elementwise differs from what it should equal by inf"),
    ],
)
def test_a_contestant_that_computes_something_else_is_found(models, sabotage, message):
    sabotage(models)
    with raises(CorrectnessError, match=message):
        check(models)


def test_gates_that_hardly_move_prove_nothing(models):
    for layer in models["elementwise"].model.layers:
        nn.init.normal_(layer.self_attn.attn_gate.proj.weight, std=1e-7)
    with raises(CorrectnessError, match="too little"):
        check({name: models[name] for name in ("llama", "llama-again", *GATE_TYPES)})


def test_no_number_after_a_failed_check(tmp_path, monkeypatch, capsys):
    """Nothing is measured, printed or written, and the program fails."""

    def make(*args, **kwargs):
        models = make_contestants(llama_config(TINY, 1))
        models["headwise"].model.layers[0].self_attn.attn_gate.scale = 1.999
        return models

    monkeypatch.setattr(bench_speed, "make_contestants", make)
    monkeypatch.setattr(speed_table, "RECORDS", tmp_path / "speed.jsonl")
    monkeypatch.setattr("sys.argv", ["bench_speed.py", "--pairs", "2"])
    with raises(CorrectnessError):
        bench_speed.main()
    assert not (tmp_path / "speed.jsonl").exists()
    assert "1." not in capsys.readouterr().out


def test_a_run_of_everything(tmp_path, monkeypatch, capsys):
    """Every case but the compiled ones, on tiny layers: what is written is what the table is made of."""
    cases = [
        Case(**{**vars(case), "tokens": min(case.tokens, 20), "pairs": None})
        for case in bench_speed.cases_of("cpu")
        if not case.compiled
    ]
    monkeypatch.setattr(bench_speed, "cases_of", lambda device: cases)
    monkeypatch.setattr(bench_speed, "llama_config", lambda shape, layers: llama_config(TINY, layers))
    monkeypatch.setattr(bench_speed, "measure_starting", dict)
    monkeypatch.setattr(speed_table, "RECORDS", tmp_path / "speed.jsonl")
    monkeypatch.setattr("sys.argv", ["bench_speed.py", "--pairs", "2"])
    bench_speed.main()
    results = speed_table.read()["results"]
    assert len(results) == len(cases)
    assert all(result["contestants"]["llama"]["ratio"]["median"] == 1 for result in results)
    assert speed_table.table().count("\n") >= len(cases)
    assert capsys.readouterr().out.count("prefill") == sum("prefill" in case.work for case in cases)


def test_every_contestant_works_once_a_round_in_rotating_order():
    calls = []
    seconds = in_rounds({name: lambda name=name: calls.append(name) for name in "abc"}, 3, "cpu", "")
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [len(values) for values in seconds.values()] == [3, 3, 3]


@mark.parametrize("gate_type", GATE_TYPES)
def test_the_limit_of_decoding_is_the_bytes_read(models, gate_type):
    def read(name):
        weights = sum(p.nbytes for p in models[name].model.layers.parameters() if p.dim() == 2)
        cache = DynamicCache(config=models[name].config)
        models[name].model(torch.ones(3, bench_speed.CONTEXT, dtype=torch.long), past_key_values=cache)
        return weights + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    case = Case("decode", "", tokens=4, batch=3)
    assert limit_of(case, models["llama"].config, gate_type) == approx(read(gate_type) / read("llama"), rel=1e-9)


def result(ours: float, *, noise: float = 0.01, peer: float = 1.0, **fields) -> dict:
    contestants = {
        "llama-again": {"ratio": {"median": 1.0, "q25": 1 - noise / 2, "q75": 1 + noise}},
        "elementwise": {"ratio": {"median": ours}, "limit": 1.1, "to_peers": {"afmoe": {"median": peer}}},
    }
    return {"work": "decode", "compiled": False, "contestants": contestants, **fields}


def test_verdicts():
    goal = 1.03 * 1.1
    assert speed_table.verdict(result(goal + 0.009), "elementwise", "cpu") == (True, [])
    assert speed_table.verdict(result(goal + 0.011), "elementwise", "cpu") == (False, [])
    assert speed_table.verdict(result(goal, noise=0, peer=1.02), "elementwise", "cpu") == (True, ["afmoe"])
    assert speed_table.verdict(result(goal, peer=1.02, noise=0.03), "elementwise", "cpu") == (True, [])
    assert not speed_table.verdict(result(goal, noise=0, compiled=True), "elementwise", "cuda")[0]


def test_peak_memory_is_that_of_what_was_allocated():
    x = torch.randn(1000, 100)

    def work():
        y = x * 2
        z = y + 1
        del y
        return z * 3  # two at a time

    assert peak_of(work, "cpu") == approx(2 * x.nbytes, abs=100)
