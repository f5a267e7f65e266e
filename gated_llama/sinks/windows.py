# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The text of a run of `desink`: what is fitted on, and what is held out and measured on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gated_llama.data import Document, check_tokens, cut_windows, mixed_windows, shuffled, tokenize, with_returns
from gated_llama.errors import UserError
from gated_llama.inspection.quantization import QUANTIZATIONS
from gated_llama.sinks.judge import LATER, Judgement, judge, losses, quantization_costs
from gated_llama.sinks.result import Sliding
from gated_llama.sinks.settings import DesinkSettings
from gated_llama.sinks.stream import last_tokens


HELD_OUT = 0.05  # of the documents; they are what is measured on
LEAST_WINDOWS = 16  # of different text that the shortest text must fill
FAR_WINDOWS = 2  # of text longer than the rows
SHORT, SHORT_WINDOWS = 256, 32  # tokens of a short text, and how many of these are measured on
SHARES = (0.5, 0.25, 0.25)  # of the tokens trained on, in the longest rows, in a quarter of these, in the shortest
SHORTER = 16  # times, than those fitted on, are the shortest


class Windows:
    """
    Windows of a text, half of them cut anywhere, half with a token in front with which texts may begin: each special
    token in turn, so that nothing is fitted to one beginning. Some documents are held out, and measured on. Of those
    that are fitted on, in half passages come back: a head that looks something up seldom does in plain text, and when
    it does not, it attends to a sink.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: list[Document],
        settings: DesinkSettings,
        config: PreTrainedConfig,
        progress: bool,
    ):
        """`config`: of the model, which is made for so many positions; none of the longer texts has more."""
        tokens = tokenize(tokenizer, shuffled(documents, settings.seed), progress=progress)
        joined = torch.tensor([token for document in tokens for token in document])
        held_out = sum(map(len, tokens[-max(1, round(HELD_OUT * len(tokens))) :]))
        least = max(round(HELD_OUT * len(joined)), 2 * settings.length + 1)
        if not 2 * settings.length < held_out < 4 * least:  # documents are few, or unlike: one of them is cut
            held_out = least
        self.length, self.seed, self.progress = settings.length, settings.seed, progress
        self.longest = min(4 * self.length, config.max_position_embeddings)
        self.train, self.held_out = joined[:-held_out], joined[-held_out:]
        if len(self.train) < LEAST_WINDOWS * self.length or len(self.held_out) <= 2 * self.length:
            raise UserError(
                f"the text has {len(self.train) + len(self.held_out):,} tokens, too few to fit on and to measure on: "
                f"give {round(2 * self.length / HELD_OUT):,} and more."
            )
        begins = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.get_vocab().get("<|endoftext|>"))
        self.beginnings = list(dict.fromkeys(token for token in begins if token is not None))
        check_tokens(max(self.train.max(), self.held_out.max(), *self.beginnings), config.vocab_size)
        far = min(self.longest, len(self.held_out) - 1)
        self.far = cut_windows(self.held_out, FAR_WINDOWS, far, f"{self.seed} far")
        twice = cut_windows(self.held_out, settings.judged_windows, 2 * self.length, f"{self.seed} recalled")
        self.recalled = with_returns(twice, f"{self.seed} recalled")
        self.short = self._cut(self.held_out, SHORT_WINDOWS, "short", min(SHORT, self.length))
        self.judged = self._cut(self.held_out, settings.judged_windows, "judge")
        self.calibration = self._cut(self.train, 8, "calibration")

    def __str__(self) -> str:
        return f"{len(self.train):,} tokens of text and {len(self.held_out):,} held out"

    def cut(self, tokens: int, what: str, length: int | None = None) -> torch.Tensor:
        """Windows (B, T) of so many tokens in all, others for each `what`; in half of them passages come back."""
        length = min(length or self.length, self.length)
        return self._cut(self.train, max(1, tokens // length), what, length, returns=True)

    def batches(self, tokens: int, what: str, rows: int, longest: int) -> list[torch.Tensor]:
        """
        So many `rows` (B, T) for each step of training, others for each `what`, of several lengths: long rows keep what
        stands far back, and short ones make many steps of a text, and keep short texts. Each has one step at least.
        """
        shares, placed = Counter(), []
        for length, share in zip((longest, longest // 4, self.length // SHORTER), SHARES, strict=True):
            shares[max(LATER, length)] += share
        for length, share in shares.items():
            steps = max(1, int(share * tokens) // (length * rows))
            cut = self._cut(self.train, steps * rows, f"{what} {length}", length, returns=True)
            placed += [((step + 0.5) / steps, ids) for step, ids in enumerate(cut.split(rows))]
        return [ids for _, ids in sorted(placed, key=lambda pair: pair[0])]

    def judge(self, model: PreTrainedModel, quantizations: tuple[str, ...] = tuple(QUANTIZATIONS)) -> Judgement:
        passes = 3 + len(quantizations)  # the windows as they are, twice with few keys, quantized
        tokens = self.short.numel() + self.far.numel() + self.recalled.numel() + passes * self.judged.numel()
        tokens += self.calibration.numel() if quantizations else 0
        with self._bar(model, tokens):
            found = {name: self._loss(model, name) for name in ("short", "far", "recalled")}
            judged = judge(model, self.judged, self.calibration, quantizations=quantizations)
        return replace(judged, **found)

    def loss(self, model: PreTrainedModel, name: str) -> float:
        """One of the losses of a [`Judgement`], by its field: "loss", "short", "far" or "recalled"."""
        with self._bar(model, self._rows(name).numel()):
            return self._loss(model, name)

    def _loss(self, model: PreTrainedModel, name: str, seen: torch.Tensor | None = None) -> float:
        rows, first = self._rows(name), self.length if name in ("far", "recalled") else 0
        return losses(model, rows, max(1, self.length // rows.shape[1]), seen)[:, first:].mean().item()

    def _rows(self, name: str) -> torch.Tensor:
        return {"loss": self.judged, "short": self.short, "far": self.far, "recalled": self.recalled}[name]

    def quantization_costs(self, model: PreTrainedModel) -> dict[str, float]:
        """What [`judge`] tells of them."""
        with self._bar(model, (1 + len(QUANTIZATIONS)) * self.judged.numel() + self.calibration.numel()):
            return quantization_costs(model, self.judged, self.calibration)

    @contextmanager
    def _bar(self, model: PreTrainedModel, tokens: int) -> Iterator[None]:
        """Context manager: forwards of so many tokens in all are shown as they pass."""
        with tqdm(total=tokens, desc="measuring", unit=" tokens", disable=not self.progress) as bar:
            # Not a lambda: what a hook returns becomes the output.
            def see(decoder: nn.Module, inputs: tuple, output: object) -> None:
                bar.update(inputs[0].numel())

            hook = model.get_decoder().register_forward_hook(see)
            try:
                yield
            finally:
                hook.remove()

    def judge_sliding(self, base: PreTrainedModel, window: int) -> Sliding:
        """What the base makes of longer texts of which it sees all, and the last `window` tokens alone."""
        length = self.far.shape[1]
        with self._bar(base, 2 * self.far.numel()):
            return Sliding(window, *(self._loss(base, "far", last_tokens(length, size)) for size in (length, window)))

    def _cut(
        self, tokens: torch.Tensor, count: int, what: str, length: int | None = None, *, returns: bool = False
    ) -> torch.Tensor:
        seed = f"{self.seed} {what}"
        return mixed_windows(tokens, count, length or self.length, seed, self.beginnings, returns=returns)
