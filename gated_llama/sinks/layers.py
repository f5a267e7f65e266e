# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A decoder, one layer at a time: states of a text stay, layers pass over them; and the tokens that are sinks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gated_llama.inspection.attention import decoder_layers, layer_states
from gated_llama.inspection.collectors import MASSIVE


BLOCK = 2**21  # attention logits held at once, so few that the next pass over them finds them in the cache


@dataclass
class Attended:
    """
    What the attention of a layer reads and makes of it, before gates. A query's others are the keys it sees that are no
    sinks; `others` is the attention that they get, and not 1 minus that of sinks, of which fp32 may leave nothing.
    """

    states: torch.Tensor  # (B, T, E), normalised: what q, k, v and the gate read
    queries: torch.Tensor  # (B, T, N, H), rotated
    values: torch.Tensor  # (B, T, K, H)
    others: torch.Tensor  # (B, T, N)
    logits: torch.Tensor  # (B, T, N): log Σ exp over the others' logits, 87 nats below the largest at the least
    outputs: torch.Tensor  # (B, T, N, H)


def attend(
    layer: nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, ...], sinks: torch.Tensor, first: int = 0
) -> Attended:
    """
    Attention of `layer` on residual `states` (B, T, E), with `rotary` the cosines and sines (1, T, H). If it slides,
    so many `first` tokens are seen even so.
    """
    attention = layer.self_attn
    states = layer.input_layernorm(states)
    shape = (*states.shape[:2], -1, attention.head_dim)
    queries, keys, values = (
        linear(states).view(shape) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (B, T, N or K, H)
    if attention.q_norm is not None:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys = apply_rotary_pos_emb(queries.transpose(1, 2), keys.transpose(1, 2), *rotary)  # (B, N or K, T, H)
    batch, heads, tokens, _ = queries.shape
    groups, window = attention.num_key_value_groups, attention.sliding_window
    keys = keys.repeat_interleave(groups, 1).transpose(2, 3)  # (B, N, H, T)
    scaled = queries * attention.scaling
    repeated = values.transpose(1, 2).repeat_interleave(groups, 1)  # (B, N, T, H)
    counted = torch.stack([torch.ones_like(sinks), ~sinks], 2)[:, None].expand(-1, heads, -1, -1)  # (B, N, T, 2)
    summed = torch.cat([repeated, counted.to(repeated)], 3)  # (B, N, T, H + 2): values, all keys, the others
    places = torch.arange(tokens, device=states.device)
    others, logits, outputs = [], [], []
    for block in places.split(max(1, BLOCK // (batch * heads * tokens))):
        end = block[-1] + 1  # of the keys that it sees
        distance = block[:, None] - places[:end]
        unseen = (distance < 0) | ((distance >= (window or tokens)) & (places[:end] >= first))  # (b, S)
        scores = (scaled[:, :, block] @ keys[..., :end]).masked_fill_(unseen, float("-inf"))
        largest = scores.amax(3, keepdim=True)  # (B, N, b, 1)
        sums, total, rest = (scores.sub_(largest).exp_() @ summed[:, :, :end]).split([values.shape[3], 1, 1], 3)
        outputs.append(sums / total)
        others.append((rest / total).squeeze(3))
        logits.append((largest + rest.clamp_min(torch.finfo(rest.dtype).tiny).log()).squeeze(3))
    joined = (torch.cat(parts, dim=2).transpose(1, 2) for parts in (others, logits, outputs))  # -> (B, T, N, …)
    return Attended(states, queries.transpose(1, 2), values, *joined)


def embed(model: PreTrainedModel, windows: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The states (B, T, E) that the first layer reads, in fp32 or what is finer."""
    table = model.get_decoder().embed_tokens
    states = table(windows.to(table.weight.device))
    return states.to(device, torch.promote_types(states.dtype, torch.float32))


def rotary_of(model: PreTrainedModel, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (1, T, H) of the positions from 0 on."""
    rotary = model.get_decoder().rotary_emb
    positions = torch.arange(states.shape[1], device=rotary.inv_freq.device)[None]
    cos, sin = rotary(states[:1].to(rotary.inv_freq.device), positions)
    return cos.to(states.device), sin.to(states.device)


@dataclass(frozen=True)
class Lengths:
    """Norms, each (L, B, T): of the residual state after every layer, and of the input of `down_proj`."""

    states: torch.Tensor
    inner: torch.Tensor

    def limits(self, times: float) -> tuple[torch.Tensor, torch.Tensor]:
        """So many times the median of each layer, (L) and (L)."""
        return tuple(times * lengths.flatten(1).median(1).values for lengths in (self.states, self.inner))


@contextmanager
def lengths_seen(model: PreTrainedModel, see: Callable[[str, int, torch.Tensor], None]) -> Iterator[None]:
    """Context manager: forwards pass the norms (B, T) of each layer's "states" and "inner" to `see`."""

    def see_states(number: int, layer: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        see("states", number, layer_states(output).float().norm(dim=2))

    def see_inner(number: int, linear: nn.Module, inputs: tuple) -> None:
        see("inner", number, inputs[0].float().norm(dim=2))

    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(model)):
            stack.callback(layer.register_forward_hook(partial(see_states, number)).remove)
            stack.callback(layer.mlp.down_proj.register_forward_pre_hook(partial(see_inner, number)).remove)
        yield


@torch.no_grad()
def state_lengths(
    model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 8, progress: bool = False
) -> Lengths:
    """One plain forward of `windows` (B, T)."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    with lengths_seen(model, lambda what, layer, lengths: found.setdefault((what, layer), []).append(lengths.cpu())):
        bar = tqdm(windows.split(batch_size), desc="finding sinks", unit=" batches", disable=not progress)
        for rows in bar:
            model.get_decoder()(rows.to(model.device), use_cache=False)
    layers = range(model.config.num_hidden_layers)
    return Lengths(*(torch.stack([torch.cat(found[what, n]) for n in layers]) for what in ("states", "inner")))


def sink_tokens(lengths: Lengths) -> torch.Tensor:
    """
    Which tokens each layer meets as sinks, (L, B, T): those that the layers before it made massive, wherever they
    stand. A layer that meets none is given those that come next.
    """
    lengths = lengths.states
    found = lengths > MASSIVE * lengths.flatten(1).median(1).values[:, None, None]
    sinks, following = torch.zeros_like(found), torch.zeros_like(found[0])
    for layer in range(len(found) - 1, -1, -1):
        read = found[layer - 1] if layer else following
        following = sinks[layer] = read if read.any() else following if following.any() else found[layer]
    return sinks
