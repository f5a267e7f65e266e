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
from gated_llama.gates import gate_modules, gate_values
from gated_llama.rank_one import add, check, separating, with_ridge


LEAST_SHARE = 1e-3  # of its scale that a gate is asked to be; to be shut further would change nothing
HIDDEN = 16.0  # so many times below the size of states is the first token in a channel that hides it
STEEPEST = 1 / 4  # slope of a sigmoid: an error of its logit is one of at most this share in its value
MARGIN = 2.0  # nats by which the first token's key is to be less attractive than the mean of the others


@dataclass(frozen=True)
class HeadFit:
    """What was found in a head, and whether its sink was moved. Means are over queries."""

    layer: int
    head: int
    sink: float  # mean p₀ before, without the first token's own query
    sink_left: float  # … and after
    value_size: float  # |v₀| over the mean |v| of the other tokens
    r2: float  # of the gates' regression, weighted by what is gated, squared; 0 where none was asked for
    gate_error: float  # mean |gate − what it should be|, so weighted
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
        max_error: the `gate_error` up to which a gate fits. A key head is edited if one of its query heads has a sink
            and the gates of all of them fit.
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
        UserError: the model's gates cannot be written, or its layers cannot be edited.
    """
    settings = settings or Desink()
    _check(model, windows, settings)
    model.eval()
    before = _attention_on_others(model, windows, settings.batch_size)
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
    linears = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "attn_gate.proj")]
    check(model, windows, linears, model.config.hidden_size)


def _attention_on_others(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The attention mass 1 − p₀ that queries of each layer give other tokens than the first, (L, B, T, N)."""
    others = torch.ones(
        model.config.num_hidden_layers, *windows.shape, model.config.num_attention_heads, device=model.device
    )

    def see(layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        others[layer, rows, start : start + weights.shape[2]] = _others(weights, first)

    with watched(model, see):
        for begin in range(0, len(windows), batch_size):
            rows = slice(begin, begin + batch_size)
            model.get_decoder()(windows[rows].to(model.device), use_cache=False)
    return others


def _others(weights: torch.Tensor, first: int) -> torch.Tensor:
    """
    Of attention weights (B, N, queries, keys) from key `first` on, what queries give other keys than the first of all,
    (B, queries, N): their sum and not 1 − p₀, of which a strong sink leaves nothing in fp32.
    """
    others = weights if first else weights[:, :, :, 1:]  # a sliding window leaves the first token behind
    return others.sum(3).transpose(1, 2)


class _Seen:
    """
    What passes through layer `number` of `model` on `windows` (B, T): what q, k, v and the gate read, `states` (B, T,
    E), the `queries` (B, N, T, H) as they meet the keys, the first token's `key` (B, K, H), the attention mass `others`
    (B, T, N) that queries give other tokens than the first, and the `outputs` (B, T, N, H) before gates.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, number: int, batch_size: int):
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("states", "queries", "key", "others", "outputs")}

        def see_layer(attention: nn.Module, args: tuple, kwargs: dict) -> None:
            states = kwargs["hidden_states"]
            shape = (*states.shape[:2], -1, attention.head_dim)
            queries = attention.q_norm(attention.q_proj(states).view(shape)).transpose(1, 2)
            keys = attention.k_norm(attention.k_proj(states).view(shape)).transpose(1, 2)
            queries, keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])
            for name, value in (("states", states), ("queries", queries), ("key", keys[:, :, 0])):
                parts[name].append(value)

        def see_attention(layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
            if layer == number:  # blocks of queries, of each batch from the first on
                blocks.append((_others(weights, first), output.transpose(1, 2)))

        with ExitStack() as stack:
            stack.enter_context(watched(model, see_attention))
            attention = decoder_layers(model)[number].self_attn
            stack.callback(attention.register_forward_pre_hook(see_layer, with_kwargs=True).remove)
            for rows in windows.split(batch_size):
                blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
                model.get_decoder()(rows.to(model.device), use_cache=False)
                for name, values in zip(("others", "outputs"), zip(*blocks, strict=True), strict=True):
                    parts[name].append(torch.cat(values, dim=1))
        self.states, self.queries, self.key, self.others, self.outputs = (torch.cat(part) for part in parts.values())


def _move(
    model: PreTrainedModel, windows: torch.Tensor, number: int, before: torch.Tensor, settings: Desink
) -> list[HeadFit]:
    """Edit layer `number`, whose queries gave other tokens than the first the attention `before` (B, T, N)."""
    layer = decoder_layers(model)[number]
    attention, groups = layer.self_attn, layer.self_attn.num_key_value_groups
    seen = _Seen(model, windows, number, settings.batch_size)
    values = attention.v_proj(seen.states).unflatten(2, (-1, attention.head_dim)).norm(dim=3)  # (B, T, K)
    sizes = (values[:, 0].mean(0) / values[:, 1:].mean((0, 1))).repeat_interleave(groups)
    sinks = 1 - before[:, 1:].mean((0, 1))  # (N)
    chosen = (sinks.view(-1, groups) >= settings.min_sink).any(1)  # (K)
    left, r2, errors, moved = sinks, torch.zeros_like(sinks), torch.zeros_like(sinks), torch.zeros_like(sinks).bool()
    if chosen.any():
        kept = {name: value.clone() for name, value in layer.state_dict().items() if not name.startswith("mlp.")}
        try:
            left, r2, errors, moved = _edit(model, windows, number, before, seen, chosen, settings)
        finally:
            if not moved.any():  # nothing fits, or something went wrong
                layer.load_state_dict(kept, strict=False)
    rows = zip(*(column.tolist() for column in (sinks, left, sizes, r2, errors, moved)), strict=True)
    return [HeadFit(number, head, *row) for head, row in enumerate(rows)]


def _edit(
    model: PreTrainedModel,
    windows: torch.Tensor,
    number: int,
    before: torch.Tensor,
    seen: _Seen,
    chosen: torch.Tensor,
    settings: Desink,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move the sinks of `chosen` (K) key heads: what is left of each head's (N), R², errors, and which was moved."""
    layer = decoder_layers(model)[number]
    attention, groups = layer.self_attn, layer.self_attn.num_key_value_groups
    scale = _hidden_scale(seen.states)
    _scale_channels(layer, scale)
    seen.states *= scale
    keys = attention.k_proj.weight.clone()
    _edit_keys(attention, seen, chosen, settings)
    edited = _Seen(model, windows, number, settings.batch_size)
    # What is left of a sink goes on doing its part, so the gate does the rest.
    wanted = before / edited.others.clamp_min(LEAST_SHARE)  # (B, T, N)
    wanted[:, 0] = 1  # a token that sees nothing but itself loses nothing
    written, r2, errors = _fit_gates(attention.attn_gate, edited.states, edited.outputs, wanted, settings.ridge)
    good = chosen & (errors.view(-1, groups) <= settings.max_error).all(1)
    _keep(attention, good, keys, *written)
    moved = good.repeat_interleave(groups)
    return 1 - torch.where(moved, edited.others, before)[:, 1:].mean((0, 1)), r2, errors, moved


def _hidden_scale(states: torch.Tensor) -> torch.Tensor:
    """
    For each channel of the `states` (B, T, E) in which the first token has more than any other and still next to
    nothing, the power of two that brings it up to their range; 1 for the others. A model may make a sink by hiding its
    first token behind norm weights near zero: then its key is 0 while other logits are far below. To write another key
    for what is left of its state takes weights of hundreds, which int8 and bf16 make ill use of.
    """
    first, rest = states[:, 0].abs().mean(0), states[:, 1:].abs()  # (E), (B, T - 1, E)
    hidden = (first > 0) & (first >= rest.amax((0, 1))) & (first * HIDDEN <= rest.square().mean().sqrt())
    return torch.where(hidden, (rest.max() / first).log2().floor().exp2(), 1)


def _scale_channels(layer: nn.Module, scale: torch.Tensor) -> None:
    """Multiply what the layer's attention reads by `scale` (E), and divide what reads it: nothing else changes."""
    attention = layer.self_attn
    layer.input_layernorm.weight *= scale
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.attn_gate.proj):
        linear.weight /= scale


def _edit_keys(attention: nn.Module, seen: _Seen, chosen: torch.Tensor, settings: Desink) -> None:
    """Give the first token another key in the `chosen` (K) key heads: W − (W x₀ − y)·uᵀ makes the state x₀ into y."""
    linear = attention.k_proj
    first, rest = seen.states[:, 0].double().mean(0), seen.states[:, 1:].flatten(0, 1).double()
    direction = separating(first, with_ridge(rest.T @ rest / len(rest), settings.ridge))  # (E)
    key = linear.weight.double() @ first + (0 if linear.bias is None else linear.bias.double())
    key = key.view(-1, attention.head_dim)  # (K, H)
    wanted = torch.zeros_like(key) if settings.key == "zero" else _fitted_key(attention, seen, settings.ridge)
    if settings.key != "zero" and _is_normed(attention):
        wanted = wanted / attention.k_norm.weight.double()  # a norm leaves the direction only: keep to the old length
        wanted = wanted * key.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True)
    add(linear, torch.where(chosen[:, None], wanted - key, 0).flatten(), direction)


def _fitted_key(attention: nn.Module, seen: _Seen, ridge: float) -> torch.Tensor:
    """
    The key (K, H), as queries meet it at the first position, whose logit comes nearest to the mean (in the exponential)
    of a query's logits at the other keys, less `MARGIN`, for all query heads that share it: of the length that a key
    norm gives it, if there is one.
    """
    queries = seen.queries.double().unflatten(1, (seen.key.shape[1], -1)) * attention.scaling  # (B, K, N/K, T, H)
    shares = seen.others.double().transpose(1, 2).unflatten(1, (seen.key.shape[1], -1))  # (B, K, N/K, T)
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
    Least squares of what heads with the `outputs` (B, T, N, H) put out behind their gates: first of the gates' logits,
    which has a solution in closed form, and from there of the gates, weighted by the outputs' squares.

    Returns:
        Weight and bias with which the gates of `states` (B, T, E) come nearest to `wanted` (B, T, N) times what they
        are; R² (N) and the mean |gate − wanted| (N), both weighted.
    """
    shares = gate_values(gate, states).double().unflatten(2, (wanted.shape[2], -1))  # (B, T, N, G)
    shares = shares * wanted[..., None] / gate.scale
    sizes = outputs.double().square()
    sizes = sizes if shares.shape[3] > 1 else sizes.sum(3, keepdim=True)
    shares, sizes = (values.flatten(2).flatten(0, 1) for values in (shares, sizes))  # (B·T, N·G)
    sizes = sizes / sizes.mean(0).clamp_min(1e-12)
    targets = shares.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    logits = targets.logit()

    inputs = states.flatten(0, 1).double()  # (B·T, E)
    mean = inputs.mean(0)
    inputs = inputs - mean
    penalty = ridge * inputs.square().mean()
    # White inputs, of mean square 1 in all directions, are what L-BFGS is quick on.
    root = torch.linalg.cholesky(with_ridge(inputs.T @ inputs / len(inputs), ridge))
    white = torch.linalg.solve_triangular(root, inputs.T, upper=False).T  # (B·T, E)
    weight = (white.T @ (logits - logits.mean(0)) / len(white)).requires_grad_()  # (E, N·G)
    bias = logits.mean(0).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def error() -> torch.Tensor:
        optimizer.zero_grad()
        errors = (sizes * (torch.sigmoid(white @ weight + bias) - targets).square()).mean(0).sum()
        written = torch.linalg.solve_triangular(root.T, weight, upper=True)
        value = errors + STEEPEST**2 * penalty * written.square().sum()  # the same ridge as that of the logits
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(error)
    found = torch.sigmoid(white @ weight + bias)
    centre = (sizes * shares).mean(0)
    left = (sizes * (found - shares).square()).mean(0) / (sizes * (shares - centre).square()).mean(0).clamp_min(1e-12)
    errors = gate.scale * (sizes * (found - shares).abs()).mean(0)
    r2, errors = (values.unflatten(0, (wanted.shape[2], -1)).mean(1) for values in (1 - left, errors))
    written = torch.linalg.solve_triangular(root.T, weight, upper=True)
    return (written.T, bias - mean @ written), r2, errors


def _keep(
    attention: nn.Module, good: torch.Tensor, old_keys: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Write the gates of the query heads of the `good` (K) key heads, and undo the edit of the other keys."""
    keys, linear = attention.k_proj.weight, attention.attn_gate.proj
    keys.copy_(torch.where(good.repeat_interleave(attention.head_dim)[:, None], keys, old_keys))
    rows = good.repeat_interleave(len(bias) // len(good))
    linear.weight[rows] = weight[rows].to(linear.weight.dtype)
    linear.bias[rows] = bias[rows].to(linear.bias.dtype)
