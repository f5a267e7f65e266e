# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Configuration of GatedLlama: a dense Llama-like decoder whose attention output passes a gate."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


# Written into every config, so that whatever is saved or pushed loads through any Auto class as remote code.
AUTO_MAP = {
    "AutoConfig": "configuration_gated.GatedLlamaConfig",
    "AutoModel": "modeling_gated.GatedLlamaModel",
    "AutoModelForCausalLM": "modeling_gated.GatedLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gated.GatedLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gated.GatedLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_gated.GatedLlamaForQuestionAnswering",
}


@strict
class GatedLlamaConfig(LlamaConfig):
    r"""
    Configuration of every GatedLlama model. Beside the fields of [`~transformers.LlamaConfig`], it has those that tell
    Llama, Mistral, Qwen2 and Qwen3 apart, and those of the gate (Qiu et al., arXiv 2505.06708, position "G1"):

        Y' = Y ⊙ gate,    gate = gate_scale · σ(X Wg + bg)

    where X is the normalised hidden state that q, k and v read and Y the attention output before `o_proj`.

    Args:
        gate_type (`str`, defaults to `"headwise"`):
            `"headwise"`, one gate value per head and token, or `"elementwise"`, one per channel of every head.
        gate_scale (`float`, defaults to 2.0):
            Largest value of the gate. With 2, zero weights are a gate of exactly 1 in every dtype. The paper's plain σ
            is scale 1; a model of scale s equals one of scale 1 whose `o_proj` weights are s times as large.
        gate_bias (`bool`, defaults to `False`):
            Whether the gate's projection has a bias.
        gate_init (`str`, defaults to `"open"`):
            How gates start that no checkpoint holds. `"open"`: every gate is 1 (zero weights, bias logit(1/scale)), so
            the model computes what it computed without them. `"normal"`: weights N(0, `initializer_range`), as in the
            paper's from-scratch training (there with `gate_scale` 1: gates start near one half).
        gate_strength (`float`, defaults to 1.0):
            Every gate g acts as 1 + gate_strength · (g − 1): 0 is the model without its gates, 1 the model as trained.
            `model.set_gate_strength` changes it.
        attention_bias (`bool`, defaults to `False`):
            Whether q, k and v (and o, unless `attention_out_bias` says otherwise) have a bias.
        attention_out_bias (`bool`, *optional*):
            Whether `o_proj` has a bias; as `attention_bias` if not given (Qwen2: `True` and `False`).
        use_qk_norm (`bool`, defaults to `False`):
            RMS-normalise queries and keys per head before the rotary embedding (Qwen3).
        sliding_window (`int`, *optional*):
            Number of tokens that a query of a sliding layer sees, itself included.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer, where they differ (Qwen). If not given, every
            layer slides when there is a `sliding_window` (Mistral) and none otherwise (Llama), and the config has no
            such attribute, as theirs have none: `attention_types` is what the layers are, either way.
        conversion (`dict`, *optional*):
            Where a converted checkpoint came from and how, as `gated-llama convert` recorded it.

    Raises:
        ValueError, StrictDataclassError: a field has a value that no model can have, or `gate_init="open"` is asked
            for with a scale and bias for which no weights make a gate of 1.

    Example:

    ```python
    >>> from configuration_gated import GatedLlamaConfig
    >>> from modeling_gated import GatedLlamaForCausalLM

    >>> config = GatedLlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    >>> model = GatedLlamaForCausalLM(config)  # from scratch as in the paper: gate_scale=1.0, gate_init="normal"
    ```
    """

    model_type = "gated_llama"
    base_model_tp_plan = {**LlamaConfig.base_model_tp_plan, "layers.*.self_attn.attn_gate.proj": "colwise"}

    gate_type: Literal["headwise", "elementwise"] = "headwise"
    gate_scale: float | int = 2.0
    gate_bias: bool = False
    gate_init: Literal["open", "normal"] = "open"
    gate_strength: float | int = 1.0
    attention_out_bias: bool | None = None
    use_qk_norm: bool = False
    sliding_window: int | None = None
    conversion: dict | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): give head_dim."
            )
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        # What says no more than sliding_window does is not kept: it would hold a model to its number of layers.
        if kwargs.get("layer_types") in (None, self.attention_types):
            kwargs.pop("layer_types", None)
        if self.use_qk_norm:
            self.base_model_tp_plan = {
                **self.base_model_tp_plan,
                "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
                "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
            }
        # An entry read from the Hub names its repository ("org/name--file.Class"); saved copies carry their own files.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def attention_types(self) -> list[str]:
        """What each layer is: `layer_types`, or what `sliding_window` says of all."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return getattr(self, "layer_types", None) or [kind] * self.num_hidden_layers

    @property
    def open_gate_logit(self) -> float:
        """The logit at which a gate is 1: logit(1 / gate_scale), which is 0 for scale 2."""
        return -math.log(self.gate_scale - 1)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: sizes that fit together, and gates that can be built."""
        if self.num_attention_heads < 1 or self.num_key_value_heads < 1:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) and num_key_value_heads "
                f"({self.num_key_value_heads}) must be at least 1."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if unknown := set(self.attention_types) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types may hold full_attention and sliding_attention, not {sorted(unknown)}.")
        if "sliding_attention" in self.attention_types and not self.sliding_window:
            raise ValueError("layer_types has sliding_attention layers: give sliding_window, the tokens they see.")
        if not (math.isfinite(self.gate_scale) and self.gate_scale > 0):
            raise ValueError(f"gate_scale must be a positive number, not {self.gate_scale}.")
        if not math.isfinite(self.gate_strength):
            raise ValueError(f"gate_strength must be a finite number, not {self.gate_strength}.")
        if self.gate_init == "open" and self.gate_scale <= 1:
            raise ValueError(
                f"gate_init='open' needs gate_scale > 1: with gate_scale={self.gate_scale} no gate reaches 1. "
                "Use gate_scale=2.0, or gate_init='normal' to train from scratch."
            )
        if self.gate_init == "open" and self.gate_scale != 2 and not self.gate_bias:
            raise ValueError(
                f"gate_init='open' without a bias needs gate_scale=2.0: zero weights make a gate of gate_scale/2, "
                f"which is {self.gate_scale / 2:g} here. Use gate_scale=2.0, or gate_bias=True."
            )


GatedLlamaConfig.register_for_auto_class()

__all__ = ["GatedLlamaConfig"]
