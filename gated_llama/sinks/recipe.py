# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A checkpoint without its attention sink: massive states calmed, the sink moved into the gates, the gates distilled from
the base; each step measured on text that it has not seen, and nothing kept that costs more than it may.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import configuration_gated
import modeling_gated
from gated_llama.checkpoints.card import desinking_card
from gated_llama.checkpoints.folder import find_source, new_folder, read_checkpoint, refuse_nesting
from gated_llama.conversion.convert import convert_checkpoint
from gated_llama.conversion.families import read_gated_config
from gated_llama.conversion.verify import no_bars_of_transformers
from gated_llama.data import begun, cut_windows, read_documents, shuffled, tokenize
from gated_llama.errors import UserError, VerificationError
from gated_llama.loading import load, refuse_adapter
from gated_llama.sinks.distil import DistilSettings, distil
from gated_llama.sinks.judge import LATER, Judgement, judge
from gated_llama.sinks.layers import sink_tokens, state_lengths
from gated_llama.sinks.move import add_biases, move_sinks


HELD_OUT = 0.05  # of the documents; they are what is measured on
LEAST_WINDOWS = 16  # of different text that the shortest text must fill


@dataclass(frozen=True)
class DesinkSettings:
    """
    What to do, and how much text to spend on it.

    Attributes:
        calm_only: leave the sink where it is; only massive states become calm.
        max_loss: the share by which the loss on held-out text may rise.
        calm_tokens: on which all layers are distilled from the base, with a penalty on massive states; or 0.
        move_tokens: on which keys, values and gates are fitted in closed form.
        heal_tokens: on which the gates are distilled from the base afterwards; or 0.
        length, batch_size: tokens of a row; rows of a step.
        judged_windows: of held-out text, that are measured on.
    """

    calm_only: bool = False
    max_loss: float = 0.01
    calm_tokens: int = 196_608
    move_tokens: int = 65_536
    heal_tokens: int = 98_304
    length: int = 256
    batch_size: int = 4
    judged_windows: int = 32
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            UserError: a setting has a value that it cannot have.
        """
        for name in ("move_tokens", "length", "batch_size", "judged_windows"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}.")
        if self.length < 2 * LATER:
            raise UserError(f"length must be at least {2 * LATER}, not {self.length}: sinks are seen by later tokens.")
        if self.move_tokens < 2 * self.length:
            raise UserError(f"move_tokens must be at least two rows, {2 * self.length}, not {self.move_tokens}.")
        if not self.max_loss >= 0 or self.heal_tokens < 0 or self.calm_tokens < 0:
            raise UserError("max_loss, calm_tokens and heal_tokens must not be negative.")
        if self.calm_only and not self.calm_tokens:
            raise UserError("calm_only with calm_tokens 0 leaves nothing to do: give calm_tokens.")


@dataclass(frozen=True)
class Step:
    name: str
    tokens: int
    seconds: float
    undone: bool  # it cost more than it may
    judgement: Judgement  # after it


@dataclass(frozen=True)
class DesinkResult:
    """What `desink_checkpoint` did; `to_json()` is what `--json` prints."""

    output: str
    source: str
    revision: str | None
    text: str
    before: Judgement
    steps: list[Step]

    @property
    def after(self) -> Judgement:
        return self.steps[-1].judgement

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def rows(self) -> list[tuple[str, str, str]]:
        """What is compared: name, before, after."""
        one, other = self.before, self.after
        shown = [
            ("loss on held-out text, nats", "{:.4f}", lambda j: j.loss),
            ("attention to the first token", "{:.3f}", lambda j: j.first_token),
            ("attention to the most attended key", "{:.3f}", lambda j: j.most_attended),
            ("heads and windows with a sink", "{:.1%}", lambda j: j.sink_rate),
            ("largest activation (M-Act)", "{:,.0f}", lambda j: j.m_act),
            *((f"{name}, cost", "{:+.3f}", lambda j, n=name: j.penalties[n]) for name in one.penalties),
            (f"last {LATER} tokens only, cost", "{:+.3f}", lambda j: j.short_window),
            (f"last {LATER} tokens and the first, cost", "{:+.3f}", lambda j: j.short_window_and_first),
        ]
        return [(name, form.format(value(one)), form.format(value(other))) for name, form, value in shown]

    def verdict(self) -> str:
        one, other = self.before, self.after
        return (
            f"attention to sinks {one.most_attended:.3f} -> {other.most_attended:.3f}, sink rate {one.sink_rate:.1%}"
            f" -> {other.sink_rate:.1%}, largest activation {one.m_act:,.0f} -> {other.m_act:,.0f}, "
            f"loss {other.loss / one.loss - 1:+.2%}"
        )


def desink_checkpoint(
    model: str | os.PathLike,
    text: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    settings: DesinkSettings | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> DesinkResult:
    """
    Write to `output` the gated checkpoint that `model` becomes without its sink.

    Args:
        model: a plain Llama, Mistral, Qwen2 or Qwen3, or a gated checkpoint; a folder or a Hub id.
        text: of the kind that the model is for, see [`gated_llama.data.read_documents`].
        device: `"cuda"`, `"cpu"`, …; a GPU if there is one, if None.
        announce: is told, a line each, what a step did.

    Raises:
        UserError: the input is at fault; nothing was written.
        VerificationError: the loss rose by more than `settings.max_loss`; nothing was written.
    """
    settings = settings or DesinkSettings()
    settings.check()
    refuse_adapter(model)
    found = find_source(model, revision)
    refuse_nesting(found.folder, Path(output))
    text = [str(source) for source in text]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with new_folder(output, force=force) as folder:
        gated = folder / ".gated"
        with no_bars_of_transformers():
            convert_checkpoint(found.folder, gated, link=True, verify=False, progress=False)
            base, tokenizer = load(gated, dtype=torch.float32)
            edited, _ = load(gated, dtype=torch.float32)
        checkpoint = read_checkpoint(gated)
        dtype = read_gated_config(checkpoint.config, str(gated)).dtype or torch.float32
        windows = Windows(tokenizer, text, settings, progress)
        base, edited = base.to(device).eval(), edited.to(device).eval()
        add_biases(edited)
        before = windows.judge(base)
        announce(f"{found.name}, on {windows}: loss {before.loss:.4f}, sink rate {before.sink_rate:.1%}")
        result = DesinkResult(str(output), found.name, found.revision, str(windows), before, [])
        set_seed(settings.seed)
        _take_steps(base, edited, windows, settings, result, progress, announce)
        steps = result.steps
        if all(done.undone for done in steps):
            raise VerificationError(
                f"every step cost more than {settings.max_loss:.2%} of loss: give more text of the kind that the model "
                "is for, or a larger --max-loss."
            )
        edited.to(dtype).float()  # what is saved is what is measured
        steps[-1] = replace(steps[-1], judgement=windows.judge(edited))
        if not result.after.loss <= (1 + settings.max_loss) * before.loss:
            raise VerificationError(
                f"{result.verdict()}, and it may rise by {settings.max_loss:.2%}: give more text of the kind that the "
                "model is for, more tokens, or a larger --max-loss."
            )
        edited.to(dtype).save_pretrained(folder)
        checkpoint.copy_carried(folder)
        shutil.rmtree(gated)
        for module in (configuration_gated, modeling_gated):
            shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
        card = desinking_card(result, found, edited.config, asdict(settings), text)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return result


def _take_steps(
    base: PreTrainedModel,
    edited: PreTrainedModel,
    windows: "Windows",
    settings: DesinkSettings,
    result: DesinkResult,
    progress: bool,
    announce: Callable[[str], None],
) -> None:
    """Calm, move and heal `edited` as far as `settings` ask for it; each step is added to those of `result`."""
    before, steps = result.before, result.steps
    fitted = windows.cut(settings.move_tokens, "move")
    lengths = state_lengths(base, fitted, progress=progress)

    def step(name: str, tokens: int, work: Callable[[], object]) -> Judgement:
        """Do it, measure, and say so."""
        since = time.monotonic()
        work()
        now = windows.judge(edited, quantizations=())
        steps.append(Step(name, tokens, time.monotonic() - since, False, now))
        announce(f"{name} ({tokens:,} tokens, {steps[-1].seconds:.0f} s): {result.verdict()}")
        return now

    def learn(name: str, train: str, tokens: int, penalty: float) -> None:
        """Training that costs more than it may is undone."""
        last = steps[-1].judgement if steps else before
        was = {key: value.cpu().clone() for key, value in edited.state_dict().items()}
        rows = windows.cut(tokens, name)
        distilling = DistilSettings(train, batch_size=settings.batch_size, penalty=penalty)
        now = step(name, rows.numel(), lambda: distil(edited, base, rows, lengths, distilling, progress=progress))
        if not now.loss <= max((1 + settings.max_loss) * before.loss, last.loss):
            edited.load_state_dict(was)
            steps[-1] = replace(steps[-1], undone=True, judgement=last)
            announce(f"that is more than {settings.max_loss:.2%} of loss, so it was undone")

    if settings.calm_tokens:
        learn("calmed", "layers", settings.calm_tokens, DistilSettings.penalty)
    calm = any(not done.undone for done in steps)
    if not settings.calm_only:
        sinks = sink_tokens(lengths)
        step(
            "moved",
            fitted.numel(),
            lambda: announce(str(move_sinks(edited, fitted, sinks=sinks, progress=progress))),
        )
        if settings.heal_tokens:  # gates alone cannot calm what is massive
            learn("healed", "gates", settings.heal_tokens, DistilSettings.penalty if calm else 0.0)


class Windows:
    """
    Windows of a text, half of them cut anywhere, half with a token in front with which texts may begin: each special
    token in turn, so that nothing is fitted to one beginning. Some documents are held out, and measured on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: list[str], settings: DesinkSettings, progress: bool):
        documents = shuffled(read_documents(text), settings.seed)
        tokens = tokenize(tokenizer, documents, progress=progress)
        if len(tokens) == 1:  # one long text: its end is held out
            cut = max(1, round((1 - HELD_OUT) * len(tokens[0])))
            tokens = [tokens[0][:cut], tokens[0][cut:]]
        held_out = max(1, round(HELD_OUT * len(tokens)))
        self.length, self.seed = settings.length, settings.seed
        self.train, self.held_out = (
            torch.tensor([token for document in part for token in document])
            for part in (tokens[:-held_out], tokens[-held_out:])
        )
        if len(self.train) < LEAST_WINDOWS * self.length or len(self.held_out) <= 2 * self.length:
            raise UserError(
                f"{', '.join(text)} has {len(self.train) + len(self.held_out):,} tokens, too few to fit on and to "
                f"measure on: give at least {2 * LEAST_WINDOWS * self.length:,} in several documents."
            )
        names = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        self.beginnings = list(dict.fromkeys(token for token in names if token is not None))
        self.judged = self._cut(self.held_out, settings.judged_windows, "judge")
        self.calibration = self._cut(self.train, 8, "calibration")

    def __str__(self) -> str:
        return f"{len(self.train):,} tokens of text and {len(self.held_out):,} held out"

    def cut(self, tokens: int, what: str) -> torch.Tensor:
        """Windows (B, T) of so many tokens in all, others for each `what`."""
        return self._cut(self.train, max(1, tokens // self.length), what)

    def judge(self, model: PreTrainedModel, **settings) -> Judgement:
        return judge(model, self.judged, self.calibration, **settings)

    def _cut(self, tokens: torch.Tensor, count: int, what: str) -> torch.Tensor:
        windows = cut_windows(tokens, count, self.length, f"{self.seed} {what}")
        if self.beginnings:
            windows[::2] = begun(windows[::2], self.beginnings)
        return windows
