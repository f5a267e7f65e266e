# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Transformers' own Qwen3.5 text model, which has this gate: no custom code needed.

It normalises queries and keys. A model that does not gets heads that are wider by `PADDING` channels, in which a bias
puts so large constants that the norm divides by their root mean square alone; its weights undo that, and are zero in
those channels. Constants are powers of two times whole numbers whose squares sum to what makes the weights powers of
two, so that bf16 holds all of them.
"""

from functools import partial
from itertools import product
from math import isqrt

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Checkpoint, TensorInfo
from gated_llama.checkpoints.shards import TensorPlan
from gated_llama.conversion.targets.fused import fused_plans, has_bias, require
from gated_llama.conversion.targets.target import Target, load_as, saved_config
from gated_llama.errors import UserError


PADDING = 8  # channels
LARGE = 2.0**20  # its square makes those of queries and keys disappear


def target(checkpoint: Checkpoint, config: GatedLlamaConfig) -> Target:
    require(config, "qwen3_5", {"mlp_bias": False}, checkpoint.folder)
    padded = not config.use_qk_norm
    if padded and config.dtype == torch.float16:
        raise UserError(f"{checkpoint.folder} has no QK norm, and float16 cannot hold what makes up for that")
    size = config.head_dim + PADDING * padded
    # Attention is scaled by the padded size there, so queries are longer by the root of that over the real size.
    constants = {"q": _constants(config.head_dim), "k": _constants(size)}

    def fuse(queries: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        if config.gate_type == "headwise":
            gates = gates.repeat_interleave(config.head_dim, dim=0)
        heads = [part.unflatten(0, (config.num_attention_heads, -1)) for part in (queries, gates)]
        if padded:
            heads = [_wider(heads[0], constants["q"] if queries.ndim == 1 else None), _wider(heads[1])]
        return torch.cat(heads, dim=1).flatten(0, 1)  # of each head [H query rows | H gate rows]

    biased = padded or has_bias(config)
    plans = fused_plans(checkpoint, config, fuse, 2 * config.num_attention_heads * size, biased=biased)
    if padded:
        _pad(plans, config, size, constants["k"])
    for key, plan in plans.items():
        if key.endswith("norm.weight"):  # stored as their distance from 1, which fp32 holds for every bf16 weight
            plans[key] = plan.then(lambda weight: weight.float() - 1, dtype="F32")
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings "
        "attention_dropout pad_token_id bos_token_id eos_token_id dtype"
    ).split()
    rotated = (config.head_dim + 0.5) / size if padded else 1.0  # of the head's channels; the half is for rounding
    qwen = Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in names},
        head_dim=size,
        attention_bias=biased,
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": rotated},
        partial_rotary_factor=rotated,
        layer_types=["full_attention"] * config.num_hidden_layers,
        architectures=["Qwen3_5ForCausalLM"],
    )
    note = f"heads have {size} channels, not {config.head_dim}, and so has what is cached" if padded else None
    load = partial(load_as, Qwen3_5ForCausalLM, qwen)
    return Target(saved_config(qwen), plans, load, expect="rounding", note=note)


def _constants(total: int) -> torch.Tensor:
    """Of `PADDING` channels, whole multiples of `LARGE` whose squares sum to `total` of its squares (Lagrange)."""
    numbers = next(four for four in product(range(isqrt(total) + 1), repeat=4) if sum(n * n for n in four) == total)
    return LARGE * torch.tensor([*numbers, *[0] * (PADDING - 4)])


def _wider(heads: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Heads (N, H, …) with `PADDING` channels more, of zeros or `values`."""
    more = heads.new_zeros(len(heads), PADDING, *heads.shape[2:])
    if values is not None:
        more += values.to(more)
    return torch.cat([heads, more], dim=1)


def _pad(plans: dict[str, TensorPlan], config: GatedLlamaConfig, size: int, constants: torch.Tensor) -> None:
    """Keys, values and outputs of padded heads, and the norms of queries and keys."""

    def rows(tensor: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        return _wider(tensor.unflatten(0, (config.num_key_value_heads, -1)), values).flatten(0, 1)

    def columns(weight: torch.Tensor) -> torch.Tensor:
        return _wider(weight.T.unflatten(0, (config.num_attention_heads, -1))).flatten(0, 1).T.contiguous()

    def norm() -> torch.Tensor:
        return torch.cat([torch.full((config.head_dim,), LARGE), torch.zeros(PADDING)])

    for key in [key for key in plans if key.endswith(".k_proj.weight")]:
        attention = key.removesuffix("k_proj.weight")
        for name, change in (
            ("k_proj.weight", rows),
            ("k_proj.bias", partial(rows, values=constants)),
            ("v_proj.weight", rows),
            ("v_proj.bias", rows),
            ("o_proj.weight", columns),
        ):
            plan = plans[attention + name]
            shape = list(plan.info.shape)
            place = 1 if change is columns else 0
            shape[place] = shape[place] // config.head_dim * size
            plans[attention + name] = plan.then(change, shape=tuple(shape))
        for name in ("q_norm.weight", "k_norm.weight"):
            plans[attention + name] = TensorPlan(TensorInfo(plans[key].info.file, "F32", (size,)), make=norm)
