# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Move the attention sink into the gate, without training.

Let p₀ be a head's attention mass on the first token, v₀ that token's value, and o′ the head's output over the other
tokens alone. Its output is o = (1 − p₀)·o′ + p₀·v₀. So but for v₀, which is small where there is a sink, a head that
does not see the first token and has the gate 1 − p₀ computes the same. The key that every query meets at the first
token is one and the same, so p₀ is largely a function of the query's own hidden state, and that is what the gate reads.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gated_llama.attention import watched
from gated_llama.diagnose import decoder_layers
from gated_llama.errors import UserError
from gated_llama.fold import separating, with_ridge
from gated_llama.gates import gate_modules


LEAST_SHARE = 1e-3  # of its scale that a gate is asked to be; to be shut further would change nothing
HIDDEN = 16.0  # how far a channel of the first token is below the states' range to be brought up to it
MARGIN = 2.0  # nats by which the first token's key is to be less attractive than the mean of the others


@dataclass(frozen=True)
class HeadFit:
    """What was found in a head, and whether its sink was moved. Means are over queries."""

    layer: int
    head: int
    sink: float  # mean p₀ before, without the first token's own query
    sink_left: float  # … and after
    value_size: float  # |v₀| over the mean |v| of the other tokens
    r2: float  # of the gates' regression
    gate_error: float  # mean |gate − what it should be|
    moved: bool


@dataclass(frozen=True)
class Desink:
    """
    How to move sinks.

    Attributes:
        key: what the first token's key becomes: `"fitted"`, the one that attracts each query a little less than the
            other keys do on average, in the least-squares sense; or `"zero"`, which attracts every query with a logit
            of 0, and stays a sink where the other logits are far below.
        min_sink: mean p₀ from which on a head has a sink.
        max_error: the mean |gate − what it should be| up to which a gate fits. A key head is edited if one of its query
            heads has a sink and the gates of all of them fit.
        ridge: of all regressions, as a share of the inputs' mean square. The smaller, the less other keys change, and
            the larger the weights that the edit writes.
        batch_size: windows at once.
    """

    key: str = "fitted"
    min_sink: float = 0.1
    max_error: float = 0.3
    ridge: float = 1e-3
    batch_size: int = 8


@torch.no_grad()
def desink(
    model: PreTrainedModel, windows: torch.Tensor, settings: Desink | None = None, *, progress: bool = False
) -> list[HeadFit]:
    """
    Edit `model` in place, a layer at a time, each on what the edited ones before it put out: the first token's key no
    longer attracts, by a rank-one edit of `k_proj`, and `attn_gate` does what the sink did, by a regression on what it
    reads. It takes no gradient through the model, and two forwards of `windows` a layer. Key heads without a sink, or
    whose gates would not fit, compute what they did.

    Args:
        windows: token ids (B, T) without padding, each beginning as texts do; many more tokens than `hidden_size`.

    Returns:
        A fit for each head, layer by layer.

    Raises:
        UserError: the model's gates cannot be written.
    """
    settings = settings or Desink()
    _check(model, windows, settings)
    before = _Seen(model, windows, settings.batch_size).others
    fits = []
    for number in tqdm(range(len(before)), desc="moving sinks", unit=" layers", disable=not progress):
        fits += _move(model, windows, number, before[number], settings)
    return fits


def _check(model: PreTrainedModel, windows: torch.Tensor, settings: Desink) -> None:
    gates = [gate for modules in gate_modules(model).values() for gate in modules]
    if not gates or any(gate.proj.bias is None for gate in gates):
        raise UserError("a sink moves into gates that have a bias: convert the checkpoint with --gate-bias.")
    if any(gate.strength != 1 for gate in gates):
        raise UserError("the gates act at a part of their strength: call model.set_gate_strength(1) first.")
    if settings.key not in ("fitted", "zero"):
        raise UserError(f"the first token's key can become 'fitted' or 'zero', not {settings.key!r}.")
    if windows.shape[1] < 3:
        raise UserError(f"windows of {windows.shape[1]} tokens are too short for a sink: take at least 3.")


class _Seen:
    """
    What passes through `model` on `windows` (B, T): `others` (L, B, T, N), the attention mass 1 − p₀ that queries give
    other tokens than the first. Of one `layer` also what q, k, v and the gate read, `states` (B, T, E), the `queries`
    (B, N, T, H) as they meet the keys, the first token's `key` (B, K, H), and the `outputs` (B, T, N, H) before gates.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, batch_size: int, layer: int | None = None):
        self.others = torch.ones(
            model.config.num_hidden_layers, *windows.shape, model.config.num_attention_heads, device=model.device
        )
        self.layer = layer
        self.seen: dict[str, list[torch.Tensor]] = {"states": [], "queries": [], "key": []}
        self.outputs = None
        with ExitStack() as stack:
            stack.enter_context(watched(model, self._see_attention))
            if layer is not None:
                attention = decoder_layers(model)[layer].self_attn
                stack.callback(attention.register_forward_pre_hook(self._see_layer, with_kwargs=True).remove)
            for start in range(0, len(windows), batch_size):
                self.rows = slice(start, start + batch_size)
                model.get_decoder()(windows[self.rows].to(model.device), use_cache=False)
        self.states, self.queries, self.key = (torch.cat(parts) if parts else None for parts in self.seen.values())

    def _see_attention(self, layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        if first == 0:  # a sliding window leaves the first token behind
            # Their sum and not 1 − p₀, of which a strong sink leaves nothing in fp32.
            others = weights[:, :, :, 1:].sum(3).transpose(1, 2)
            self.others[layer, self.rows, start : start + weights.shape[2]] = others
        if layer == self.layer:
            if self.outputs is None:
                self.outputs = output.new_empty(*self.others.shape[1:], output.shape[3])
            self.outputs[self.rows, start : start + output.shape[2]] = output.transpose(1, 2)

    def _see_layer(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        states = kwargs["hidden_states"]
        shape = (*states.shape[:2], -1, attention.head_dim)
        queries = attention.q_norm(attention.q_proj(states).view(shape)).transpose(1, 2)
        keys = attention.k_norm(attention.k_proj(states).view(shape)).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])
        for name, value in (("states", states), ("queries", queries), ("key", keys[:, :, 0])):
            self.seen[name].append(value)


def _move(
    model: PreTrainedModel, windows: torch.Tensor, number: int, before: torch.Tensor, settings: Desink
) -> list[HeadFit]:
    """Edit layer `number`, whose queries gave other tokens than the first the attention `before` (B, T, N)."""
    attention = decoder_layers(model)[number].self_attn
    groups = attention.num_key_value_groups
    seen = _Seen(model, windows, settings.batch_size, number)
    sinks = 1 - before[:, 1:].mean((0, 1))  # (N)
    chosen = (sinks.view(-1, groups) >= settings.min_sink).any(1)  # (K)
    scale = _hidden_scale(seen.states)
    _scale_channels(decoder_layers(model)[number], scale)
    seen.states *= scale
    weight = attention.k_proj.weight.clone()
    _edit_keys(attention, seen, seen.others[number], chosen, settings)
    edited = _Seen(model, windows, settings.batch_size, number) if chosen.any() else seen
    after = edited.others[number]

    # What is left of a sink goes on doing its part, so the gate does the rest.
    wanted = before / after.clamp_min(LEAST_SHARE)  # (B, T, N)
    wanted[:, 0] = 1  # a token that sees nothing but itself loses nothing
    written, r2, errors = _fit_gates(attention.attn_gate, edited.states, edited.outputs, wanted, settings.ridge)
    good = chosen & (errors.view(-1, groups) <= settings.max_error).all(1)
    _keep(attention, good, weight, *written)

    moved = good.repeat_interleave(groups)
    values = attention.v_proj(seen.states).unflatten(2, (-1, attention.head_dim)).norm(dim=3)  # (B, T, K)
    sizes = (values[:, 0].mean(0) / values[:, 1:].mean((0, 1))).repeat_interleave(groups)
    left = torch.where(moved, 1 - after[:, 1:].mean((0, 1)), sinks)
    if not moved.any():
        _scale_channels(decoder_layers(model)[number], 1 / scale)
    rows = zip(*(column.tolist() for column in (sinks, left, sizes, r2, errors, moved)), strict=True)
    return [HeadFit(number, head, *row) for head, row in enumerate(rows)]


def _hidden_scale(states: torch.Tensor) -> torch.Tensor:
    """
    For each channel of the `states` (B, T, E) in which the first token has more than any other and still next to
    nothing, the power of two that brings it up to their range; 1 for the others. A model may make a sink by hiding its
    first token behind norm weights near zero: then its key is 0 while other logits are far below. To write another key
    for what is left of its state takes weights of hundreds, which int8 and bf16 make ill use of.
    """
    first, rest = states[:, 0].abs().mean(0), states[:, 1:].abs().amax((0, 1))  # (E)
    scale = (rest.max() / first).clamp_min(1).log2().floor().exp2()
    return torch.where((first >= rest) & (first > 0) & (scale >= HIDDEN), scale, 1)


def _scale_channels(layer: nn.Module, scale: torch.Tensor) -> None:
    """Multiply what the layer's attention reads by `scale` (E), and divide what reads it: nothing else changes."""
    attention = layer.self_attn
    layer.input_layernorm.weight *= scale
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.attn_gate.proj):
        linear.weight /= scale


def _edit_keys(attention: nn.Module, seen: _Seen, others: torch.Tensor, chosen: torch.Tensor, settings: Desink) -> None:
    """Give the first token another key in the `chosen` (K) key heads: W − (W x₀ − y)·uᵀ makes the state x₀ into y."""
    linear = attention.k_proj
    first, rest = seen.states[:, 0].double().mean(0), seen.states[:, 1:].flatten(0, 1).double()
    direction = separating(first, with_ridge(rest.T @ rest / len(rest), settings.ridge))  # (E)
    key = linear.weight.double() @ first + (0 if linear.bias is None else linear.bias.double())
    key = key.view(-1, attention.head_dim)  # (K, H)
    wanted = torch.zeros_like(key) if settings.key == "zero" else _fitted_key(attention, seen, others, settings.ridge)
    if settings.key != "zero" and _is_normed(attention):
        wanted = wanted / attention.k_norm.weight.double()  # a norm leaves the direction only: keep to the old length
        wanted = wanted * key.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True)
    change = (key - wanted) * chosen[:, None]
    linear.weight -= torch.outer(change.flatten(), direction).to(linear.weight.dtype)


def _fitted_key(attention: nn.Module, seen: _Seen, others: torch.Tensor, ridge: float) -> torch.Tensor:
    """
    The key (K, H), as queries meet it at the first position, whose logit comes nearest to the mean (in the exponential)
    of a query's logits at the other keys, less `MARGIN`, for all query heads that share it: of the length that a key
    norm gives it, if there is one.
    """
    queries = seen.queries.double().unflatten(1, (seen.key.shape[1], -1)) * attention.scaling  # (B, K, N/K, T, H)
    shares = others.double().transpose(1, 2).unflatten(1, (seen.key.shape[1], -1))  # (B, K, N/K, T)
    logits = (queries @ seen.key.double()[:, :, None, :, None]).squeeze(4)  # at the first token's key as it is
    tiny = torch.finfo(torch.float32).tiny
    logits = logits + shares.clamp_min(tiny).log() - (1 - shares).clamp_min(tiny).log()  # of all others together
    logits = logits - torch.arange(shares.shape[3], device=shares.device).clamp_min(1).log() - MARGIN
    seeing = (shares < 1) & (torch.arange(shares.shape[3], device=shares.device) > 0)  # a sliding window sees no more
    inputs = (queries * seeing[..., None]).transpose(0, 1).flatten(1, 3)  # (K, M, H)
    targets = (logits * seeing).transpose(0, 1).flatten(1)  # (K, M)
    normed = _is_normed(attention)
    scale = attention.k_norm.weight.double() if normed else torch.ones_like(inputs[0, 0])  # (H)
    inputs = inputs * scale
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs)  # (K, H), (K, H, H)
    products = (vectors.mT @ (inputs.mT @ targets[:, :, None])).squeeze(2)  # (K, H)
    penalty = ridge * values.mean(1, keepdim=True)
    if normed:  # the larger the penalty, the shorter the key: halve the span in which the right one lies
        low, high = penalty, 1e12 * penalty
        for _ in range(100):
            penalty = (low * high).sqrt()
            long = (products / (values + penalty)).norm(dim=1, keepdim=True) > scale.numel() ** 0.5
            low, high = torch.where(long, penalty, low), torch.where(long, high, penalty)
    return (vectors @ (products / (values + penalty))[:, :, None]).squeeze(2) * scale


def _is_normed(attention: nn.Module) -> bool:
    return not isinstance(attention.k_norm, nn.Identity)


def _fit_gates(
    gate: nn.Module, states: torch.Tensor, outputs: torch.Tensor, wanted: torch.Tensor, ridge: float
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """
    Least squares of what heads with the `outputs` (B, T, N, H) put out behind their gates: first of the logits, which
    has a solution in closed form, and from there of the gates, weighted by the outputs' squares.

    Returns:
        Weight and bias with which the gates of `states` (B, T, E) come nearest to `wanted` (B, T, N) times what they
        are; R² of the gates (N); mean |gate − wanted| (N).
    """
    shares = gate(states).double().unflatten(2, (wanted.shape[2], -1)) * wanted[..., None] / gate.scale  # (B, T, N, G)
    sizes = outputs.double().square()
    sizes = (sizes if shares.shape[3] > 1 else sizes.sum(3, keepdim=True)).flatten(2).flatten(0, 1)  # (B·T, N·G)
    sizes /= sizes.mean(0).clamp_min(1e-12)
    shares = shares.clamp(LEAST_SHARE, 1 - LEAST_SHARE).flatten(2).flatten(0, 1)  # (B·T, N·G)

    inputs = states.flatten(0, 1).double()  # (B·T, E)
    mean = inputs.mean(0)
    inputs = inputs - mean
    root = torch.linalg.cholesky(with_ridge(inputs.T @ inputs / len(inputs), ridge))
    white = torch.linalg.solve_triangular(root, inputs.T, upper=False).T  # (B·T, E), of variance 1
    logits = shares.logit()
    bias = logits.mean(0).requires_grad_()
    weight = (white.T @ (logits - logits.mean(0)) / len(white)).requires_grad_()  # (E, N·G)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def error() -> torch.Tensor:
        optimizer.zero_grad()
        gates = torch.sigmoid(white @ weight + bias)
        value = (sizes * (gates - shares).square()).mean(0).sum() + ridge / 16 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(error)
    weight, bias = weight.detach(), bias.detach()
    found = torch.sigmoid(white @ weight + bias)
    r2 = 1 - (found - shares).square().sum(0) / (shares - shares.mean(0)).square().sum(0).clamp_min(1e-12)
    errors = gate.scale * (found - shares).abs().mean(0)
    r2, errors = (values.unflatten(0, (wanted.shape[2], -1)).mean(1) for values in (r2, errors))
    weight = torch.linalg.solve_triangular(root.T, weight, upper=True)
    return (weight.T, bias - mean @ weight), r2, errors


def _keep(
    attention: nn.Module, good: torch.Tensor, old_keys: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Write the gates of the query heads of the `good` (K) key heads, and undo the edit of the other keys."""
    keys, linear = attention.k_proj.weight, attention.attn_gate.proj
    keys.copy_(torch.where(good.repeat_interleave(attention.head_dim)[:, None], keys, old_keys))
    rows = good.repeat_interleave(len(bias) // len(good))
    linear.weight[rows] = weight[rows].to(linear.weight.dtype)
    linear.bias[rows] = bias[rows].to(linear.bias.dtype)
