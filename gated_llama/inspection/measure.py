# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Look inside a model on a text: attention sinks, massive activations, gates, and what the gates are worth. Everything is
summed up as it passes; no attention map and nothing per token is kept.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.errors import UserError
from gated_llama.gates import gate_modules
from gated_llama.inspection.attention import capture_attention, decoder_layers


SINK_SHARE = 0.3  # ε of the sink rate
SINK_LENGTH = 64  # T of the sink rate as it is published
FIRST_QUERIES = 16  # have few keys to look at, so that each gets much
GATE_BINS = 40
TOKENS_AT_ONCE = 1024  # whose logits, or copies in fp32, are held
TEXT_TOKENS = 96  # of a text that is shown token by token
FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from has have if in into is it its no not of on or so than that the their then "
    "there these they this to was were which will with would you".split()
)
KINDS = ("first token", "whitespace", "punctuation", "number", "function word", "other")


@dataclass(frozen=True)
class GateStatistics:
    """Of the gates over some group of tokens; 1 is open, 0 shut, `gate_scale` the most a gate can be."""

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
    Massive activations (Sun et al., arXiv 2402.17762) in the residual stream behind each layer, averaged over windows.
    M-Act (Qiu et al., Table 4) is the mean over layers of the largest.
    """

    top3: list[list[float]]  # the three largest |x|
    median: list[float]  # of |x|
    above_100: float  # share of layers whose largest |x| is above 100
    massive: float  # … and above 1000 medians too, which is what makes it massive
    m_act: float
    # What makes quantization hard (Bondarenko et al., arXiv 2306.12929): of the inputs of these linears, by layer. That
    # of o_proj is the attention's output after the gate.
    input_size: dict[str, list[float]]  # mean |x|
    input_max: dict[str, list[float]]
    input_kurtosis: dict[str, list[float]]


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
    text: "TextReport"  # the beginning of the first window
    sentence: "TextReport | None"
    # Loss with the gates in another state, and the mean KL divergence from the model as it is, in nats a token.
    without_gates: dict[str, tuple[float, float]] | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


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


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    compared_windows: int = 4,
    sentence: str | None = None,
    query: str | None = None,
    progress: bool = False,
) -> Measurements:
    """
    Args:
        model: a causal language model whose layers are Llama's: Llama, Mistral, Qwen2, Qwen3 or gated.
        windows: token ids (windows, T) without padding, each measured by itself.
        compared_windows: how many of them to run again with the gates open and inverted, if there are gates.
        sentence, query: a short text to look at token by token, and the word in it whose attention is shown (its last
            token if None).

    Raises:
        UserError: the windows are too short, hold tokens that the model does not have, or do not fit into memory; or
            the loss is no number.
    """
    try:
        return _measure(model, tokenizer, windows, batch_size, compared_windows, sentence, query, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {batch_size} windows of {windows.shape[1]} tokens at once: take fewer or shorter ones."
        ) from error


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    batch_size: int,
    compared_windows: int,
    sentence: str | None,
    query: str | None,
    progress: bool,
) -> Measurements:
    length = windows.shape[1]
    if length < 2:
        raise UserError(f"windows of {length} tokens are too short to measure: take at least 2.")
    if windows.max() >= model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer made token {int(windows.max())}, and the model has "
            f"{model.get_input_embeddings().num_embeddings}: it is not this model's tokenizer."
        )
    model.eval()
    gates = gate_modules(model)
    attention, activations = _AttentionSums(model.config, length), _ActivationSums(model)
    gate_sums = _GateSums(model, tokenizer) if gates else None
    losses = torch.zeros(length - 1, dtype=torch.float64)
    with ExitStack() as stack, tqdm(total=windows.numel(), unit=" tokens", disable=not progress) as bar:
        stack.enter_context(torch.no_grad())
        stack.enter_context(capture_attention(model, attention.see))
        stack.enter_context(activations.hooked())
        if gate_sums:
            stack.enter_context(gate_sums.hooked())
        for part in windows.split(batch_size):
            if gate_sums:
                gate_sums.begin(part)
            losses += token_losses(model, last_states(model, part), part).sum(0)
            attention.end(part)
            bar.update(part.numel())
    losses /= len(windows)
    compared = windows[:compared_windows]
    if not losses.isfinite().all():
        raise UserError(f"the loss of {_name(model)} on this text is no number: its weights or its dtype are at fault.")
    starts = [0, *(2**power for power in range(4, 20) if 2**power < length - 1)]
    bounds = zip(starts, [*starts[1:], length - 1], strict=True)
    return Measurements(
        model=_name(model),
        gated=bool(gates),
        windows=len(windows),
        length=length,
        loss=losses.mean().item(),
        loss_by_position=[(start + 1, losses[start:stop].mean().item()) for start, stop in bounds],
        attention=attention.report(len(windows), tokenizer),
        activations=activations.report(len(windows)),
        gates=gate_sums.report() if gate_sums else None,
        text=replace(look_at(model, tokenizer, windows[:1, :TEXT_TOKENS]), maps=None),
        sentence=_sentence(model, tokenizer, sentence, query) if sentence else None,
        without_gates=_without_gates(model, compared, batch_size) if gates and len(compared) else None,
    )


@torch.no_grad()
def look_at(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, query: int | None = None
) -> TextReport:
    """
    Args:
        ids: token ids (1, T) of a short text: its maps are kept.
        query: the number of the token whose attention is shown; the last if None.
    """
    tokens = ids.shape[1]
    query = tokens - 1 if query is None else query
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    maps = torch.zeros(layers, heads, tokens, tokens)
    gates: dict[int, torch.Tensor] = {}

    def see(layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        maps[layer, :, start : start + weights.shape[2], first : first + weights.shape[3]] = weights[0].cpu()

    with ExitStack() as stack:
        stack.enter_context(capture_attention(model, see))
        for layer, modules in gate_modules(model).items():
            for module in modules:
                hook = module.register_forward_hook(
                    lambda m, i, output, n=layer: gates.update({n: m.values(output[1][0])})
                )
                stack.callback(hook.remove)
        last_states(model, ids)
    by_head = torch.stack([gates[n].float().cpu().unflatten(1, (heads, -1)).mean(2) for n in gates]) if gates else None
    return TextReport(
        tokens=[tokenizer.decode([token]) for token in ids[0].tolist()],
        query=query,
        attention=_rounded(maps[:, :, query]),
        maps=_rounded(maps),
        gates=_rounded(by_head.mean(2)) if gates else None,  # (L, T, N) -> (L, T)
        query_gates=_rounded(by_head[:, query]) if gates else None,
    )


def _rounded(values: torch.Tensor) -> list:
    """Four places are more than a picture shows."""
    return (values.double() * 1e4).round().div(1e4).tolist()


def _sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, query: str | None
) -> TextReport:
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    ids = tokenizer(sentence, add_special_tokens=False).input_ids[:TEXT_TOKENS]
    ids = [tokenizer.bos_token_id, *ids] if begins else ids
    if len(ids) < 2:
        raise UserError(f"the sentence {sentence!r} has fewer than 2 tokens: take a longer one.")
    place = None
    if query is not None:
        words = [tokenizer.decode([token]).strip() for token in ids]
        place = next((n for n, word in enumerate(words) if word and query.startswith(word) and n), None)
        if place is None:
            raise UserError(f"the sentence {sentence!r} has no token that begins {query!r}.")
    return look_at(model, tokenizer, torch.tensor([ids]), place)


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def last_states(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden states (B, T, E): the logits of a long text would take more room than all else."""
    return model.get_decoder()(ids.to(model.device), attention_mask=mask, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, states: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The logits in fp32 of some tokens at a time, with the first and the last of them."""
    for start in range(0, states.shape[1], TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE, states.shape[1])
        yield start, stop, model.get_output_embeddings()(states[:, start:stop]).float()


def token_losses(model: PreTrainedModel, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In nats, for each predicted token: (B, T - 1), on the CPU."""
    wanted = ids[:, 1:].to(states.device)
    losses = [
        nn.functional.cross_entropy(logits.transpose(1, 2), wanted[:, start:stop], reduction="none")
        for start, stop, logits in _logits(model, states[:, :-1])
    ]
    return torch.cat(losses, dim=1).double().cpu()


@torch.no_grad()
def _without_gates(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> dict[str, tuple[float, float]]:
    """The loss with every gate at 1 and with every gate g at 2 - g, and what that does to the predictions."""
    trained = model.config.gate_strength
    strengths = {"trained": trained, "open": 0.0, "inverted": -trained}
    sums = {name: [0.0, 0.0] for name in strengths}
    try:
        for part in windows.split(batch_size):
            expected = None
            for name, strength in strengths.items():
                model.set_gate_strength(strength)
                states = last_states(model, part)
                expected = states if expected is None else expected
                sums[name][0] += token_losses(model, states, part).mean(1).sum().item()
                for (_, _, p), (_, _, q) in zip(_logits(model, expected), _logits(model, states), strict=True):
                    p, q = p.log_softmax(-1), q.log_softmax(-1)
                    sums[name][1] += (p.exp() * (p - q)).sum().item() / part.shape[1]
    finally:
        model.set_gate_strength(trained)
    return {name: (loss / len(windows), divergence / len(windows)) for name, (loss, divergence) in sums.items()}


class _AttentionSums:
    """The attention that each key receives, summed over queries, window by window."""

    def __init__(self, config, length: int):
        self.length = length
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
        self.received: dict[int, torch.Tensor] = {}  # (B, N, T)
        self.to_first: dict[int, torch.Tensor] = {}  # (B, N, T), by query

    def see(self, layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        self.size[layer] += output.abs().float().mean((1, 3)).sum().item() / self.length
        if layer not in self.received:
            self.received[layer] = weights.new_zeros(*weights.shape[:2], self.length)
            self.to_first[layer] = weights.new_zeros(*weights.shape[:2], self.length)
        self.received[layer][:, :, first : first + weights.shape[3]] += weights.sum(2)
        if first == 0:
            self.to_first[layer][:, :, start : start + weights.shape[2]] = weights[:, :, :, 0]

    def end(self, ids: torch.Tensor) -> None:
        by_key = torch.zeros(ids.shape, dtype=torch.float64)  # (B, T)
        queries = torch.arange(self.length, 0, -1)  # that can see each key
        for layer, received in self.received.items():
            by_query = self.to_first[layer].cpu().double()  # (B, N, T)
            self.first[layer] += by_query.mean(2).sum(0)
            self.first_later[layer] += by_query[:, :, min(FIRST_QUERIES, self.length - 1) :].mean(2).sum(0)
            for length, sinks in self.sinks.items():
                sinks[layer] += (by_query[:, :, :length].mean(2) > SINK_SHARE).double().sum(0)
            by_key += (received.cpu() / queries > SINK_SHARE).double().sum(1)
        self.positions += by_key.sum(0)
        counted, shares = ids[:, : self.counted].flatten(), by_key[:, : self.counted].flatten() / self.first.numel()
        self.token_shares.index_add_(0, counted, shares)
        self.token_counts += torch.bincount(counted, minlength=len(self.token_counts))
        self.received.clear()
        self.to_first.clear()

    def report(self, windows: int, tokenizer: PreTrainedTokenizerBase) -> AttentionReport:
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
                (tokenizer.decode([token]), int(self.token_counts[token]), share)
                for token, share in shares.items()
                if share > 0
            ],
            sink_positions=[(int(p), v) for p, v in zip(places, values.tolist(), strict=True) if v > 0],
        )


class _ActivationSums:
    def __init__(self, model: PreTrainedModel):
        self.layers = decoder_layers(model)
        count = len(self.layers)
        self.top3 = torch.zeros(count, 3, dtype=torch.float64)
        self.median = torch.zeros(count, dtype=torch.float64)
        self.above_100 = torch.zeros(count, dtype=torch.float64)
        self.massive = torch.zeros(count, dtype=torch.float64)
        self.moments = {name: torch.zeros(count, 6, dtype=torch.float64) for name in ("o_proj", "down_proj")}
        self.maxima = {name: torch.zeros(count, dtype=torch.float64) for name in self.moments}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                hooks = [
                    layer.register_forward_hook(lambda m, i, output, n=number: self.see_stream(n, output)),
                    layer.self_attn.o_proj.register_forward_pre_hook(
                        lambda m, inputs, n=number: self.see_input("o_proj", n, inputs[0])
                    ),
                    layer.mlp.down_proj.register_forward_pre_hook(
                        lambda m, inputs, n=number: self.see_input("down_proj", n, inputs[0])
                    ),
                ]
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def see_stream(self, layer: int, output: torch.Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        for window in states:  # (T, E), each by itself as in the paper
            sizes = window.detach().abs().flatten().float()
            top3, median = sizes.topk(3).values.cpu().double(), sizes.median().item()
            self.top3[layer] += top3
            self.median[layer] += median
            self.above_100[layer] += float(top3[0] > 100)
            self.massive[layer] += float(top3[0] > 100 and top3[0] > 1000 * median)

    def see_input(self, name: str, layer: int, states: torch.Tensor) -> None:
        for part in states.detach().flatten(0, -2).split(TOKENS_AT_ONCE):
            x = part.flatten().float()
            square, size = x * x, x.abs()
            sums = [x.sum(), square.sum(), square.dot(x), square.dot(square), size.sum()]
            counted = [x.numel(), *(value.item() for value in sums)]
            self.moments[name][layer] += torch.tensor(counted, dtype=torch.float64)
            self.maxima[name][layer] = max(self.maxima[name][layer].item(), size.max().item())

    def report(self, windows: int) -> ActivationReport:
        size, kurtosis = {}, {}
        for name, moments in self.moments.items():
            m1, m2, m3, m4, absolute = moments.T[1:] / moments.T[0]
            size[name] = absolute.tolist()
            variance = m2 - m1**2
            kurtosis[name] = ((m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2).tolist()
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


class _GateSums:
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.modules = gate_modules(model)
        config = model.config
        self.heads, count = config.num_attention_heads, config.num_hidden_layers
        self.end = config.gate_scale
        self.sums = torch.zeros(count, len(KINDS), 5, dtype=torch.float64)  # as in GateStatistics
        self.tokens = torch.zeros(len(KINDS), dtype=torch.float64)
        self.by_head = torch.zeros(count, self.heads, dtype=torch.float64)
        self.least = torch.full((count, self.heads), math.inf)
        self.most = torch.full((count, self.heads), -math.inf)
        self.histogram = torch.zeros(count, GATE_BINS, dtype=torch.int64)

    def begin(self, ids: torch.Tensor) -> None:
        self.kinds = _kinds(self.tokenizer, ids)  # (B, T)
        self.tokens += torch.bincount(self.kinds.flatten(), minlength=len(KINDS))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, gates in self.modules.items():
                for gate in gates:
                    hook = gate.register_forward_hook(lambda m, i, output, n=layer: self.see(n, m.values(output[1])))
                    stack.callback(hook.remove)
            yield

    def see(self, layer: int, gates: torch.Tensor) -> None:
        gates, kinds = gates.detach().flatten(0, 1), self.kinds.flatten()  # (B·T, N·G), (B·T)
        for gate, kind in zip(gates.split(TOKENS_AT_ONCE), kinds.split(TOKENS_AT_ONCE), strict=True):
            gate = gate.float().cpu()
            values = (
                torch.stack([torch.ones_like(gate), gate, (gate - 1).abs(), gate < 0.1, gate > 1.5]).sum(2).double()
            )
            for number in range(len(KINDS)):  # (5, tokens) -> (5)
                self.sums[layer, number] += values[:, kind == number].sum(1)
            heads = gate.unflatten(1, (self.heads, -1))  # (tokens, N, G)
            self.by_head[layer] += heads.double().mean(2).sum(0)
            self.least[layer] = torch.minimum(self.least[layer], heads.amin((0, 2)))
            self.most[layer] = torch.maximum(self.most[layer], heads.amax((0, 2)))
            self.histogram[layer] += torch.histc(gate, GATE_BINS, 0, self.end).long()

    def report(self) -> GateReport:
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
            histogram_end=self.end,
            always_open=[tuple(place) for place in near_one.nonzero().tolist()],
            always_shut=[tuple(place) for place in (self.most < 0.1).nonzero().tolist()],
        )


def _kinds(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    kinds = {token: KINDS.index(token_kind(tokenizer.decode([token]))) for token in ids.unique().tolist()}
    numbers = torch.tensor([[kinds[token] for token in row] for row in ids.tolist()])
    numbers[:, 0] = KINDS.index("first token")
    return numbers
