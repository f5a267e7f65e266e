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

from collections.abc import Callable
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
    GenerationMixin,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import use_kernelized_func
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
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
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, maybe_install_capturing_hooks


try:
    from .configuration_gated import GatedLlamaConfig
except ImportError:
    if __package__:  # as remote code the file beside this one must be there; installed, it is a top-level module
        raise
    from configuration_gated import GatedLlamaConfig


class ScaledSigmoid(torch.autograd.Function):
    """`scale · σ(logits)`, which keeps one tensor for its gradient: its result, which the product with it keeps too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.sigmoid(logits).mul_(scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.scale = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate,) = ctx.saved_tensors
        return torch.addcmul(gate, gate, gate, value=-1 / ctx.scale).mul_(grad), None  # g' = s·σ·(1 − σ) = g − g²/s


class AttentionGate(nn.Module):
    """
    The gate values of one layer, `gate_scale · σ(X Wg + bg)`, drawn towards 1 where `gate_strength` is not 1: from
    hidden states `(B, T, E)` to `(B, T, N·G)`.

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
        # `_init_weights` meets this linear by itself, and as remote code it does not meet modules without parameters.
        self.proj.is_attn_gate = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.proj(hidden_states)  # (B, T, E) -> (B, T, N·G)
        if gate.requires_grad and not torch.compiler.is_compiling():  # a compiler finds by itself what to keep
            gate = ScaledSigmoid.apply(gate, self.scale)
        else:
            gate = torch.sigmoid(gate)  # by itself, so that two of these are held at once and not three
            gate = self.scale * gate
        return gate if self.strength == 1 else 1 + self.strength * (gate - 1)


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
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
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

        query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)  # (B, N, T, H)
        key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)  # (B, K, T, H)
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

        gate = self.attn_gate(hidden_states)  # (B, T, N·G)
        attn_output = attn_output.reshape(*gate.shape, -1) * gate.unsqueeze(-1)  # (B, T, N·G, H/G)
        return self.o_proj(attn_output.flatten(-2)), attn_weights  # (B, T, N·H) -> (B, T, E)


class GatedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # not LlamaDecoderLayer's: it builds an ungated attention first
        self.hidden_size = config.hidden_size
        self.self_attn = GatedLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class GatedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: GatedLlamaConfig
    _no_split_modules = ["GatedLlamaDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": GatedLlamaDecoderLayer,
        "attentions": GatedLlamaAttention,
        "gates": OutputRecorder(AttentionGate, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if getattr(module, "is_attn_gate", False) and self.config.gate_init == "open":
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


@torch.compiler.assume_constant_result  # run while tracing: it takes a lock, which Dynamo cannot trace
def _install_recording_hooks(model: nn.Module) -> bool:
    maybe_install_capturing_hooks(model)
    return True


def returns_gates(forward: Callable, output_class: type) -> Callable:
    """
    An in-tree `forward`, returning an `output_class` whose `gates` holds what `output_gates=True` recorded: for each
    layer the gate values `(B, T, N·G)`. The heads hand the base model a list to put them in, since their in-tree
    forwards build their outputs field by field.
    """

    @wraps(forward)
    def gated_forward(self, *args, gates_out: list | None = None, return_dict: bool | None = None, **kwargs):
        is_base = self.base_model is self
        if not is_base:
            kwargs["gates_out"] = gates_out = []
        elif kwargs.get("output_gates", getattr(self.config, "output_gates", False)):
            _install_recording_hooks(self)
        outputs = forward(self, *args, return_dict=True, **kwargs)
        if is_base and gates_out is not None:
            gates_out.append(outputs.get("gates"))
        outputs = output_class(**{**outputs, "gates": outputs.get("gates") if is_base else gates_out[0]})
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return gated_forward


@dataclass
class GatedLlamaModelOutput(BaseModelOutputWithPast):
    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GatedLlamaCausalLMOutput(CausalLMOutputWithPast):
    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GatedLlamaSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GatedLlamaTokenClassifierOutput(TokenClassifierOutput):
    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GatedLlamaQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    gates: tuple[torch.FloatTensor, ...] | None = None


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
        self.has_sliding_layers = "sliding_attention" in config.layer_types

        self.post_init()

    # Qwen2's, which masks each layer by its type; Llama's knows no sliding layers.
    forward = returns_gates(Qwen2Model.forward, GatedLlamaModelOutput)


class GatedLlamaForCausalLM(GatedLlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan
    _fsdp_plan = LlamaForCausalLM._fsdp_plan

    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.model = GatedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    forward = returns_gates(LlamaForCausalLM.forward, GatedLlamaCausalLMOutput)


# The in-tree heads build their base with AutoModel, which asks again for trust in remote code; these name it.


class GatedLlamaForSequenceClassification(GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GatedLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        self.post_init()

    forward = returns_gates(GenericForSequenceClassification.forward, GatedLlamaSequenceClassifierOutput)


class GatedLlamaForTokenClassification(GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GatedLlamaModel(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

        self.post_init()

    forward = returns_gates(GenericForTokenClassification.forward, GatedLlamaTokenClassifierOutput)


class GatedLlamaForQuestionAnswering(GatedLlamaPreTrainedModel):
    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.model = GatedLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        self.post_init()

    forward = returns_gates(GenericForQuestionAnswering.forward, GatedLlamaQuestionAnsweringOutput)


AUTO_CLASSES = {
    AutoModel: GatedLlamaModel,
    AutoModelForCausalLM: GatedLlamaForCausalLM,
    AutoModelForSequenceClassification: GatedLlamaForSequenceClassification,
    AutoModelForTokenClassification: GatedLlamaForTokenClassification,
    AutoModelForQuestionAnswering: GatedLlamaForQuestionAnswering,
}
for auto_class, model_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class.__name__)  # saved with its code
if not __name__.startswith("transformers_modules."):  # remote code must not take the place of an installed package
    AutoConfig.register("gated_llama", GatedLlamaConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(GatedLlamaConfig, model_class, exist_ok=True)

__all__ = [
    "AttentionGate",
    "GatedLlamaForCausalLM",
    "GatedLlamaForQuestionAnswering",
    "GatedLlamaForSequenceClassification",
    "GatedLlamaForTokenClassification",
    "GatedLlamaModel",
    "GatedLlamaPreTrainedModel",
]
