# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A GGUF as a source: what comes of it computes what the file's weights, made dense, compute."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gated_llama import UserError, convert_checkpoint
from gated_llama.conversion.targets.gguf import OF_LAYER, WHOLE
from gated_llama.scripts.cli import main
from hub import local_hub
from tiny import LLAMA3_ROPE, VOCAB, source_model, tiny_tokenizer, token_ids


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5}
MIXED = {"mlp.down_proj.weight": "Q8_0", "self_attn.v_proj.weight": "F16"}  # the rest is F32
NORMAL, CONTROL = 1, 3  # kinds of tokens


def settings_of(model, arch):
    config = model.config
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if arch == "llama":
        settings["rope.dimension_count"] = 16
    if arch == "qwen3":
        settings["attention.key_length"] = settings["attention.value_length"] = config.head_dim
    return settings


def write_gguf(path, model, arch, more=None, factors=None):
    """As llama.cpp's converter does; returns the tensors as they come back, by Transformers' names."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (settings_of(model, arch) | (more or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{name}", value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    contents = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(contents["model"]["vocab"], key=contents["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([CONTROL if number < 3 else NORMAL for number in range(VOCAB)])
    writer.add_token_merges([" ".join(pair) for pair in contents["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    dense = {}
    for key, tensor in model.state_dict().items():
        *prefix, layer = key.split(".", 3)[:3]
        name = key.split(".", 3)[-1] if prefix == ["model", "layers"] else key
        array, kind = tensor.float().numpy(), MIXED.get(name, "F32")
        permuted = arch == "llama" and (".q_proj." in key or ".k_proj." in key)
        if permuted:
            heads = len(array) // 16
            array = array.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(array, kind)
        writer.add_tensor(WHOLE[key] if key in WHOLE else f"blk.{layer}.{OF_LAYER[name]}", packed, raw_dtype=kind)
        array = gguf.dequantize(packed, kind)
        if permuted:
            array = array.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(array.shape)
        dense[key] = torch.tensor(array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize(
    ("arch", "variant", "fields"),
    [
        ("llama", "llama", {"rms_norm_eps": 1e-5}),
        ("llama", "llama-linear", {}),
        ("qwen2", "qwen2", {"tie_word_embeddings": False}),
        ("qwen3", "qwen3", {"head_dim": 24}),
    ],
)
def test_converts_to_what_the_file_computes(tmp_path, arch, variant, fields):
    sizes = {**SIZES, **fields} if arch != "qwen2" else {key: SIZES[key] for key in SIZES if key != "head_dim"} | fields
    model = source_model(variant, **sizes)
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0} if variant == "llama-linear" else None
    dense = write_gguf(tmp_path / "tiny.gguf", model, arch, scaled)
    result = convert_checkpoint(tmp_path / "tiny.gguf", tmp_path / "gated", dtype="float32", progress=False)
    assert result.verification.exact and result.source == "tiny.gguf" and result.quantized == "Q8_0"
    assert not list(tmp_path.glob(".gated*"))  # what was made dense is gone
    for key, tensor in dense.items():
        assert key == "lm_head.weight" or model.state_dict()[key].shape == tensor.shape
    model.load_state_dict(dense)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").eval()
    with torch.no_grad():
        expected, actual = model(token_ids()).logits, gated(token_ids()).logits
    assert torch.equal(actual, expected)
    text = "the grumpy cat sat on the mat"
    assert AutoTokenizer.from_pretrained(tmp_path / "gated")(text).input_ids == tiny_tokenizer()(text).input_ids
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "`tiny.gguf`, quantized (Q8_0) and made dense" in card
    assert json.loads((tmp_path / "gated" / "config.json").read_text())["conversion"]["quantized"] == "Q8_0"


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_the_scaled_rope_of_llama_3(tmp_path, factor):
    rope = LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    model = source_model("llama", **SIZES, rope_parameters=rope)
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    dense = write_gguf(tmp_path / "tiny.gguf", model, "llama", factors=plain / model.model.rotary_emb.inv_freq)
    if factor == 5.0:  # of no published model
        with pytest.raises(UserError, match="factors that are not Llama 3's"):
            convert_checkpoint(tmp_path / "tiny.gguf", tmp_path / "gated", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
        return
    convert_checkpoint(tmp_path / "tiny.gguf", tmp_path / "gated", dtype="float32", progress=False)
    model.load_state_dict(dense)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").eval()
    assert gated.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(gated(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(
    ("arch", "more", "message"),
    [
        ("gemma", None, "architecture 'gemma': llama, qwen2, qwen3 are read"),
        ("step35", None, "architecture 'step35'"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "RoPE scaled by 'yarn'"),
        ("llama", {"attention.sliding_window": 5}, "sliding_window 5, and Transformers reads None"),
    ],
)
def test_what_would_be_left_out_is_refused(tmp_path, arch, more, message):
    write_gguf(tmp_path / "tiny.gguf", source_model("llama", **SIZES), arch, more)
    with pytest.raises(UserError, match=message):
        convert_checkpoint(tmp_path / "tiny.gguf", tmp_path / "gated", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_file_that_is_none_and_options_that_do_not_fit(tmp_path, capsys):
    (tmp_path / "text.gguf").write_text("this is no model")
    for arguments, message in (
        ([tmp_path / "text.gguf"], "cannot be read as a GGUF"),
        ([tmp_path / "none.gguf"], "is no file"),
        ([tmp_path, "--gguf-file", "none.gguf"], "is no file"),
        ([tmp_path / "text.gguf", "--link"], "leave --link out"),
        ([tmp_path / "text.gguf", "--revision", "main"], "leave --revision out"),
    ):
        assert main(["convert", *map(str, arguments[:1]), str(tmp_path / "out"), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err
    whole = tmp_path / "tiny.gguf"
    write_gguf(whole, source_model("llama", **SIZES), "llama")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:40])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, message in (
        ([tmp_path / "cut.gguf", tmp_path / "new"], "cut.gguf cannot be read as a GGUF"),
        ([whole, tmp_path / "out"], "is not empty"),
        ([whole, tmp_path, "--force"], "tiny.gguf lies inside"),
        ([tmp_path, tmp_path, "--gguf-file", "tiny.gguf", "--force"], "tiny.gguf lies inside"),
        ([whole, "/proc/out"], "nothing was written"),
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_from_a_folder_and_from_the_hub(tmp_path, run_python):
    write_gguf(tmp_path / "tiny.gguf", source_model("llama", **SIZES), "llama")
    result = convert_checkpoint(
        tmp_path, tmp_path / "gated", gguf_file="tiny.gguf", source_id="org/tiny", verify=False, progress=False
    )
    assert result.source == "org/tiny" and result.gguf_file == "tiny.gguf"
    assert "--gguf-file tiny.gguf" in (tmp_path / "gated" / "README.md").read_text()
    (tmp_path / "hub" / "org" / "tiny").mkdir(parents=True)
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "hub" / "org" / "tiny")
    with local_hub(tmp_path / "hub") as environment:
        done = run_python(
            f"""
            from gated_llama import convert_checkpoint
            out = {str(tmp_path / "from-hub")!r}
            result = convert_checkpoint("org/tiny", out, gguf_file="tiny.gguf", verify=False, progress=False)
            print(result.source, result.gguf_file, len(result.revision))
            """,
            environment=environment,
        )
    assert done.stdout.split() == ["org/tiny", "tiny.gguf", "40"], done.stderr
