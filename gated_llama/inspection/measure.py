# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Look inside a model on a text: attention sinks, massive activations, gates, and what the gates are worth. Everything is
summed up as it passes.
"""

from contextlib import ExitStack

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.data import check_tokens
from gated_llama.errors import UserError
from gated_llama.gates import gate_modules
from gated_llama.inspection.attention import capture_attention, decoder_layers, has_experts
from gated_llama.inspection.collectors import COLLECTORS
from gated_llama.inspection.losses import last_states, logits_in_parts, token_losses
from gated_llama.inspection.quantization import QUANTIZATIONS, quantized
from gated_llama.inspection.results import Measurements
from gated_llama.inspection.text import TEXT_TOKENS, look_at, look_at_sentence


QUANTIZED = 256  # tokens on which quantization is simulated
COMPARED, COMPARED_SHARE = 256, 0.0125  # tokens of a piece that is run again with other gates; share of the text


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    compared_windows: int | None = None,
    sentence: str | None = None,
    query: str | None = None,
    progress: bool = False,
) -> Measurements:
    """
    Measure a model's loss, attention sinks, massive activations and gates on a text.

    Args:
        model: a causal language model whose layers are Llama's: Llama, Mistral, Qwen2, Qwen3 or gated.
        windows: token ids (windows, T) without padding, each measured by itself.
        compared_windows: how many of them to run again with the gates open and inverted, if there are gates; if None,
            as many pieces of 256 tokens as make an eightieth of the text.
        sentence, query: a short text to look at token by token, and the word in it whose attention is shown (if None,
            its last token; see [`look_at_sentence`]).

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
    compared_windows: int | None,
    sentence: str | None,
    query: str | None,
    progress: bool,
) -> Measurements:
    length = windows.shape[1]
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}.")
    if length < 2:
        raise UserError(f"windows of {length} tokens are too short to measure: take at least 2.")
    check_tokens(windows.max(), model.get_input_embeddings().num_embeddings)
    _check_layers(model)
    model.eval()
    gated = bool(gate_modules(model))
    collectors = {name: collector(model, tokenizer, length) for name, collector in COLLECTORS.items()}
    losses = torch.zeros(length - 1, dtype=torch.float64)
    compared, trained = _compared(windows, compared_windows) if gated else windows[:0], []
    with ExitStack() as stack, tqdm(total=windows.numel(), unit=" tokens", disable=not progress) as bar:
        stack.enter_context(torch.no_grad())
        for collector in collectors.values():
            stack.enter_context(collector.watching())
        for part in windows.split(batch_size):
            for collector in collectors.values():
                collector.begin(part)
            states = last_states(model, part)
            losses += token_losses(model, states, part).sum(0)
            trained += states[: len(compared) - len(trained), : compared.shape[1]].clone()  # not all of them
            for collector in collectors.values():
                collector.end(part)
            bar.update(part.numel())
    losses /= len(windows)
    if not losses.isfinite().all():
        raise UserError(f"the loss of {_name(model)} on this text is no number: its weights or its dtype are at fault.")
    starts = [0, *(2**power for power in range(4, 20) if 2**power < length - 1)]
    bounds = zip(starts, [*starts[1:], length - 1], strict=True)
    return Measurements(
        model=_name(model),
        gated=gated,
        windows=len(windows),
        length=length,
        loss=losses.mean().item(),
        loss_by_position=[(start + 1, losses[start:stop].mean().item()) for start, stop in bounds],
        **{name: collector.report(len(windows)) for name, collector in collectors.items()},
        text=look_at(model, tokenizer, windows[:1, :TEXT_TOKENS], maps=False),
        sentence=look_at_sentence(model, tokenizer, sentence, query) if sentence else None,
        without_gates=_without_gates(model, compared, trained) if len(compared) else None,
        quantization=_quantized(model, windows),
    )


def _check_layers(model: PreTrainedModel) -> None:
    def is_known(layer: nn.Module) -> bool:
        return hasattr(layer.self_attn, "o_proj") and (has_experts(layer) or hasattr(layer.mlp, "down_proj"))

    if sum(map(is_known, decoder_layers(model))) != getattr(model.config, "num_hidden_layers", None):
        raise UserError(
            f"the layers of {_name(model)} ({type(model).__name__}) are not built as Llama's, with self_attn.o_proj "
            "and mlp.down_proj, so they are not measured."
        )


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def _compared(windows: torch.Tensor, count: int | None) -> torch.Tensor:
    """The windows that are run again with other gates."""
    if count is not None:
        return windows[:count]
    pieces = windows[:, :COMPARED]
    return pieces[: max(1, round(COMPARED_SHARE * windows.numel() / pieces.shape[1]))]


@torch.no_grad()
def _quantized(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
    """
    What 8 bits cost on a piece of the last window, by scales of the first; nothing where weights are packed, or in
    experts, which are not simulated.
    """
    if any(map(has_experts, decoder_layers(model))):
        return {}
    weights = [parameter.data for parameter in model.parameters()]
    if any(type(w) is not torch.Tensor or w.is_meta or not w.is_floating_point() for w in weights):
        return {}

    def loss(ids: torch.Tensor) -> float:
        return token_losses(model, last_states(model, ids), ids).mean().item()

    first, last = windows[:1, :QUANTIZED], windows[-1:, :QUANTIZED]
    usual, costs = loss(last), {}
    for name, (how, bits) in QUANTIZATIONS.items():
        if bits == 8:
            with quantized(model, how, lambda: loss(first), bits):
                costs[name] = loss(last) - usual
    return costs


@torch.no_grad()
def _without_gates(
    model: PreTrainedModel, windows: torch.Tensor, trained: list[torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """
    The loss with every gate at 1 and with every gate g at 2 - g, and what that does to the predictions. `trained` are
    the last states (T, E) of each of the `windows` with the gates as they are.
    """
    own = model.config.gate_strength
    sums = {name: [0.0, 0.0] for name in ("trained", "open", "inverted")}
    try:
        for ids, before in zip(windows[:, None], trained, strict=True):
            states = {"trained": before[None]}
            for name, strength in (("open", 0.0), ("inverted", -own)):
                model.set_gate_strength(strength)
                with capture_attention(model, lambda *block: None):  # the kernel that `trained` came by
                    states[name] = last_states(model, ids)
            for parts in zip(*(logits_in_parts(model, of) for of in states.values()), strict=True):
                start, stop, _ = parts[0]
                wanted = ids[:, start + 1 : stop + 1, None].to(before.device)
                expected = parts[0][2].float().log_softmax(-1)
                for name, (_, _, logits) in zip(states, parts, strict=True):
                    found = expected if name == "trained" else logits.float().log_softmax(-1)
                    sums[name][0] -= found[:, : wanted.shape[1]].gather(2, wanted).cpu().double().sum().item()
                    if name != "trained":
                        difference = nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                        sums[name][1] += difference.sum(-1).cpu().double().sum().item()
    finally:
        model.set_gate_strength(own)
    count, length = windows.shape
    return {  # a divergence of next to nothing may be rounded below 0
        name: (loss / count / (length - 1), max(0.0, divergence) / count / length)
        for name, (loss, divergence) in sums.items()
    }
