# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The `gated-llama` command as a user meets it: help, results, exit codes, one sentence for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gated_llama.scripts.cli import COMMANDS
from tiny import published, source_model


ROOT = Path(__file__).parent.parent


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "gated_llama.scripts.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )


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
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr  # the progress bar
    again = command("convert", source, tmp_path / "gated", "--quiet", "--force")
    assert (again.returncode, again.stdout) == (0, "")
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
modeling_gated.AttentionGate.forward = lambda self, x: x.new_full((*x.shape[:2], 6), 0.5)
from gated_llama.scripts.cli import main
sys.exit(main(["convert", {str(source)!r}, {str(tmp_path / "gated")!r}, "--quiet"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "verification failed" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize("folder", ["readonly-file-system", "file-size-limit"])
def test_an_output_that_cannot_be_written_gets_one_sentence(tmp_path, folder):
    """Root is stopped by no permission: /proc takes no folders, and a file-size limit stops any write."""
    source = published(tmp_path / "source", source_model("llama"))
    output = "/proc/gated" if folder == "readonly-file-system" else tmp_path / "gated"
    limit = "" if folder == "readonly-file-system" else "ulimit -f 8; trap '' XFSZ; "
    python = f"{sys.executable} -m gated_llama.scripts.cli convert {source} {output} --quiet"
    done = subprocess.run(["bash", "-c", limit + python], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
