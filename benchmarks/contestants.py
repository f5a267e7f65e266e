# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
One Llama, gated in different ways on the same weight tensors: what bench_speed.py compares.

    llama              LlamaForCausalLM
    llama-again        the same once more: its ratio to the first is the noise
    headwise           ours
    elementwise        ours
    afmoe              elementwise by AFMoE's attention, whose `gate_proj` is a linear of its own
    qwen3_5            elementwise by Qwen3.5's attention (Qwen3-Next's is the same), its gate fused into `q_proj`
    hook-headwise      the retrofit by forward hooks: Llama, with a hook that gates the input of `o_proj`
    hook-elementwise   the same, elementwise

The peers' attention stands in Llama's layers. Their QK norm is an `nn.Identity`, since Llama has none, and their
`o_proj` holds the factor 2 that their gates lack: so each computes what ours of its gate type does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5TextConfig,
    StaticCache,
)
from transformers.models.afmoe.modeling_afmoe import AfmoeAttention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Attention

from configuration_gated import GatedLlamaConfig
from modeling_gated import AttentionGate, GatedLlamaForCausalLM


# Full width; depth and vocabulary are cut, so that what is timed are decoder layers. The last is so narrow that what
# costs are launches and Python.
NARROW = "64 wide"
SHAPES = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128},
    NARROW: {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
    },
}
NAMES = ("llama", "llama-again", "headwise", "elementwise", "afmoe", "qwen3_5", "hook-headwise", "hook-elementwise")
# The others that compute what ours of a gate type computes.
PEERS = {"headwise": ("hook-headwise",), "elementwise": ("hook-elementwise", "afmoe", "qwen3_5")}
GATE_TYPES = tuple(PEERS)


def llama_config(shape: str | dict, layers: int) -> LlamaConfig:
    common = {"num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 2**14, "bos_token_id": 1}
    fields = SHAPES[shape] if isinstance(shape, str) else shape
    return LlamaConfig(**{**common, **fields, "num_hidden_layers": layers})


def make_contestants(config: LlamaConfig, names: tuple[str, ...] = NAMES, **where) -> dict[str, PreTrainedModel]:
    """The models called `names`, with random weights and gates that are moved; `where`: dtype and device."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).to(**where).eval()
    gates = {}
    for kind, values in zip(GATE_TYPES, (1, config.head_dim), strict=True):
        sizes = (config.num_attention_heads * values, config.hidden_size)
        gates[kind] = [nn.Parameter(torch.randn(sizes).mul_(0.02).to(**where)) for _ in llama.model.layers]
    return {name: _make(name, llama, gates) for name in names}


def _make(name: str, llama: LlamaForCausalLM, gates: dict[str, list[nn.Parameter]]) -> PreTrainedModel:
    kind = name.removeprefix("hook-")
    if name in GATE_TYPES:
        own = {f"model.layers.{n}.self_attn.attn_gate.proj.weight": gate for n, gate in enumerate(gates[name])}
        return _on_weights(GatedLlamaForCausalLM, gated_config(llama.config, name), llama, own)
    model = _on_weights(LlamaForCausalLM, llama.config, llama)
    for number, layer in enumerate(model.model.layers):
        if name in ("afmoe", "qwen3_5"):
            layer.self_attn = _peer(name, layer.self_attn, gates["elementwise"][number])
        elif kind in GATE_TYPES:
            hook_gate(layer.self_attn, gates[kind][number])
    return model


def gated_config(config: LlamaConfig, gate_type: str) -> GatedLlamaConfig:
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return GatedLlamaConfig(**fields, gate_type=gate_type)


def _on_weights(
    model_class: type[PreTrainedModel], config: LlamaConfig, llama: LlamaForCausalLM, own: dict | None = None
) -> PreTrainedModel:
    """A model whose parameters *are* those of `llama`, and `own`."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict({**llama.state_dict(keep_vars=True), **(own or {})}, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(llama.device)  # its buffers are in no state dict
    for module in model.modules():
        if isinstance(module, AttentionGate):
            module.zero = torch.zeros((), device=llama.device, dtype=llama.dtype)
    return model.eval()


def _peer(name: str, attention: nn.Module, gate: nn.Parameter) -> nn.Module:
    config = attention.config
    names = "hidden_size num_attention_heads num_key_value_heads head_dim attention_bias attention_dropout"
    common = {name: getattr(config, name) for name in names.split()}
    weights = {**attention.state_dict(keep_vars=True)}
    weights["o_proj.weight"] = nn.Parameter(2 * attention.o_proj.weight.detach())
    kinds = {"num_hidden_layers": 1, "attn_implementation": config._attn_implementation}
    with torch.device("meta"):
        if name == "afmoe":
            # only its sliding layers have rotary embeddings
            afmoe = AfmoeConfig(**common, **kinds, layer_types=["sliding_attention"], num_dense_layers=1)
            peer = AfmoeAttention(afmoe, 0)
            peer.sliding_window = None
            weights["gate_proj.weight"] = gate
        else:
            peer = Qwen3_5Attention(Qwen3_5TextConfig(**common, **kinds, layer_types=["full_attention"]), 0)
            heads = [part.detach().unflatten(0, (-1, config.head_dim)) for part in (weights["q_proj.weight"], gate)]
            weights["q_proj.weight"] = nn.Parameter(torch.cat(heads, dim=1).flatten(0, 1))  # by head [q | gate]
    peer.layer_idx = attention.layer_idx
    peer.q_norm, peer.k_norm = nn.Identity(), nn.Identity()
    peer.load_state_dict(weights, assign=True)
    return peer.eval()


def hook_gate(attention: nn.Module, weight: nn.Parameter) -> None:
    """Gate an attention from outside: its input is kept by one hook, the input of `o_proj` is gated by another."""
    gate = nn.Linear(1, 1, bias=False)
    gate.weight = weight
    attention.add_module("hooked_gate", gate)
    kept, heads = [], attention.config.num_attention_heads

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept[:] = [kwargs["hidden_states"]]

    def apply(module: nn.Module, args: tuple) -> tuple:
        values = 2 * torch.sigmoid(gate(kept.pop()))
        return ((args[0].unflatten(-1, (heads, -1)) * values.unflatten(-1, (heads, -1))).flatten(-2),)

    attention.register_forward_pre_hook(keep, with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(apply)


# --- the gate before any number -------------------------------------------------------------------------------------


class CorrectnessError(AssertionError):
    """The contestants do not compute what they should: no number may be told."""


@contextmanager
def open_gates(model: GatedLlamaForCausalLM) -> Iterator[None]:
    gates = [layer.self_attn.attn_gate.proj.weight for layer in model.model.layers]
    moved = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    yield
    with torch.no_grad():
        for gate, values in zip(gates, moved, strict=True):
            gate.copy_(values)


def outputs_of(model: PreTrainedModel, tokens: int = 21, decoded: int = 3) -> list[torch.Tensor]:
    """
    Last hidden states (2, tokens, E), the last `decoded` of them computed one by one, with either cache; and the
    gradient of the embeddings.
    """
    ids = torch.randint(3, model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    parts = ids.to(model.device).split([tokens - decoded] + [1] * decoded, dim=1)
    caches = (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=tokens))
    with torch.no_grad():
        outputs = [
            torch.cat([model.model(part, past_key_values=cache).last_hidden_state for part in parts], dim=1)
            for cache in caches
        ]
    loss = loss_of(model, torch.cat(parts, dim=1))
    return outputs + list(torch.autograd.grad(loss, model.model.embed_tokens.weight))


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of the last hidden states, for want of a head worth its name; their squares would be the norm's own constant."""
    return model.model(ids, use_cache=False).last_hidden_state.float().logsumexp(-1).mean()


def distance(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, in units of the largest expected value of its tensor; infinite if any is no number."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    distances = torch.stack([(a - e).abs().max() / e.abs().max() for a, e in pairs])
    return distances.max().item() if distances.isfinite().all() else float("inf")


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def check(models: dict[str, PreTrainedModel]) -> dict[str, float]:
    """
    Open gates change no bit of Llama nor of its gradient; peers and hooks equal ours of their gate type within
    `TOLERANCE`; and each of these comparisons sees a gate that moved.

    Returns:
        The distance of each contestant to what it should equal.

    Raises:
        CorrectnessError: one of it does not hold.
    """
    tolerance = TOLERANCE[models["llama"].dtype]
    plain = outputs_of(models["llama"])
    distances = {"llama-again": distance(outputs_of(models["llama-again"]), plain)}
    for kind in GATE_TYPES:
        moved = outputs_of(models[kind])
        with open_gates(models[kind]):
            opened = outputs_of(models[kind])
        if not all(map(torch.equal, opened, plain)):
            raise CorrectnessError(f"{kind}: open gates are not Llama to the bit ({distance(opened, plain):.2g})")
        distances[kind] = 0.0
        for peer in set(PEERS[kind]) & models.keys():
            distances[peer] = distance(outputs_of(models[peer]), moved)
        if (control := distance(moved, opened)) < 5 * tolerance:
            raise CorrectnessError(f"{kind}: moved gates change too little for a comparison to see ({control:.2g})")
    for name, value in distances.items():
        if not value <= tolerance:
            raise CorrectnessError(f"{name} differs from what it should equal by {value:.2g} (allowed: {tolerance:g})")
    return distances
