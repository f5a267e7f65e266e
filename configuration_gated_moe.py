# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Configuration of GatedMoe: a GatedLlama whose MLPs are mixtures of experts, Qwen3-MoE's or Mixtral's."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig


try:
    from .configuration_gated import AUTO_MAP as DENSE_AUTO_MAP
    from .configuration_gated import GatedLlamaConfig
except ImportError:
    if __package__:  # as remote code the file beside this one must be there; installed, it is a top-level module
        raise
    from configuration_gated import AUTO_MAP as DENSE_AUTO_MAP
    from configuration_gated import GatedLlamaConfig


AUTO_MAP = {auto: name.replace("gated.GatedLlama", "gated_moe.GatedMoe") for auto, name in DENSE_AUTO_MAP.items()}


def _experts(plan: dict) -> dict:
    """What a plan for several devices says of experts; attention and dense MLPs are Llama's."""
    return {name: how for name, how in plan.items() if ".mlp.experts" in name}


@strict
class GatedMoeConfig(GatedLlamaConfig):
    r"""
    Configuration of every GatedMoe model: the fields of [`GatedLlamaConfig`], and those of the experts.

    Args:
        moe_type (`str`, defaults to `"qwen3_moe"`):
            Whose experts and router the MLPs are, and by whose names a model is saved: `"qwen3_moe"` or `"mixtral"`
            (which rounds differently).
        num_local_experts (`int`, defaults to 128):
            Experts of a layer; `num_experts` is another name of it.
        num_experts_per_tok (`int`, defaults to 8):
            Experts that a token goes to.
        moe_intermediate_size (`int`, defaults to 768):
            Width of a Qwen3 expert. A Mixtral expert's is `intermediate_size`.
        norm_topk_prob (`bool`, defaults to `False`):
            Whether the weights of a token's experts sum to 1. Mixtral's always do.
        decoder_sparse_step (`int`, defaults to 1), mlp_only_layers (`list[int]`, *optional*):
            Every so-manieth layer has experts, except those named; others have an MLP of `intermediate_size`.
        output_router_logits (`bool`, defaults to `False`):
            Return the router's logits, and add the load-balancing loss to that of `labels`.
        router_aux_loss_coef (`float`, defaults to 0.001):
            Weight of the load-balancing loss.
        router_jitter_noise (`float`, defaults to 0.0):
            In training, what Mixtral's experts read is multiplied by noise of up to so much around 1.

    Raises:
        ValueError, StrictDataclassError: as [`GatedLlamaConfig`], or a token goes to more experts than there are.

    Example:

    ```python
    >>> from configuration_gated_moe import GatedMoeConfig
    >>> from modeling_gated_moe import GatedMoeForCausalLM

    >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 32}
    >>> model = GatedMoeForCausalLM(GatedMoeConfig(**sizes, num_local_experts=8, num_experts_per_tok=2))
    ```
    """

    model_type = "gated_moe"
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {**GatedLlamaConfig.base_model_tp_plan, **_experts(Qwen3MoeConfig.base_model_tp_plan)}
    base_model_ep_plan = Qwen3MoeConfig.base_model_ep_plan

    moe_type: Literal["qwen3_moe", "mixtral"] = "qwen3_moe"
    num_local_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    def __post_init__(self, **kwargs):
        self.mlp_only_layers = self.mlp_only_layers or []
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def has_experts(self, layer_idx: int) -> bool:
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0

    def validate_architecture(self):
        """Part of `@strict`-powered validation: as of every GatedLlama, and experts that can be chosen."""
        super().validate_architecture()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be from 1 to num_local_experts "
                f"({self.num_local_experts})."
            )


GatedMoeConfig.register_for_auto_class()

__all__ = ["GatedMoeConfig"]
