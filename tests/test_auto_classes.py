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
from safetensors.torch import load_file

import configuration_gated_moe
import modeling_gated
import modeling_gated_moe
from configuration_gated import AUTO_MAP
from hub import local_hub
from modeling_gated import GatedLlamaForCausalLM
from modeling_gated_moe import GatedMoeForCausalLM
from tiny import gated_model, published, source_model, tiny_tokenizer


MODEL_CLASSES = [
    (auto, cls) for modeling in (modeling_gated, modeling_gated_moe) for auto, cls in modeling.AUTO_CLASSES.items()
]
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


def name_of(value):
    return value.__name__


@pytest.mark.parametrize(("auto", "model_class"), MODEL_CLASSES, ids=name_of)
def test_saved_model_loads_as_remote_code(auto, model_class, tmp_path, run_python):
    """A model made from a fresh config, saved: code, full auto_map, and nothing else needed."""
    model = gated_model(model_class)
    model.save_pretrained(tmp_path / "model")
    done = run_python(LOAD.format(auto=auto.__name__, folder=str(tmp_path / "model"), trust=True), installed=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == expected_line(model)


@pytest.mark.parametrize(("auto", "model_class"), MODEL_CLASSES, ids=name_of)
def test_saved_model_loads_with_the_package(auto, model_class, tmp_path):
    model = gated_model(model_class)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(again(torch.arange(5, 12)[None])[0], model(torch.arange(5, 12)[None])[0])


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path):
    return save(gated_model(GatedLlamaForCausalLM), tmp_path / "model")


@pytest.fixture
def saved_moe(tmp_path):
    return save(gated_model(GatedMoeForCausalLM), tmp_path / "moe")


CODE = {"configuration_gated.py", "modeling_gated.py"}
MOE_CODE = CODE | {"configuration_gated_moe.py", "modeling_gated_moe.py"}


def test_saved_folder_is_complete(saved, saved_moe):
    for folder, code, auto_map in ((saved, CODE, AUTO_MAP), (saved_moe, MOE_CODE, configuration_gated_moe.AUTO_MAP)):
        assert {path.name for path in folder.glob("*.py")} == code
        assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map


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


def test_remote_code_keeps_the_names_of_experts(saved_moe, tmp_path, run_python):
    """Loading joins each layer's experts by the rules that the file registers, saving takes them apart again."""
    again = tmp_path / "again"
    code = f"""
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(saved_moe)!r}, trust_remote_code=True).save_pretrained({str(again)!r})
        """
    done = run_python(code, installed=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in again.glob("*.py")} == MOE_CODE
    before, after = (load_file(folder / "model.safetensors") for folder in (saved_moe, again))
    assert "model.layers.2.mlp.experts.4.down_proj.weight" in after
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


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
