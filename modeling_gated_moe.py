# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
GatedMoe: GatedLlama with the experts, the router and the load-balancing loss of Qwen3-MoE or Mixtral, which are
Transformers' own. Importing this file registers the Auto classes, and how experts are named in a checkpoint.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralExperts,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder


try:
    from .configuration_gated_moe import GatedMoeConfig
    from .modeling_gated import (
        AttentionGate,
        GatedLlamaAttention,
        GatedLlamaDecoderLayer,
        GatedLlamaModel,
        GatedLlamaModelOutput,
        GatedLlamaPreTrainedModel,
        register,
    )
except ImportError:
    if __package__:  # as remote code the files beside this one must be there; installed, they are top-level modules
        raise
    from configuration_gated_moe import GatedMoeConfig
    from modeling_gated import (
        AttentionGate,
        GatedLlamaAttention,
        GatedLlamaDecoderLayer,
        GatedLlamaModel,
        GatedLlamaModelOutput,
        GatedLlamaPreTrainedModel,
        register,
    )


MOE_BLOCKS = {"qwen3_moe": Qwen3MoeSparseMoeBlock, "mixtral": MixtralSparseMoeBlock}
# Checkpoints name each expert's matrices, models hold those of all in one: Transformers' own rules, by `moe_type`.
EXPERT_NAMES = {moe_type: get_checkpoint_conversion_mapping(moe_type) for moe_type in MOE_BLOCKS}
register_checkpoint_conversion_mapping("gated_moe", [*chain(*EXPERT_NAMES.values())], overwrite=True)


class GatedMoeDecoderLayer(GatedLlamaDecoderLayer):
    def __init__(self, config: GatedMoeConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # not GatedLlamaDecoderLayer's: it builds a dense MLP
        self.hidden_size = config.hidden_size
        self.self_attn = GatedLlamaAttention(config, layer_idx)
        self.mlp = MOE_BLOCKS[config.moe_type](config) if config.has_experts(layer_idx) else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


@dataclass
class GatedMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """`gates`, with `output_gates=True`: of each layer the gate values (B, T, N·G)."""

    gates: tuple[torch.FloatTensor, ...] | None = None


class GatedMoePreTrainedModel(GatedLlamaPreTrainedModel):
    config: GatedMoeConfig
    _no_split_modules = ["GatedMoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": [OutputRecorder(Qwen3MoeTopKRouter, index=0), OutputRecorder(MixtralTopKRouter, index=0)],
        "hidden_states": GatedMoeDecoderLayer,
        "attentions": GatedLlamaAttention,
        "gates": OutputRecorder(AttentionGate, index=1),
    }

    def __init__(self, config: GatedMoeConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._weight_conversions = deepcopy(EXPERT_NAMES[config.moe_type])  # reversed to save what was not loaded

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # Transformers looks for the decorator in this file, and the experts stand in others

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (Qwen3MoeExperts, MixtralExperts)):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, (Qwen3MoeTopKRouter, MixtralTopKRouter)):
            init.normal_(module.weight, mean=0.0, std=std)


class GatedMoeModel(GatedLlamaModel, GatedMoePreTrainedModel):
    config: GatedMoeConfig

    def __init__(self, config: GatedMoeConfig):
        GatedMoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [GatedMoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        self.post_init()


class GatedMoeForCausalLM(LlamaForCausalLM, GatedMoePreTrainedModel):
    config: GatedMoeConfig

    def __init__(self, config: GatedMoeConfig):
        GatedMoePreTrainedModel.__init__(self, config)
        self.model = GatedMoeModel(config)
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GatedMoeCausalLMOutput:
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        outputs: GatedLlamaModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        router_logits = outputs.get("router_logits")  # of each layer with experts (B·T, experts)

        # As in Transformers before 5.17, which has no function for it.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T, E) -> (B, T kept, vocabulary)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss_func(
                router_logits, self.config.num_local_experts, self.config.num_experts_per_tok, attention_mask
            )
            if labels is not None:
                loss += self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return GatedMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
            gates=outputs.gates,
        )


class GatedMoeForSequenceClassification(GenericForSequenceClassification, GatedMoePreTrainedModel):
    def __init__(self, config: GatedMoeConfig):
        GatedMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GatedMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        self.post_init()


class GatedMoeForTokenClassification(GenericForTokenClassification, GatedMoePreTrainedModel):
    def __init__(self, config: GatedMoeConfig):
        GatedMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GatedMoeModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)

        self.post_init()


class GatedMoeForQuestionAnswering(GenericForQuestionAnswering, GatedMoePreTrainedModel):
    def __init__(self, config: GatedMoeConfig):
        GatedMoePreTrainedModel.__init__(self, config)
        self.model = GatedMoeModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        self.post_init()


AUTO_CLASSES = {
    AutoModel: GatedMoeModel,
    AutoModelForCausalLM: GatedMoeForCausalLM,
    AutoModelForSequenceClassification: GatedMoeForSequenceClassification,
    AutoModelForTokenClassification: GatedMoeForTokenClassification,
    AutoModelForQuestionAnswering: GatedMoeForQuestionAnswering,
}
register(GatedMoeConfig, AUTO_CLASSES, __name__)

__all__ = [
    "GatedMoeForCausalLM",
    "GatedMoeForQuestionAnswering",
    "GatedMoeForSequenceClassification",
    "GatedMoeForTokenClassification",
    "GatedMoeModel",
    "GatedMoePreTrainedModel",
]
