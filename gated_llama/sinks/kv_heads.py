# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""KV heads whose sinks were moved, and what it takes to restore some of them."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.inspection.attention import decoder_layers
from gated_llama.sinks.budget import weights_of_attention
from gated_llama.sinks.distil import divergence


Head = tuple[int, int]  # a layer, and a KV head in it


class KVHeads:
    """
    The KV heads of a model whose sinks were moved, each with the query heads and gates that share it. Any can be
    restored to what it was `before` (see [`gated_llama.sinks.move.Moved.unmoved`]); the others stay as they are.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, before: Sequence[dict], rows: torch.Tensor, dtype: torch.dtype):
        """`rows` (B, T) of token ids are what means are taken over; weights are rounded to `dtype`."""
        self.model, self.rows, self.dtype = model, rows, dtype
        self.layers = decoder_layers(model)
        self.made = [weights_of_attention(layer) for layer in self.layers]
        self.before = [
            {name: value.to(dtype).to(made[name]) for name, value in weights.items()}
            for weights, made in zip(before, self.made, strict=True)
        ]
        self.each = [
            (number, head) for number in range(len(self.layers)) for head in range(model.config.num_key_value_heads)
        ]
        self.read = self._mean_inputs()
        self.restore(self.each)
        self.read_before = self._mean_inputs()
        self.restore(())

    def _mean_inputs(self) -> list[torch.Tensor]:
        """What the `o_proj` of each layer reads, a mean over all tokens: (N·H)."""
        sums = [0.0] * len(self.layers)

        def see(number: int, linear: nn.Module, inputs: tuple) -> None:
            sums[number] = sums[number] + inputs[0].mean((0, 1)) / len(self.rows)

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                hook = layer.self_attn.o_proj.register_forward_pre_hook(partial(see, number))
                stack.callback(hook.remove)
            for row in self.rows:
                self.model.get_decoder()(row[None].to(self.model.device), use_cache=False)
        return sums

    def moved(self) -> list[Head]:
        """Those whose keys are not what they were."""
        return [
            (number, head)
            for number, head in self.each
            if not torch.equal(
                self._weights(number, {head})["self_attn.k_proj.weight"],
                self.made[number]["self_attn.k_proj.weight"],
            )
        ]

    def said(self, heads: Iterable[Head]) -> str:
        """As "layer 2, layer 18 (KV head 1)": a layer alone is all of its KV heads."""
        of_layer = by_layer(heads)
        each = {number: ", ".join(map(str, sorted(of_layer[number]))) for number in sorted(of_layer)}
        is_all = {number: len(of_layer[number]) == self.model.config.num_key_value_heads for number in each}
        return "; ".join(f"layer {number}" + ("" if is_all[number] else f" ({each[number]})") for number in each)

    @torch.no_grad()
    def restore(self, heads: Iterable[Head]) -> None:
        """These are what they were before; all others are as they were made."""
        of_layer = by_layer(heads)
        for number, layer in enumerate(self.layers):
            layer.load_state_dict(self._weights(number, of_layer.get(number, set())), strict=False)

    def _weights(self, number: int, heads: set[int]) -> dict[str, torch.Tensor]:
        """Of a layer in which these KV heads are what they were."""
        before, made, attention = self.before[number], self.made[number], self.layers[number].self_attn
        kv_heads = self.model.config.num_key_value_heads
        if len(heads) in (0, kv_heads):
            return before if heads else made
        back = torch.tensor([head in heads for head in range(kv_heads)], device=self.model.device)  # (K)
        norm = "input_layernorm.weight"
        scale = torch.where(before[norm] == 0, 1, made[norm] / before[norm])  # of channels in which sinks were hidden
        mixed = dict(made)
        for name in ("k_proj", "v_proj", "attn_gate.proj"):
            weight, bias = f"self_attn.{name}.weight", f"self_attn.{name}.bias"
            rows = back.repeat_interleave(len(made[weight]) // kv_heads)
            mixed[weight] = torch.where(rows[:, None], before[weight] / scale, made[weight])
            mixed[bias] = torch.where(rows, before[bias], made[bias])
        weight, bias = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
        columns = back.repeat_interleave(attention.num_key_value_groups * attention.head_dim)
        mixed[weight] = torch.where(columns, before[weight], made[weight])
        # The bias stands for what each head puts out on average that was taken from it: without the part of these.
        part = before[weight] @ (columns * self.read_before[number]) - made[weight] @ (columns * self.read[number])
        mixed[bias] = (made[bias] - part).to(self.dtype).to(part)
        return mixed

    @torch.no_grad()
    def divergence_saved(
        self, base: PreTrainedModel, heads: Iterable[Head], *, progress: bool = False
    ) -> dict[Head, float]:
        """By how much the divergence from `base` falls if one of these alone is restored."""
        device = self.model.device
        expected = [base(row[None].to(device), use_cache=False).logits for row in self.rows]

        def diverges() -> float:
            found = (self.model(row[None].to(device), use_cache=False).logits for row in self.rows)
            return sum(divergence(*pair).item() for pair in zip(expected, found, strict=True)) / len(expected)

        usual, saved = diverges(), {}
        for head in tqdm(heads, desc="what KV heads cost", unit=" heads", disable=not progress):
            self.restore([head])
            saved[head] = usual - diverges()
        self.restore(())
        return saved


def by_layer(heads: Iterable[Head]) -> dict[int, set[int]]:
    """Pairs of a layer and a number in it, as the numbers of each layer."""
    found: dict[int, set[int]] = {}
    for number, head in heads:
        found.setdefault(number, set()).add(head)
    return found
