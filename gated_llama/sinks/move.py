# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Move attention sinks into the gates, without training.

Let p₀ be a head's attention mass on sink tokens, v₀ their value, which is one and the same, and o′ the head's output
over the other tokens alone. Its output is o = (1 − p₀)·o′ + p₀·v₀ = (1 − p₀)·(o′ − v₀) + v₀. So a head that does not
see the sinks, whose values are all shifted by −v₀ (a bias of `v_proj`), which has the gate 1 − p₀, and behind which v₀
is added (a bias of `o_proj`), computes the same. The key that every query meets at a sink is one and the same, so p₀ is
largely a function of the query's own hidden state, and that is what the gate reads.

What makes a sink massive is a neuron or two of one MLP, which write next to nothing elsewhere. If asked for they are
damped: what is left is still told from other tokens, by the KV heads whose gates would not fit and which keep it.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from configuration_gated import GatedLlamaConfig
from gated_llama.errors import UserError
from gated_llama.gates import gate_values
from gated_llama.inspection.attention import decoder_layers, has_experts
from gated_llama.inspection.collectors import MASSIVE
from gated_llama.inspection.losses import token_losses
from gated_llama.sinks.budget import undo_fewest, weights_of_attention
from gated_llama.sinks.judge import losses
from gated_llama.sinks.kv_heads import by_layer
from gated_llama.sinks.layers import Attended, attend, embed, rotary_of, sink_tokens, state_lengths
from gated_llama.sinks.writers import damp, massive_writers


LEAST_GATE = 1e-3  # of its scale that a gate is asked to be; to be shut further would change nothing
HIDDEN = 16.0  # so many times below the size of states is a sink token in a channel that hides it
STEEPEST = 1 / 4  # slope of a sigmoid: an error of its logit is one of at most this share in its value
MARGIN = 2.0  # nats by which a sink's key is to be less attractive than the mean of the others
HEAVIEST = 10.0  # times their median are the weights of a gate's fit capped: a few tokens else have most of it
OUTPUT_RIDGE = 1e-2  # of the regressions of `o_proj`, which has weights to keep near to
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "attn_gate.proj")


@dataclass(frozen=True)
class HeadFit:
    """A head's sink before and after, how well the edit fits, and whether it was kept. Means are over queries."""

    layer: int
    head: int
    sink: float  # mean p₀ before
    sink_left: float  # … and after
    value_size: float  # |v₀| over the mean |v| of the other tokens
    error: float  # mean square of what the edit changes in the head's output, as a share of its mean square
    error_ungated: float  # the same with the gate left open, which is what the gate has to make good
    moved: bool


@dataclass(frozen=True)
class Moved:
    """What `move_sinks` did. Losses are in nats a token, on windows that nothing was fitted on."""

    heads: list[HeadFit]
    loss_before: float
    loss_after: float
    undone: list[int]  # layers left as they were because all together would have cost more than they may
    damped: list[tuple[int, int]]  # layers and the neurons there that made sinks massive
    unmoved: list[dict[str, torch.Tensor]] = field(compare=False, repr=False)  # weights that keep a sink, by layer

    def __str__(self) -> str:
        moved = sum(fit.moved for fit in self.heads)
        undone = f"; undone to keep the budget: layers {', '.join(map(str, self.undone))}" if self.undone else ""
        damped = f"; {self.said_of_damped()}" if self.damped else ""
        return (
            f"moved the sinks of {moved} of {len(self.heads)} heads: loss {self.loss_before:.4f} -> "
            f"{self.loss_after:.4f} ({self.loss_after / self.loss_before - 1:+.2%}){damped}{undone}"
        )

    def said_of_damped(self) -> str:
        """As "damped neurons 4 and 7 of layer 2, neuron 3 of layer 5", or nothing."""
        parts = [
            f"neuron{'s' * (len(neurons) > 1)} {' and '.join(map(str, sorted(neurons)))} of layer {layer}"
            for layer, neurons in by_layer(self.damped).items()
        ]
        return f"damped {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class MoveSettings:
    """
    How to move sinks.

    Attributes:
        max_loss: the share by which the loss may rise, on windows that were not fitted on.
        min_sink: mean p₀ from which on a head's sink is moved. Small sinks, most in early layers, cost much for what
            they get; but a model that keeps them needs its first token in sight (docs/sinks.md).
        max_error: of what a head puts out (see [`HeadFit.error`]); a KV head whose query heads change more on windows
            that were not fitted on stays as it was.
        damping: the neurons that make sinks massive write so many times less (see [`gated_llama.sinks.writers`]); 32
            was tried. If the loss rises by more than `max_loss`, they are left as they were.
        values: shift the values by those of the sinks, which takes biases of `v_proj` and `o_proj`.
        outputs: let `o_proj` make good what it can of the rest, by a regression.
        held_out: share of the windows that nothing is fitted on.
        ridge: of all regressions, as a share of the inputs' mean square. The smaller, the less other keys change, and
            the larger the weights that the edit writes.
        first: of layers that slide, so many first tokens are seen by what is reproduced, and not by what is made: as
            StreamingLLM reads a stream, and a model that needs no sink (see [`gated_llama.sinks.stream`]).
        batch_size: windows at once.
    """

    max_loss: float = 0.1
    min_sink: float = 0.05
    max_error: float = 0.5
    damping: float = 1.0
    values: bool = True
    outputs: bool = True
    held_out: float = 0.125
    ridge: float = 1e-3
    first: int = 0
    batch_size: int = 8


@torch.no_grad()
def move_sinks(
    model: PreTrainedModel,
    windows: torch.Tensor,
    settings: MoveSettings | None = None,
    *,
    sinks: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Moved:
    """
    Edit `model` in place, a layer at a time, each on what the edited ones before it put out: sink tokens no longer
    attract, by a rank-one edit of `k_proj`, and `attn_gate` does what they did, by a regression on what it reads. What
    is fitted is what the layer put out before anything was edited. KV heads without a sink, or whose gates would not
    fit, compute what they did, or nearly so where `damping` is more than 1. It takes no gradient through the model and
    about three plain forwards of `windows`.

    Args:
        windows: token ids (B, T) without padding, of the texts that the model is for, beginning as these do; many more
            tokens than `hidden_size`.
        sinks: which tokens each layer meets as sinks (L, B, T); found if None, which takes one forward more.
        device: where a layer is put for its turn, with the states of all windows (twice, in fp32); the model's own if
            None.

    Raises:
        UserError: the model's gates cannot be written, its layers cannot be edited, or no token is a sink.
    """
    settings, device = settings or MoveSettings(), torch.device(device or model.device)
    _check(model, windows, device)
    model.eval()
    if sinks is None:
        sinks = sink_tokens(state_lengths(model, windows, batch_size=settings.batch_size, progress=progress))
    sinks = sinks.to(device)
    if not sinks.any():
        raise UserError("no layer makes a token of this text massive, so there is no sink to move.")
    add_biases(model, attention=settings.values)
    judged = max(1, round(settings.held_out * len(windows)))  # the last windows
    base = embed(model, windows, device)
    edited, rotary = base.clone(), rotary_of(model, base)
    fits, costs, before, unmoved, damped = [], [], [], [], []
    layers = decoder_layers(model)
    for number in tqdm(range(len(layers)), desc="moving sinks", unit=" layers", disable=not progress):
        before.append(weights_of_attention(layers[number]))
        with _placed(layers[number], device) as layer:
            edit = _LayerEdit(layer, rotary, sinks[number], judged, settings)
            fits += [HeadFit(number, *row) for row in edit.move(base, edited)]
            base, edited = edit.states
            costs.append(edit.cost)
            damped += [(number, neuron) for neuron in edit.damped]
            was = before[number]  # where the layer is at home: no more than one layer stays on the device
            unmoved.append(was | {name: value.to(was[name]) for name, value in edit.unmoved.items()})
            before[number] |= edit.loud
    loss_before, loss_after = (_loss(model, states[-judged:], windows[-judged:]) for states in (base, edited))
    undone, most = [], (1 + settings.max_loss) * loss_before
    if not loss_after <= most and damped:
        for layer, weights in zip(layers, before, strict=True):
            layer.load_state_dict(weights, strict=False)
        loud = replace(settings, damping=1.0)
        return move_sinks(model, windows, loud, sinks=sinks, device=device, progress=progress)
    if not loss_after <= most:
        undone, loss_after = _undo_layers(model, before, costs, windows[-judged:], most)
        fits = [replace(fit, moved=fit.moved and fit.layer not in undone) for fit in fits]
    return Moved(fits, loss_before, loss_after, undone, damped, unmoved)


def _undo_layers(
    model: PreTrainedModel, before: list[dict], costs: list[float], windows: torch.Tensor, most: float
) -> tuple[list[int], float]:
    """Undo the costliest layers until the loss on `windows` is at most `most`: their numbers, and the loss."""
    layers = decoder_layers(model)
    order = sorted((number for number, cost in enumerate(costs) if cost), key=lambda number: -costs[number])
    made = [weights_of_attention(layer) for layer in layers]

    def undo(numbers: Sequence[int]) -> None:
        for number in order:
            layers[number].load_state_dict((before if number in numbers else made)[number], strict=False)

    def loss() -> float:
        return losses(model, windows, batch_size=1).mean().item()

    undone = sorted(undo_fewest(order, undo, [lambda: loss() <= most]))
    return undone, loss()


def add_biases(model: PreTrainedModel, *, attention: bool = True) -> None:
    """Give the gates, and q, k, v and o if `attention`, biases of zero where they have none."""
    names = LINEARS if attention else LINEARS[-1:]
    for layer in decoder_layers(model):
        for linear in map(layer.self_attn.get_submodule, names):
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    model.config.gate_bias = True
    if attention:
        model.config.attention_bias = model.config.attention_out_bias = True


def _check(model: PreTrainedModel, windows: torch.Tensor, device: torch.device) -> None:
    refuse_mps(device)
    if any(map(has_experts, decoder_layers(model))):
        raise UserError("the sinks of mixtures of experts are not moved: no such model was tried.")
    if model.config.model_type != GatedLlamaConfig.model_type:
        raise UserError(f"a {model.config.model_type!r} model has no gates to move sinks into: convert it first.")
    if model.config.gate_strength != 1:
        raise UserError("the gates act at a part of their strength: call model.set_gate_strength(1) first.")
    for number, layer in enumerate(decoder_layers(model)):
        for name in LINEARS:
            linear = layer.self_attn.get_submodule(name)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point() or linear.weight.is_meta:
                raise UserError(
                    f"{name} of layer {number} is a {type(linear).__name__} that cannot be edited: merge adapters "
                    "(merge_and_unload), and load the weights whole, without quantization or offloading."
                )
    if windows.ndim != 2 or len(windows) < 2 or windows.shape[1] < 3:
        raise UserError(
            f"windows of shape {tuple(windows.shape)} are too few or too short: take (B, T), B at least 2 and T 3."
        )
    if windows.numel() < 4 * model.config.hidden_size:
        warnings.warn(
            f"{windows.numel()} tokens are few for regressions on {model.config.hidden_size} channels, so other text "
            f"will suffer: take {4 * model.config.hidden_size} or more.",
            stacklevel=3,
        )


def refuse_mps(device: torch.device) -> None:
    if device.type == "mps":
        raise UserError("regressions take fp64, which Apple's GPUs do not have: give the device cpu.")


@contextmanager
def _placed(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Context manager: the layer is on `device`, in fp32 or finer, and goes back afterwards."""
    weight = layer.self_attn.q_proj.weight
    home, dtype = weight.device, weight.dtype
    try:
        yield layer.to(device, torch.promote_types(dtype, torch.float32))
    finally:
        layer.to(home, dtype)


def _loss(model: PreTrainedModel, states: torch.Tensor, windows: torch.Tensor) -> float:
    """Mean next-token loss, from the states after the last layer."""
    norm, weight = model.get_decoder().norm, model.get_output_embeddings().weight
    found = [
        token_losses(model, norm(rows[None].to(weight.device, weight.dtype)), ids[None])
        for rows, ids in zip(states, windows, strict=True)
    ]
    return torch.cat(found).mean().item()


class _LayerEdit:
    """
    The edit of one layer. `sinks` (B, T) are the tokens that are sinks to it; the last `judged` windows are those that
    nothing is fitted on. Afterwards `states` are those that it puts out as it was, of states as they were, and as it
    is, of those that the edited layers before it put out; `cost` is what the edit changes, as a share of them;
    `unmoved` are the weights with which KV heads that keep a damped sink read it; `damped` are neurons of its MLP, and
    `loud` the weights of it before.
    """

    def __init__(self, layer: nn.Module, rotary: tuple, sinks: torch.Tensor, judged: int, settings: MoveSettings):
        self.layer, self.attention, self.rotary, self.settings = layer, layer.self_attn, rotary, settings
        self.sinks, self.fitted, self.judged = sinks, slice(0, len(sinks) - judged), slice(len(sinks) - judged, None)
        self.groups = self.attention.num_key_value_groups
        self.cost = 0.0
        self.unmoved: dict[str, torch.Tensor] = {}
        self.damped: list[int] = []
        self.loud: dict[str, torch.Tensor] = {}
        self.scale = torch.ones_like(layer.input_layernorm.weight)

    def move(self, base: torch.Tensor, edited: torch.Tensor) -> Iterator[tuple]:
        """Edit the layer, given residual states (B, T, E); yields the fields of `HeadFit` for each head."""
        attention, gate, settings = self.attention, self.attention.attn_gate, self.settings
        origin, seen = self.attend(base, settings.first), self.attend(edited)
        wanted = self.gated(gate_values(gate, origin.states), origin.outputs)  # (B, T, N, H)
        out = attention.o_proj(wanted.flatten(2))
        outputs = self.gated(gate_values(gate, seen.states), seen.outputs)
        others = ~self.sinks
        sink = 1 - origin.others[others].mean(0)  # (N)
        left, errors, ungated = sink.clone(), torch.zeros_like(sink), torch.zeros_like(sink)
        firsts = origin.values[self.fitted][self.sinks[self.fitted]]  # (sinks, K, H)
        value = firsts.mean(0) if len(firsts) else torch.zeros_like(origin.values[0, 0])  # (K, H)
        sizes = (value.norm(dim=1) / origin.values[others].norm(dim=2).mean(0)).repeat_interleave(self.groups)
        good = torch.zeros_like(value[:, 0]).bool()
        chosen = (sink.view(-1, self.groups) >= settings.min_sink).any(1) & bool(len(firsts))  # (K)
        is_damped = bool(len(firsts)) and self.is_damped(base, edited)
        if chosen.any() or is_damped:
            before = weights_of_attention(self.layer)
            if not is_damped:
                self.scale_hidden(seen)
            self.edit_keys(seen, chosen)
            if is_damped:
                self.unmoved = self.reading_sinks_as_they_were(before, origin, seen)
            now = self.attend(edited)
            shift = value.repeat_interleave(self.groups, 0) * settings.values  # (N, H)
            moved, target = now.outputs - shift, wanted - shift
            weight, bias = self.fit_gates(now.states, moved, target)
            shares = torch.sigmoid(now.states @ weight.T + bias)  # (B, T, N·G)
            moved_gated = self.gated(gate.scale * shares, moved)
            errors, ungated = (self.error(found, target, wanted) for found in (moved_gated, moved))
            good = chosen & (errors.view(-1, self.groups) <= settings.max_error).all(1)
            heads = good.repeat_interleave(self.groups)
            self.keep(before | self.unmoved, good, shift, weight, bias)
            if is_damped and not good.all():
                outputs = self.gated(gate_values(gate, seen.states), self.attend(edited).outputs)
            left = torch.where(heads, 1 - now.others[others].mean(0), sink)
            outputs = torch.where(heads[:, None], moved_gated, outputs)
            if good.any() and settings.outputs:
                self.fit_outputs(outputs, target, good)
        result = attention.o_proj(outputs.flatten(2))
        if good.any():
            change = (result - out)[self.judged][others[self.judged]].square().sum()
            self.cost = (change / base[self.judged][others[self.judged]].square().sum()).item()
        origin_out = self.feed(base + out)
        if settings.damping != 1:
            self.damp(edited + result, origin_out)
        self.states = origin_out, self.feed(edited + result)
        columns = (sink, left, sizes, errors, ungated, good.repeat_interleave(self.groups))
        return zip(range(len(sink)), *(column.tolist() for column in columns), strict=True)

    def attend(self, states: torch.Tensor, first: int = 0) -> Attended:
        size = self.settings.batch_size
        parts = [
            attend(self.layer, rows, self.rotary, sinks, first)
            for rows, sinks in zip(states.split(size), self.sinks.split(size), strict=True)
        ]
        return Attended(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Attended)))

    def damp(self, states: torch.Tensor, origin_out: torch.Tensor) -> None:
        """
        Damp the neurons that make tokens massive, if any become so. The MLP reads `states`, and `origin_out` is what
        the layer put out before anything was edited.
        """
        lengths = origin_out.norm(dim=2)
        length = lengths.median().item()
        if (lengths > MASSIVE * length).any():
            neurons = massive_writers(self.layer, states[self.fitted], length, self.settings.batch_size)
            self.damped = neurons.tolist()
            if self.damped:
                weights = self.layer.mlp.up_proj.state_dict()
                self.loud = {f"mlp.up_proj.{name}": value.clone() for name, value in weights.items()}
                damp(self.layer, neurons, self.settings.damping)

    def feed(self, states: torch.Tensor) -> torch.Tensor:
        """The layer's MLP."""
        mlp, norm = self.layer.mlp, self.layer.post_attention_layernorm
        return torch.cat([rows + mlp(norm(rows)) for rows in states.split(self.settings.batch_size)])

    def gated(self, gates: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return gates.unflatten(2, (outputs.shape[2], -1)) * outputs

    def error(self, found: torch.Tensor, target: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Squared error of each head on the held-out windows, as a share of its output's mean square, (N)."""
        missed, size = (x[self.judged].square().sum((0, 1, 3)) for x in (found - target, wanted))
        return missed / size.clamp_min(1e-12)

    def scale_hidden(self, seen: Attended) -> None:
        """
        Bring channels up in which sinks have more than any other token and still next to nothing, by a power of two in
        the norm's weight that is taken back in what reads it. A model may make a sink by hiding it behind norm weights
        near zero: then its key is 0 while other logits are far below. To write another key for what is left of its
        state takes weights of hundreds, which int8 and bf16 make ill use of.
        """
        first, rest = seen.states[self.sinks].abs().mean(0), seen.states[~self.sinks].abs()  # (E), (tokens, E)
        hidden = (first > 0) & (first >= rest.amax(0)) & (first * HIDDEN <= rest.square().mean().sqrt())
        scale = torch.where(hidden, (rest.max() / first).log2().floor().exp2(), 1)
        self.scale = scale
        self.layer.input_layernorm.weight *= scale
        for name in ("q_proj", "k_proj", "v_proj", "attn_gate.proj"):
            self.attention.get_submodule(name).weight /= scale
        seen.states = seen.states * scale

    def edit_keys(self, seen: Attended, chosen: torch.Tensor) -> None:
        """
        Give sinks another key in the `chosen` (K) KV heads: W − (W x₀ − y)·uᵀ makes the state x₀ into y. Of all u with
        u·x₀ = 1 the one is taken that is smallest on other tokens' states.
        """
        linear = self.attention.k_proj
        states, sinks = seen.states[self.fitted].double(), self.sinks[self.fitted]
        first, rest = states[sinks].mean(0), states[~sinks]
        direction = torch.linalg.solve(_with_ridge(rest.T @ rest / len(rest), self.settings.ridge), first)
        self.direction = direction = direction / (direction @ first)  # (E)
        key = linear.weight.double() @ first + (0 if linear.bias is None else linear.bias.double())
        key = key.view(-1, self.attention.head_dim)  # (K, H)
        wanted = self.fitted_key(seen, len(key))
        if self.is_normed:  # a norm leaves the direction only: keep to the old length
            wanted = wanted / self.attention.k_norm.weight.double()
            wanted = wanted * key.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True)
        change = torch.where(chosen[:, None], wanted - key, 0).flatten()
        linear.weight.copy_(linear.weight.double() + torch.outer(change, direction))

    def is_damped(self, base: torch.Tensor, edited: torch.Tensor) -> bool:
        """Damped neurons made sinks less than half as long as they were."""
        if self.settings.damping == 1:
            return False
        now, before = (states[self.sinks].norm(dim=1).mean() for states in (edited, base))
        return bool(2 * now < before)

    def reading_sinks_as_they_were(self, before: dict, origin: Attended, seen: Attended) -> dict[str, torch.Tensor]:
        """
        Weights with which KV heads that keep their sink read what is left of damped ones as these were, so that key and
        value are too: W + W (x₀ − x)·uᵀ, of the state x₀ that is x now, with u as in [`edit_keys`].
        """
        fitted = self.sinks[self.fitted]
        was, now = (found.states[self.fitted][fitted].double().mean(0) for found in (origin, seen))  # (E)
        written = {}
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            weight = before[name].double()
            written[name] = (weight + torch.outer(weight @ (was - now), self.direction)).to(before[name])
        return written

    @property
    def is_normed(self) -> bool:
        return self.attention.k_norm is not None

    def fitted_key(self, seen: Attended, kv_heads: int) -> torch.Tensor:
        """
        The key (K, H), before it is rotated, whose logit comes nearest to the mean (in the exponential) of a query's
        logits at the keys that are no sinks, less `MARGIN`, for all query heads that share it: of the length that a key
        norm gives it, if there is one. The queries are those behind the first sink of each window.
        """
        sinks = self.sinks[self.fitted]
        rows = sinks.any(1)
        sinks, places = sinks[rows], torch.arange(sinks.shape[1], device=sinks.device)
        first = sinks.int().argmax(1)  # (B)
        queries, logits = seen.queries[self.fitted][rows], seen.logits[self.fitted][rows]
        cos, sin = (table[0, first][:, None] for table in self.rotary)  # (B, 1, H)
        # As a key before its rotation meets them.
        queries = apply_rotary_pos_emb(queries, queries, cos, -sin, unsqueeze_dim=2)[0].double()
        seen_others = (~sinks).cumsum(1)  # (B, T)
        reach = self.attention.sliding_window or len(places)
        meeting = (places > first[:, None]) & (places - first[:, None] < reach) & ~sinks & (seen_others > 0)
        targets = logits.double() - seen_others.clamp_min(1).clamp_max(reach).log()[..., None] - MARGIN  # (B, T, N)
        inputs = (queries * self.attention.scaling)[meeting].unflatten(1, (kv_heads, -1))  # (M, K, N/K, H)
        inputs = inputs.transpose(0, 1).flatten(1, 2)  # (K, M', H)
        targets = targets[meeting].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1)  # (K, M')
        scale = self.attention.k_norm.weight.double() if self.is_normed else torch.ones_like(inputs[0, 0])  # (H)
        inputs = inputs * scale
        values, vectors = torch.linalg.eigh(inputs.mT @ inputs)  # (K, H), (K, H, H)
        products = (vectors.mT @ (inputs.mT @ targets[:, :, None])).squeeze(2)  # (K, H)
        penalty = self.settings.ridge * values.mean(1, keepdim=True)
        if self.is_normed:  # the larger the penalty, the shorter the key: halve the span in which the right one lies
            low, high = penalty, 1e12 * penalty
            for _ in range(100):
                penalty = (low * high).sqrt()
                long = (products / (values + penalty)).norm(dim=1, keepdim=True) > scale.numel() ** 0.5
                low, high = torch.where(long, penalty, low), torch.where(long, high, penalty)
        return (vectors @ (products / (values + penalty))[:, :, None]).squeeze(2) * scale

    def fit_gates(
        self, states: torch.Tensor, outputs: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weight (N·G, E) and bias (N·G) of the gates of `states` (B, T, E) with which heads that put out `outputs` come
        nearest to the `target`, both (B, T, N, H): least squares, first of the gates' logits, which has a solution in
        closed form, and from there of what is put out, in which no token may have more weight than `HEAVIEST` medians.
        """
        gate = self.attention.attn_gate
        outputs, target = (x[self.fitted].flatten(0, 1) for x in (outputs, target))  # (M, N, H)
        products, sizes = outputs * target, outputs.square()
        if gate.values_per_head == 1:
            products, sizes = products.sum(2, keepdim=True), sizes.sum(2, keepdim=True)
        products, sizes = products.flatten(1), sizes.flatten(1)  # (M, N·G)
        targets = (products / sizes.clamp_min(1e-12) / gate.scale).clamp(LEAST_GATE, 1 - LEAST_GATE)
        sizes = sizes.minimum(HEAVIEST * sizes.median(0).values)
        sizes = sizes / sizes.mean(0).clamp_min(1e-12)
        precise = states.dtype
        logits = targets.logit()

        inputs = states[self.fitted].flatten(0, 1).double()  # (M, E)
        mean = inputs.mean(0)
        inputs = inputs - mean
        penalty = self.settings.ridge * inputs.square().mean().item()
        # White inputs, of mean square 1 in all directions, are what L-BFGS is quick on.
        root = torch.linalg.cholesky(_with_ridge(inputs.T @ inputs / len(inputs), self.settings.ridge))
        white = torch.linalg.solve_triangular(root, inputs.T, upper=False).T.to(precise)  # (M, E)
        upper = root.T.to(precise)
        centre = (sizes * logits).mean(0)
        weight = (white.T @ (sizes * (logits - centre)) / len(white)).requires_grad_()  # (E, N·G)
        bias = centre.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

        def error() -> torch.Tensor:
            optimizer.zero_grad()
            errors = (sizes * (torch.sigmoid(white @ weight + bias) - targets).square()).mean(0).sum()
            written = torch.linalg.solve_triangular(upper, weight, upper=True)
            value = errors + STEEPEST**2 * penalty * written.square().sum()  # the same ridge as that of the logits
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(error)
        written = torch.linalg.solve_triangular(upper, weight.detach(), upper=True)
        bias = bias.detach() - mean.to(precise) @ written
        return written.T.to(states.dtype), bias.to(states.dtype)

    def keep(
        self, unmoved: dict, good: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> None:
        """Write gates and shifted values of the `good` (K) KV heads; the others are as in `unmoved`."""
        attention, gate = self.attention, self.attention.attn_gate.proj
        if not good.any():
            self.layer.load_state_dict(unmoved, strict=False)
            return
        rows = good.repeat_interleave(attention.head_dim)[:, None]
        for name in ("k_proj", "v_proj"):
            linear, old = attention.get_submodule(name), unmoved[f"self_attn.{name}.weight"]
            linear.weight.copy_(torch.where(rows, linear.weight, old / self.scale))
        if self.settings.values:
            shift = shift * good.repeat_interleave(self.groups)[:, None]
            attention.v_proj.bias -= shift[:: self.groups].flatten()
            attention.o_proj.bias += attention.o_proj.weight @ shift.flatten()
        rows = good.repeat_interleave(len(bias) // len(good))
        gate.weight[rows], gate.bias[rows] = weight[rows], bias[rows]

    def fit_outputs(self, outputs: torch.Tensor, target: torch.Tensor, good: torch.Tensor) -> None:
        """
        Let `o_proj` make of the gated `outputs` of each `good` (K) KV head what it made of their `target`, both
        (B, T, N, H), as near as it helps. None makes good what another misses, so each can be undone by itself.
        """
        linear, others, missed = self.attention.o_proj, ~self.sinks, target - outputs
        size = self.groups * self.attention.head_dim
        for head in good.nonzero().flatten().tolist():
            columns = slice(head * size, (head + 1) * size)
            (read, left), (read_judged, left_judged) = (
                [x[rows].flatten(2)[others[rows]][:, columns].double() for x in (outputs, missed)]  # (tokens, size)
                for rows in (self.fitted, self.judged)
            )
            mean, left_mean = (read.mean(0), left.mean(0)) if linear.bias is not None else (0.0, 0.0)
            read, left = read - mean, left - left_mean
            second = _with_ridge(read.T @ read / len(read), OUTPUT_RIDGE)
            change = torch.linalg.solve(second, read.T @ left / len(read))  # (size, size)
            still_left = left_judged - left_mean - (read_judged - mean) @ change
            weight = linear.weight[:, columns].double()
            if (still_left @ weight.T).square().sum() < (left_judged @ weight.T).square().sum():
                linear.weight[:, columns] += (weight @ change.T).to(linear.weight)
                if linear.bias is not None:
                    linear.bias += (weight @ (left_mean - mean @ change)).to(linear.bias)


def _with_ridge(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """The mean square `second` (E, E) of some vectors, with `ridge` times the mean of its diagonal added to that."""
    second = second.clone()
    second.diagonal().add_(ridge * second.diagonal().mean())
    return second
