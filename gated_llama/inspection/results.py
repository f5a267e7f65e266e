# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `measure` finds, as data."""

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of the gates over a group of tokens; 1 is open, 0 shut, `gate_scale` the most a gate can be."""

    tokens: int
    mean: float
    moved: float  # mean |gate - 1|
    nearly_shut: float  # share below 0.1
    amplifying: float  # share above 1.5


@dataclass(frozen=True)
class GateReport:
    layers: list[GateStatistics]
    kinds: dict[str, GateStatistics]  # over all layers
    heads: list[list[float]]  # mean gate, layer by layer
    histogram: list[list[int]]  # layer by layer; GATE_BINS bins from 0 to `histogram_end`
    histogram_end: float
    always_open: list[tuple[int, int]]  # (layer, head) within 0.1 of 1 at every token and channel
    always_shut: list[tuple[int, int]]  # below 0.1 at every token and channel


@dataclass(frozen=True)
class AttentionReport:
    """
    Attention to the first token and attention sinks.

    `first_token` is F-Attn of Qiu et al. (arXiv 2505.06708, Table 4): the attention weight on the first token, averaged
    over queries, heads and layers; `first_token_later` the same without the first 16 queries. The sink rates are
    Sink^ε_1 of Gu et al. ("When Attention Sink Emerges", arXiv 2410.10781): the share of heads that give the first
    token more than ε = 0.3 of their attention on average over all queries, here averaged over windows.
    """

    first_token: float
    first_token_later: float
    heads: list[list[float]]  # F-Attn, layer by layer
    sink_rate: dict[int, float]  # by length: of the first 64, 128, … tokens of the windows, and of all of them
    sink_heads: list[list[float]]  # share of windows in which a head is a sink, at the full length
    sink_positions: list[tuple[int, float]]  # other positions too: (position, share of heads), the ten with the most
    sink_tokens: list[tuple[str, int, float]]  # of those that are one often: (text, times seen, mean share of heads)
    output_size: list[float]  # mean |x| of each layer's output, before any gate


@dataclass(frozen=True)
class ActivationReport:
    """
    Massive activations (Sun et al., arXiv 2402.17762) in the residual stream after each layer, averaged over windows.
    M-Act (Qiu et al., Table 4) is the mean over layers of the largest.
    """

    top3: list[list[float]]  # the three largest |x|
    median: list[float]  # of |x|
    above_100: float  # share of layers whose largest |x| is above 100
    massive: float  # … and above 1000 medians too, which is what makes it massive
    m_act: float
    # What makes quantization hard (Bondarenko et al., arXiv 2306.12929): of the inputs of these linears, by layer. That
    # of o_proj is the attention's output after the gate. Layers with experts have none for down_proj.
    input_size: dict[str, list[float | None]]  # mean |x|
    input_max: dict[str, list[float]]
    input_kurtosis: dict[str, list[float | None]]


@dataclass(frozen=True)
class MassiveToken:
    """
    A token whose residual state some layer makes more than eight times as long as the layer's median: what attention
    sinks are made of (see docs/sinks.md). The first of a window is one by itself, whatever its text.
    """

    text: str
    first: bool  # of its window; then the text is empty
    seen: int  # times it was massive
    positions: tuple[int, int]  # the least and the largest
    ratios: list[float]  # its length over the median's after each layer, a mean
    written_by: str  # where it becomes massive, such as "the MLP of layer 11"
    removed_by: str | None  # where it is no longer


@dataclass(frozen=True)
class TextReport:
    """What happens on one short text, token by token; lists are by layer first."""

    tokens: list[str]
    query: int  # the token whose attention is shown
    attention: list[list[list[float]]]  # of the query: (layers, heads, tokens)
    maps: list | None  # of a sentence: (layers, heads, queries, keys)
    gates: list[list[float]] | None  # mean over heads and channels: (layers, tokens)
    query_gates: list[list[float]] | None  # of the query, mean over channels: (layers, heads)


@dataclass(frozen=True)
class Measurements:
    model: str
    gated: bool
    windows: int
    length: int
    loss: float  # nats a token
    loss_by_position: list[tuple[int, float]]  # (first position, mean loss up to the next)
    attention: AttentionReport
    activations: ActivationReport
    gates: GateReport | None
    massive: list[MassiveToken]  # ten at most, those seen most often
    text: "TextReport"  # the beginning of the first window
    sentence: "TextReport | None"
    # Loss with the gates in another state, and the mean KL divergence from the model as it is, in nats a token.
    without_gates: dict[str, tuple[float, float]] | None
    quantization: dict[str, float]  # what it would cost, simulated, in nats a token, by the names of `QUANTIZATIONS`

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_json(self) -> str:
        return json.dumps(asdict(self))
