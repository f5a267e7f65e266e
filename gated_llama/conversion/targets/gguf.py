# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A GGUF that an unchanged llama.cpp runs, as its architecture `step35`: that has a headwise gate, and QK norm and experts
only where there are tensors for them. Needs the package gguf.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import modeling_gated
from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import TOKENIZER_CONFIG, Checkpoint, read_json
from gated_llama.conversion.targets import GGUF_TYPES
from gated_llama.conversion.targets.target import Target, refuse
from gated_llama.errors import UserError
from gated_llama.gates import is_gate


ARCHITECTURE = "step35"
FILE = "model.gguf"
OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",  # times gate_scale: its gate is a σ
    "self_attn.attn_gate.proj.weight": "attn_gate.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
QUERIES_KEYS_VALUES = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
# Where there are biases of q, k and v: versions that would leave them out refuse the fused weight instead.
FUSED = "attn_qkv.weight"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf's TokenType
# The pre-tokenizers that both sides have, by what is in tokenizer.json. GPT-2's splits stand in llama.cpp, not here.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ("ByteLevel, splitting",): "gpt-2",
    ("Digits, each", "ByteLevel, splitting"): "smollm",
    (f"Split {_LETTERS}\\p{{N}}{_REST}", "ByteLevel"): "qwen2",
    (f"Split {_LETTERS}\\p{{N}}{{1,3}}{_REST}", "ByteLevel"): "llama-bpe",
}


def target(checkpoint: Checkpoint, config: GatedLlamaConfig, kind: str | None = None) -> Target:
    """
    The export of a headwise causal LM to GGUF.

    Args:
        kind: one of `GGUF_TYPES`, of the weights; gates, norms and biases are fp32. The checkpoint's own if None.
    """
    where = checkpoint.folder
    own = OF_DTYPE.get(config.dtype or torch.float32)
    kind = kind or own
    rope = config.rope_parameters
    refused = {
        f"elementwise gates, and {ARCHITECTURE} has headwise ones": config.gate_type != "headwise",
        f"biases of its gates, which {ARCHITECTURE} has not": config.gate_bias,
        f"biases of o_proj, which {ARCHITECTURE} has not": config.attention_out_bias,
        f"biases of its MLPs, which {ARCHITECTURE} has not": config.mlp_bias,
        f"the activation {config.hidden_act!r}, and {ARCHITECTURE} has silu": config.hidden_act != "silu",
        f"the head {config.architectures[0]}, and the GGUF is a dense causal language model": (
            config.architectures != ["GatedLlamaForCausalLM"]
        ),
        f"RoPE of type {rope['rope_type']!r}, which the export does not know": (
            rope["rope_type"] not in ("default", "linear", "llama3", "yarn")
        ),
        "scaled RoPE in sliding layers, which llama.cpp does not scale": (
            rope["rope_type"] != "default" and "sliding_attention" in config.attention_types
        ),
        f"weights in {config.dtype}, which have no GGUF type": own is None,
    }
    refuse(where, refused)
    if kind not in GGUF_TYPES:
        raise UserError(f"there is no GGUF type {kind!r}: {', '.join(GGUF_TYPES)} are.")
    vocabulary = _vocabulary(where, config)
    return Target(
        config=None,
        plans={},
        write=partial(_write, checkpoint, config, kind, vocabulary),
        load=partial(_load, config),
        # Nothing is rounded in fp32, nor in the checkpoint's own dtype if the scale in o_proj is a power of two.
        expect="rounding" if kind == "f32" or (kind == own and math.log2(config.gate_scale) % 1 == 0) else "reported",
    )


def _write(
    checkpoint: Checkpoint,
    config: GatedLlamaConfig,
    kind: str,
    vocabulary: dict,
    folder: Path,
    progress: bool,
) -> None:
    """One tensor in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(folder.name.strip(".").partition(".partial")[0])
    for key, value in _settings(config).items():
        _add(writer, f"{ARCHITECTURE}.{key}", value)
    for key, value in vocabulary.items():
        _add(writer, key, value)
    planned = list(_planned(checkpoint, config, kind))
    for name, shape, tensor_type, _ in planned:
        if tensor_type in ("F32", "F16"):
            size, numpy_type = shape, {"F32": "float32", "F16": "float16"}[tensor_type]
        else:
            size, numpy_type = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[tensor_type]), "uint8"
        _add_tensor(writer, name, size, numpy_type, gguf.GGMLQuantizationType[tensor_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, tensor_type, make in tqdm(planned, desc="writing", unit=" tensors", disable=not progress):
        values = make().float().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor_type]))
    writer.close()
    (folder / "README.md").write_text(README.format(kind=kind, file=FILE), encoding="utf-8")


def _add_tensor(writer, name: str, shape: tuple[int, ...], numpy_type: str, tensor_type) -> None:
    dtype = np.dtype(numpy_type)
    writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=tensor_type)


def _add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _settings(config: GatedLlamaConfig) -> dict:
    """
    The architecture needs a sliding layer. Where all see all tokens and RoPE is plain, all are sliding ones, and their
    window is the context; where RoPE is scaled, which it is not in sliding layers, a last one is that has no tensors.
    """
    rope, layers = config.rope_parameters, config.num_hidden_layers
    sliding = [kind == "sliding_attention" for kind in config.attention_types]
    scaled = rope["rope_type"] != "default"  # and then all layers see all tokens
    pattern = [*sliding, True] if scaled else sliding if any(sliding) else [True] * layers
    settings = {
        "block_count": layers + scaled,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": 0,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window or config.max_position_embeddings,
        "attention.sliding_window_pattern": pattern,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.freq_base_swa": float(rope["rope_theta"]),
        "rope.dimension_count": 2 * config.head_dim,  # which the architecture halves in full layers
        "rope.dimension_count_swa": config.head_dim,
    }
    if scaled:
        settings["nextn_predict_layers"] = 1
        settings["rope.scaling.attn_factor"] = float(rope_factors(config)[1])
    return settings


def _planned(checkpoint: Checkpoint, config: GatedLlamaConfig, kind: str) -> Iterator[tuple]:
    """The tensors to write: name, shape, type, and a function that makes the values."""

    def read(*keys: str, scale: float = 1.0) -> torch.Tensor:
        found = []
        for key in keys:
            with safe_open(checkpoint.folder / checkpoint.tensors[key].file, framework="pt") as file:
                found.append(file.get_tensor(key))
        return torch.cat(found).float() * scale

    def one(name: str, *keys: str, scale: float = 1.0) -> tuple:
        infos = [checkpoint.tensors[key] for key in keys]
        shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
        in_blocks = kind != "q8_0" or shape[-1] % 32 == 0
        small = len(shape) == 1 or is_gate(keys[0])
        return (
            name,
            shape,
            "F32" if small else GGUF_TYPES[kind] if in_blocks else "F16",
            partial(read, *keys, scale=scale),
        )

    for key, name in WHOLE.items():
        if key in checkpoint.tensors:
            yield one(name, key)
        elif key == "lm_head.weight":  # tied
            yield one(name, "model.embed_tokens.weight")
    if config.rope_parameters["rope_type"] != "default":
        yield "rope_freqs.weight", (config.head_dim // 2,), "F32", lambda: rope_factors(config)[0]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        fused = f"{prefix}self_attn.q_proj.bias" in checkpoint.tensors
        if fused:
            yield one(f"blk.{layer}.{FUSED}", *(prefix + name for name in QUERIES_KEYS_VALUES))
        for key, name in OF_LAYER.items():
            if prefix + key in checkpoint.tensors and not (fused and key in QUERIES_KEYS_VALUES):
                scale = config.gate_scale if name == "attn_output.weight" else 1.0
                yield one(f"blk.{layer}.{name}", prefix + key, scale=scale)


def rope_factors(config: PreTrainedConfig) -> tuple[torch.Tensor, float]:
    """Of scaled RoPE, by how much each frequency is divided (H/2), and the factor of cosine and sine (YaRN's)."""
    rope, size = config.rope_parameters, config.head_dim
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return plain / frequencies, attention_factor


def _vocabulary(folder: Path, config: GatedLlamaConfig) -> dict:
    """The tokenizer as GGUF has it, of a byte-level BPE in tokenizer.json whose pre-tokenizer llama.cpp has."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json, and a GGUF holds the tokenizer too")
    contents = read_json(path)
    steps = contents.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    found = tuple(_described(step) for step in steps)
    if contents["model"]["type"] != "BPE" or contents["model"].get("byte_fallback") or found not in PRE_TOKENIZERS:
        raise UserError(f"{path} is of a kind that is not known to be the same in llama.cpp ({', '.join(found)})")
    pieces: dict[int, tuple[str, int]] = {number: (text, NORMAL) for text, number in contents["model"]["vocab"].items()}
    for added in contents.get("added_tokens", []):
        pieces[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(pieces) >= config.vocab_size:
        raise UserError(f"{path} has {max(pieces) + 1} tokens, and the model has {config.vocab_size}")
    listed = [pieces.get(number, (f"[PAD{number}]", UNUSED)) for number in range(config.vocab_size)]
    merges = contents["model"]["merges"]
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    by_text = {text: number for number, (text, _) in pieces.items()}
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE_TOKENIZERS[found],
        "tokenizer.ggml.tokens": [text for text, _ in listed],
        "tokenizer.ggml.token_type": [kind for _, kind in listed],
        "tokenizer.ggml.merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in merges],
        "tokenizer.ggml.add_bos_token": _adds_bos(contents, settings),
    }
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        if (text := _special(settings, key)) in by_text:
            vocabulary[f"tokenizer.ggml.{name}_token_id"] = by_text[text]
    template = folder / "chat_template.jinja"
    if template.is_file():
        vocabulary["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), str):
        vocabulary["tokenizer.chat_template"] = settings["chat_template"]
    return vocabulary


def _described(step: dict) -> str:
    kind = step.get("type")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"Split {step['pattern'].get('Regex')}"
    if kind == "Digits" and step.get("individual_digits"):
        return "Digits, each"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel, splitting" if step.get("use_regex", True) else "ByteLevel"
    return str(kind)


def _special(settings: dict, name: str) -> str | None:
    """A special token of tokenizer_config.json, which older versions write with its settings."""
    token = settings.get(name)
    return token["content"] if isinstance(token, dict) else token


def _adds_bos(contents: dict, settings: dict) -> bool:
    """Whether a text begins with the beginning-of-text token, by the template of the post-processor."""
    bos = _special(settings, "bos_token")
    steps = contents.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        first = (step.get("single") or [{}])[0]
        if bos and first.get("SpecialToken", {}).get("id") == bos:
            return True
    return False


def _load(config: GatedLlamaConfig, folder: Path, dtype: torch.dtype | None) -> modeling_gated.GatedLlamaForCausalLM:
    """Our own reading of the file, to compare: a model whose gates are σ, as llama.cpp's are."""
    import gguf

    scaled = deepcopy(config)
    scaled.gate_scale, scaled.gate_init = 1.0, "normal"
    model = modeling_gated.GatedLlamaForCausalLM(scaled).float()
    names = {there: ours for ours, there in WHOLE.items()}
    state = {}
    for tensor in gguf.GGUFReader(folder / FILE).tensors:
        values = torch.from_numpy(_dense(tensor))
        if tensor.name in names:
            state[names[tensor.name]] = values
        elif tensor.name != "rope_freqs.weight":
            _, layer, name = tensor.name.split(".", 2)
            prefix = f"model.layers.{layer}."
            if name == FUSED:
                heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
                parts = values.split([count * config.head_dim for count in heads])
                state |= {prefix + key: part for key, part in zip(QUERIES_KEYS_VALUES, parts, strict=True)}
            else:
                state[prefix + next(ours for ours, there in OF_LAYER.items() if there == name)] = values
    model.load_state_dict(state)
    return model.to(dtype or config.dtype or torch.float32).eval()


def _dense(tensor) -> np.ndarray:
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape([int(size) for size in reversed(tensor.shape)]).copy()


README = """# A gated Llama for llama.cpp

`{file}` ({kind}) holds a Llama with gated attention as the architecture `step35`, whose gate it has. An unchanged
llama.cpp runs it, from release b9294 on (b9873 with scaled RoPE, b11063 with biases of q, k and v):

    llama-cli -m {file}

Written by `gated-llama export --to gguf`. `general.architecture` says step35; the model is no Step 3.5.
"""
