# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A GGUF for llama.cpp: its keys and tensors by a reading of our own. (llama.cpp itself: `make check-llama-cpp`.)"""

import json
import struct

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_llama import UserError, convert_checkpoint, export_checkpoint
from gated_llama.gates import is_gate
from gated_llama.scripts.cli import main
from tiny import VOCAB, published, source_model, tiny_tokenizer


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
SCALED_ROPE = ["llama-3.2", "llama-linear", "llama-yarn"]


class File:
    """As the format's specification has it: keys with values, tensors with type and values."""

    def __init__(self, path):
        self.data, self.place = path.read_bytes(), 4
        assert self.data[:4] == b"GGUF" and self.scalar("I") == 3
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        self.keys = {self.string(): self.value(self.scalar("I")) for _ in range(keys)}
        infos = []
        for _ in range(tensors):
            name = self.string()
            shape = [self.scalar("Q") for _ in range(self.scalar("I"))][::-1]
            infos.append((name, shape, self.scalar("I"), self.scalar("Q")))
        start = -(-self.place // 32) * 32
        self.types = {name: kind for name, _, kind, _ in infos}
        self.tensors = {name: self.tensor(shape, kind, start + offset) for name, shape, kind, offset in infos}

    def scalar(self, form):
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return value

    def string(self):
        size = self.scalar("Q")
        self.place += size
        return self.data[self.place - size : self.place].decode()

    def value(self, kind):
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(count)]
        return self.string() if kind == STRING else self.scalar(SCALARS[kind])

    def tensor(self, shape, kind, place):
        count = int(np.prod(shape))
        if kind in (F32, F16):
            values = np.frombuffer(self.data, {F32: "<f4", F16: "<f2"}[kind], count, place).astype("f4")
        elif kind == BF16:
            values = (np.frombuffer(self.data, "<u2", count, place).astype("u4") << 16).view("f4")
        else:
            blocks = np.frombuffer(self.data, [("scale", "<f2"), ("values", "i1", 32)], count // 32, place)
            values = (blocks["scale"].astype("f4")[:, None] * blocks["values"]).ravel()
        return torch.from_numpy(values.reshape(shape).copy())


@torch.no_grad()
def gated(folder, variant, *, dtype=torch.float32, move=True, **fields):
    """A converted checkpoint with gates that have learned something."""
    settings = {name: fields.pop(name) for name in [*fields] if name.startswith("gate_")}
    published(folder / "source", source_model(variant, **fields), dtype=dtype, tokenizer=True)
    convert_checkpoint(folder / "source", folder / "gated", progress=False, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder / "gated", dtype="auto")
    if move:
        for name, parameter in model.named_parameters():
            if is_gate(name):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "gated")
    return model


def export(folder, **settings):
    result = export_checkpoint(folder / "gated", folder / "out", to="gguf", progress=False, **settings)
    assert {path.name for path in (folder / "out").iterdir()} == {"model.gguf", "README.md"}
    return result, File(folder / "out" / "model.gguf")


@pytest.mark.parametrize("variant", [*SCALED_ROPE, "llama", "mistral", "mistral-full", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_tensors(tmp_path, variant, dtype):
    model = gated(tmp_path, variant, dtype=dtype)
    config, state = model.config, model.state_dict()
    result, file = export(tmp_path)
    assert result.verification.max_difference < 1e-4
    keys = {key.removeprefix("step35."): value for key, value in file.keys.items()}
    assert keys["general.architecture"] == "step35" and keys["vocab_size"] == VOCAB == len(
        keys["tokenizer.ggml.tokens"]
    )
    heads = (config.num_attention_heads, config.num_key_value_heads)
    assert (keys["attention.head_count"], keys["attention.head_count_kv"]) == heads
    assert keys["attention.key_length"] == keys["attention.value_length"] == config.head_dim
    assert keys["rope.dimension_count"] == 2 * keys["rope.dimension_count_swa"] == 2 * config.head_dim
    theta = pytest.approx(config.rope_parameters["rope_theta"])
    assert keys["rope.freq_base"] == theta == keys["rope.freq_base_swa"]
    scaled = variant in SCALED_ROPE
    assert keys["block_count"] == 3 + scaled and keys.get("nextn_predict_layers", 0) == scaled
    assert keys["attention.sliding_window_pattern"] == ([False] * 3 + [True] if scaled else [True] * 3)
    assert keys["attention.sliding_window"] == (5 if variant == "mistral" else config.max_position_embeddings)
    assert ("rope_freqs.weight" in file.tensors) == scaled

    find = file.tensors.__getitem__
    assert torch.equal(find("output.weight"), state["lm_head.weight"].float())  # a copy where it is tied
    for layer in range(3):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        assert torch.equal(find(f"{theirs}.attn_gate.weight"), state[f"{ours}.self_attn.attn_gate.proj.weight"].float())
        assert torch.equal(find(f"{theirs}.attn_output.weight"), 2 * state[f"{ours}.self_attn.o_proj.weight"].float())
        assert torch.equal(find(f"{theirs}.ffn_norm.weight"), state[f"{ours}.post_attention_layernorm.weight"].float())
        assert torch.equal(find(f"{theirs}.ffn_gate.weight"), state[f"{ours}.mlp.gate_proj.weight"].float())
        rows = torch.cat([state[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkv"]).float()
        if variant == "qwen2":
            assert torch.equal(find(f"{theirs}.attn_qkv.weight"), rows)
            assert torch.equal(find(f"{theirs}.attn_v.bias"), state[f"{ours}.self_attn.v_proj.bias"].float())
        else:
            assert torch.equal(torch.cat([find(f"{theirs}.attn_{name}.weight") for name in "qkv"]), rows)
        assert (f"{theirs}.attn_q_norm.weight" in file.tensors) == (variant == "qwen3")
    wanted = {torch.float32: F32, torch.bfloat16: BF16}[dtype]
    for name, kind in file.types.items():
        assert kind == (F32 if "norm" in name or "bias" in name or "attn_gate" in name or "freqs" in name else wanted)


@pytest.mark.parametrize("variant", SCALED_ROPE)
def test_frequencies_are_those_of_transformers(tmp_path, variant):
    model = gated(tmp_path, variant)
    _, file = export(tmp_path)
    size = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    rotary = model.model.rotary_emb
    # A quotient of fp32, and one of that: two roundings of 6e-8, and that of the power.
    torch.testing.assert_close(plain / file.tensors["rope_freqs.weight"], rotary.inv_freq, rtol=2e-7, atol=0)
    assert file.tensors["rope_freqs.weight"].max() > 1.5  # something is scaled
    assert file.keys["step35.rope.scaling.attn_factor"] == np.float32(rotary.attention_scaling)
    assert (rotary.attention_scaling > 1.1) == (variant == "llama-yarn")


def test_the_tokenizer_goes_along(tmp_path):
    gated(tmp_path, "llama")
    _, file = export(tmp_path)
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    assert file.keys["tokenizer.ggml.tokens"][: len(pieces)] == pieces
    types = file.keys["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3] and set(types[3 : len(pieces)]) == {1} and set(types[len(pieces) :]) <= {5}
    assert (file.keys["tokenizer.ggml.bos_token_id"], file.keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert file.keys["tokenizer.ggml.pre"] == "gpt-2" and file.keys["tokenizer.ggml.add_bos_token"] is False
    assert file.keys["tokenizer.chat_template"] == tokenizer.chat_template
    path = tmp_path / "gated" / "tokenizer.json"
    contents = json.loads(path.read_text())
    contents["pre_tokenizer"] = {"type": "Metaspace"}
    path.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"not known to be the same in llama\.cpp \(Metaspace\)"):
        export_checkpoint(tmp_path / "gated", tmp_path / "no", to="gguf", progress=False)


def test_eight_bits(tmp_path, capsys):
    """Rows that 32 does not divide stay in f16; gates, norms and biases in f32."""
    model = gated(tmp_path, "llama", hidden_size=96, head_dim=16, intermediate_size=40)
    arguments = [str(tmp_path / "gated"), str(tmp_path / "out"), "--to", "gguf", "--gguf-type", "q8_0"]
    assert main(["export", *arguments, "--quiet"]) == 0
    file = File(tmp_path / "out" / "model.gguf")
    assert file.types["blk.0.ffn_up.weight"] == Q8_0 and file.types["blk.0.ffn_down.weight"] == F16
    assert file.types["blk.0.attn_gate.weight"] == F32
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert (file.tensors["blk.0.ffn_up.weight"] - expected).abs().max() < expected.abs().max() / 120


def test_greedy_tokens_are_compared_beyond_the_end_of_text(tmp_path):
    gated(tmp_path, "llama", eos_token_id=list(range(VOCAB - 9)))
    export(tmp_path)


def test_control_a_wrong_tensor_fails_verification(tmp_path, monkeypatch):
    from gated_llama import VerificationError
    from gated_llama.conversion.targets import gguf

    gated(tmp_path, "llama")
    monkeypatch.setattr(gguf, "OF_LAYER", {**gguf.OF_LAYER, "self_attn.o_proj.weight": "attn_out.weight"})  # unscaled
    with pytest.raises(VerificationError):
        export(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("llama", {"gate_type": "elementwise"}, "elementwise gates"),
        ("llama", {"gate_bias": True}, "biases of its gates"),
        ("llama-biases", {}, "biases of o_proj"),
        ("llama-dynamic", {}, "RoPE of type 'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
    ],
)
def test_what_it_cannot_express_is_refused(tmp_path, variant, fields, message):
    gated(tmp_path, variant, **fields)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "gated", tmp_path / "out", to="gguf", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="gguf_type is for the export to gguf"):
        export_checkpoint(tmp_path / "gated", tmp_path / "out", to="base", gguf_type="f16", progress=False)
