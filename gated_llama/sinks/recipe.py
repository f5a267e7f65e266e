# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A checkpoint without its attention sink: massive states calmed, the sink moved into the gates, the gates distilled from
the base; each step measured on text that it has not seen, and nothing kept that costs more than it may.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.card import desinking_card
from gated_llama.checkpoints.folder import (
    Checkpoint,
    Source,
    find_source,
    new_folder,
    read_checkpoint,
    refuse_nesting,
)
from gated_llama.checkpoints.measurements import INSPECTION, read_measurements, write_measurements
from gated_llama.conversion.convert import convert_checkpoint
from gated_llama.conversion.families import GATED_TYPES, read_gated_config, recognise
from gated_llama.conversion.verify import no_bars_of_transformers
from gated_llama.data import cut_windows, mixed_windows, read_documents, shuffled, tokenize, with_returns
from gated_llama.errors import UserError, VerificationError
from gated_llama.gates import gate_modules
from gated_llama.inspection import SENTENCE
from gated_llama.inspection.measure import measure
from gated_llama.inspection.quantization import QUANTIZATIONS
from gated_llama.loading import load, refuse_adapter
from gated_llama.sinks.distil import DistilSettings, distil
from gated_llama.sinks.judge import LATER, Judgement, judge, last_tokens, losses
from gated_llama.sinks.layers import sink_tokens, state_lengths
from gated_llama.sinks.move import add_biases, move_sinks
from gated_llama.sinks.result import DesinkResult, Sliding, Step
from gated_llama.sinks.unfinished import Unfinished, as_in_main, from_main
from gated_llama.training.trainer import has_accelerator


HELD_OUT = 0.05  # of the documents; they are what is measured on
LEAST_WINDOWS = 16  # of different text that the shortest text must fill
INSPECTED = 8  # windows that the page is made of
FAR_WINDOWS = 2  # of text longer than the rows
LONG_WINDOWS = 4  # on which it is measured what it costs to slide


@dataclass(frozen=True)
class DesinkSettings:
    """
    What to do, and how much text to spend on it.

    Attributes:
        calm_only: leave the sink where it is; only massive states become calm.
        max_loss: the share by which the loss on held-out text may rise.
        calm_tokens: on which all layers are distilled from the base, with a penalty on massive states; 0 leaves these
            as they are, since on two cores calming cost long texts more than it may (docs/sinks.md).
        move_tokens: on which keys, values and gates are fitted in closed form.
        heal_tokens: on which the gates are distilled from the base afterwards; or 0.
        sliding_window: let every layer of the result see so many tokens only, for streams in constant memory; None
            leaves the layers as they are.
        length, batch_size: tokens of a row; rows of a step, in each process. What is fitted to short rows forgets
            to look back further, so the budget holds for texts four times as long too, and for passages that come back
            in texts twice as long.
        judged_windows: of held-out text, that are measured on.
    """

    calm_only: bool = False
    max_loss: float = 0.01
    calm_tokens: int = 0
    move_tokens: int = 32_768
    heal_tokens: int = 98_304
    sliding_window: int | None = None
    length: int = 2_048
    batch_size: int = 1
    judged_windows: int = 4
    seed: int = 0

    def check(self) -> None:
        """
        Check the settings.

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
        if self.sliding_window is not None and self.calm_only:
            raise UserError("a model that keeps its sink cannot slide: leave out calm_only or sliding_window.")
        if self.sliding_window is not None and self.sliding_window < LATER:
            raise UserError(f"sliding_window must be at least {LATER}, not {self.sliding_window}.")


def desink_checkpoint(
    model: str | os.PathLike,
    text: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    settings: DesinkSettings | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> DesinkResult:
    """
    Write to `output` the gated checkpoint that `model` becomes without its sink, and to `inspection` there what
    [`gated_llama.measure`] finds before and after. Until that is written, what it takes to resume is beside it, in a
    folder of the same name and `.unfinished`.

    Args:
        model: a plain Llama, Mistral, Qwen2 or Qwen3, or a gated checkpoint; a folder or a Hub id.
        text: of the kind that the model is for, see [`gated_llama.data.read_documents`].
        device: `"cuda"`, `"cpu"`, …; a GPU if there is one, if None.
        resume: go on from the last step, or quarter of one, that a run which was stopped had made.
        announce: is told, a line each, what a step did.

    Raises:
        UserError: the input is at fault, and nothing was written; or the run was interrupted.
        VerificationError: the loss rose by more than `settings.max_loss`; nothing was written.
    """
    settings = settings or DesinkSettings()
    settings.check()
    processes = PartialState(cpu=not has_accelerator())
    refuse_adapter(model)
    found = find_source(model, revision)
    refuse_nesting(found.folder, Path(output))
    _refuse_unsuited(found, settings)
    text = [str(source) for source in text]
    asked = {"model": found.found_again_by, "revision": found.revision, "text": text, **asdict(settings)}
    main = processes.is_main_process
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(output, force=force)) if main else None
        run = Unfinished(Path(output))
        if main:
            stack.enter_context(run.opened(asked, resume=resume, force=force))
            with no_bars_of_transformers():
                convert_checkpoint(found.folder, run.gated, link=True, verify=False, progress=False, force=True)
        processes.wait_for_everyone()
        base, edited, tokenizer = _load_twice(run.gated, device or str(processes.device))
        windows = Windows(tokenizer, text, settings, progress and main)
        add_biases(edited)
        set_seed(settings.seed)

        def judge(model: PreTrainedModel) -> Judgement:
            return from_main(windows.judge(model))

        result = run.go_on(edited)
        if result is None:
            result = DesinkResult(str(output), found.name, found.revision, str(windows), judge(base), [])
            run.keep(edited, result)
        announce(f"{found.name}, on {windows}: loss {result.before.loss:.4f}, sink rate {result.before.sink_rate:.1%}")
        _take_steps(base, edited, windows, settings, result, run, progress and main, announce)
        _refuse_if_nothing_held(result, settings)
        checkpoint = read_checkpoint(run.gated)
        dtype = read_gated_config(checkpoint.config, str(run.gated)).dtype or torch.float32
        edited.to(dtype).float()  # what is saved is what is measured
        result.steps[-1] = replace(result.steps[-1], judgement=judge(edited))
        _refuse_if_too_dear(result, settings)
        if settings.sliding_window:
            result = replace(result, sliding=windows.judge_sliding(base, edited, settings.sliding_window))
        if main:
            _inspect(base, edited, tokenizer, windows, result, folder / INSPECTION.parent, progress)
            if settings.sliding_window:
                let_slide(edited.config, settings.sliding_window)
            card = desinking_card(result, found, edited.config, asdict(settings), text)
            _write(edited.to(dtype), checkpoint, card, folder)
    return result


def _write(model: PreTrainedModel, origin: Checkpoint, card: str, folder: Path) -> None:
    """The model, what else `origin` has, the code and the card."""
    model.save_pretrained(folder)
    origin.copy_carried(folder)
    GATED_TYPES[model.config.model_type].copy_code(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _refuse_unsuited(found: Source, settings: DesinkSettings) -> None:
    origin = recognise(read_checkpoint(found.folder).config, found.name)
    if origin.gated_class.config_class is not GatedLlamaConfig:
        raise UserError(f"{found.name} is a mixture of experts, whose sinks are not moved: no such model was tried.")
    if settings.length > (most := origin.config.max_position_embeddings):
        raise UserError(f"{found.name} is made for texts of {most:,} tokens: give a --length of at most so many.")


def _refuse_if_nothing_held(result: DesinkResult, settings: DesinkSettings) -> None:
    if all(done.undone for done in result.steps):
        raise VerificationError(
            f"every step cost more than {settings.max_loss:.2%} of loss: give more text of the kind that the model "
            "is for, or a larger --max-loss."
        )


def _refuse_if_too_dear(result: DesinkResult, settings: DesinkSettings) -> None:
    if dear := _too_dear(result.before, result.after, settings.max_loss):
        raise VerificationError(
            f"{dear}: give more text of the kind that the model is for, more tokens, a larger --length, or a larger "
            "--max-loss."
        )


def _too_dear(before: Judgement, now: Judgement, share: float, last: Judgement | None = None) -> str | None:
    """
    What costs more than it may, in a sentence: the loss on held-out text, far behind in longer texts, or of passages
    that come back, which may rise by as many nats as the first. What cost as much already in the `last` step does not
    count.
    """
    for what, name, may in (
        ("on held-out text", "loss", share * before.loss),
        ("behind the rows' length", "far", share * before.far),
        ("of passages that come back", "recalled", share * before.loss),
    ):
        then, value = getattr(before, name), getattr(now, name)
        if not value <= max(then + may, getattr(last or before, name)):
            return f"the loss {what} rose from {then:.4f} to {value:.4f}, and it may by {may:.4f}"
    return None


def _load_twice(gated: Path, device: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, in the class of a gated model, and the one to edit."""
    with no_bars_of_transformers():
        base, tokenizer = load(gated, dtype=torch.float32)
        edited, _ = load(gated, dtype=torch.float32)
    return base.to(device).eval(), edited.to(device).eval(), tokenizer


def let_slide(config: GatedLlamaConfig, window: int) -> None:
    """Every layer of a model that is loaded with the config sees the last `window` tokens."""
    config.sliding_window = window
    if hasattr(config, "layer_types"):
        del config.layer_types


def _take_steps(
    base: PreTrainedModel,
    edited: PreTrainedModel,
    windows: "Windows",
    settings: DesinkSettings,
    result: DesinkResult,
    run: Unfinished,
    progress: bool,
    announce: Callable[[str], None],
) -> None:
    """Calm, move and heal `edited` as far as `settings` ask for it; each step is added to `result`, and kept."""
    before, steps = result.before, result.steps
    fitted = windows.cut(settings.move_tokens, "move")
    lengths = state_lengths(base, fitted, progress=progress)

    def step(name: str, tokens: int, work: Callable[[], object], *, may_be_undone: bool) -> None:
        """Do it unless a run that is resumed did; measure, say so, and undo what costs more than it may."""
        if any(done.name == name for done in steps):
            return
        last, since = steps[-1].judgement if steps else before, time.monotonic()
        work()
        now = from_main(windows.judge(edited, quantizations=()))
        steps.append(Step(name, tokens, time.monotonic() - since, False, now))
        announce(f"{name} ({tokens:,} tokens, {steps[-1].seconds:.0f} s): {result.verdict()}")
        if may_be_undone and (dear := _too_dear(before, now, settings.max_loss, last)):
            run.restore(edited)
            steps[-1] = replace(steps[-1], undone=True, judgement=last)
            announce(f"{name} was undone: {dear}")
        run.keep(edited, result)

    def learn(name: str, train: str, tokens: int, penalty: float) -> None:
        rows = windows.cut(tokens, name)
        frozen = _layers_with_open_gates(edited) if train == "gates" else ()
        distilling = DistilSettings(train, batch_size=settings.batch_size, penalty=penalty, frozen=frozen)

        def work() -> None:
            distil(edited, base, rows, lengths, distilling, state=run.training, progress=progress)

        step(name, rows.numel(), work, may_be_undone=True)

    def move() -> None:
        found = move_sinks(edited, fitted, sinks=sink_tokens(lengths), progress=progress)
        announce(str(found))
        if not calm and not any(head.moved for head in found.heads):
            raise VerificationError("no head has a sink that is large enough, and fits well enough, to be moved.")
        as_in_main(edited)

    if settings.calm_tokens:
        learn("calmed", "layers", settings.calm_tokens, DistilSettings.penalty)
    calm = any(not done.undone for done in steps)
    if not settings.calm_only:
        # It keeps to a budget of its own, of layers; what it leaves, healing makes good.
        step("moved", fitted.numel(), move, may_be_undone=False)
        if settings.heal_tokens:  # gates alone cannot calm what is massive
            learn("healed", "gates", settings.heal_tokens, DistilSettings.penalty if calm else 0.0)


def _layers_with_open_gates(model: PreTrainedModel) -> tuple[str, ...]:
    """From which no sink was moved, so there is nothing to make good; as parts of their parameters' names."""
    gates = gate_modules(model)
    return tuple(f".layers.{n}." for n in gates if not any(gate.proj.weight.any() for gate in gates[n]))


def _inspect(
    base: PreTrainedModel,
    edited: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: "Windows",
    result: DesinkResult,
    folder: Path,
    progress: bool,
) -> None:
    """Measure both as `gated-llama inspect --compare` does, and draw the page where matplotlib is installed."""
    folder.mkdir()
    measured = []
    for model, name in ((base, result.source), (edited, result.output)):
        found = measure(
            model, tokenizer, windows.judged[:INSPECTED], sentence=SENTENCE, query="which", progress=progress
        )
        measured.append(replace(found, model=Path(name).name))
    written = write_measurements(measured, folder)
    if find_spec("matplotlib"):
        from gated_llama.inspection.page import draw

        draw(read_measurements([written]), folder)


class Windows:
    """
    Windows of a text, half of them cut anywhere, half with a token in front with which texts may begin: each special
    token in turn, so that nothing is fitted to one beginning. Some documents are held out, and measured on. Of those
    that are fitted on, in half passages come back: a head that looks something up seldom does in plain text, and when
    it does not, it attends to a sink.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: list[str], settings: DesinkSettings, progress: bool):
        documents = shuffled(read_documents(text), settings.seed)
        tokens = tokenize(tokenizer, documents, progress=progress)
        if len(tokens) == 1:  # one long text: its end is held out
            cut = max(1, round((1 - HELD_OUT) * len(tokens[0])))
            tokens = [tokens[0][:cut], tokens[0][cut:]]
        held_out = max(1, round(HELD_OUT * len(tokens)))
        self.length, self.seed, self.progress = settings.length, settings.seed, progress
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
        self.long = 4 * (settings.sliding_window or 0)  # tokens of the texts on which sliding is measured
        if len(self.held_out) <= self.long:
            raise UserError(
                f"the held-out text has {len(self.held_out):,} tokens, too few to measure what sliding costs: give "
                f"{round(self.long / HELD_OUT):,} and more, or a smaller sliding_window."
            )
        self.far = cut_windows(self.held_out, FAR_WINDOWS, self._far(tokenizer), f"{self.seed} far")
        twice = cut_windows(self.held_out, FAR_WINDOWS, 2 * self.length, f"{self.seed} recalled")
        self.recalled = with_returns(twice, f"{self.seed} recalled")
        self.judged = self._cut(self.held_out, settings.judged_windows, "judge")
        self.calibration = self._cut(self.train, 8, "calibration")

    def __str__(self) -> str:
        return f"{len(self.train):,} tokens of text and {len(self.held_out):,} held out"

    def cut(self, tokens: int, what: str) -> torch.Tensor:
        """Windows (B, T) of so many tokens in all, others for each `what`; in half of them passages come back."""
        return self._cut(self.train, max(1, tokens // self.length), what, returns=True)

    def judge(self, model: PreTrainedModel, quantizations: tuple[str, ...] = tuple(QUANTIZATIONS)) -> Judgement:
        passes = 3 + len(quantizations)  # the windows as they are, twice with few keys, quantized
        tokens = self.far.numel() + self.recalled.numel() + passes * self.judged.numel()
        tokens += self.calibration.numel() if quantizations else 0
        with tqdm(total=tokens, desc="measuring", unit=" tokens", disable=not self.progress) as bar:
            hook = model.get_decoder().register_forward_hook(lambda m, inputs, output: bar.update(inputs[0].numel()))
            try:
                far, recalled = (losses(model, rows, 1)[:, self.length :] for rows in (self.far, self.recalled))
                found = judge(model, self.judged, self.calibration, quantizations=quantizations)
            finally:
                hook.remove()
        return replace(found, far=far.mean().item(), recalled=recalled.mean().item())

    def _far(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longer texts: four rows, if model and held-out text have so many."""
        return min(4 * self.length, max(2 * self.length, tokenizer.model_max_length), len(self.held_out) - 1)

    def judge_sliding(self, base: PreTrainedModel, edited: PreTrainedModel, window: int) -> Sliding:
        """Losses with and without a window, on texts four times as long as the window."""
        rows = cut_windows(self.held_out, LONG_WINDOWS, self.long, f"{self.seed} sliding")
        found = [
            losses(model, rows, 1, seen).mean().item()
            for model in (base, edited)
            for seen in (None, last_tokens(self.long, window))
        ]
        return Sliding(window, *found)

    def _cut(self, tokens: torch.Tensor, count: int, what: str, *, returns: bool = False) -> torch.Tensor:
        return mixed_windows(tokens, count, self.length, f"{self.seed} {what}", self.beginnings, returns=returns)
