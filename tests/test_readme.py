# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the README tells people to run is run, on small stand-ins under the names it uses; so is the demo."""

import argparse
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import bench_desink
import buys
import sinks
import torch
import wikitext

import engines
import paint_mixer
import pretrain
import speed_table
import spotlight
from fresh import run_fresh
from gated_llama.scripts.cli import main
from hub import local_hub
from measured import PAGES, read_records, read_table
from modeling_gated import GatedLlamaForCausalLM
from tiny import published, source_model, tiny_tokenizer


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def snippets(language: str) -> dict[str, str]:
    return dict(re.findall(rf"<!-- test: ([\w-]+) -->\n```{language}\n(.*?)```", TEXT, re.DOTALL))


RUN = """
import shlex, sys
from gated_llama.scripts.cli import main

for line in sys.argv[1].splitlines():
    name, *arguments = shlex.split(line, comments=True)
    assert name in ("pip", "gated-llama")
    if name == "gated-llama":
        assert main(arguments) == 0, line
"""


def test_from_a_hub_id_to_an_adapter(tmp_path):
    """The fine-tuning section, pasted: the commands with a Hub on this machine, then the Python."""
    published(tmp_path / "hub" / "meta-llama" / "Llama-3.2-1B", source_model("llama-3.2"), tokenizer=True)
    (tmp_path / "train.jsonl").write_text('{"text": "the grumpy cat sat on the mat, which was red"}\n' * 1500)
    (tmp_path / "notes.txt").write_text("the grumpy cat sat on the mat, which was red\n" * 200)
    with local_hub(tmp_path / "hub") as environment:
        done = run_fresh(RUN, snippets("bash")["finetune-commands"], cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "648 of gates" in done.stdout and "The gates moved" in done.stdout and "punctuation" in done.stdout
    assert (tmp_path / "run1" / "adapter_model.safetensors").exists()


def test_load_finetune_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "Llama-3.2-1B", source_model("llama-3.2"), tokenizer=True)
    (tmp_path / "notes.txt").write_text("the grumpy cat sat on the mat, which was red\n" * 200)
    commands = [line for line in README.splitlines() if line.startswith("gated-llama convert ./")]
    assert len(commands) == 1
    assert main(commands[0].split()[1:]) == 0
    namespace = {}
    for name in ("load", "look", "finetune", "scratch"):
        exec(compile(snippets("python")[name], f"README.md ({name})", "exec"), namespace)
    assert set(snippets("python")) == {"load", "look", "finetune", "scratch"}
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "GateStatistics(" in capsys.readouterr().out


def test_the_demo_on_a_real_model_ends_in_a_sentence_a_picture_and_a_chat(tmp_path, capsys):
    """Real in that it is not trained here: one token of its text is massive, so that there is a sink to move."""
    from gated_llama.scripts import run_demo

    model = source_model(max_position_embeddings=512)
    massive = tiny_tokenizer().convert_tokens_to_ids("z")
    with torch.no_grad():
        model.model.embed_tokens.weight[massive] *= 1000
    published(tmp_path / "real", model, dtype=torch.bfloat16, tokenizer=True)
    parser = argparse.ArgumentParser()
    run_demo.add_arguments(parser)
    out = tmp_path / "demo"
    run_demo.run(parser.parse_args(["--model", str(tmp_path / "real"), "--output", str(out), "--windows", "12"]))
    said = capsys.readouterr().out
    assert "the outputs are equal" in said or "to the bit" in said
    assert "moved the sinks of" in said and "What is gravity?" in said and f"The picture: {out / 'sinks.png'}" in said
    assert (out / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert GatedLlamaForCausalLM.from_pretrained(out / "moved").config.attention_out_bias


def test_the_table_of_engines_tells_every_run_and_no_other():
    told = []
    for row in engines.table().splitlines()[2:]:
        engine, parts, result = row.strip("| ").split(" | ")
        runs = product(*(part.split(" / ") for part in parts.split("; ")))
        told += [(engine, "; ".join(run), result) for run in runs]
    assert sorted(told) == sorted((engines.versioned(line), line["run"], line["result"]) for line in engines.read())


def test_tables_are_those_of_the_records():
    assert read_table("engines") == engines.table()
    for name, module in (("spotlight", spotlight), ("paint mixer", paint_mixer), ("pretrain", pretrain)):
        records = read_records(module.RECORDS)
        assert records and read_table(name) == module.table(records)


def test_what_the_textbook_tasks_are_to_show_holds_in_the_records():
    for module in (spotlight, paint_mixer):
        records = read_records(module.RECORDS)
        assert len({record["seed"] for record in records}) >= 3
        assert [claim for claim in module.claims(records) if not claim.holds] == []


def test_the_tables_of_sinks_are_those_of_the_records():
    assert read_table("sinks") == sinks.table(sinks.known(sinks.RECORDS))
    assert read_table("desink") == bench_desink.table(read_records(bench_desink.RECORDS))
    assert read_table("buys") == buys.table(read_records(buys.RECORDS))
    assert read_table("wikitext") == wikitext.table(read_records(wikitext.RECORDS))


def test_the_table_of_speed_is_that_of_the_last_record():
    assert read_table("speed") == speed_table.table()
    assert read_table("speed on a GPU") == speed_table.table("cuda")
    assert read_table("speed where launches cost") == speed_table.table("cpu, narrow")
    assert speed_table.table().count("\n") > len(speed_table.read()["results"])


def test_pages_name_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", TEXT)) <= targets
    for page in PAGES:
        for path in re.findall(r"\]\(([\w.][\w/.-]*)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), (page, path)


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200 and max(map(len, README.splitlines())) < 400


def test_demo_runs_to_its_end(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "run_demo.py", "--steps", "2", "--gate-steps", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in ("equal to the bit", "layer 3", "punctuation", "--- before", "--- after", "[6/6] Done"):
        assert part in done.stdout
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "base",
        "gated",
        "gated-tuned",
        "train.jsonl",
        "eval.jsonl",
    }
    assert "loss=" in done.stderr
