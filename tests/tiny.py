# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The one factory of small models and checkpoints: odd shapes, no weight at a value that hides a mistake."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from configuration_gated import GatedLlamaConfig


VOCAB = 307
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What real checkpoints differ in, one variant each: name -> (family's class prefix, config fields).
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-3.2": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 8}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-longrope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [2.0, 3.0, 4.0],
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-sliding": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
}
# Mixtures of experts: their grouped products in 16 bits want rows of a multiple of 16 bytes.
MOE = {"hidden_size": 40, "head_dim": 8, "num_experts_per_tok": 2}
VARIANTS |= {
    "mixtral": ("Mixtral", {**MOE, "intermediate_size": 24, "num_local_experts": 5}),
    "mixtral-sliding": ("Mixtral", {**MOE, "num_local_experts": 3, "sliding_window": 5, "intermediate_size": 8}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 8, "num_experts": 4, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
}


def source_model(variant: str = "llama", head: str = "ForCausalLM", *, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of the real class, in fp32."""
    prefix, own = VARIANTS[variant]
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **own, **fields})
    torch.manual_seed(seed)
    return randomise(getattr(transformers, f"{prefix}{head}")(config)).eval()


def gated_model(cls: type[PreTrainedModel], *, seed: int = 0, trained: bool = True, **fields) -> PreTrainedModel:
    """A gated model in fp32; `trained` gates are away from 1, as fine-tuning leaves them."""
    torch.manual_seed(seed)
    experts = {**MOE, "moe_intermediate_size": 24, "num_local_experts": 5} if "Moe" in cls.__name__ else {}
    model = cls(cls.config_class(**{**SHAPE, **experts, **fields}))
    return randomise(model, gates=trained).eval()


def gated_config(**fields) -> GatedLlamaConfig:
    return GatedLlamaConfig(**{**SHAPE, **fields})


@torch.no_grad()
def randomise(model: PreTrainedModel, *, gates: bool = False) -> PreTrainedModel:
    """Biases and norm weights start at 0 and 1, where a forgotten or doubled one goes unseen."""
    for name, parameter in model.named_parameters():
        if "attn_gate" in name:
            if gates:
                parameter.normal_(0.0, 0.3)
        elif parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def token_ids(batch: int = 3, tokens: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        mask[row, : 3 * row] = 0
    return mask


def published(
    folder: Path,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    old_style: bool = True,
    tokenizer: bool = False,
) -> Path:
    """Write `model` as its checkpoint would be published, with a config.json in the style of Transformers 4.x."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    write_shards(folder, tensors, shards)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(as_published(config) if old_style else config))
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_published(config: dict) -> dict:
    """A config.json of today as Transformers 4.x wrote it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if rope.get("rope_type") in ("linear", "dynamic"):
        config["rope_scaling"]["type"] = rope.pop("rope_type")  # older still
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    config.pop("layer_types", None)
    return config


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer with a chat template, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the grumpy cat sat on the mat, which was red"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return fast
