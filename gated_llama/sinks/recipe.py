# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A checkpoint without its attention sink: the sink moved into the gates, these or all layers distilled from the base, so
that massive states become calm; each step measured on text that it has not seen, and nothing kept that costs more than
it may.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
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
    refuse_replacing,
    save_model,
)
from gated_llama.checkpoints.measurements import INSPECTION, read_measurements, write_measurements
from gated_llama.conversion.convert import convert_checkpoint
from gated_llama.conversion.families import GATED_TYPES, read_gated_config, recognise
from gated_llama.conversion.verify import no_bars_of_transformers
from gated_llama.data import digest_of, read_documents
from gated_llama.errors import UserError, VerificationError, first_line
from gated_llama.gates import gate_modules
from gated_llama.inspection import SENTENCE
from gated_llama.inspection.measure import measure
from gated_llama.loading import load, refuse_adapter
from gated_llama.sinks.budget import excess, highest_losses, too_dear, undo_fewest
from gated_llama.sinks.distil import DistilSettings, distil
from gated_llama.sinks.judge import Judgement
from gated_llama.sinks.kv_heads import KVHeads
from gated_llama.sinks.layers import sink_tokens, state_lengths
from gated_llama.sinks.move import MoveSettings, add_biases, move_sinks, refuse_mps
from gated_llama.sinks.result import DesinkResult, Step
from gated_llama.sinks.settings import SLIDING_ROWS, DesinkSettings
from gated_llama.sinks.stream import FIRST, keeping_first, let_slide
from gated_llama.sinks.unfinished import Unfinished, as_in_main, from_main
from gated_llama.sinks.windows import Windows
from gated_llama.training.trainer import has_accelerator


ORDER = ("moved", "healed", "calmed", "KV heads restored")  # of the steps, whichever are taken
INSPECTED = 8  # windows that the page is made of
COMPARED = 1024  # tokens of a row on which it is measured what KV heads cost
LEAST_SINK = 0.2  # of a head's attention: to move smaller sinks costs more than it is worth (docs/sinks.md)
LEAST_ATTENTION = 0.05  # that a KV head is taken to be rid of, summed over the query heads that share it


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
        text: of all kinds that the model is for, see [`gated_llama.data.read_documents`].
        device: `"cuda"`, `"cpu"`, …; a GPU if there is one, if None.
        resume: go on from the last step, or quarter of one, that a run which was stopped had made.
        announce: is told, a line each, what a step did.

    Raises:
        UserError: the input is at fault, and nothing was written; or the run was interrupted.
        VerificationError: the loss rose by more than `settings.max_loss`; nothing was written.
    """
    settings = settings or DesinkSettings()
    settings.check()  # before anything is downloaded
    processes = PartialState(cpu=not has_accelerator())
    refuse_adapter(model)
    found = find_source(model, revision)
    refuse_nesting(found.folder, output)
    settings, text = _suited(found, settings), [str(source) for source in text]
    for source in text:
        refuse_replacing(source, output)
    device = _device(device, processes)
    documents = read_documents(text)
    asked = {"model": found.found_again_by, "revision": found.revision, "text": text, **asdict(settings)}
    asked |= {"digest of the text": digest_of(documents), "processes": processes.num_processes}
    main, folder = processes.is_main_process, None
    with ExitStack() as stack:
        run = Unfinished(Path(output))
        stack.enter_context(run.opened(asked, resume=resume, force=force))
        if main:
            folder = stack.enter_context(new_folder(output, force=force))  # is there before the run is forgotten
            how = {"link": True, "verify": False, "progress": False, "force": True}
            with no_bars_of_transformers():
                convert_checkpoint(found.found_again_by, run.gated, revision=found.revision, **how)
        processes.wait_for_everyone()
        base, edited, tokenizer = _load_twice(run.gated, device)
        checkpoint = read_checkpoint(run.gated)
        dtype = read_gated_config(checkpoint.config, str(run.gated)).dtype or torch.float32
        windows = Windows(tokenizer, documents, settings, base.config, progress and main)
        add_biases(edited)
        if window := settings.sliding_window:
            let_slide(edited, window)
        set_seed(settings.seed)

        with keeping_first(base, window) if window else nullcontext():
            result = run.go_on(edited)
            if result is None:
                before = from_main(windows.judge(base))
                result = DesinkResult(str(output), found.name, found.revision, str(windows), before, [])
                run.keep(edited, result)
            steps = _Steps(base, edited, dtype, windows, settings, result, run, progress and main, announce)
            result = steps.take()
        if main:
            _inspect(base, edited, tokenizer, windows, result, folder / INSPECTION.parent, progress, announce)
            card = desinking_card(result, found, edited.config, asdict(settings), text)
            _write(edited.to(dtype), checkpoint, card, folder)
    return result


def _write(model: PreTrainedModel, origin: Checkpoint, card: str, folder: Path) -> None:
    """The model, what else `origin` has, the code and the card."""
    save_model(model, folder)
    origin.copy_carried(folder)
    GATED_TYPES[model.config.model_type].copy_code(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _suited(found: Source, settings: DesinkSettings) -> DesinkSettings:
    """The settings for this model, or a refusal."""
    origin = recognise(read_checkpoint(found.folder).config, found.name)
    if origin.gated_class.config_class is not GatedLlamaConfig:
        raise UserError(f"{found.name} is a mixture of experts, whose sinks are not moved: no such model was tried.")
    if not origin.gated_class.__name__.endswith("ForCausalLM"):
        raise UserError(f"{found.name} is no causal language model: only of these sinks are moved.")
    if getattr(origin.config, "gate_strength", 1) != 1:
        raise UserError(f"the gates of {found.name} act at a part of their strength: set its gate_strength to 1.")
    most = origin.config.max_position_embeddings
    settings = settings.suited_to(most)
    settings.check()
    if 2 * settings.length > most:
        raise UserError(
            f"{found.name} is made for texts of {most:,} tokens, and passages come back in texts twice as long as a "
            f"row: give a --length of at most {most // 2:,}."
        )
    window = settings.sliding_window or 0
    if SLIDING_ROWS * window > most:
        raise UserError(
            f"{found.name} is made for texts of {most:,} tokens, and what slides is fitted to texts four times as long "
            f"as the window: give a --sliding-window of at most {most // SLIDING_ROWS:,}."
        )
    if settings.length <= window:
        raise UserError(f"rows of {settings.length:,} tokens never slide: give a --length above --sliding-window.")
    return settings


def _device(asked: str | None, processes: PartialState) -> str:
    """The one asked for, or that of this process; regressions take fp64, which Apple's GPUs do not have."""
    if asked and ":" in asked and processes.num_processes > 1:
        raise UserError(f"each process takes a device of its own: give --device {asked.partition(':')[0]}.")
    if asked:
        return asked
    return "cpu" if processes.device.type == "mps" else str(processes.device)


def _load_twice(gated: Path, device: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, in the class of a gated model, and the one to edit."""
    with no_bars_of_transformers():
        base, tokenizer = load(gated, dtype=torch.float32)
        edited, _ = load(gated, dtype=torch.float32)
    try:
        base, edited = base.to(device).eval(), edited.to(device).eval()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # of a name that is none, or of a device that is not there
        raise UserError(f"the model cannot be put on the device {device!r}: {first_line(error)}") from error
    refuse_mps(base.device)  # before it is trained
    return base, edited, tokenizer


@dataclass
class _Steps:
    """
    Moves, heals and calms `edited` as far as `settings` ask for it, and restores KV heads that cost too much. Each
    step is added to `result`, and kept; its weights are rounded to `dtype`, so that what is measured is what is saved.
    """

    base: PreTrainedModel
    edited: PreTrainedModel
    dtype: torch.dtype
    windows: Windows
    settings: DesinkSettings
    result: DesinkResult
    run: Unfinished
    progress: bool
    announce: Callable[[str], None]

    def take(self) -> DesinkResult:
        """All that are asked for; the rest is as in [`finished`]."""
        settings, before = self.settings, self.result.before
        started = f"loss {before.loss:.4f}, sink rate {before.sink_rate:.1%}"
        self.announce(f"{self.result.source}, on {self.windows}: {started}")
        self.fitted = self.windows.cut(settings.move_tokens, "move")
        self.lengths = state_lengths(self.base, self.fitted, progress=self.progress)
        if not settings.calm_only:  # whatever it costs: what follows makes good what it can
            self.step("moved", self.fitted.numel(), self.move, may_be_undone=False)
            self.learn("healed", "gates", settings.heal_tokens)
        self.learn("calmed", "layers", settings.calm_tokens)
        self.restore_if_too_dear()
        return self.finished()

    def restore_if_too_dear(self) -> None:
        """But for what slides, which needs all sinks gone, and what is calm, whose keys read no massive states."""
        is_calm = any(done.name == "calmed" and not done.undone for done in self.result.steps)
        if is_calm or self.settings.sliding_window:
            return
        if too_dear(self.result.before, self.result.after, self.settings.max_loss):
            rows = self.windows.cut(4 * COMPARED, "restored", COMPARED)[1:3]  # one plain, in one passages come back
            self.step("KV heads restored", rows.numel(), lambda: self.restore_heads(rows), may_be_undone=False)

    def finished(self) -> DesinkResult:
        """
        The result, with what quantization costs and what sliding does.

        Raises:
            VerificationError: nothing was done in the end, or what was costs too much.
        """
        steps, share = self.result.steps, self.settings.max_loss
        if all(done.undone for done in steps):
            raise VerificationError(
                f"every step cost more than {share:.2%} of loss: give more text of the kind that the model is for, or "
                "a larger --max-loss."
            )
        if dear := too_dear(self.result.before, self.result.after, share):
            raise VerificationError(
                f"{dear}: give more text of the kind that the model is for, more tokens, a larger --length, or a "
                "larger --max-loss."
            )
        penalties = from_main(self.windows.quantization_costs(self.edited))
        steps[-1] = replace(steps[-1], judgement=replace(self.result.after, penalties=penalties))
        window = self.settings.sliding_window
        return replace(self.result, sliding=self.windows.judge_sliding(self.base, window)) if window else self.result

    def step(self, name: str, tokens: int, work: Callable[[], str | None], *, may_be_undone: bool) -> None:
        """
        Do it, unless a run that is resumed did, or left it out; measure, say so, and undo what costs more than it may
        and makes nothing good. What `work` returns is noted.
        """
        before, steps = self.result.before, self.result.steps
        if steps and ORDER.index(name) <= ORDER.index(steps[-1].name):
            return
        last, since = steps[-1].judgement if steps else before, time.monotonic()
        note = work()
        _round(self.edited, self.dtype)
        now = from_main(self.windows.judge(self.edited, quantizations=()))
        steps.append(Step(name, tokens, time.monotonic() - since, False, now, note or ""))
        self.announce(f"{steps[-1].title} ({tokens:,} tokens, {steps[-1].seconds:.0f} s): {self.result.verdict()}")
        share = self.settings.max_loss
        over = [sum(excess(before, judged, share).values()) for judged in (last, now)]
        if may_be_undone and not over[1] < over[0] and (dear := too_dear(before, now, share)):
            self.run.restore(self.edited)
            steps[-1] = replace(steps[-1], undone=True, judgement=last)
            self.announce(f"{name} was undone: {dear}")
        PartialState().wait_for_everyone()  # what is kept takes the place of what another process may still restore
        self.run.keep(self.edited, self.result)

    def learn(self, name: str, train: str, tokens: int) -> None:
        """All layers, with a penalty on massive states; or the gates alone, which cannot calm what is massive."""
        distilling = DistilSettings(train)
        if train == "gates":
            distilling = replace(distilling, states=0.0, penalty=0.0, frozen=_layers_with_open_gates(self.edited))
        if not tokens or len(distilling.frozen) == self.edited.config.num_hidden_layers:
            return
        windows, rows = self.windows, self.settings.batch_size * PartialState().num_processes
        longest = windows.length if train == "gates" else windows.longest  # layers forget what they do not look back to
        batches = windows.batches(tokens, name, rows, longest)

        def work() -> None:
            distil(
                self.edited,
                self.base,
                batches,
                self.lengths,
                distilling,
                state=self.run.training,
                progress=self.progress,
            )

        self.step(name, sum(ids.numel() for ids in batches), work, may_be_undone=True)

    def move(self) -> str:
        asked = MoveSettings(max_loss=float("inf"), damping=self.settings.damping)
        if self.settings.sliding_window:  # behind which no head has its sink any more, whether or not its gate fits
            asked = replace(asked, max_error=float("inf"), first=FIRST)
        elif not self.settings.calm_tokens:  # with which small sinks, too, lose the state that makes them
            asked = replace(asked, min_sink=LEAST_SINK)
        found = move_sinks(self.edited, self.fitted, asked, sinks=sink_tokens(self.lengths), progress=self.progress)
        self.run.keep_unmoved(found.unmoved)
        self.announce(str(found))
        if not self.settings.calm_tokens and not any(head.moved for head in found.heads):
            raise VerificationError("no head has a sink that is large enough, and fits well enough, to be moved.")
        as_in_main(self.edited)
        return found.said_of_damped()

    def restore_heads(self, rows: torch.Tensor) -> str:
        """
        Restore KV heads to what they were before the move, until the budget is kept: those first that cost the most of
        it for the attention to sinks that they are rid of.
        """
        heads = KVHeads(self.edited, self.run.unmoved(), rows, self.dtype)
        moved, config = heads.moved(), self.edited.config
        groups = config.num_attention_heads // config.num_key_value_heads

        def attention(judged: Judgement, layer: int, head: int) -> float:
            return sum(judged.heads[layer][head * groups : (head + 1) * groups])

        rid = {head: attention(self.result.before, *head) - attention(self.result.after, *head) for head in moved}
        saved = heads.divergence_saved(self.base, moved, progress=self.progress)
        order = sorted(moved, key=lambda head: -saved[head] / max(rid[head], LEAST_ATTENTION))
        order = from_main([head for head in order if saved[head] >= 0])

        def keeps(name: str, most: float) -> bool:
            return from_main(self.windows.loss(self.edited, name) <= most)

        highest = highest_losses(self.result.before, self.settings.max_loss)
        given = undo_fewest(order, heads.restore, [partial(keeps, *budget) for budget in highest.items()])
        if len(given) == len(moved):
            raise VerificationError(
                f"to move the sink of any KV head costs more than {self.settings.max_loss:.2%} of loss: give more "
                "text of the kind that the model is for, or a larger --max-loss."
            )
        return f"{len(given)} of {len(moved)}: {heads.said(given)}"


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights alone: a cast of the model takes its rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _layers_with_open_gates(model: PreTrainedModel) -> tuple[str, ...]:
    """From which no sink was moved, so there is nothing to make good; as parts of their parameters' names."""
    gates = gate_modules(model)
    return tuple(f".layers.{n}." for n in gates if not any(gate.proj.weight.any() for gate in gates[n]))


def _inspect(
    base: PreTrainedModel,
    edited: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    result: DesinkResult,
    folder: Path,
    progress: bool,
    announce: Callable[[str], None],
) -> None:
    """
    Measure both as `gated-llama inspect --compare` does, and draw the page where matplotlib is installed. What took
    hours does not hang on that: what goes wrong is announced, and leaves no page.
    """
    measured = []
    try:
        folder.mkdir()
        for model, name in ((base, result.source), (edited, result.output)):
            found = measure(model, tokenizer, windows.judged[:INSPECTED], sentence=SENTENCE, progress=progress)
            measured.append(replace(found, model=Path(name).name))
        written = write_measurements(measured, folder)
        if find_spec("matplotlib"):
            from gated_llama.inspection.page import draw

            draw(read_measurements([written]), folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        announce(f"there is no page of what changed, since it could not be made: {first_line(error)}")
