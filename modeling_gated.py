# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
GatedLlama: every dense Llama-like decoder, with gated attention (Qiu et al., arXiv 2505.06708), as a diff on the Llama
and Qwen2 classes of Transformers. Importing this file registers the Auto classes.

Shapes on the lines that change them:

    B  batch                    N  query heads (num_attention_heads)
    T  tokens of this forward   K  key/value heads (num_key_value_heads)
    S  tokens attended to       H  head_dim
    E  hidden_size              G  gate values per head: 1 (headwise) or H (elementwise)
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernelized_func
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


try:
    from .configuration_gated import GatedLlamaConfig
except ImportError:
    if __package__:  # as remote code the file beside this one must be there; installed, it is a top-level module
        raise
    from configuration_gated import GatedLlamaConfig


# What quantizers leave as it is: their own default, the head's last layer, and the gates, whose few weights decide over
# whole heads. They match names from the first letter on, so that "attn_gate" alone would match nothing.
UNQUANTIZED = ["lm_head", "score", "qa_outputs", r".*\.attn_gate\..*"]


class AttentionGate(nn.Module):
    """
    The gate of one layer: `Y ⊙ gate`, where gate = gate_scale · σ(X Wg + bg), drawn towards 1 where `gate_strength` is
    not 1.

    Its projection is a plain `nn.Linear` inside a sub-module: quantizers, tensor parallelism and PEFT know what to do
    with it, and engines that fuse the linears reading one input still find q, k and v alone.
    """

    def __init__(self, config: GatedLlamaConfig):
        super().__init__()
        self.scale = config.gate_scale
        self.strength = config.gate_strength
        self.values_per_head = 1 if config.gate_type == "headwise" else config.head_dim  # G
        self.proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * self.values_per_head, bias=config.gate_bias
        )
        self.proj.is_attn_gate = True  # `_init_weights` meets this linear by itself, before it meets the gate
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, hidden_states: torch.Tensor, attn_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From X (B, T, E) and Y (B, T, N, H): the gated Y (B, T, N·H), and σ of every gate (B, T, N·G)."""
        scores = torch.sigmoid(self.proj(hidden_states))  # (B, T, E) -> (B, T, N·G)
        headwise = self.values_per_head == 1
        if headwise:
            attn_output, factors = attn_output.reshape(*scores.shape, -1), scores.unsqueeze(-1)  # (B, T, N, H or 1)
        else:
            attn_output, factors = attn_output.reshape(scores.shape), scores  # (B, T, N·H)
        # The scale inside the product: training keeps Y and σ and nothing else, and where s·σ is 1 so is the factor.
        rest = self.zero if self.strength == 1 else (1 - self.strength) * attn_output
        if rest.dtype != attn_output.dtype:  # under autocast
            rest = rest.to(attn_output.dtype)
        gated = torch.addcmul(rest, attn_output, factors, value=self.strength * self.scale)
        return gated.flatten(-2) if headwise else gated, scores

    def values(self, scores: torch.Tensor) -> torch.Tensor:
        """The gates as they act, from their σ."""
        gates = self.scale * scores
        return gates if self.strength == 1 else 1 + self.strength * (gates - 1)


@use_kernelized_func(apply_rotary_pos_emb)
class GatedLlamaAttention(LlamaAttention):
    """Llama's attention, with Qwen's biases, QK norm and sliding window where the config has them, and the gate."""

    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        nn.Module.__init__(self)  # not LlamaAttention's: its o_proj has the bias of q, k and v
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        sliding = config.attention_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.attn_gate = AttentionGate(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # (B, T)
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape)  # (B, T, N, H)
        key_states = self.k_proj(hidden_states).view(hidden_shape)  # (B, T, K, H)
        if self.q_norm is not None:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)  # (B, N or K, T, H)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # (B, K, T, H)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if past_key_values is not None:  # (B, K, S, H)
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

        attn_output, _ = self.attn_gate(hidden_states, attn_output)  # (B, T, N, H) -> (B, T, N·H)
        return self.o_proj(attn_output), attn_weights  # (B, T, N·H) -> (B, T, E)


class GatedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # not LlamaDecoderLayer's: it builds an ungated attention first
        self.hidden_size = config.hidden_size
        self.self_attn = GatedLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


@dataclass
class GatedLlamaModelOutput(BaseModelOutputWithPast):
    """`gates`, with `output_gates=True`: of each layer the gate values (B, T, N·G)."""

    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GatedLlamaCausalLMOutput(CausalLMOutputWithPast):
    gates: tuple[torch.FloatTensor, ...] | None = None


class GatedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: GatedLlamaConfig
    _no_split_modules = ["GatedLlamaDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": GatedLlamaDecoderLayer,
        "attentions": GatedLlamaAttention,
        "gates": OutputRecorder(AttentionGate, index=1),
    }

    def __init__(self, config: GatedLlamaConfig, *args, **kwargs):
        config.validate_architecture()  # again: from_pretrained(sliding_window=None) and its like set fields later
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, quantization_config=None, **kwargs
    ):
        """[`~transformers.PreTrainedModel.from_pretrained`], in which `quantization_config` leaves the gates whole."""
        if quantization_config is not None:
            kwargs["quantization_config"] = _with_whole_gates(quantization_config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, AttentionGate):
            init.zeros_(module.zero)
        elif getattr(module, "is_attn_gate", False) and self.config.gate_init == "open":
            init.zeros_(module.weight)
            if module.bias is not None:
                init.constant_(module.bias, self.config.open_gate_logit)
        else:
            super()._init_weights(module)

    def set_gate_strength(self, strength: float) -> None:
        """
        Let every gate g act as 1 + strength · (g − 1): 0 is the model without its gates, 1 the model as trained. It is
        part of the config, so a saved model keeps it.
        """
        self.config.gate_strength = strength
        for module in self.modules():
            if isinstance(module, AttentionGate):
                module.strength = strength


def _with_whole_gates(quantization_config):
    """A copy of a quantization config, or of the dict of one, that leaves the gates alone."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes; torchao and others
        if hasattr(quantization_config, name):
            asked = getattr(quantization_config, name)
            quantization_config = deepcopy(quantization_config)  # the caller's own stays as it is
            skipped = UNQUANTIZED if asked is None else [*asked, *(set(UNQUANTIZED[-1:]) - set(asked))]
            setattr(quantization_config, name, list(skipped))
    return quantization_config


def returns_gate_values(forward: Callable) -> Callable:
    """What `capture_outputs` recorded are the σ of the gates; what a caller gets are the gates as they act."""

    @can_return_tuple
    @wraps(forward)
    def forward_with_gate_values(self, *args, **kwargs):
        outputs = forward(self, *args, return_dict=True, **kwargs)
        if outputs.gates is not None:
            layers = zip(self.layers, outputs.gates, strict=True)
            outputs.gates = tuple(layer.self_attn.attn_gate.values(scores) for layer, scores in layers)
        return outputs

    return forward_with_gate_values


class GatedLlamaModel(GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [GatedLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @returns_gate_values
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GatedLlamaModelOutput:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T) -> (B, T, E)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        attention_types = self.config.attention_types
        # It may already have been prepared by e.g. `generate`
        if not isinstance(causal_mask_mapping := attention_mask, dict):
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            create = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            causal_mask_mapping = {kind: create[kind](**mask_kwargs) for kind in dict.fromkeys(attention_types)}

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        for i, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask_mapping[attention_types[i]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return GatedLlamaModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
        )


class GatedLlamaForCausalLM(LlamaForCausalLM, GatedLlamaPreTrainedModel):
    config: GatedLlamaConfig

    def __init__(self, config: GatedLlamaConfig):
        GatedLlamaPreTrainedModel.__init__(self, config)
        self.model = GatedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GatedLlamaCausalLMOutput:
        outputs: GatedLlamaModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        # As in Transformers before 5.17, which has no function for it.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T, E) -> (B, T kept, vocabulary)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return GatedLlamaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=outputs.gates,
        )


# The in-tree heads build their base with AutoModel, which asks again for trust in remote code; these name it.


class GatedLlamaForSequenceClassification(GenericForSequenceClassification, GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        GatedLlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GatedLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        self.post_init()


class GatedLlamaForTokenClassification(GenericForTokenClassification, GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        GatedLlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GatedLlamaModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)

        self.post_init()


class GatedLlamaForQuestionAnswering(GenericForQuestionAnswering, GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        GatedLlamaPreTrainedModel.__init__(self, config)
        self.model = GatedLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        self.post_init()


AUTO_CLASSES = {
    AutoModel: GatedLlamaModel,
    AutoModelForCausalLM: GatedLlamaForCausalLM,
    AutoModelForSequenceClassification: GatedLlamaForSequenceClassification,
    AutoModelForTokenClassification: GatedLlamaForTokenClassification,
    AutoModelForQuestionAnswering: GatedLlamaForQuestionAnswering,
}
# By which the Trainer (label smoothing), pipelines and others know what kind of model a class is.
NAMES = {
    AutoModel: modeling_auto.MODEL_MAPPING_NAMES,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def register(config_class: type[GatedLlamaConfig], auto_classes: dict[type, type], module: str) -> None:
    """Make the Auto classes know the models of a config, whose code is `module`."""
    for auto_class, model_class in auto_classes.items():
        model_class.register_for_auto_class(auto_class.__name__)  # saved with its code
        NAMES[auto_class][config_class.model_type] = model_class.__name__
    if not module.startswith("transformers_modules."):  # remote code must not take the place of an installed package
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in auto_classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)


register(GatedLlamaConfig, AUTO_CLASSES, __name__)

__all__ = [
    "AttentionGate",
    "GatedLlamaForCausalLM",
    "GatedLlamaForQuestionAnswering",
    "GatedLlamaForSequenceClassification",
    "GatedLlamaForTokenClassification",
    "GatedLlamaModel",
    "GatedLlamaPreTrainedModel",
]
