# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is summed up while a text passes through a model: nothing per token, and no attention map, is kept."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.gates import gate_modules
from gated_llama.inspection.attention import capture_attention, decoder_layers, has_experts, layer_states
from gated_llama.inspection.results import ActivationReport, AttentionReport, GateReport, GateStatistics, MassiveToken


SINK_SHARE = 0.3  # of a head's attention, from which on a key is its sink: ε of the sink rate (arXiv 2410.10781)
SINK_LENGTH = 64  # T of the sink rate as it is published
FIRST_QUERIES = 16  # have few keys to look at, so that each gets much
MASSIVE = 8.0  # times a layer's median length, from which on a token's state is massive
GATE_BINS = 40
TOKENS_AT_ONCE, CACHED = 1024, 128  # whose copies in fp32 are held; of those a processor's cache holds
MEDIAN_OF = 2**18  # numbers at least are what a median is of, spread over a window
FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from has have if in into is it its no not of on or so than that the their then "
    "there these they this to was were which will with would you".split()
)
KINDS = ("first token", "whitespace", "punctuation", "number", "function word", "other")


class Collector(ABC):
    """Sums up forwards of windows of `length` tokens, and gives its part of the [`Measurements`]."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int):
        self.model, self.tokenizer, self.length = model, tokenizer, length

    @abstractmethod
    def watching(self) -> AbstractContextManager[None]:
        """The block in which forwards are seen."""

    def begin(self, ids: torch.Tensor) -> None:  # noqa: B027 (few need it)
        """Before each forward, of token ids (B, T)."""

    def end(self, ids: torch.Tensor) -> None:  # noqa: B027
        """After it."""

    @abstractmethod
    def report(self, windows: int) -> Any:
        """After all of them."""


def token_kind(text: str) -> str:
    """One of `KINDS` (the position decides on the first), for the text of one token."""
    word = text.strip()
    if not word:
        return "whitespace"
    if re.fullmatch(r"[\W_]+", word):
        return "punctuation"
    if re.fullmatch(r"[\d.,]+", word):
        return "number"
    return "function word" if word.lower() in FUNCTION_WORDS else "other"


class AttentionSums(Collector):
    """The attention that each key receives, summed over queries, window by window."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int):
        super().__init__(model, tokenizer, length)
        config = model.config
        shape = (config.num_hidden_layers, config.num_attention_heads)
        self.lengths = sorted({*(n for n in (2**p for p in range(6, 20)) if n < length), length})
        self.first = torch.zeros(shape, dtype=torch.float64)  # mean over queries, summed over windows
        self.first_later = torch.zeros(shape, dtype=torch.float64)
        self.sinks = {n: torch.zeros(shape, dtype=torch.float64) for n in self.lengths}
        self.positions = torch.zeros(length, dtype=torch.float64)
        # The last keys are seen by few queries, so any of them may look like a sink.
        self.counted = max(1, length - SINK_LENGTH)
        self.token_shares = torch.zeros(config.vocab_size, dtype=torch.float64)
        self.token_counts = torch.zeros(config.vocab_size, dtype=torch.int64)
        self.size = torch.zeros(config.num_hidden_layers, dtype=torch.float64)  # mean |output|, summed over windows

    def begin(self, ids: torch.Tensor) -> None:
        layers, heads = self.first.shape
        self.received, self.to_first = torch.zeros(2, layers, len(ids), heads, self.length, device=self.model.device)
        self.sizes = torch.zeros(layers, device=self.model.device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with capture_attention(self.model, self.see):
            yield

    def see(self, layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        # `to`: layers may lie on several devices.
        self.sizes[layer] += output.abs().float().mean((1, 3)).sum().to(self.sizes.device)
        received = weights.sum(2)  # (B, N, keys), added up in fp32 and rounded to the dtype of the weights
        self.received[layer, ..., first : first + weights.shape[3]] += received.to(self.received.device)
        if first == 0:
            self.to_first[layer, ..., start : start + weights.shape[2]] = weights[..., 0]

    def end(self, ids: torch.Tensor) -> None:
        self.size += self.sizes.cpu() / self.length
        later = min(FIRST_QUERIES, self.length - 1)
        self.first += self.to_first.mean(3).sum(1).cpu()  # (L, B, N, T) -> (L, N)
        self.first_later += self.to_first[..., later:].mean(3).sum(1).cpu()
        for length, sinks in self.sinks.items():
            sinks += (self.to_first[..., :length].mean(3) > SINK_SHARE).sum(1).cpu()
        queries = torch.arange(self.length, 0, -1, device=self.received.device)  # that can see each key
        by_key = sum((received / queries > SINK_SHARE).sum(1) for received in self.received).cpu().double()  # (B, T)
        self.positions += by_key.sum(0)
        counted, shares = ids[:, : self.counted].flatten(), by_key[:, : self.counted].flatten() / self.first.numel()
        self.token_shares.index_add_(0, counted, shares)
        self.token_counts += torch.bincount(counted, minlength=len(self.token_counts))

    def report(self, windows: int) -> AttentionReport:
        heads = self.first.numel()
        positions = self.positions / (heads * windows)
        values, places = positions[: self.counted].topk(min(10, self.counted))
        tokens = self.token_shares.topk(min(10, len(self.token_shares))).indices.tolist()
        shares = {token: (self.token_shares / self.token_counts)[token].item() for token in tokens}
        return AttentionReport(
            first_token=(self.first / windows).mean().item(),
            first_token_later=(self.first_later / windows).mean().item(),
            heads=(self.first / windows).tolist(),
            sink_rate={length: (sinks / windows).mean().item() for length, sinks in self.sinks.items()},
            sink_heads=(self.sinks[self.length] / windows).tolist(),
            output_size=(self.size / windows).tolist(),
            sink_tokens=[
                (self.tokenizer.decode([token]), int(self.token_counts[token]), share)
                for token, share in shares.items()
                if share > 0
            ],
            sink_positions=[(int(p), v) for p, v in zip(places, values.tolist(), strict=True) if v > 0],
        )


def _or_none(values: torch.Tensor, seen: torch.Tensor) -> list[float | None]:
    return [value if found else None for value, found in zip(values.tolist(), seen.tolist(), strict=True)]


def _median(values: torch.Tensor) -> torch.Tensor:
    """As torch's, which takes several times as long on a CPU."""
    if values.device.type != "cpu":
        return values.median()
    middle = (values.numel() - 1) // 2
    return torch.from_numpy(np.partition(values.numpy(), middle, axis=None))[middle]


class ActivationSums(Collector):
    """Sizes in the residual stream, and of what `o_proj` and `down_proj` read, but for those of experts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int):
        super().__init__(model, tokenizer, length)
        self.layers = decoder_layers(model)
        count = len(self.layers)
        self.top3 = torch.zeros(count, 3, dtype=torch.float64)
        self.median = torch.zeros(count, dtype=torch.float64)
        self.above_100 = torch.zeros(count, dtype=torch.float64)
        self.massive = torch.zeros(count, dtype=torch.float64)
        self.moments = {name: torch.zeros(count, 6, dtype=torch.float64) for name in ("o_proj", "down_proj")}
        self.maxima = {name: torch.zeros(count, dtype=torch.float64) for name in self.moments}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                hooks = [
                    layer.register_forward_hook(lambda m, i, output, n=number: self.see_stream(n, output)),
                    layer.self_attn.o_proj.register_forward_pre_hook(
                        lambda m, inputs, n=number: self.see_input("o_proj", n, inputs[0])
                    ),
                ]
                if not has_experts(layer):
                    hooks.append(
                        layer.mlp.down_proj.register_forward_pre_hook(
                            lambda m, inputs, n=number: self.see_input("down_proj", n, inputs[0])
                        )
                    )
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def begin(self, ids: torch.Tensor) -> None:
        # Fetched from the device in one piece each, since a device is waited for whenever something is.
        self.stream: list[torch.Tensor] = []  # of each layer and window: the three largest sizes, and the median
        self.inputs: list[tuple[str, int, int, torch.Tensor]] = []  # name, layer, count, the five sums and the largest

    def see_stream(self, layer: int, output: torch.Tensor | tuple) -> None:
        for window in layer_states(output):  # (T, E), each by itself as in the paper
            sizes = window.detach().abs()
            # The three largest lie in the three tokens whose own largest are the largest.
            tokens = sizes.amax(1).topk(min(3, len(sizes))).indices
            top3 = sizes[tokens].float().flatten().topk(3).values
            median = _median(sizes[:: -(-sizes.numel() // MEDIAN_OF)].float())
            self.stream.append(torch.cat([top3, median[None]]).to(self.model.device))

    def see_input(self, name: str, layer: int, states: torch.Tensor) -> None:
        for part in states.detach().flatten(0, -2).split(CACHED if states.device.type == "cpu" else TOKENS_AT_ONCE):
            x = part.flatten().float()
            square, size = x * x, x.abs()  # vector_norm takes nine times as long for the last two
            sums = [x.sum(), x.dot(x), square.dot(x), square.dot(square), size.sum(), size.amax()]
            self.inputs.append((name, layer, x.numel(), torch.stack(sums).to(self.model.device)))

    def end(self, ids: torch.Tensor) -> None:
        stream = torch.stack(self.stream).cpu().double().unflatten(0, (len(self.layers), -1))  # (L, B, 4)
        largest, median = stream[..., 0], stream[..., 3]
        self.top3 += stream[..., :3].sum(1)
        self.median += median.sum(1)
        self.above_100 += (largest > 100).sum(1)
        self.massive += ((largest > 100) & (largest > 1000 * median)).sum(1)
        values = torch.stack([sums for *_, sums in self.inputs]).cpu().double()
        for (name, layer, count, _), (*sums, most) in zip(self.inputs, values.tolist(), strict=True):
            self.moments[name][layer] += torch.tensor([count, *sums], dtype=torch.float64)
            self.maxima[name][layer] = max(self.maxima[name][layer].item(), most)

    def report(self, windows: int) -> ActivationReport:
        size, kurtosis = {}, {}
        for name, moments in self.moments.items():
            m1, m2, m3, m4, absolute = moments.T[1:] / moments.T[0]
            variance = m2 - m1**2
            by_layer = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2
            seen = moments.T[0] > 0
            size[name], kurtosis[name] = (_or_none(values, seen) for values in (absolute, by_layer))
        return ActivationReport(
            top3=(self.top3 / windows).tolist(),
            median=(self.median / windows).tolist(),
            above_100=(self.above_100 / windows).mean().item(),
            massive=(self.massive / windows).mean().item(),
            m_act=(self.top3[:, 0] / windows).mean().item(),
            input_size=size,
            input_max={name: maxima.tolist() for name, maxima in self.maxima.items()},
            input_kurtosis=kurtosis,
        )


class GateSums(Collector):
    """The gates by layer, head and kind of token."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int):
        super().__init__(model, tokenizer, length)
        self.modules = gate_modules(model)
        config = model.config
        self.heads, count = config.num_attention_heads, config.num_hidden_layers
        self.largest = getattr(config, "gate_scale", 0.0)
        self.sums = torch.zeros(count, len(KINDS), 5, dtype=torch.float64)  # as in GateStatistics
        self.tokens = torch.zeros(len(KINDS), dtype=torch.float64)
        self.by_head = torch.zeros(count, self.heads, dtype=torch.float64)
        self.least = torch.full((count, self.heads), math.inf)
        self.most = torch.full((count, self.heads), -math.inf)
        self.histogram = torch.zeros(count, GATE_BINS, dtype=torch.int64)

    def begin(self, ids: torch.Tensor) -> None:
        if self.modules:
            kinds = _kinds(self.tokenizer, ids).flatten()  # (B·T)
            self.tokens += kinds.bincount(minlength=len(KINDS))
            self.kinds = kinds.to(self.model.device)
        # Fetched from the device in one piece, as those of activations are.
        self.parts: list[tuple[int, torch.Tensor]] = []  # of some tokens: the layer, and all that is summed up

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, gates in self.modules.items():
                for gate in gates:
                    hook = gate.register_forward_hook(lambda m, i, output, n=layer: self.see(n, m.values(output[1])))
                    stack.callback(hook.remove)
            yield

    def see(self, layer: int, gates: torch.Tensor) -> None:
        gates = gates.detach().flatten(0, 1)  # (B·T, N·G)
        every_kind = self.kinds.to(gates.device)  # layers may lie on several
        for gate, kinds in zip(gates.split(TOKENS_AT_ONCE), every_kind.split(TOKENS_AT_ONCE), strict=True):
            gate = gate.float()
            values = (gate, (gate - 1).abs(), gate < 0.1, gate > 1.5)
            sums = [value.sum(1, dtype=torch.float32) for value in values]
            sums = torch.stack([torch.full_like(sums[0], gate.shape[1]), *sums], dim=1)  # (tokens, 5)
            by_kind = sums.new_zeros(len(KINDS), 5).index_add_(0, kinds, sums)
            heads = gate.unflatten(1, (self.heads, -1))  # (tokens, N, G)
            histogram = torch.histc(gate, GATE_BINS, 0, self.largest)
            found = (by_kind, heads.mean(2).sum(0), heads.amin((0, 2)), heads.amax((0, 2)), histogram)
            self.parts.append((layer, torch.cat([part.flatten() for part in found]).to(self.model.device)))

    def end(self, ids: torch.Tensor) -> None:
        if not self.parts:
            return
        sizes = (5 * len(KINDS), *(self.heads,) * 3, GATE_BINS)
        found = torch.stack([part for _, part in self.parts]).cpu().split(sizes, dim=1)
        for (layer, _), by_kind, by_head, least, most, histogram in zip(self.parts, *found, strict=True):
            self.sums[layer] += by_kind.unflatten(0, (-1, 5))
            self.by_head[layer] += by_head
            self.least[layer] = torch.minimum(self.least[layer], least)
            self.most[layer] = torch.maximum(self.most[layer], most)
            self.histogram[layer] += histogram.long()

    def report(self, windows: int) -> GateReport | None:
        if not self.modules:
            return None

        def summary(sums: torch.Tensor, tokens: float) -> GateStatistics:
            count, *rest = sums.tolist()
            return GateStatistics(round(tokens), *(value / count if count else float("nan") for value in rest))

        tokens = self.tokens.sum().item()
        near_one = (self.least > 0.9) & (self.most < 1.1)
        return GateReport(
            layers=[summary(sums.sum(0), tokens) for sums in self.sums],
            kinds={kind: summary(self.sums[:, n].sum(0), self.tokens[n].item()) for n, kind in enumerate(KINDS)},
            heads=(self.by_head / tokens).tolist(),
            histogram=self.histogram.tolist(),
            histogram_end=self.largest,
            always_open=[tuple(place) for place in near_one.nonzero().tolist()],
            always_shut=[tuple(place) for place in (self.most < 0.1).nonzero().tolist()],
        )


def _kinds(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    kinds = {token: KINDS.index(token_kind(tokenizer.decode([token]))) for token in ids.unique().tolist()}
    numbers = torch.tensor([[kinds[token] for token in row] for row in ids.tolist()])
    numbers[:, 0] = KINDS.index("first token")
    return numbers


class MassiveTokens(Collector):
    """The tokens that some layer makes massive, wherever they stand."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int):
        super().__init__(model, tokenizer, length)
        self.layers = decoder_layers(model)
        # By token (None: the first of a window): times seen, positions, ratios before each MLP and after it.
        self.found: dict[int | None, tuple] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                middle = layer.post_attention_layernorm
                hooks = [
                    middle.register_forward_pre_hook(lambda m, inputs, n=number: self.see(2 * n, inputs[0])),
                    layer.register_forward_hook(lambda m, i, output, n=number: self.see(2 * n + 1, output)),
                ]
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def begin(self, ids: torch.Tensor) -> None:
        self.lengths = torch.zeros(2 * len(self.layers), *ids.shape, device=self.model.device)  # (2L, B, T)

    def see(self, place: int, states: torch.Tensor | tuple) -> None:
        self.lengths[place] = layer_states(states).detach().norm(dim=2, dtype=torch.float32)

    def end(self, ids: torch.Tensor) -> None:
        lengths = self.lengths.cpu()
        ratios = lengths / lengths.median(2, keepdim=True).values.clamp_min(1e-12)
        for row, place in (ratios[1::2] > MASSIVE).any(0).nonzero().tolist():
            key = int(ids[row, place]) if place else None
            seen, least, most, sums = self.found.get(key, (0, place, place, 0.0))
            self.found[key] = (seen + 1, min(least, place), max(most, place), sums + ratios[:, row, place])

    def report(self, windows: int) -> list[MassiveToken]:
        most_seen = sorted(self.found.items(), key=lambda entry: -entry[1][0])[:10]
        return [self._token(token, *found) for token, found in most_seen]

    def _token(self, token: int | None, seen: int, least: int, most: int, sums: torch.Tensor) -> MassiveToken:
        ratios = sums / seen
        massive = (ratios > MASSIVE).nonzero().flatten().tolist() or [ratios.argmax().item()]
        parts = [f"the {part} of layer {n}" for n in range(len(self.layers)) for part in ("attention", "MLP")]
        return MassiveToken(
            text="" if token is None else self.tokenizer.decode([token]),
            first=token is None,
            seen=seen,
            positions=(least, most),
            ratios=[round(ratio, 2) for ratio in ratios[1::2].tolist()],
            written_by=parts[massive[0]],
            removed_by=parts[massive[-1] + 1] if massive[-1] + 1 < len(parts) else None,
        )


COLLECTORS: dict[str, type[Collector]] = {  # by the field of `Measurements` that they give
    "attention": AttentionSums,
    "activations": ActivationSums,
    "gates": GateSums,
    "massive": MassiveTokens,
}
