# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Out of gated: the same function in the format of others."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM

import modeling_gated
from gated_llama import UserError, VerificationError, convert_checkpoint, export_checkpoint
from gated_llama.conversion.targets.qwen3_5 import LARGE
from tiny import LLAMA3_ROPE, VARIANTS, gated_model, published, source_model, tiny_tokenizer, token_ids


MIXED = ["full_attention", "sliding_attention", "full_attention"]


def weights(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path, variant, shards):
    source = published(tmp_path / "source", source_model(variant), dtype=torch.bfloat16, shards=shards, tokenizer=True)
    convert_checkpoint(source, tmp_path / "gated", gate_type="elementwise", progress=False)
    result = export_checkpoint(tmp_path / "gated", tmp_path / "base", to="base", progress=False)
    assert result.verification.exact
    assert weights(tmp_path / "base") == weights(source)  # the same bytes under the same names
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "base"))
    assert type(after) is type(before)
    with torch.no_grad():
        assert torch.equal(before(token_ids()).logits, after(token_ids()).logits)
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_heads_come_back(tmp_path, head):
    source = published(tmp_path / "source", source_model("qwen3", head, num_labels=5))
    convert_checkpoint(source, tmp_path / "gated", gate_scale=3.0, gate_bias=True, progress=False)
    export_checkpoint(tmp_path / "gated", tmp_path / "base", to="base", progress=False)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["architectures"] == [f"Qwen3{head}"]
    assert weights(tmp_path / "base") == weights(source)


def test_a_checkpoint_saved_again_goes_back_too(tmp_path):
    """save_pretrained puts the gates into one file with the rest."""
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "gated", progress=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "gated").save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "base", to="base", progress=False)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "base"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_moved_gates_are_refused_with_their_distance(tmp_path):
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "gated", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    model.model.layers[2].self_attn.attn_gate.proj.weight.data[3, 4] = -0.25
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.attn_gate\.proj\.weight is up to 0\.25 away"):
        export_checkpoint(tmp_path / "tuned", tmp_path / "base", to="base", progress=False)
    assert not (tmp_path / "base").exists()


def test_what_has_no_base_is_refused(tmp_path):
    gated_model(modeling_gated.GatedLlamaForCausalLM, trained=False).save_pretrained(tmp_path / "fresh")
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "random", gate_scale=1.0, gate_init="normal", progress=False)
    for name, message in (("fresh", "names no family"), ("source", "no gated model"), ("random", "did not start open")):
        with pytest.raises(UserError, match=message):
            export_checkpoint(tmp_path / name, tmp_path / "base", to="base", progress=False)
    with pytest.raises(UserError, match="no export to 'onnx'"):
        export_checkpoint(tmp_path / "fresh", tmp_path / "base", to="onnx", progress=False)


def test_control_a_wrong_weight_fails_verification(tmp_path, monkeypatch):
    source = published(tmp_path / "source", source_model("llama"), shards=2)
    convert_checkpoint(source, tmp_path / "gated", progress=False)

    def copy_wrongly(read, write, on_bytes=None):
        content = bytearray(read.read_bytes())
        content[-100] ^= 0x40
        write.write_bytes(content)

    monkeypatch.setattr("gated_llama.checkpoints.shards.copy_file", copy_wrongly)
    with pytest.raises(VerificationError):
        export_checkpoint(tmp_path / "gated", tmp_path / "base", to="base", progress=False)
    assert not (tmp_path / "base").exists()


# --- Qwen3.5 and the paper authors' layout --------------------------------------------------------------------------


def trained(folder, *, dtype=torch.float32, **fields):
    """A saved model whose gates do something."""
    model = gated_model(modeling_gated.GatedLlamaForCausalLM, **fields).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [True, False], ids=["QK norm", "padded"])
@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_to_qwen3_5_runs_without_our_code(tmp_path, run_python, dtype, gate_type, norm, bias):
    fields = {"gate_type": gate_type, "use_qk_norm": norm, "head_dim": 8, "attention_bias": bias, "gate_bias": bias}
    trained(tmp_path / "gated", dtype=dtype, **fields)
    result = export_checkpoint(tmp_path / "gated", tmp_path / "qwen", to="qwen3_5", progress=False)
    # fp32: σ and o_proj take the factor 2 in another order only; headwise gates come from wider products
    assert result.verification.dtype == "float32"
    assert result.verification.max_difference <= result.verification.bound < 1e-3
    assert (result.in_own_dtype is None) == (dtype == torch.float32)
    assert (result.note is None) == norm
    exported = Qwen3_5ForCausalLM.from_pretrained(tmp_path / "qwen", dtype=torch.float32)
    assert exported.config.head_dim == (8 if norm else 16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", dtype=torch.float32)  # float() keeps bf16 angles
    with torch.no_grad():
        torch.testing.assert_close(exported(token_ids()).logits, model(token_ids()).logits, rtol=1e-4, atol=1e-4)
    if dtype == torch.float32 and gate_type == "headwise" and not bias:
        code = f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "qwen")!r})
        print(type(model).__name__, model(torch.arange(5, 12)[None]).logits.argmax(-1).tolist())
        """
        done = run_python(code, installed=False)
        expected = model(torch.arange(5, 12)[None]).logits.argmax(-1).tolist()
        assert done.stdout.strip() == f"Qwen3_5ForCausalLM {expected}", done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": torch.float16}, "no QK norm, and float16"),
        ({"use_qk_norm": True, "mlp_bias": True}, "mlp_bias True"),
        ({"use_qk_norm": True, "sliding_window": 5}, "sliding-window"),
        ({"use_qk_norm": True, "gate_strength": 0.5}, "gate_strength 0.5, which no other format can express"),
    ],
)
def test_what_qwen3_5_cannot_express_is_refused(tmp_path, fields, message):
    trained(tmp_path / "gated", **fields)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "gated", tmp_path / "qwen", to="qwen3_5", progress=False)
    assert not (tmp_path / "qwen").exists()


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}], ids=str)
@pytest.mark.parametrize("head_dim", [6, 22])  # 14 = 9 + 4 + 1, 22 = 9 + 9 + 4, 30 = 25 + 4 + 1 are sums of squares
def test_padded_heads_of_odd_sizes_and_with_scaled_rope(tmp_path, head_dim, rope):
    model = trained(tmp_path / "gated", head_dim=head_dim, rope_parameters=rope)
    export_checkpoint(tmp_path / "gated", tmp_path / "qwen", to="qwen3_5", progress=False)
    exported = Qwen3_5ForCausalLM.from_pretrained(tmp_path / "qwen").eval()
    with torch.no_grad():
        # fp32: norms divide by the constants' root and multiply again (7e-6 at most here, of logits up to 5)
        torch.testing.assert_close(exported(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-5)
    norm = exported.model.layers[0].self_attn.k_norm.weight
    assert norm[:head_dim].eq(LARGE - 1).all() and norm[head_dim:].eq(-1).all()


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 5}, {"layer_types": MIXED, "sliding_window": 4}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_to_lfm3_runs_without_our_code(tmp_path, fields, bias):
    model = trained(tmp_path / "gated", use_qk_norm=True, head_dim=8, attention_bias=bias, **fields)
    result = export_checkpoint(tmp_path / "gated", tmp_path / "lfm3", to="lfm3", progress=False)
    assert result.verification.max_difference <= result.verification.bound < 1e-3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "lfm3")
    assert type(exported).__name__ == "Lfm3ForCausalLM"
    with torch.no_grad():
        assert torch.equal(exported(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no QK norm"),
        ({"use_qk_norm": True, "gate_type": "elementwise"}, "elementwise gates"),
        ({"use_qk_norm": True, "gate_bias": True}, "biases of gates or MLPs"),
        ({"use_qk_norm": True, "attention_bias": True, "attention_out_bias": False}, "and not of o"),
        ({"use_qk_norm": True, "rope_parameters": LLAMA3_ROPE}, "RoPE of type 'llama3'"),
    ],
)
def test_what_lfm3_cannot_express_is_refused(tmp_path, fields, message):
    trained(tmp_path / "gated", **fields)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "gated", tmp_path / "lfm3", to="lfm3", progress=False)


@torch.no_grad()
def official_logits(folder, ids):
    """The released layout run from scratch in fp64, from the files alone: `ids` (T,) -> logits (T, V)."""
    config = json.loads((folder / "config.json").read_text())
    weights = {key: tensor.double() for key, tensor in load_file(folder / "model.safetensors").items()}
    heads, kv_heads, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    repeats, eps, length = heads // kv_heads, config["rms_norm_eps"], len(ids)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    # Transformers' angles are fp32; the reference takes the same numbers.
    angles = torch.arange(length)[:, None].float() / config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    cos, sin = (torch.cat([f(angles)] * 2, -1).double() for f in (torch.cos, torch.sin))

    def rotate(x):  # (T, heads, H)
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, weights[f"{at}.input_layernorm.weight"])
        fused = linear(h, f"{at}.self_attn.q_proj").reshape(length, kv_heads, -1)
        queries = fused[:, :, : repeats * size].reshape(length, heads, size)
        gates = fused[:, :, repeats * size :].reshape(length, heads, -1)
        assert gates.shape[-1] == (1 if config["headwise_attn_output_gate"] else size)
        keys = linear(h, f"{at}.self_attn.k_proj").reshape(length, kv_heads, size)
        values = linear(h, f"{at}.self_attn.v_proj").reshape(length, kv_heads, size)
        if config["use_qk_norm"]:
            queries = norm(queries, weights[f"{at}.self_attn.q_norm.weight"])
            keys = norm(keys, weights[f"{at}.self_attn.k_norm.weight"])
        queries, keys = rotate(queries), rotate(keys)
        keys, values = (part.repeat_interleave(repeats, 1) for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values) * torch.sigmoid(gates)
        x = x + linear(mixed.reshape(length, -1), f"{at}.self_attn.o_proj")
        h = norm(x, weights[f"{at}.post_attention_layernorm.weight"])
        up = torch.nn.functional.silu(linear(h, f"{at}.mlp.gate_proj")) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(up, f"{at}.mlp.down_proj")
    x = norm(x, weights["model.norm.weight"])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


OFFICIAL = [
    {"gate_type": "headwise", "head_dim": 8, "use_qk_norm": True, "tie_word_embeddings": True},
    {"gate_type": "elementwise", "head_dim": 8, "use_qk_norm": True},
    {"gate_type": "headwise", "attention_bias": True, "gate_bias": True},
    {"gate_type": "elementwise", "attention_bias": True, "gate_bias": True, "gate_scale": 1.5},
]


@pytest.mark.parametrize("fields", OFFICIAL, ids=lambda f: f"{f['gate_type']}-{'bias' if 'gate_bias' in f else 'norm'}")
def test_official_layout_out_and_in(tmp_path, fields):
    """Out: the files mean what the released code takes them to mean. In again: the same function as at first."""
    model = trained(tmp_path / "gated", **fields)
    result = export_checkpoint(tmp_path / "gated", tmp_path / "official", to="official", progress=False)
    assert result.verification.max_difference <= result.verification.bound
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    ids = token_ids(1, 11)
    with torch.no_grad():
        ours = model(ids).logits[0]
    reference = official_logits(tmp_path / "official", ids[0])
    # fp32 against fp64
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-5)
    back = convert_checkpoint(tmp_path / "official", tmp_path / "back", progress=False)
    assert (back.source_layout, back.gate_type, back.gate_scale) == ("official", fields["gate_type"], 1.0)
    assert back.verification.max_difference <= back.verification.bound
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits[0].double(), reference, rtol=0, atol=2e-5)
    gate, q = "self_attn.attn_gate.proj.weight", "self_attn.q_proj.weight"
    for layer in range(3):  # splitting undoes fusing, to the bit
        for name in (gate, q):
            key = f"model.layers.{layer}.{name}"
            assert torch.equal(again.state_dict()[key], model.state_dict()[key])


def test_control_rows_in_another_order_are_seen(tmp_path, monkeypatch):
    """The grouping by key/value head is what the reference is there to check: without it the logits differ."""
    model = trained(tmp_path / "gated", **OFFICIAL[1])
    monkeypatch.setattr(
        "gated_llama.conversion.official.fuse", lambda queries, gates, config: torch.cat([queries, gates])
    )
    export_checkpoint(tmp_path / "gated", tmp_path / "official", to="official", verify=False, progress=False)
    ids = token_ids(1, 11)
    with torch.no_grad():
        difference = (model(ids).logits[0].double() - official_logits(tmp_path / "official", ids[0])).abs().max()
    assert difference > 1e-2
    with pytest.raises(VerificationError):  # ours sees it too
        export_checkpoint(tmp_path / "gated", tmp_path / "again", to="official", progress=False)


def test_official_config_must_say_one_kind_of_gate(tmp_path):
    trained(tmp_path / "gated", **OFFICIAL[0])
    export_checkpoint(tmp_path / "gated", tmp_path / "official", to="official", progress=False)
    path = tmp_path / "official" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"elementwise_attn_output_gate": True}))
    with pytest.raises(UserError, match="one of them"):
        convert_checkpoint(tmp_path / "official", tmp_path / "back", progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 5}, "sliding-window"),
        ({"mlp_bias": True}, "mlp_bias True"),
    ],
)
def test_what_the_official_layout_cannot_express_is_refused(tmp_path, fields, message):
    trained(tmp_path / "gated", **fields)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "gated", tmp_path / "official", to="official", progress=False)


BIASES = [("attention_bias", "attention_out_bias", "gate_bias")[n : n + 1] for n in range(3)]
BIASES += [("attention_bias", "gate_bias"), ("attention_out_bias", "gate_bias")]


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("biases", BIASES, ids=str)
@pytest.mark.parametrize("to", ["qwen3_5", "official"])
def test_biases_that_the_layout_has_and_the_model_has_not_are_zero(tmp_path, to, biases, gate_type):
    names = ("attention_bias", "attention_out_bias", "gate_bias")
    fields = {name: name in biases for name in names}
    trained(tmp_path / "gated", use_qk_norm=True, gate_type=gate_type, **fields)
    export_checkpoint(tmp_path / "gated", tmp_path / "out", to=to, progress=False)
    if to == "official":
        ids = token_ids(1)[0]
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").double()(ids[None]).logits[0]
        torch.testing.assert_close(official_logits(tmp_path / "out", ids), expected, rtol=0, atol=2e-5)


# The table of the README: family -> the formats that can express it with open and with trained gates.
CAN = {
    "llama": ({"base", "official", "qwen3_5"}, {"official", "qwen3_5"}),
    "llama-biases": ({"base"}, set()),  # a bias in the MLP
    "mistral": ({"base"}, set()),  # sliding
    "mistral-full": ({"base", "official", "qwen3_5"}, {"official", "qwen3_5"}),
    "qwen2": ({"base", "official", "qwen3_5"}, {"official", "qwen3_5"}),
    "qwen3": ({"base", "official", "qwen3_5"}, {"official", "qwen3_5"}),
    "qwen3-sliding": ({"base"}, set()),
}


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("variant", CAN)
def test_what_can_be_exported_to_what_and_proposals_hold(tmp_path, variant, gate_type):
    published(tmp_path / "source", source_model(variant))
    convert_checkpoint(tmp_path / "source", tmp_path / "open", gate_type=gate_type, progress=False, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "open")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_gate" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "trained")
    for name, can in zip(("open", "trained"), CAN[variant], strict=True):
        can = can | {"lfm3"} if variant.startswith("qwen3") and gate_type == "headwise" else can
        for to in ("base", "qwen3_5", "official", "lfm3"):
            if to in can:
                export_checkpoint(tmp_path / name, tmp_path / f"{name}-{to}", to=to, progress=False)
                continue
            with pytest.raises(UserError) as refused:
                export_checkpoint(tmp_path / name, tmp_path / "none", to=to, progress=False)
            proposed = f"--to {' or '.join(sorted(can))} can." if can else "no other format can either"
            assert proposed in str(refused.value)
