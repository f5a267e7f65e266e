# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Both ways to the Auto classes: installed (`import modeling_gated`) and as remote code, each class alone in a fresh
process in another folder. Where the package must not help, the process cannot import it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modeling_gated
from configuration_gated import AUTO_MAP
from hub import local_hub
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, published, source_model, tiny_tokenizer


MODEL_AUTO_CLASSES = {auto.__name__: cls for auto, cls in modeling_gated.AUTO_CLASSES.items()}
LOAD = """
import torch
from transformers import {auto}
model = {auto}.from_pretrained({folder!r}, trust_remote_code={trust}).eval()
assert model.__class__.__module__.startswith("transformers_modules.") == {trust}, model.__class__.__module__
ids = torch.arange(5, 12)[None]
gates = model.base_model(ids, output_gates=True).gates
print("OUT", model(ids)[0].double().sum().item(), len(gates), type(model).__name__)
"""


def expected_line(model):
    outputs = model(torch.arange(5, 12)[None])
    return f"OUT {outputs[0].double().sum().item()} 3 {type(model).__name__}"


@pytest.mark.parametrize("auto", MODEL_AUTO_CLASSES)
def test_saved_model_loads_as_remote_code(auto, tmp_path, run_python):
    """A model made from a fresh config, saved: code, full auto_map, and nothing else needed."""
    model = gated_model(MODEL_AUTO_CLASSES[auto])
    model.save_pretrained(tmp_path / "model")
    done = run_python(LOAD.format(auto=auto, folder=str(tmp_path / "model"), trust=True), installed=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == expected_line(model)


@pytest.mark.parametrize("auto", modeling_gated.AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_saved_model_loads_with_the_package(auto, tmp_path):
    model = gated_model(modeling_gated.AUTO_CLASSES[auto])
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(again(torch.arange(5, 12)[None])[0], model(torch.arange(5, 12)[None])[0])


@pytest.fixture
def saved(tmp_path):
    model = gated_model(GatedLlamaForCausalLM)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_saved_folder_is_complete(saved):
    assert {"configuration_gated.py", "modeling_gated.py"} <= {path.name for path in saved.iterdir()}
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_config_and_tokenizer_load_as_remote_code(saved, run_python):
    done = run_python(
        f"""
        from transformers import AutoConfig, AutoTokenizer
        config = AutoConfig.from_pretrained({str(saved)!r}, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained({str(saved)!r}, trust_remote_code=True)
        print(config.gate_scale, tokenizer("the cat").input_ids)
        """,
        installed=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"2.0 {tiny_tokenizer()('the cat').input_ids}"


def test_tokenizer_loads_with_the_package_and_without_trust(saved, run_python):
    done = run_python(
        f"""
        import modeling_gated
        from transformers import AutoTokenizer
        print(AutoTokenizer.from_pretrained({str(saved)!r})("the cat").input_ids)
        """
    )
    assert done.stdout.strip() == str(tiny_tokenizer()("the cat").input_ids), done.stderr


def test_remote_code_saves_a_complete_folder_again(saved, tmp_path, run_python):
    """Loaded as remote code, fine-tuned, saved: the next one, too, loads without the package."""
    again = str(tmp_path / "again")
    code = f"""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
        model.save_pretrained({again!r})
        """
    done = run_python(code, installed=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        done = run_python(LOAD.format(auto=auto, folder=again, trust=True), installed=False)
        assert done.returncode == 0, done.stderr


def test_plain_folder_gets_open_gates_as_remote_code(saved, tmp_path, run_python):
    """Remote code takes another path through Transformers' initialisation, which forgets modules without parameters."""
    published(tmp_path / "plain", source_model("llama"))
    done = run_python(
        f"""
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.from_pretrained({str(saved)!r}, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        print([bool((layer.self_attn.attn_gate.proj.weight == 0).all()) for layer in model.model.layers])
        model = type(model).from_pretrained({str(tmp_path / "plain")!r}, config=config)
        print([bool((layer.self_attn.attn_gate.proj.weight == 0).all()) for layer in model.model.layers])
        """,
        installed=False,
    )
    assert done.stdout.split("\n")[:2] == ["[True, True, True]"] * 2, done.stderr


def test_needs_trust_without_the_package(saved, run_python):
    done = run_python(
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(saved)!r})",
        installed=False,
    )
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


def test_remote_code_does_not_replace_the_installed_classes(saved, run_python):
    done = run_python(
        f"""
        import modeling_gated
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
        assert type(model) is modeling_gated.GatedLlamaForCausalLM, type(model).__module__
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from .configuration_gated import", "from configuration_gated import"),  # absolute only
        ("self.model = GatedLlamaModel(config)", "self.model = AutoModel.from_config(config)"),
    ],
    ids=["absolute import", "base through AutoModel"],
)
def test_control_broken_remote_code_fails(saved, run_python, old, new):
    """The traps that these tests are there for, walked into on purpose."""
    code = saved / "modeling_gated.py"
    assert old in code.read_text()
    code.write_text(code.read_text().replace(old, new))
    load = LOAD.format(auto="AutoModelForSequenceClassification", folder=str(saved), trust=True)
    done = run_python(load, installed=False)
    assert done.returncode != 0


def test_import_registers_and_the_package_does_not(run_python):
    code = "import gated_llama, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = run_python(
        """
        import gated_llama
        from transformers import CONFIG_MAPPING
        print("gated_llama" in CONFIG_MAPPING)
        import modeling_gated
        print("gated_llama" in CONFIG_MAPPING)
        """
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_pushed_model_is_complete(tmp_path, run_python):
    """push_to_hub from Python, then loading by id without the package."""
    with local_hub(tmp_path / "hub") as environment:
        code = """
        import sys
        sys.path.insert(0, {tests!r})
        from tiny import gated_model
        from modeling_gated import GatedLlamaForCausalLM
        gated_model(GatedLlamaForCausalLM).push_to_hub("org/name")
        """
        done = run_python(code.format(tests=str(Path(__file__).parent)), environment=environment)
        assert done.returncode == 0, done.stderr
        pushed = tmp_path / "hub" / "org" / "name"
        assert {"config.json", "model.safetensors", "configuration_gated.py", "modeling_gated.py"} <= {
            path.name for path in pushed.iterdir()
        }
        load = LOAD.format(auto="AutoModelForCausalLM", folder="org/name", trust=True)
        done = run_python(load, installed=False, environment=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1] == expected_line(gated_model(GatedLlamaForCausalLM))
