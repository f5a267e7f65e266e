# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmark of retrofits, at a size that takes seconds: it runs to its end, and compares what it says."""

import sys

import pytest
import torch

import retrofit
from tiny import gated_model


SIZES = "--layers 1 --width 24 --length 24 --batch 4 --steps 60".split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(retrofit, "RECORDS", tmp_path / "retrofit.jsonl")

    def run(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["retrofit.py", "--work", str(tmp_path / "bases"), *SIZES, *arguments])
        retrofit.main()
        return retrofit.read_records(retrofit.RECORDS)

    return run


def test_every_recipe_runs_and_is_kept_once(run, tmp_path):
    records = run("--task", "deep", "--seeds", "0")
    assert [record["recipe"] for record in records] == [retrofit.BASE, *retrofit.RECIPES]
    assert run("--task", "deep", "--seeds", "0") == records
    for record in records:
        recipe, measured = retrofit.RECIPES.get(record["recipe"]), record["measured"]
        if recipe is None or recipe.tokens:
            trained = recipe is not None and recipe.gates
            reset = measured["loss, gates reset to open"]
            assert trained == (measured["mean gate"] != 1) == (reset != pytest.approx(measured["loss"], abs=1e-7))
    rows = retrofit.compared(records)
    assert list(rows) == [retrofit.BASE, *retrofit.RECIPES] and rows[retrofit.REFERENCE]["loss"] == [0]
    assert retrofit.table(records).count("\n") == len(rows) + 3
    retrofit.draw(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def made_record(recipe: str, loss: float, other: float = 1.0, text: str = "") -> dict:
    names = ("first-token attention", "first-token attention, idle queries", "largest activation", "W8A8 loss penalty")
    measured = {**dict.fromkeys(names, other), **dict.fromkeys(("loss", "loss, gates reset to open"), loss)}
    return {"text": text, "seed": 0, "recipe": recipe, "measured": measured}


def test_a_recipe_is_held_against_as_many_tokens_without_gates():
    losses = {retrofit.BASE: 2.0, retrofit.REFERENCE: 1.9, retrofit.LONG_REFERENCE: 1.0, "attention penalty": 1.9}
    losses["attention penalty, 10 times the tokens"] = 1.0
    records = [made_record(name, loss) for name, loss in losses.items()]
    rows = retrofit.compared([*records, {**records[0], "recipe": "a recipe of another day"}])
    assert [row["loss"][0] for row in rows.values()] == pytest.approx([100 * (2.0 / 1.9 - 1), 0, 0, 0, 0])


def test_bases_of_two_texts_are_two_bases():
    def record(text: str, recipe: str, value: float) -> dict:
        return made_record(recipe, value, value, text)

    records = [record("a", retrofit.BASE, 2.0), record("a", retrofit.REFERENCE, 1.0), record("a", "sink moved", 1.0)]
    records += [record("b", retrofit.BASE, 4.0), record("b", retrofit.REFERENCE, 2.0), record("b", "sink moved", 1.0)]
    assert retrofit.compared(records)["sink moved"]["attention ratio"] == [0.5, 0.25]
    assert retrofit.compared(records)["sink moved"]["loss"] == [0, -50]
    assert "| sink moved | 2 | 0.38 (0.25 to 0.50) |" in retrofit.table(records)
    assert "sink moved" not in retrofit.compared([line for line in records if line["text"] == "a"][2:] + records[3:5])


def test_a_base_of_another_text_is_trained_anew(run, tmp_path):
    path = tmp_path / "bases" / "deep-0.pt"
    first = run("--task", "deep", "--seeds", "0", "--recipes")
    saved = torch.load(path)
    torch.save({**saved, "model": {key: torch.zeros_like(value) for key, value in saved["model"].items()}}, path)
    retrofit.RECORDS.unlink()
    assert run("--task", "deep", "--seeds", "0", "--recipes")[0]["measured"] != first[0]["measured"]
    torch.save({**torch.load(path), "text": "another"}, path)
    retrofit.RECORDS.unlink()
    assert run("--task", "deep", "--seeds", "0", "--recipes")[0]["measured"] == first[0]["measured"]


def test_what_cannot_be_folded_is_left_out(run):
    records = run("--task", "deep, no first token", "--seeds", "0", "--recipes", "first token folded", "sink moved")
    assert [record["recipe"] for record in records] == [retrofit.BASE, "sink moved"]


def test_a_base_that_was_stopped_goes_on_as_if_it_had_not(run, tmp_path, monkeypatch):
    whole = run("--task", "python", "--heads", "4", "--seeds", "0", "--recipes")
    (tmp_path / "bases" / "python-0.pt").unlink()
    steps, step_of = [], retrofit.step_of

    def stop_later(*args):
        steps.append(1)
        if len(steps) == 40:
            raise KeyboardInterrupt
        return step_of(*args)

    retrofit.RECORDS.unlink()
    monkeypatch.setattr(retrofit, "step_of", stop_later)
    with pytest.raises(KeyboardInterrupt):
        run("--task", "python", "--heads", "4", "--seeds", "0", "--recipes")
    resumed = run("--task", "python", "--heads", "4", "--seeds", "0", "--recipes")
    assert len(steps) == 40 + 60 - 39 and resumed[0]["measured"] == whole[0]["measured"]


def test_what_follows_a_trigger_is_a_copy():
    task = retrofit.DEEP
    ids = retrofit.Triggers(task).sample(200, seed=0)
    assert torch.equal(ids, retrofit.Triggers(task).sample(200, seed=0)) and (ids[:, 0] == 0).all()
    copies = [0] * (task.kinds + 1)
    for row in ids.tolist():
        acts = False  # a trigger that is itself a copy triggers nothing
        for place in range(2, task.length - 1):
            acts = not acts and 1 <= row[place] <= task.kinds
            if acts:
                assert row[place + 1] == row[place - row[place]]
                copies[row[place]] += 1
    assert min(copies[1:]) > 50


def test_int8_rounds_to_255_levels_and_leaves_the_model_as_it_was():
    model = gated_model(retrofit.GatedLlamaForCausalLM)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    linear = model.model.layers[0].mlp.up_proj
    with retrofit.quantized(model):
        assert len(linear.weight.unique()) <= 255 < len(before["model.layers.0.mlp.up_proj.weight"].unique())
        x = torch.randn(2, 36)
        step = x.abs().max() / 127
        torch.testing.assert_close(linear(x), torch.nn.functional.linear((x / step).round() * step, linear.weight))
        assert torch.equal(
            model.model.layers[0].self_attn.attn_gate.proj.weight,
            before["model.layers.0.self_attn.attn_gate.proj.weight"],
        )
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
