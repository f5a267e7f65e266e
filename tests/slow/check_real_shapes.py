# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-real-shapes`: checkpoints in the shapes and the files of published models, with random weights, converted,
loaded, generated from, compared to the bit. Needs about 8 GB of memory, 10 GB of disk and some minutes.
"""

import json
import random
import resource
import shutil
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama import convert_checkpoint


pytestmark = pytest.mark.real_shapes


# config.json as published (Transformers 4.x), the fields that say what the model is.
PUBLISHED = {
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Mistral-7B-v0.1-2-layers": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Mixtral-8x7B-v0.1-1-layer": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B-2-layers": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of such a checkpoint, from its published layout and nothing of ours."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"] or config["model_type"] == "qwen3":  # Qwen3-0.6B carries its tied head
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    layer = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", q), ("k", kv), ("v", kv))}
    if config["model_type"] == "mixtral":
        layer = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")}
        layer["block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            matrices = {"w1": (mlp, hidden), "w2": (hidden, mlp), "w3": (mlp, hidden)}
            layer |= {f"block_sparse_moe.experts.{expert}.{name}.weight": shape for name, shape in matrices.items()}
    if config["model_type"] == "qwen3_moe":
        mlp = config["moe_intermediate_size"]
        layer = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")}
        layer["mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            matrices = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
            layer |= {f"mlp.experts.{expert}.{name}.weight": shape for name, shape in matrices.items()}
    if config["model_type"] in ("qwen3", "qwen3_moe"):
        layer |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def write_published(folder: Path, config: dict, tokenizer: PreTrainedTokenizerFast, shard_bytes: int = 10**9) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shards, size = [{}], 0
    for key, shape in shapes_of(config).items():
        tensor = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        if key.endswith("norm.weight"):
            tensor += 1
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            tensor = shards[0]["model.embed_tokens.weight"].clone()
        tensor = tensor.to(torch.bfloat16)
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": [2]}))
    (folder / "LICENSE").write_text("a licence\n")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    bpe = ByteLevelBPETokenizer()
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths[:100])
    bpe.train_from_iterator(texts, vocab_size=16000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.mark.parametrize("gate_type", ["headwise", "elementwise"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint(name, gate_type, tmp_path, tokenizer):
    source, output = tmp_path / name, tmp_path / f"{name}-gated"
    write_published(source, PUBLISHED[name], tokenizer)
    started = time.monotonic()
    result = convert_checkpoint(source, output, gate_type=gate_type, progress=False)
    seconds = time.monotonic() - started
    assert result.verification.exact

    inputs = AutoTokenizer.from_pretrained(output)(
        "def __init__(self", return_tensors="pt", return_token_type_ids=False
    )
    chat = AutoTokenizer.from_pretrained(output).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert chat == "<|user|>Hi\n"
    window = PUBLISHED[name].get("sliding_window")
    seen = []
    for folder in (source, output):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            seen.append([model(**inputs).logits, model.generate(**inputs, max_new_tokens=12, do_sample=False)])
            if window == 4096:  # past the window, where a forgotten one would show
                ids = torch.randint(3, 32000, (1, window + 77), generator=torch.Generator().manual_seed(0))
                seen[-1].append(model(ids, logits_to_keep=33, use_cache=False).logits)
        del model
    assert all(map(torch.equal, *seen))
    shutil.rmtree(tmp_path)
    print(
        f"\n{name} {gate_type}: {result.other_parameters:,} + {result.gate_parameters:,} parameters, converted and "
        f"verified in {seconds:.1f} s; equal to the bit; peak memory so far "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    )
