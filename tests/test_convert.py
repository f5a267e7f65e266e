# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Conversion of folders as they are published: nothing rewritten, nothing lost, nothing half done."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gated_llama.checkpoints.shards
import gated_llama.conversion.convert
import modeling_gated
from configuration_gated import AUTO_MAP
from fresh import run_command
from gated_llama import UserError, VerificationError, convert_checkpoint, export_checkpoint
from gated_llama.checkpoints.folder import copy_file, new_folder, work_folder
from gated_llama.publish import check_loads, contents_to_publish
from hub import local_hub
from tiny import VARIANTS, published, source_model, token_ids, write_shards


GATE_TYPES = ("headwise", "elementwise")


def convert(source, output, **settings):
    return convert_checkpoint(source, output, progress=False, **settings)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))


@pytest.fixture
def source(tmp_path):
    return published(tmp_path / "Tiny-Llama", source_model("llama"), dtype=torch.bfloat16, shards=2, tokenizer=True)


# --- the main job -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("variant", ["llama-3.2", "mistral", "qwen2-sliding", "qwen3", "mixtral", "qwen3-moe"])
def test_loads_through_the_auto_class_with_the_same_logits(tmp_path, variant, gate_type, dtype, shards):
    folder = published(tmp_path / "source", source_model(variant), dtype=dtype, shards=shards)
    result = convert(folder, tmp_path / "gated", gate_type=gate_type)
    assert result.verification.exact and result.verification.control_difference > 0
    expected = AutoModelForCausalLM.from_pretrained(folder)
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    moe = variant in ("mixtral", "qwen3-moe")
    assert type(actual).__name__ == f"Gated{'Moe' if moe else 'Llama'}ForCausalLM" and actual.dtype == dtype
    with torch.no_grad():
        assert torch.equal(expected(token_ids()).logits, actual(token_ids()).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_converts_from_either_style_of_config(tmp_path, variant):
    for old_style in (True, False):
        folder = published(tmp_path / f"source-{old_style}", source_model(variant), old_style=old_style)
        assert convert(folder, tmp_path / f"gated-{old_style}").verification.exact


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["qwen3", "qwen3-moe", "mixtral"])
def test_weights_are_carried_byte_for_byte(tmp_path, variant, shards):
    folder = published(tmp_path / "source", source_model(variant), shards=shards)
    before = hashes(folder)
    convert(folder, tmp_path / "gated")
    assert hashes(folder) == before
    after = hashes(tmp_path / "gated")
    weights = {name: digest for name, digest in before.items() if name.endswith(".safetensors")}
    assert len(weights) == shards
    for name, digest in weights.items():
        assert after["model-00001-of-00001.safetensors" if shards == 1 else name] == digest
    assert "model.safetensors" not in after  # beside an index, only that file would be read
    gates = load_file(tmp_path / "gated" / "model-gates.safetensors")
    assert sorted(gates) == [f"model.layers.{layer}.self_attn.attn_gate.proj.weight" for layer in range(3)]
    index = json.loads((tmp_path / "gated" / "model.safetensors.index.json").read_text())
    shapes = {}
    for name in {*index["weight_map"].values()}:
        with safe_open(tmp_path / "gated" / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                assert index["weight_map"][key] == name
                shapes[key] = file.get_tensor(key)
    assert shapes.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in shapes.values())


def test_tokenizer_and_notices_are_carried_and_the_rest_is_named(source, tmp_path):
    (source / "LICENSE.txt").write_text("a licence")
    (source / "NOTICE").write_text("a notice")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"x")
    (source / "consolidated.safetensors").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "model-q4.gguf").write_bytes(b"x")
    (source / "training_args.bin").write_bytes(b"x")
    result = convert(source, tmp_path / "gated")
    assert result.left_behind == [
        "consolidated.safetensors",
        "model-q4.gguf",
        "original/",
        "pytorch_model.bin",
        "training_args.bin",
    ]
    assert set(result.carried) == {
        "LICENSE.txt",
        "NOTICE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in result.carried:
        assert (tmp_path / "gated" / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in (tmp_path / "gated").iterdir()} == {
        *result.carried,
        "README.md",
        "config.json",
        "configuration_gated.py",
        "modeling_gated.py",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model-gates.safetensors",
        "model.safetensors.index.json",
    }
    messages = [{"role": "user", "content": "the cat"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "gated"))
    assert before("the grumpy cat").input_ids == after("the grumpy cat").input_ids
    assert before.apply_chat_template(messages, tokenize=False) == after.apply_chat_template(messages, tokenize=False)


def test_config_says_what_it_is_and_where_it_came_from(source, tmp_path):
    convert(source, tmp_path / "gated", gate_type="elementwise")
    config = json.loads((tmp_path / "gated" / "config.json").read_text())
    assert config["model_type"] == "gated_llama"
    assert config["architectures"] == ["GatedLlamaForCausalLM"]
    assert config["auto_map"] == AUTO_MAP
    record = config["conversion"]
    assert (record["source"], record["revision"], record["gate_type"]) == ("Tiny-Llama", None, "elementwise")
    assert record["verification"]["exact"] is True
    assert str(tmp_path) not in json.dumps(config)  # a local path is nobody's business
    loaded = AutoConfig.from_pretrained(tmp_path / "gated")
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(tmp_path / "gated").save_pretrained(again)
    assert AutoConfig.from_pretrained(again).conversion == loaded.conversion == record


def test_converted_folder_is_remote_code(source, tmp_path, run_python):
    convert(source, tmp_path / "gated")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(torch.arange(5, 12)[None]).logits.double().sum().item()
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        done = run_python(
            f"""
            import torch
            from transformers import AutoTokenizer, {auto}
            AutoTokenizer.from_pretrained({str(tmp_path / "gated")!r}, trust_remote_code=True)
            model = {auto}.from_pretrained({str(tmp_path / "gated")!r}, trust_remote_code=True)
            print(model(torch.arange(5, 12)[None]).logits.double().sum().item())
            """,
            installed=False,
        )
        assert done.returncode == 0, done.stderr
        if auto == "AutoModelForCausalLM":
            assert float(done.stdout.split()[-1]) == expected


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_heads_convert(tmp_path, variant, head):
    folder = published(tmp_path / "source", source_model(variant, head, num_labels=5))
    assert convert(folder, tmp_path / "gated").verification.exact
    config = json.loads((tmp_path / "gated" / "config.json").read_text())
    assert config["architectures"] == [f"GatedLlama{head}"] and len(config["id2label"]) == 5


def test_bare_base_model_under_a_causal_name_converts(tmp_path):
    """Some embedding models: architecture ForCausalLM, keys without the prefix, the head tied and left out."""
    model = source_model("qwen3", "Model")
    folder = published(tmp_path / "source", model)
    edit_config(folder, architectures=["Qwen3ForCausalLM"])
    assert convert(folder, tmp_path / "gated").verification.exact
    assert "layers.0.self_attn.attn_gate.proj.weight" in load_file(tmp_path / "gated" / "model-gates.safetensors")


# --- the source's own defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("Llama", {"num_key_value_heads": 32, "head_dim": 2, "sliding_window": None, "bos_token_id": 1}),
        ("Mistral", {"num_key_value_heads": 8, "head_dim": 2, "sliding_window": 4096, "bos_token_id": 1}),
        ("Qwen2", {"num_key_value_heads": 32, "head_dim": 2, "sliding_window": None, "bos_token_id": None}),
        ("Qwen3", {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": None, "bos_token_id": None}),
    ],
)
def test_fields_left_out_mean_what_the_family_means(tmp_path, prefix, expected):
    sizes = {"hidden_size": 64, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 307}
    raw = {"model_type": prefix.lower(), "architectures": [f"{prefix}ForCausalLM"], **sizes}
    model_class, config_class = (getattr(transformers, prefix + kind) for kind in ("ForCausalLM", "Config"))
    model_class(config_class.from_dict(raw)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
    assert convert(tmp_path / "source", tmp_path / "gated").verification.exact
    config = AutoConfig.from_pretrained(tmp_path / "gated")
    assert {name: getattr(config, name) for name in expected} == expected


# --- keys ---------------------------------------------------------------------------------------------------------


def test_known_surplus_keys_are_tolerated(tmp_path):
    folder = published(tmp_path / "source", source_model("llama-3.2"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_shards(folder, tensors, 2)
    assert convert(folder, tmp_path / "gated").verification.exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "no tensor lm_head.weight"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra, which a llama model does not have"),
        (lambda t: t.update({"model.norm.weight": torch.ones(35)}), r"model.norm.weight of shape \[35\].*\[36\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(36, dtype=torch.int8)}), "model.norm.weight as I8"),
    ],
    ids=["missing", "untied head missing", "unexpected", "shape", "dtype"],
)
def test_wrong_keys_are_refused(tmp_path, change, message):
    folder = published(tmp_path / "source", source_model("llama"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "gated")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_duplicate_and_missing_shards_are_refused(source, tmp_path):
    name = "model-00002-of-00002.safetensors"
    whole = (source / name).read_bytes()
    tensors = load_file(source / name)
    other = load_file(source / "model-00001-of-00002.safetensors")
    key = sorted(other)[0]
    save_file({**tensors, key: other[key]}, source / name)
    with pytest.raises(UserError, match=f"{key} is in two shards"):
        convert(source, tmp_path / "gated")
    (source / name).write_bytes(whole[:-7])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        convert(source, tmp_path / "gated")
    (source / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        convert(source, tmp_path / "gated")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", ""])
def test_index_cannot_leave_the_folder(source, tmp_path, shard):
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a file of this folder"):
        convert(source, tmp_path / "gated")


# --- what is refused, and what a failure leaves --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2', which is not supported: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, "),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe', which is not supported"),  # it has a shared expert
        ({"model_type": "deepseek_v3"}, "'deepseek_v3', which is not supported"),
        ({"model_type": "gpt_oss"}, "'gpt_oss', which is not supported"),
        ({"model_type": "DROP"}, "model_type None"),
        ({"model_type": []}, r"model_type \[\], which is not supported"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "LlamaForCausalLMEagle"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "36"}, "not a valid llama config"),
        ({"dtype": False}, "its dtype is False"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_scaling": {"rope_type": "bogus", "factor": 2.0}}, "config.json"),
        ({"vocab_size": 306}, "of shape"),
    ],
)
def test_wrong_configs_are_refused(source, tmp_path, changes, message):
    edit_config(source, **changes)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize("content", [None, "", "[]", "{", "\xff"], ids=["missing", "empty", "list", "cut", "binary"])
def test_unreadable_config_is_refused(source, tmp_path, content):
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        convert(source, tmp_path / "gated")


def test_pickled_weights_are_refused_unopened(source, tmp_path):
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match=r"only pickled weights.*safetensors"):
        convert(source, tmp_path / "gated")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_scale": 1.0}, "no gate reaches 1"),
        ({"gate_scale": 3.0}, "gate_bias=True"),
        ({"gate_type": "rowwise"}, "headwise"),
        ({"revision": "main"}, "local folder"),
    ],
)
def test_wrong_settings_are_refused(source, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "gated", **settings)


def test_source_must_be_somewhere(tmp_path):
    for name in (str(tmp_path / "nowhere"), "no/such/thing", "a b"):
        with pytest.raises(UserError, match="neither a local folder nor"):
            convert(name, tmp_path / "gated")
    with pytest.raises(UserError, match="no local folder, and the Hub"):
        convert("no-such-org/no-such-model", tmp_path / "gated")


@pytest.mark.parametrize("inside", [".", "inner", ".."])
def test_output_and_source_must_not_hold_each_other(source, inside):
    before = hashes(source)
    with pytest.raises(UserError, match=r"lies inside|is the source itself"):
        convert(source, source / inside, force=True)
    assert hashes(source) == before


def test_output_that_is_not_empty_needs_force(source, tmp_path):
    output = tmp_path / "gated"
    output.mkdir()  # an empty one is fine
    convert(source, output)
    (output / "mine.txt").write_text("keep me")
    before = hashes(output)
    with pytest.raises(UserError, match="--force"):
        convert(source, output)
    assert hashes(output) == before
    convert(source, output, force=True)
    assert not (output / "mine.txt").exists() and (output / "model-gates.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny-Llama", "gated"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        convert(source, tmp_path / "file")


@pytest.mark.parametrize("moment", ["copying", "verifying", "renaming"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device", "shard")], ids=repr)
def test_a_failure_with_force_puts_the_old_output_back(source, tmp_path, monkeypatch, moment, error):
    output = tmp_path / "gated"
    convert(source, output)
    before = hashes(output)

    def fail(*args, **kwargs):
        raise error

    if moment == "renaming":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: fail() if ".partial" in self.name else rename(self, to))
    else:
        name = {"copying": "write_index", "verifying": "compare"}[moment]
        monkeypatch.setattr(gated_llama.conversion.convert, name, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        convert(source, output, force=True, gate_type="elementwise")
    assert hashes(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny-Llama", "gated"]


def test_what_a_killed_run_left_is_cleared_and_nothing_of_it_loads(source, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    output = tmp_path / "gated"
    convert(source, output)
    before = hashes(output)
    output.rename(tmp_path / f".gated.old-{dead.pid}")  # killed between the two renames …
    partial = tmp_path / f".gated.partial-{dead.pid}"
    partial.mkdir()  # … or while it copied
    (partial / "model-gates.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty"):  # the old output is back before anything is decided
        convert(source, output)
    assert hashes(output) == before and not partial.exists()
    partial = tmp_path / f".gated.partial-{os.getpid()}"  # by a process of the same number, as in containers
    partial.mkdir()
    convert(source, output, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny-Llama", "gated"]


def test_a_work_folder_of_this_process_is_not_cleared(tmp_path):
    with work_folder(tmp_path / "gated", "dense") as dense, new_folder(tmp_path / "gated") as folder:
        assert dense.is_dir() and folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["gated"]


# --- verification ---------------------------------------------------------------------------------------------------


def test_a_flipped_bit_fails_verification_and_leaves_nothing(source, tmp_path, monkeypatch):
    """The negative control of the conversion: one wrong bit in one carried weight."""

    def copy_wrongly(read, write, on_bytes=None):
        content = bytearray(read.read_bytes())
        if write.name == "model-00002-of-00002.safetensors":
            content[-100] ^= 0x40
        write.write_bytes(content)

    monkeypatch.setattr(gated_llama.checkpoints.shards, "copy_file", copy_wrongly)
    with pytest.raises(VerificationError, match="differ"):
        convert(source, tmp_path / "gated")
    assert {path.name for path in tmp_path.iterdir()} == {"Tiny-Llama"}


def test_gates_that_are_not_open_fail_verification(source, tmp_path, monkeypatch):
    make = gated_llama.conversion.convert._new_gate
    monkeypatch.setattr(gated_llama.conversion.convert, "_new_gate", lambda *arguments: make(*arguments) + 1e-2)
    with pytest.raises(VerificationError, match="is allowed"):
        convert(source, tmp_path / "gated")


def test_verification_that_cannot_fail_is_a_failure(source, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_gated.AttentionGate, "forward", lambda self, x, y: (y.flatten(2), x))
    with pytest.raises(VerificationError, match="prove nothing"):
        convert(source, tmp_path / "gated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.5, 10.0])
def test_open_gates_with_a_bias_stay_within_the_stated_bound(tmp_path, scale, dtype):
    folder = published(tmp_path / "source", source_model("llama"), dtype=dtype)
    checked = convert(folder, tmp_path / "gated", gate_scale=scale, gate_bias=True).verification
    assert checked.max_difference <= checked.bound < 0.3 * checked.max_output
    gates = load_file(tmp_path / "gated" / "model-gates.safetensors")
    assert {key.rsplit(".", 1)[1] for key in gates} == {"weight", "bias"}


def test_random_gates_are_reported_and_the_rest_verified(source, tmp_path):
    results = [
        convert(source, tmp_path / name, gate_scale=1.0, gate_init="normal").verification for name in ("one", "two")
    ]
    assert results[0] == results[1]  # the same weights every time
    assert results[0].bound is None and results[0].max_difference > 1e-2


def test_no_verify_says_so(source, tmp_path):
    result = convert(source, tmp_path / "gated", verify=False)
    assert result.verification is None
    assert "**Verified:** nothing" in (tmp_path / "gated" / "README.md").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "gated").conversion["verification"] is None


def test_verifies_unless_memory_is_short(source, tmp_path, monkeypatch):
    available = SimpleNamespace(available=10**6)
    monkeypatch.setattr(gated_llama.conversion.convert.psutil, "virtual_memory", lambda: available)
    assert convert(source, tmp_path / "small").verification is None
    assert convert(source, tmp_path / "asked", verify=True).verification.exact


# --- a gated checkpoint again ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A converted checkpoint whose gates have been trained, and saved as save_pretrained does: all in one file."""
    source = published(tmp_path / "Tiny-Llama", source_model("llama"))
    convert(source, tmp_path / "open")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "open")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.attn_gate.proj.weight, std=0.3)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(
    ("settings", "exact"),
    [({}, True), ({"gate_type": "elementwise"}, False), ({"gate_bias": True}, False)],
    ids=["as it is", "elementwise", "bias"],
)
def test_a_gated_checkpoint_keeps_what_its_gates_do(trained, tmp_path, settings, exact):
    result = convert(trained, tmp_path / "again", **settings)
    assert result.source_layout == "gated" and result.verification.max_difference <= result.verification.bound
    assert result.verification.exact or not exact
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (trained, tmp_path / "again"))
    old, new = (model.model.layers[1].self_attn.attn_gate.proj for model in (before, after))
    expected = old.weight.repeat_interleave(6, 0) if "gate_type" in settings else old.weight
    assert torch.equal(new.weight, expected)
    assert (new.bias is None) == ("gate_bias" not in settings)
    with torch.no_grad():
        torch.testing.assert_close(before(token_ids()).logits, after(token_ids()).logits, rtol=1e-4, atol=1e-5)
    assert after.config.conversion["source_model_type"] == "llama"  # so that it still knows its base
    assert (tmp_path / "again" / "model-gates.safetensors").exists()


def test_gates_in_a_shard_of_their_own_are_carried(trained, tmp_path):
    convert(trained, tmp_path / "one")
    result = convert(tmp_path / "one", tmp_path / "two")
    shards = {name: digest for name, digest in hashes(tmp_path / "one").items() if name.endswith(".safetensors")}
    assert len(shards) == 2 and shards.items() <= hashes(tmp_path / "two").items()
    assert result.carried_bytes == sum((tmp_path / "one" / name).stat().st_size for name in shards)


@pytest.mark.parametrize(
    "settings", [{"gate_scale": 1.5, "gate_bias": True}, {"gate_init": "normal"}, {"gate_type": "headwise"}], ids=str
)
def test_what_trained_gates_cannot_become_is_refused(trained, tmp_path, settings):
    if settings == {"gate_type": "headwise"}:
        convert(trained, tmp_path / "wide", gate_type="elementwise")
        trained = tmp_path / "wide"
    with pytest.raises(UserError, match="cannot express"):
        convert(trained, tmp_path / "again", **settings)


# --- other dtypes and shards, links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_rewrites_every_weight(source, tmp_path, dtype):
    result = convert(source, tmp_path / "gated", dtype=dtype, gate_type="elementwise")
    assert result.verification.exact and result.verification.dtype == dtype  # of the source, loaded in that dtype
    tensors = {}
    for path in (tmp_path / "gated").glob("*.safetensors"):
        tensors |= load_file(path)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in model.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path / "gated").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("size", ["8KB", 20_000, "1GB"])
def test_max_shard_size(source, tmp_path, size):
    result = convert(source, tmp_path / "gated", max_shard_size=size)
    assert result.verification.exact
    limit = {"8KB": 8000, "1GB": 10**9}.get(size, size)
    index = json.loads((tmp_path / "gated" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()) - {"model-gates.safetensors"})
    assert len(shards) > 3 if limit < 10**9 else len(shards) == 1
    for number, shard in enumerate(shards, 1):
        assert shard == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = load_file(tmp_path / "gated" / shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        assert all(index[key] == shard for key in tensors)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").state_dict()
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "message"), [({"dtype": "int8"}, "no dtype"), ({"max_shard_size": "5 pounds"}, "no shard size")]
)
def test_wrong_dtype_and_size_are_refused(source, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "gated", **settings)


def test_links_share_the_bytes_and_the_source_stays(source, tmp_path):
    before = hashes(source)
    convert(source, tmp_path / "gated", link=True)
    for name in before:
        if name.endswith(".safetensors"):
            assert (source / name).samefile(tmp_path / "gated" / name)
    assert not (source / "tokenizer.json").samefile(tmp_path / "gated" / "tokenizer.json")
    convert(source, tmp_path / "gated", link=True, force=True)
    shutil.rmtree(tmp_path / "gated")
    assert hashes(source) == before


def test_links_to_the_hub_cache_and_across_filesystems_are_symbolic(source, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    convert(snapshot, tmp_path / "one", link=True)

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    convert(source, tmp_path / "two", link=True)
    for output in ("one", "two"):
        link = tmp_path / output / "model-00001-of-00002.safetensors"
        assert link.is_symlink() and link.resolve() == source / link.name


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_copying_falls_back_where_the_kernel_cannot(source, tmp_path, monkeypatch, error):
    """The second call fails, as between filesystems that share some bytes: copying goes on where it stopped."""
    calls = []
    real = os.copy_file_range

    def sometimes(read, write, count):
        calls.append(count)
        if len(calls) > 1:
            raise OSError(error, "no")
        return real(read, write, 1000)

    monkeypatch.setattr("os.copy_file_range", sometimes)
    heard = []
    shard = source / "model-00001-of-00002.safetensors"
    copy_file(shard, tmp_path / "copy", heard.append)
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()
    assert heard[0] == 1000 and sum(heard) == shard.stat().st_size


# --- the card -------------------------------------------------------------------------------------------------------


def test_card(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: llama3.2\nlanguage:\n- en\nbase_model: other\n---\n# Theirs\n")
    convert(source, tmp_path / "gated", gate_type="elementwise")
    card = ModelCard.load(tmp_path / "gated" / "README.md")
    assert card.data.base_model == "Tiny-Llama"
    assert card.data.license == "llama3.2" and card.data.language == ["en"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"gated-attention", "gated-llama"} <= set(card.data.tags)
    assert "gated-llama convert Tiny-Llama gated --gate-type elementwise\n" in card.text
    assert "equal to the bit in bfloat16" in card.text
    assert str(tmp_path) not in str(card)


# --- from the Hub ---------------------------------------------------------------------------------------------------


def test_converts_from_a_hub_id(source, tmp_path):
    repository = tmp_path / "hub" / "org" / "Tiny-Llama"
    shutil.copytree(source, repository)
    (repository / "original").mkdir()
    for name in ("original/consolidated.00.pth", "pytorch_model.bin", "consolidated.safetensors"):
        (repository / name).write_bytes(b"x")
    with local_hub(tmp_path / "hub") as environment:
        done = run_command("convert", "org/Tiny-Llama", "gated", "--json", cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        done = run_command("convert", "org/none", "other", cwd=tmp_path, environment=environment)
    assert done.returncode == 2 and "org/none is no local folder, and the Hub did not give it" in done.stderr
    assert "Traceback" not in done.stderr
    assert result["verification"]["exact"] is True
    assert result["source"] == "org/Tiny-Llama" and len(result["revision"]) == 40
    record = json.loads((tmp_path / "gated" / "config.json").read_text())["conversion"]
    assert (record["source"], record["revision"]) == ("org/Tiny-Llama", result["revision"])
    card = ModelCard.load(tmp_path / "gated" / "README.md")
    assert card.data.base_model == "org/Tiny-Llama" and result["revision"] in card.text
    downloaded = {path.name for path in Path(environment["HF_HOME"]).rglob("*") if path.is_file() or path.is_symlink()}
    assert "tokenizer.json" in downloaded
    assert not {"pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth"} & downloaded


# --- what others refer to, and what code reads without declaring it ------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"is_causal": False},
        {"tokenizer_class": "LlamaTokenizer", "something": {"of": "others"}},
        {"output_hidden_states": True},
        {"classifier_dropout": 0.5},
    ],
)
def test_fields_that_no_class_declares_stay(tmp_path, extra):
    source = published(tmp_path / "source", source_model("llama"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | extra))
    convert(source, tmp_path / "gated")
    assert extra.items() <= json.loads((tmp_path / "gated" / "config.json").read_text()).items()
    export_checkpoint(tmp_path / "gated", tmp_path / "base", to="base", progress=False)
    assert extra.items() <= json.loads((tmp_path / "base" / "config.json").read_text()).items()
    outputs = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(token_ids()) for name in ("source", "gated")]
    assert torch.equal(outputs[0].logits, outputs[1].logits) and outputs[0].keys() == outputs[1].keys()
    if "is_causal" in extra:  # the control
        (source / "config.json").write_text(json.dumps(config))
        causal = AutoModelForCausalLM.from_pretrained(source)(token_ids())
        assert not torch.allclose(causal.logits, outputs[0].logits, atol=1e-3)


def test_fields_that_a_family_does_not_read_do_not_become_ours(tmp_path):
    """A Llama slides nowhere, whatever its config.json says."""
    source = published(tmp_path / "source", source_model("llama"))
    path = source / "config.json"
    unread = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 3, "gate_scale": 7.0, "use_qk_norm": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | unread))
    convert(source, tmp_path / "gated", verify=False)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "gated")]
    assert torch.equal(*(model(token_ids(), use_cache=False).logits for model in models))
    assert models[1].config.sliding_window is None and models[1].config.gate_scale == 2


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_longrope_with_its_original_length_beside_or_inside(tmp_path, place):
    source = published(tmp_path / "source", source_model("llama-longrope"))
    path = source / "config.json"
    config = json.loads(path.read_text())
    if place == "beside":
        config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")
    path.write_text(json.dumps(config))
    convert(source, tmp_path / "gated")
    ids = torch.cat([token_ids(1), token_ids(1, 30)], dim=1)  # longer than the original length
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "gated")]
    assert torch.equal(*(model(ids).logits for model in models))


@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_pruned_and_deepened_models_load_as_their_in_tree_ones_do(tmp_path, variant):
    published(tmp_path / "source", source_model(variant))
    convert(tmp_path / "source", tmp_path / "gated")
    for name in ("source", "gated"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        model.save_pretrained(tmp_path / f"{name}-pruned")
        config = AutoConfig.from_pretrained(tmp_path / name)
        config.num_hidden_layers = 5
        assert len(AutoModelForCausalLM.from_config(config)(token_ids(), output_hidden_states=True).hidden_states) == 6
    pruned = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-pruned") for name in ("source", "gated")]
    assert torch.equal(*(model(token_ids()).logits for model in pruned))


def test_a_window_that_is_switched_off_when_loading(tmp_path):
    published(tmp_path / "source", source_model("mistral"))
    convert(tmp_path / "source", tmp_path / "gated")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, sliding_window=None).eval()
        for name in ("source", "gated")
    ]
    assert torch.equal(*(model(token_ids()).logits for model in models))
    assert torch.equal(*(model.generate(token_ids(1), max_new_tokens=5, do_sample=False) for model in models))
    windowed = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    assert not torch.equal(windowed(token_ids()).logits, models[1](token_ids()).logits)  # the control
    published(tmp_path / "qwen2", source_model("qwen2-sliding"))
    convert(tmp_path / "qwen2", tmp_path / "gated-qwen2")
    with pytest.raises(ValueError, match="layer_types has sliding_attention layers: give sliding_window"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gated-qwen2", sliding_window=None)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_under_either_name(tmp_path, stored):
    model = source_model("qwen3", tie_word_embeddings=True)
    source = published(tmp_path / "source", model)
    weights = load_file(source / "model.safetensors")
    weights[stored] = weights.pop("model.embed_tokens.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    in_tree = AutoModelForCausalLM.from_pretrained(source)(token_ids()).logits
    convert(source, tmp_path / "gated")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "gated")(token_ids()).logits, in_tree)
    check_loads(tmp_path / "gated")
    for to in ("base", "qwen3_5", "official"):
        export_checkpoint(tmp_path / "gated", tmp_path / to, to=to, progress=False)
    del weights[stored]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no tensor (lm_head|model.embed_tokens).weight"):
        convert(source, tmp_path / "none")


def test_an_index_without_metadata_is_refused_in_a_sentence(tmp_path):
    source = published(tmp_path / "source", source_model("llama"), shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(KeyError):  # the control: so does Transformers
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(UserError, match='has no "metadata", which Transformers does not load'):
        convert(source, tmp_path / "gated")


def test_files_that_others_refer_to_are_carried(tmp_path):
    source = published(tmp_path / "source", source_model("mistral", "Model"), tokenizer=True)
    files = {
        "additional_chat_templates/tool_use.jinja": "TOOLS",
        "custom_generate/generate.py": "raise SystemExit('code was run')",
        "modules.json": json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "./2_Own", "type": "own_module.Own"},
            ]
        ),
        "config_sentence_transformers.json": "{}",
        "sentence_bert_config.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
        "2_Own/deep/er.json": "{}",
        "own_module.py": "raise SystemExit('code was run')",
    }
    others = {"notes.md": "", "onnx/model.onnx": "", "custom_generate/cache.bin": ""}
    for name, text in {**files, **others}.items():
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text(text)
    result = convert(source, tmp_path / "gated")
    assert {name: (tmp_path / "gated" / name).read_text() for name in files} == files
    assert set(files) <= set(result.carried)
    assert result.left_behind == ["custom_generate/cache.bin", "notes.md", "onnx/"]
    sent = contents_to_publish(tmp_path / "gated", base="org/name")
    assert set(files) <= set(sent)
    (source / "modules.json").write_text('[{"path": "../elsewhere", "type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(UserError, match=r"names '../elsewhere/', which is not inside the folder"):
        convert(source, tmp_path / "refused")
