# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Train a gated model with Transformers' Trainer: the gates alone, LoRA with the gates whole beside it, or everything; the
gates always at a learning rate of their own. On one process or many, stopped and resumed.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.card import finetuning_card
from gated_llama.checkpoints.folder import (
    CONFIG_NAME,
    Checkpoint,
    Source,
    find_source,
    read_checkpoint,
    read_header,
    read_json,
    refuse_nesting,
)
from gated_llama.conversion.families import GATED_TYPES, read_gated_config
from gated_llama.data import (
    Document,
    Rows,
    check_tokens,
    digest_of,
    one_row_each,
    pack,
    read_documents,
    shuffled,
    split_off,
    tokenize,
)
from gated_llama.errors import UserError, first_line
from gated_llama.gates import gate_parameters, is_gate
from gated_llama.loading import ADAPTER_CONFIG, load, load_tokenizer, refuse_adapter
from gated_llama.runs import begin_record, check_seed, resume_record
from gated_llama.training.trainer import GatedTrainer, checkpoint_activations, has_accelerator, training_arguments
from gated_llama.training.ways import WAYS, Written


POSITIVE = (
    *("epochs", "steps", "length", "batch_size", "accumulate", "lr", "lora_rank", "fsdp_size", "tp_size"),
    *("save_steps", "log_steps", "eval_tokens"),
)
# In the folder of a run, beside what it made: its checkpoints, and what it was asked to do and did.
CHECKPOINTS = "checkpoints"
RECORD = "finetune.json"


@dataclass(frozen=True)
class Parameters:
    """How many a run trains, and of what."""

    gates: int
    rest: int
    total: int

    def __str__(self) -> str:
        trained = self.gates + self.rest
        return (
            f"training {trained:,} of {self.total:,} parameters ({trained / self.total:.2%}): {self.gates:,} of gates "
            f"({self.gates / self.total:.2%}), {self.rest:,} others ({self.rest / self.total:.2%})"
        )


def count_parameters(model: torch.nn.Module) -> Parameters:
    """The parameters that `requires_grad`, and all; 4-bit weights count as what they stand for."""
    counts = {True: 0, False: 0}
    total = 0
    for name, parameter in model.named_parameters():
        # bitsandbytes packs two 4-bit weights into a byte, and keeps the shape that they had.
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        total += math.prod(shape)
        if parameter.requires_grad:
            counts[is_gate(name)] += math.prod(shape)
    return Parameters(counts[True], counts[False], total)


@dataclass(frozen=True)
class FinetuneSettings:
    """
    How to train. A run is resumed only with the settings that it began with.

    Attributes:
        train: `"lora"`, `"gates"` or `"full"`.
        eval_data: data to measure on, as for training; without it the share `held_out` of the rows is kept for that.
        eval_tokens: of either no more than these, so that measuring takes little beside training.
        epochs, steps: passes over the data, or, if given, optimizer steps.
        length, packing: tokens a row; whether rows are filled with one document after the other, or hold one each.
        batch_size, accumulate: rows that a process takes at once; how often it does for one step.
        lr: learning rate of the weights; None is 2e-4 for LoRA, 2e-5 for all.
        gate_lr, weight_decay: learning rate of the gates; decay of the weights, never of gates.
        lora_rank, lora_mlp: see [`gated_llama.adapters.gated_lora_config`].
        quantize: `"4bit"` or `"8bit"`, by bitsandbytes, for the frozen weights under LoRA.
        gradient_checkpointing: compute activations twice rather than keep them.
        fsdp_size, tp_size: processes to shard the model over (see `transformers.distributed.DistributedConfig`).
        save_steps, log_steps: steps between checkpoints, and between logs; None is a quarter and a twentieth of all.
        report_to: where else to log, such as `"tensorboard"` or `"wandb"` (see `TrainingArguments.report_to`).
    """

    train: str = "lora"
    eval_data: tuple[str, ...] = ()
    held_out: float = 0.05
    eval_tokens: int = 50_000
    epochs: float = 1.0
    steps: int | None = None
    length: int = 512
    packing: bool = True
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    gate_lr: float = 1e-3
    weight_decay: float = 0.0
    lora_rank: int = 16
    lora_mlp: bool = False
    quantize: str | None = None
    gradient_checkpointing: bool = False
    fsdp_size: int = 1
    tp_size: int = 1
    save_steps: int | None = None
    log_steps: int | None = None
    report_to: str = "none"
    seed: int = 0

    def check(self) -> None:
        """
        Check the settings, alone and together.

        Raises:
            UserError: a setting has a value that it cannot have, or not with another.
        """
        if self.train not in WAYS:
            raise UserError(f"there is no way to train {self.train!r}: {', '.join(WAYS)} are.")
        if self.quantize not in (None, "4bit", "8bit"):
            raise UserError(f"there is no quantization {self.quantize!r}: 4bit and 8bit are.")
        for name, value in asdict(self).items():
            if name in POSITIVE and value is not None and not value > 0:
                raise UserError(f"{name} must be more than 0, not {value}.")
            if name in ("gate_lr", "weight_decay") and not value >= 0:
                raise UserError(f"{name} must not be negative, and is {value}.")
        usual = type(self)()
        if unused := [name for name in WAYS[self.train].ignores if getattr(self, name) != getattr(usual, name)]:
            raise UserError(f"{unused[0]} has no say with train={self.train!r}: leave it out.")
        if self.length < 2:
            raise UserError("length must be at least 2: one token predicts nothing.")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is a share of the data from 0 to less than 1, not {self.held_out}.")
        if self.quantize and not WAYS[self.train].quantizes:
            raise UserError(f"quantized weights cannot be trained: use train='lora', not {self.train!r}.")
        if self.quantize and find_spec("bitsandbytes") is None:
            raise UserError("quantize needs the package bitsandbytes: `pip install bitsandbytes`, or leave it out.")
        if self.report_to not in ("none", "all", *get_available_reporting_integrations()):
            raise UserError(f"report_to {self.report_to!r} needs a package of its name: install it, or leave it out.")
        check_seed(self.seed)
        if self.sharded and not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
            raise UserError(
                f"Transformers {transformers.__version__} cannot train sharded weights: take a newer one, or leave out "
                "fsdp_size and tp_size."
            )
        if self.sharded and not WAYS[self.train].shards:
            raise UserError(
                "LoRA with gates cannot be trained on sharded weights: leave out fsdp_size and tp_size (every process "
                "then holds the model, quantized if need be), or train the gates or all of it."
            )

    @property
    def sharded(self) -> bool:
        return self.fsdp_size * self.tp_size > 1


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune_checkpoint` did; `to_json()` is what `--json` prints. Losses are in nats per token."""

    output: str
    train: str
    steps: int
    tokens: int  # seen in all steps, without padding
    parameters: Parameters
    data: str
    loss: float  # mean over the run
    held_out_before: float | None
    held_out_after: float | None
    gate_drift: float | None  # see GateMonitor
    verdict: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def finetune_checkpoint(
    model: str | os.PathLike,
    data: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    settings: FinetuneSettings | None = None,
    *,
    resume: bool = False,
    link: bool = False,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """
    Train a gated checkpoint by next-token prediction.

    `output` then holds an adapter (`"lora"`), the checkpoint with other gates and everything else as it was
    (`"gates"`), or a checkpoint (`"full"`); a record of the run; and in `checkpoints` what it takes to resume.

    Args:
        model: a converted checkpoint, a folder or a Hub id.
        data: files and datasets, see [`gated_llama.data.read_documents`].
        resume: go on from the last whole checkpoint in `output`.
        link: with `"gates"`, link to the weights that stay as they are instead of copying them.
        progress: show bars and the live view on stderr.
        announce: is told, a line each, what will be trained and on what.

    Raises:
        UserError: the input is at fault, the run went wrong or was interrupted. Checkpoints that are whole stay.
    """
    settings = settings or FinetuneSettings()
    settings.check()
    if link and not WAYS[settings.train].links:
        raise UserError(f"link needs weights that stay as they are: use train='gates', not {settings.train!r}.")
    processes = PartialState(cpu=not has_accelerator())
    refuse_adapter(model)
    found = find_source(model)
    output = Path(output)
    refuse_nesting(found.folder, output)
    checkpoint, config = _trainable(found, settings)
    asked = {"model": found.found_again_by, "data": [str(source) for source in data], **asdict(settings)}
    documents, eval_documents = read_documents(asked["data"]), read_documents(settings.eval_data)
    asked |= {"revision": found.revision, "digest of the text": digest_of([*documents, *eval_documents])}
    asked["processes"] = processes.num_processes

    tokenizer = load_tokenizer(found.folder)
    rows, held_out = _rows(tokenizer, documents, eval_documents, settings, progress and processes.is_main_process)
    for part in filter(None, (rows, held_out)):
        check_tokens(max(row.max() for row in part.rows), config.vocab_size)
    if processes.is_main_process:
        _open_run(output, asked, resume)
    processes.wait_for_everyone()
    last = last_checkpoint(output / CHECKPOINTS)
    try:
        set_seed(settings.seed)  # adapters start at random
        network = _load_network(found, config, settings)
        parameters = count_parameters(network)
        announce(str(parameters))
        if settings.length > (most := config.max_position_embeddings):
            announce(f"rows of {settings.length:,} tokens are longer than the {most:,} that the model is made for")
        padding = _padding(tokenizer, config.vocab_size)
        if not settings.packing and padding is not tokenizer:
            announce(
                f"the tokenizer has no padding token that the model knows: rows are padded with {padding.pad_token}, "
                "as TRL does, without a loss"
            )
        announce(f"on {rows}" + (f"; measured on {len(held_out):,} rows held out" if held_out else ""))
        trainer = _trainer(network, padding, rows, held_out, output, config, settings, progress, last is None)
        _run(trainer, last)
    except BaseException:
        if processes.is_main_process and last_checkpoint(output / CHECKPOINTS) is None:
            _forget_run(output)
        raise
    result = _result_of(trainer, output, settings, parameters, rows)
    _write_result(trainer, checkpoint, config, found, result, link)
    return result


def _trainable(found: Source, settings: FinetuneSettings) -> tuple[Checkpoint, GatedLlamaConfig]:
    """The checkpoint and its config, or a refusal."""
    checkpoint = read_checkpoint(found.folder)
    config = read_gated_config(checkpoint.config, str(found.folder / CONFIG_NAME))
    if not config.architectures[0].endswith("ForCausalLM"):
        raise UserError(f"{found.folder} holds a {config.architectures[0]}: only causal language models are trained.")
    if settings.lora_mlp and config.model_type != GatedLlamaConfig.model_type:
        raise UserError(f"{found.folder} has experts, which LoRA is not put on: leave lora_mlp out.")
    return checkpoint, config


def _result_of(
    trainer: GatedTrainer, output: Path, settings: FinetuneSettings, parameters: Parameters, rows: Rows
) -> FinetuneResult:
    """Of a run that came to its end; what was held out is measured once more, unless the last step was."""
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    if evaluations and evaluations[-1]["step"] != trainer.state.global_step:
        evaluations.append(trainer.evaluate())
    return FinetuneResult(
        output=str(output),
        train=settings.train,
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen // settings.tp_size,  # processes that split layers see the same
        parameters=parameters,
        data=str(rows),
        loss=sum(losses) / len(losses),
        held_out_before=evaluations[0]["eval_loss"] if evaluations else None,
        held_out_after=evaluations[-1]["eval_loss"] if evaluations else None,
        gate_drift=trainer.gate_monitor.drift,
        verdict=trainer.gate_monitor.verdict(),
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
    eval_documents: list[Document],
    settings: FinetuneSettings,
    progress: bool,
) -> tuple[Rows, Rows | None]:
    def cut(documents: list[Document]) -> Rows:
        tokens = tokenize(tokenizer, documents, progress=progress)
        rows = pack(tokens, settings.length) if settings.packing else one_row_each(tokens, settings.length)
        if not len(rows):
            raise UserError(
                f"the text has {rows.dropped:,} tokens, which fill no row of {settings.length}: give more text, or a "
                "smaller length."
            )
        return rows

    rows = cut(shuffled(documents, settings.seed))
    if settings.eval_data:
        return rows, cut(eval_documents).first(settings.eval_tokens)
    return split_off(rows, settings.held_out, settings.eval_tokens)


def _open_run(output: Path, asked: dict, resume: bool) -> None:
    """Make the folder of a new run, or see that the one there can be gone on with."""
    if resume:
        resume_record(output / RECORD, asked)
        return
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is not empty: give another folder, or --resume to go on with the run in it.")
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}.") from error
    begin_record(output / RECORD, asked)


def _forget_run(output: Path) -> None:
    """Leave no trace of a run that came to nothing."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    (output / RECORD).unlink(missing_ok=True)
    if not any(output.iterdir()):
        output.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole: a process killed while it wrote one leaves it in part."""
    return next((path for path in _checkpoints(folder) if _is_whole(path)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first; a copy under another name is not of the run."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return sorted(filter(found.get, found), key=lambda path: -int(found[path][1]))


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes the weights first, trainer_state.json last, and by each process its random state."""
    try:
        read_json(checkpoint / "trainer_state.json")
        weights = [read_header(checkpoint, path.name) for path in checkpoint.glob("*.safetensors")]
    except UserError:
        return False
    random_states = len(list(checkpoint.glob("rng_state*.pth")))
    return bool(weights) and random_states == PartialState().num_processes


def _load_network(found: Source, config: GatedLlamaConfig, settings: FinetuneSettings) -> torch.nn.Module:
    """The model, with what is to be trained in fp32 and set to `requires_grad`."""
    asked = {"dtype": config.dtype or torch.float32}
    way = WAYS[settings.train]
    if way.in_fp32 or settings.sharded or (asked["dtype"] is torch.float16 and not has_accelerator()):
        asked["dtype"] = torch.float32
    if settings.quantize:
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if has_accelerator() else torch.float32
        asked["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=settings.quantize == "4bit",
            load_in_8bit=settings.quantize == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
        )
    if settings.sharded:
        from transformers.distributed import DistributedConfig

        asked["distributed_config"] = DistributedConfig(fsdp_size=settings.fsdp_size, tp_size=settings.tp_size)
    network, _ = load(found.folder, **asked)
    if settings.gradient_checkpointing:
        checkpoint_activations(network)
    if hasattr(network, "generation_config"):  # which has no part in training, and is the source's again in the end
        network.generation_config = GenerationConfig()
    network = way.prepare(network, found, settings)
    for _, gate in gate_parameters(network):
        if gate.requires_grad and gate.dtype != torch.float32:
            gate.data = gate.data.float()
    return network


def _trainer(
    network: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_out: Rows | None,
    output: Path,
    config: GatedLlamaConfig,
    settings: FinetuneSettings,
    progress: bool,
    from_start: bool,
) -> GatedTrainer:
    lr = WAYS[settings.train].lr if settings.lr is None else settings.lr
    arguments = training_arguments(
        output / CHECKPOINTS,
        learning_rate=lr,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        logging_steps=settings.log_steps or 0.05,
        save_steps=settings.save_steps or 0.25,
        eval_strategy="steps" if held_out else "no",
        eval_steps=settings.save_steps or 0.25,
        eval_on_start=held_out is not None and from_start,
        report_to=settings.report_to,
        seed=settings.seed,
        bf16=config.dtype is torch.bfloat16,
        fp16=config.dtype is torch.float16 and has_accelerator(),
        disable_tqdm=not progress,
        include_num_input_tokens_seen="non_padding",
    )
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads, and lets no padding count in the loss
    try:
        return GatedTrainer(network, arguments, collator, rows, held_out, gate_lr=settings.gate_lr)
    except (ImportError, RuntimeError, ValueError) as error:  # a logger that is not installed, a device that cannot
        raise UserError(f"the Trainer does not take these settings: {first_line(error)}") from error


def _padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreTrainedTokenizerBase:
    """
    With a padding token that is in the vocabulary. Llama's has none; TRL then takes the end-of-text token, and rows of
    equal length need none at all.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer = deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _run(trainer: GatedTrainer, last: Path | None) -> None:
    """Train to the end, or leave whole checkpoints only and say how to go on."""
    if last is not None:
        # Shares of the run there, steps here: the Trainer would warn that they do not match.
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(trainer.args, name, getattr(state, name))
        if state.global_step >= state.max_steps:  # only the result is missing, and the Trainer would take one step more
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except UserError as error:
        raise UserError(f"{error}{_kept(trainer)}") from error
    except KeyboardInterrupt:
        raise UserError(f"interrupted after step {trainer.state.global_step}.{_kept(trainer)}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory at step {trainer.state.global_step + 1}: use a smaller batch_size (and accumulate) or "
            f"length, gradient_checkpointing, or quantize.{_kept(trainer)}"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = first_line(error)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason and "PytorchStreamWriter" not in reason:
                raise
            reason = f"torch.save failed, as it does on a full disk ({reason})"
        where = f"no checkpoint could be written after step {trainer.state.global_step}: {reason}"
        raise UserError(f"{where}.{_kept(trainer)}") from error


def _kept(trainer: GatedTrainer) -> str:
    """Remove a checkpoint that was only begun, and name the one that is whole."""
    folder = Path(trainer.args.output_dir)
    last = last_checkpoint(folder)
    for path in _checkpoints(folder):
        if trainer.args.should_save and not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
    return f" {last} is whole: --resume goes on from it." if last else " No checkpoint had been written."


def _reported_settings(asked: dict) -> dict:
    """The settings that the card reports: data, learning rates, and whatever differs from the defaults."""
    usual = json.loads(json.dumps(asdict(FinetuneSettings())))
    told = {name: value for name, value in asked.items() if name in usual and value != usual[name]}
    lr = WAYS[asked["train"]].lr if asked["lr"] is None else asked["lr"]
    rates = {"gate_lr": asked["gate_lr"]} if asked["train"] == "gates" else {"lr": lr, "gate_lr": asked["gate_lr"]}
    return {"data": asked["data"], "train": asked["train"], **rates, **told}


def _write_result(
    trainer: GatedTrainer,
    checkpoint: Checkpoint,
    config: GatedLlamaConfig,
    found: Source,
    result: FinetuneResult,
    link: bool,
) -> None:
    """Write what was trained under a provisional name, then move it into the run's folder, what makes it load last."""
    network, output, way = trainer.model, Path(result.output), WAYS[result.train]
    partial = output / ".result"
    main = trainer.args.should_save
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        # All processes look into the folder while they write: it must be there before, and stay until they are done.
        trainer.accelerator.wait_for_everyone()
        way.write(network, Written(partial, checkpoint, config.dtype or torch.float32, link, main))
        trainer.accelerator.wait_for_everyone()
        if main:
            checkpoint.copy_carried(partial)
            if not way.is_adapter:
                GATED_TYPES[config.model_type].copy_code(partial)
            record = read_json(output / RECORD)
            card = finetuning_card(result, way, found, config, _reported_settings(record["asked"]))
            (partial / "README.md").write_text(card, encoding="utf-8")
            record |= {"result": asdict(result), "log": trainer.state.log_history}
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            last = ("", CONFIG_NAME, ADAPTER_CONFIG, RECORD)
            files = [path for path in partial.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: last.index(path.name if path.name in last else "")):
                target = output / path.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        kept, why = _kept(trainer), "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
        raise UserError(f"{output}: the result could not be written: {why}.{kept}") from error
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
