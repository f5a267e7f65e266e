# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
From scratch: the same small Llama without gates, with headwise and with elementwise ones (σ, as in the paper), trained
by the Trainer on equal tokens at rising learning rates. The text is the Python sources and documents of this machine,
its vocabulary is made of it; or, where sinks are wanted at a size that a CPU can train, the trigger text of the
retrofits. Writes a table for people and one JSON line a run to benchmarks/results/.

Runs that are done, and the one that was stopped, are kept in --work: the same command goes on from there.

    python benchmarks/pretrain.py
    python benchmarks/pretrain.py --data triggers --tokens 4096000 --rates 5e-3 1e-2 2e-2 4e-2 8e-2
    python benchmarks/pretrain.py --width 512 --layers 10 --tokens 5e8 --rates 1e-3 2e-3 4e-3 8e-3 --device cuda
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import sysconfig
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, processors
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from triggers import DEEP, LETTERS, Tokenizer, Triggers

from configuration_gated import GatedLlamaConfig
from gated_llama import UserError, measure
from gated_llama.training.trainer import training_arguments
from measured import RESULTS, circumstances, digest, keep_record, read_records, write_table
from modeling_gated import GatedLlamaForCausalLM


RECORDS = RESULTS / "pretrain.jsonl"
DATA = {"text": "Python sources and documents", "triggers": "Trigger text"}
KINDS = ("ungated", "headwise", "elementwise")
SIZE = ("data", "text", "length", "width", "layers", "tokens", "device")  # of what is compared
RATES = [1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2]
LARGE = 256  # width from which on vocabulary, heads and windows are those of larger models
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
BPE_DOCUMENTS = 400
HELD_OUT = 20  # one document of so many is not trained on
# Written down before anything was run. A rate trains a kind of model if the validation loss of its worst seed is at
# most 5 % above the best mean that this kind reaches at any rate. (In the paper's 1.7B models, from a rate of 4e-3 to
# 8e-3, the ungated loss rises by 10.7 %, the gated one by .3 %.)
TRAINS = 1.05
# Below these, what the gates are to take away is not there: the sink that the retrofit starts from (the issue's F-Attn
# of .3), and an activation that Sun et al. (arXiv 2402.17762) would call massive.
SINK, MASSIVE = 0.3, 100.0


@dataclass(frozen=True)
class Plan:
    """What all runs share; everything else follows from the data and size asked for."""

    data: str  # "text" or "triggers"
    width: int
    layers: int
    tokens: int
    length: int  # of windows

    @property
    def large(self) -> bool:
        return self.width >= LARGE

    @property
    def vocabulary(self) -> int:
        if self.data == "triggers":
            return 1 + DEEP.kinds + LETTERS
        return 8192 if self.large else 1024

    @property
    def rows(self) -> int:
        """Rows a step: 2,048 tokens at least, and about 2,000 steps if there are tokens for them."""
        return max(2048, 2 ** round(math.log2(max(1, self.tokens / 2000)))) // self.length

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.rows * self.length))

    def config(self, kind: str) -> LlamaConfig:
        heads = self.width // (64 if self.large else 16)
        shape = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": 8 * round(self.width / 3),
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": self.length,
            "tie_word_embeddings": self.data == "text",  # the retrofits' bases, which have sinks, have untied ones
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        if kind == "ungated":
            return LlamaConfig(**shape)
        return GatedLlamaConfig(**shape, gate_type=kind, gate_scale=1.0, gate_init="normal")


def documents(wanted: int) -> list[str]:
    """The standard library and what is installed, sources and documents in a fixed order, each once: `wanted` bytes."""
    folders = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
    paths = sorted({path for folder in folders for path in folder.rglob("*.*") if path.suffix in SUFFIXES})
    random.Random(0).shuffle(paths)
    texts, seen, size = [], set(), 0
    for path in filter(Path.is_file, paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        known = hashlib.sha256(text.encode(errors="replace")).digest()
        if len(text) > 200 and known not in seen:
            seen.add(known)
            texts.append(text)
            size += len(text)
        if size >= wanted:
            break
    return texts


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """All tokens one after the other, cut into windows (W, length), each from the beginning-of-text token on."""
    ids = []
    for start in tqdm(range(0, len(texts), 256), desc="tokenizing", unit=" × 256 documents"):
        encoded = tokenizer.backend_tokenizer.encode_batch(texts[start : start + 256])
        ids += [np.array(document.ids[1:], dtype=np.int32) for document in encoded]
    tokens = torch.from_numpy(np.concatenate(ids))
    rows = tokens[: len(tokens) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id, dtype=rows.dtype), rows], dim=1)


def prepare(plan: Plan, folder: Path) -> tuple[PreTrainedTokenizerFast | Tokenizer, torch.Tensor, torch.Tensor]:
    """The tokenizer, windows to train on and held-out ones, made once and kept in `folder`."""
    made = folder / "windows.pt"
    if not made.exists() and plan.data == "triggers":
        data = Triggers(replace(DEEP, length=plan.length))
        torch.save((data.sample(plan.steps * plan.rows, seed=0), data.sample(256, seed=10**9)), made)
    elif not made.exists():
        texts = documents(round(4.5 * plan.tokens) + 2_000_000)
        tokenizer = make_tokenizer(texts[:BPE_DOCUMENTS], plan.vocabulary)
        tokenizer.save_pretrained(folder)
        held_out = windows(tokenizer, texts[::HELD_OUT], plan.length)[:128]
        trained = windows(tokenizer, [text for n, text in enumerate(texts) if n % HELD_OUT], plan.length)
        torch.save((trained[: plan.steps * plan.rows], held_out), made)
    tokenizer = Tokenizer() if plan.data == "triggers" else PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, *torch.load(made)


class Sweep(TrainerCallback):
    """One bar over all runs; and an end in time, with a checkpoint, or at once if the loss is no number."""

    def __init__(self, bar: tqdm, tokens_a_step: int, ends: float):
        self.bar, self.tokens, self.ends = bar, tokens_a_step, ends

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.tokens)
        if time.monotonic() > self.ends and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
            control.should_training_stop |= not math.isfinite(float(logs["loss"]))


class Windows(torch.utils.data.Dataset):
    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = self.rows[number].long()
        return {"input_ids": ids, "labels": ids}


def train(plan: Plan, kind: str, rate: float, seed: int, rows: torch.Tensor, folder: Path, sweep: Sweep, cpu: bool):
    """
    Returns:
        The trained model and its training losses as (step, nats a token); None and those so far if time ran out.
    """
    set_seed(seed)
    model_class = LlamaForCausalLM if kind == "ungated" else GatedLlamaForCausalLM
    model = model_class(plan.config(kind))
    at_once = min(plan.rows, 64)
    arguments = training_arguments(
        folder,
        max_steps=plan.steps,
        learning_rate=rate,
        weight_decay=0.1,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=plan.rows // at_once,
        seed=seed,
        bf16=not cpu,
        use_cpu=cpu,
        dataloader_num_workers=0 if cpu else 4,
        logging_steps=0.04,
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model, arguments, train_dataset=Windows(rows), callbacks=[sweep])
    trainer.pop_callback(PrinterCallback)
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last:
        sweep.bar.update(int(last.rsplit("-", 1)[1]) * sweep.tokens)
    trainer.train(resume_from_checkpoint=last)
    curve = [(log["step"], float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    finished = trainer.state.global_step == plan.steps or not all(math.isfinite(loss) for _, loss in curve)
    return (model if finished else None), curve


def look(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: torch.Tensor) -> dict:
    """What is compared, on held-out windows; the loss is None if it is no number."""
    numbers = {"parameters": model.num_parameters()}
    try:
        measured = measure(model, tokenizer, held_out.long(), batch_size=16)
    except UserError:
        return {**numbers, "loss": None, "f_attn": None, "m_act": None, "sink_rate": None, "gate": None, "opened": None}
    gates = measured.gates
    return {
        **numbers,
        "loss": measured.loss,
        "f_attn": measured.attention.first_token,
        "m_act": measured.activations.m_act,
        "sink_rate": measured.attention.sink_rate[held_out.shape[1]],
        "gate": sum(layer.mean for layer in gates.layers) / len(gates.layers) if gates else None,
        "opened": measured.without_gates["open"][0] if gates else None,  # loss with every gate at 1
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summed(records: list[dict]) -> dict[str, dict[float, dict]]:
    """By kind and rate: the means over seeds, and whether the rate trains. A loss that is no number is infinite."""
    table: dict[str, dict[float, dict]] = defaultdict(dict)
    for kind in KINDS:
        for rate in sorted({line["rate"] for line in records if line["kind"] == kind}):
            lines = [line for line in records if (line["kind"], line["rate"]) == (kind, rate)]
            losses = {line["seed"]: math.inf if line["loss"] is None else line["loss"] for line in lines}
            row = {"losses": losses, "loss": mean(list(losses.values())), "worst": max(losses.values())}
            for name in ("f_attn", "m_act", "gate"):
                values = [line[name] for line in lines]
                row[name] = None if None in values else mean(values)
            table[kind][rate] = row
        best = min((row["loss"] for row in table[kind].values()), default=math.inf)
        for row in table[kind].values():
            row["trains"] = math.isfinite(row["worst"]) and row["worst"] <= TRAINS * best
    return dict(table)


@dataclass(frozen=True)
class Goal:
    name: str
    wanted: str
    found: str
    verdict: str  # "met", "not met", or "not shown" and why


def goals(records: list[dict], kind: str) -> list[Goal]:
    """The goals of training `kind` from scratch, at the rate that is best for the ungated model."""
    table = summed(records)
    ungated, gated = table["ungated"], table[kind]
    rate = min(ungated, key=lambda rate: ungated[rate]["loss"])
    before, after = ungated[rate], gated[rate]
    found = []
    for name, key, least in (("first-token attention", "f_attn", SINK), ("M-Act", "m_act", MASSIVE)):
        ratio = math.inf if None in (after[key], before[key]) else after[key] / before[key]
        verdict = "met" if ratio <= 0.2 else "not met"
        if before[key] is not None and before[key] < least:
            verdict = f"not shown: the ungated model has {before[key]:.3g}, below {least:g}"
        found.append(Goal(f"{name}, gated / ungated", "≤ 0.2", f"{ratio:.2f}", verdict))
    pairs = [(after["losses"][seed], before["losses"][seed]) for seed in before["losses"] if seed in after["losses"]]
    lower = sum(new < old for new, old in pairs)
    verdict = "met" if lower == len(pairs) else "not met"
    verdict = verdict if len(pairs) >= 3 else f"not shown: {len(pairs)} seeds"
    found.append(
        Goal(
            "validation loss",
            "gated lower, ≥ 3 seeds",
            f"{lower} of {len(pairs)} seeds lower, {after['loss'] - before['loss']:+.4f}",
            verdict,
        )
    )
    old, new = (max((rate for rate, row in rows.items() if row["trains"]), default=0.0) for rows in (ungated, gated))
    verdict = "met" if new >= 1.99 * old and new > 0 else "not met"
    if verdict == "not met" and new == max(gated):
        verdict = "not shown: the gated model trains at the highest rate of the sweep"
    found.append(Goal("highest learning rate that trains", "gated ≥ 2 × ungated", f"{new:g} / {old:g}", verdict))
    return found


def show(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def results_table(records: list[dict]) -> str:
    rows = [
        "| learning rate | model | validation loss (worst seed) | F-Attn | M-Act | mean gate | trains |",
        "|---|---|---|---|---|---|---|",
    ]
    table = summed(records)
    for rate in sorted({line["rate"] for line in records}):
        for kind in KINDS:
            if row := table[kind].get(rate):
                rows.append(
                    f"| {rate:g} | {kind} | {row['loss']:.4f} ({row['worst']:.4f}) | {show(row['f_attn'], '.3f')} | "
                    f"{show(row['m_act'], '.1f')} | {show(row['gate'], '.3f')} | {'yes' if row['trains'] else 'no'} |"
                )
    return "\n".join(rows) + "\n"


def goals_table(records: list[dict]) -> str:
    rows = ["| goal | wanted | headwise | | elementwise | |", "|---|---|---|---|---|---|"]
    for head, element in zip(goals(records, "headwise"), goals(records, "elementwise"), strict=True):
        rows.append(
            f"| {head.name} | {head.wanted} | {head.found} | {head.verdict} | {element.found} | {element.verdict} |"
        )
    return "\n".join(rows) + "\n"


def sizes(records: list[dict]) -> dict[tuple, list[dict]]:
    """The records of each size, of those rates and seeds that every kind of model was trained with."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for line in records:
        groups[tuple(line[name] for name in SIZE)].append(line)
    whole = {}
    for size, lines in sorted(groups.items()):
        pairs = [{(line["rate"], line["seed"]) for line in lines if line["kind"] == kind} for kind in KINDS]
        if common := set.intersection(*pairs):
            whole[size] = [line for line in lines if (line["rate"], line["seed"]) in common]
    return whole


def table(records: list[dict]) -> str:
    """The README's: for every size the goals, then the numbers."""
    parts = []
    for (data, _, length, width, layers, tokens, device), lines in sizes(records).items():
        parameters = {line["kind"]: f"{line['parameters']:,}" for line in lines}
        parameters = " / ".join(parameters[kind] for kind in KINDS)
        seeds = len({line["seed"] for line in lines})
        parts.append(
            f"{DATA[data]} in windows of {length}; {layers} layers, {width} wide ({parameters} parameters), "
            f"{tokens:,} tokens, {seeds} seeds, {device}:\n\n"
            f"{goals_table(lines)}\n{results_table(lines)}"
        )
    return "\n" + "\n".join(parts) + "\n"


def run_all(plan: Plan, args: argparse.Namespace) -> bool:
    """Whether every run is done; what is done is recorded."""
    ends = time.monotonic() + 60 * args.minutes
    folder = args.work / "-".join(str(value) for value in asdict(plan).values())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, rows, held_out = prepare(plan, folder)
    text = digest(held_out)
    cpu = args.device == "cpu"
    device = {} if cpu else {"device": torch.cuda.get_device_name()}
    todo = [(rate, seed, kind) for rate in args.rates for seed in args.seeds for kind in KINDS]
    tokens = plan.rows * plan.length
    with tqdm(total=len(todo) * plan.steps * tokens, unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for rate, seed, kind in todo:
            bar.set_description(f"{kind}, rate {rate:g}, seed {seed}")
            own = folder / f"{kind}-{rate:g}-{seed}"
            if (own / "record.json").exists():
                bar.update(plan.steps * tokens)
                record = json.loads((own / "record.json").read_text())
            else:
                model, curve = train(plan, kind, rate, seed, rows, own, Sweep(bar, tokens, ends), cpu)
                if model is None:
                    return False
                record = {
                    "kind": kind,
                    "rate": rate,
                    "seed": seed,
                    **asdict(plan),
                    "text": text,
                    "steps": plan.steps,
                    "epochs": plan.steps * plan.rows / len(rows),
                    **look(model, tokenizer, held_out),
                    "curve": curve,
                    **circumstances(),
                    **device,
                }
                (own / "record.json").write_text(json.dumps(record))
                shutil.rmtree(get_last_checkpoint(own) or "", ignore_errors=True)
            keep_record(args.records, record, "kind", "rate", "seed", *SIZE)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="text", help="(default: text)")
    parser.add_argument("--width", type=int, default=64, help="hidden size (default: 64; from 256 on long windows)")
    parser.add_argument("--layers", type=int, default=3, help="(default: 3)")
    parser.add_argument("--length", type=int, help="of windows (default: 64 of triggers; 128 of text, if wide 1024)")
    parser.add_argument("--tokens", type=float, default=3e5, help="tokens of each run (default: 3e5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help=f"learning rates (default: {RATES})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so many; the same command goes on (9)")
    parser.add_argument(
        "--work", type=Path, default=Path("pretrain"), help="folder of unfinished runs (default: pretrain)"
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="where to (other than by default: no table)")
    args = parser.parse_args()
    usual = DEEP.length if args.data == "triggers" else 1024 if args.width >= LARGE else 128
    plan = Plan(args.data, args.width, args.layers, round(args.tokens), args.length or usual)
    done = run_all(plan, args)
    lines = [line for line in read_records(args.records) if {key: line[key] for key in asdict(plan)} == asdict(plan)]
    print(table(lines), end="")
    if args.records == RECORDS:
        write_table("pretrain", table(read_records(RECORDS)))
    if not done:
        print("Stopped in time: the same command goes on from here.", file=sys.stderr)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
