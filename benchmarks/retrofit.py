# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What takes the attention sink out of a converted model, and at what cost: a base for each task and seed, trained here,
and from it every recipe on the same tokens, 2 % of those that the base saw. A gate of 2·σ(0) is exactly 1, so the base
with its gates frozen is the ungated model. Keeps a record of each in benchmarks/results/retrofit.jsonl (what is there
is not run again); `--write` makes the README's table and docs/retrofit.png of them.

    python benchmarks/retrofit.py [--task deep] [--seeds 0 1 2] [--recipes "plain, gates trained" …]
    python benchmarks/retrofit.py --task "python, small" --seeds 0
    python benchmarks/retrofit.py --task python --device cuda [--layers 8] [--width 640] [--length 512] [--steps 20000]
"""

import argparse
import copy
import random
import statistics
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from configuration_gated import GatedLlamaConfig
from gated_llama import gate_parameter_groups, measure
from gated_llama.attention import watched
from gated_llama.desink import Desink, desink
from gated_llama.diagnose import decoder_layers
from gated_llama.fold import fold_first_token
from gated_llama.gates import gate_modules, gate_parameters
from measured import RESULTS, ROOT, circumstances, digest, keep_record, read_records, write_table
from modeling_gated import GatedLlamaForCausalLM


RECORDS, FIGURE = RESULTS / "retrofit.jsonl", ROOT / "docs" / "retrofit.png"
LETTERS = 56  # the most frequent characters of Python sources
WINDOWS = {"calibration": (256, 10**9), "evaluation": (256, 10**9 + 1), "curve": (64, 10**9 + 2)}  # how many, seed


@dataclass(frozen=True)
class Task:
    """What a base is and what it is trained on; its tokens are `steps` · `batch` · `length`."""

    data: str  # "triggers", "bare triggers" or "python"
    layers: int
    width: int
    heads: int
    key_heads: int
    length: int
    batch: int
    steps: int
    lr: float
    inner: int | None = None  # width of the MLP; 8/3 · width if None
    kinds: int = 0  # of triggers
    qk_norm: bool = False
    gate_type: str = "headwise"


# With a wide MLP the toy has no sink (.02): the MLP learns to take away what an idle head adds.
TOY = Task(
    "triggers", layers=1, width=32, heads=1, key_heads=1, length=64, batch=64, steps=3000, lr=3e-3, inner=8, kinds=1
)
DEEP = Task("triggers", layers=3, width=64, heads=4, key_heads=2, length=64, batch=32, steps=2000, lr=1e-2, kinds=4)
TASKS = {
    "toy": TOY,
    "deep": DEEP,
    "deep, QK norm": replace(DEEP, qk_norm=True),
    "deep, elementwise": replace(DEEP, gate_type="elementwise"),
    "deep, no first token": replace(DEEP, data="bare triggers"),
    "python": Task("python", layers=8, width=640, heads=8, key_heads=4, length=512, batch=64, steps=20000, lr=3e-3),
    "python, small": Task(
        "python", layers=4, width=96, heads=4, key_heads=2, length=128, batch=16, steps=30000, lr=4e-3
    ),
}


@dataclass(frozen=True)
class Recipe:
    edit: str = ""  # "sink": key and gates; "key": the key alone; "zero": as "sink", with a zero key
    tokens: int = 1  # times those that recipes are given; 0: no training
    gates: bool = True  # trained, or frozen as they are
    teacher: bool = False  # the KL divergence from the base, a frozen second copy, in place of the loss on the text
    penalty: str = ""  # "outliers" or "attention"
    fold: bool = False  # the first token's massive activations
    lora: bool = False


BASE = "base"
REFERENCE, LONG_REFERENCE = (f"plain, gates frozen open (no gates){tokens}" for tokens in ("", ", 10 times the tokens"))
RECIPES = {
    REFERENCE: Recipe(gates=False),
    LONG_REFERENCE: Recipe(gates=False, tokens=10),
    "plain, gates trained": Recipe(),
    "plain, gates trained, 10 times the tokens": Recipe(tokens=10),
    "LoRA, gates trained": Recipe(lora=True),
    "sink moved, zero key": Recipe("zero", tokens=0),
    "key edited alone": Recipe("key", tokens=0),
    "sink moved": Recipe("sink", tokens=0),
    "key edited alone, healed, gates frozen open": Recipe("key", gates=False),
    "key edited alone, healed": Recipe("key"),
    "sink moved, healed": Recipe("sink"),
    "sink moved, healed by LoRA": Recipe("sink", lora=True),
    "sink moved, healed, attention penalty": Recipe("sink", penalty="attention"),
    "sink moved, healed, outlier penalty": Recipe("sink", penalty="outliers"),
    "sink moved, healed by KL": Recipe("sink", teacher=True),
    "sink moved, healed by KL, attention penalty": Recipe("sink", teacher=True, penalty="attention"),
    "first token folded": Recipe(tokens=0, fold=True),
    "sink moved, first token folded": Recipe("sink", tokens=0, fold=True),
    "sink moved, first token folded, healed, attention penalty": Recipe("sink", penalty="attention", fold=True),
    "KL, outlier penalty, gates frozen open": Recipe(teacher=True, penalty="outliers", gates=False),
    "KL, outlier penalty": Recipe(teacher=True, penalty="outliers"),
    "KL, outlier penalty, 10 times the tokens": Recipe(teacher=True, penalty="outliers", tokens=10),
    "attention penalty, gates frozen open": Recipe(penalty="attention", gates=False),
    "attention penalty": Recipe(penalty="attention"),
    "attention penalty, gates frozen open, 10 times the tokens": Recipe(penalty="attention", gates=False, tokens=10),
    "attention penalty, 10 times the tokens": Recipe(penalty="attention", tokens=10),
}
DRAWN = ("plain, gates trained", "key edited alone, healed", "sink moved, healed", "attention penalty")
DRAWN += ("sink moved, healed, attention penalty",)
HEAL_SHARE = 0.02  # of the base's steps
HEAL_RATE = 0.02  # of the base's learning rate; that of the gates is 50 times as large
PENALTY = {"outliers": 1.0, "attention": 1.0}  # their weights


class Tokenizer:
    """As much of one as `measure` asks for."""

    bos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


@cache
def python_files() -> list[Path]:
    """The standard library's and those of installed packages, in an order that stays the same while they do."""
    folders = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    random.Random(0).shuffle(paths)
    return paths


def python_sources(limit: int) -> Iterator[str]:
    """Their texts, up to `limit` characters."""
    for path in python_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text
        limit -= len(text)
        if limit < 0:
            return


class Triggers:
    """
    Characters as a bigram model of Python sources makes them, behind a beginning-of-text token 0. One in ten is a
    trigger, 1 to `kinds`, and what follows a trigger k is the token k places before it. So no other token needs
    anything from attention: its query is idle. Bare, they begin with any character.
    """

    def __init__(self, task: Task):
        text = "".join(python_sources(2 * 10**6))
        number = {character: n for n, (character, _) in enumerate(Counter(text).most_common(LETTERS))}
        letters = torch.tensor([number[character] for character in text if character in number])
        pairs = torch.full((LETTERS, LETTERS), 0.1)
        self.bigrams = pairs.index_put((letters[:-1], letters[1:]), torch.ones(len(letters) - 1), accumulate=True)
        self.bare = task.data == "bare triggers"
        self.kinds, self.length, self.vocab = task.kinds, task.length, 1 + task.kinds + LETTERS

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """Windows (count, T), the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        first = 1 + self.kinds  # number of the first letter
        ids = torch.zeros(count, self.length, dtype=torch.long)
        if self.bare:
            ids[:, 0] = first + torch.randint(LETTERS, (count,), generator=random)
        letter = torch.randint(LETTERS, (count,), generator=random)
        ids[:, 1] = first + letter
        triggers = torch.rand(count, self.length, generator=random) < 0.1
        kinds = torch.randint(1, first, (count, self.length), generator=random)
        triggers[:, : self.kinds + 2] = False
        rows, kind = torch.arange(count), torch.zeros(count, dtype=torch.long)  # 0: the last was no trigger
        for place in range(2, self.length):
            drawn = first + torch.multinomial(self.bigrams[letter], 1, generator=random)[:, 0]
            copied = ids[rows, (place - 1 - kind).clamp_min(1)]
            new = triggers[:, place] & (kind == 0)
            ids[:, place] = torch.where(kind > 0, copied, torch.where(new, kinds[:, place], drawn))
            kind = torch.where(new, kinds[:, place], 0)
            letter = torch.where(ids[:, place] >= first, ids[:, place] - first, letter)
        return ids

    def idle(self, ids: torch.Tensor) -> torch.Tensor:
        idle = (ids > self.kinds).clone()
        idle[:, 0] = False
        return idle


class Python:
    """Python sources by a small byte-level BPE, cut at random places, behind a beginning-of-text token 0."""

    def __init__(self, task: Task):
        from tokenizers import ByteLevelBPETokenizer

        vocab = 4096 if task.width >= 256 else 2048
        texts = list(python_sources(4 * task.steps * task.batch * task.length))
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts[:1000], vocab_size=vocab, special_tokens=["<s>"], show_progress=False)
        self.vocab, self.length = vocab, task.length
        self.tokens = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
        self.held_out = len(self.tokens) // 50

    def sample(self, count: int, seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed)
        evaluation = seed > 10**9
        tokens = self.tokens[-self.held_out :] if evaluation else self.tokens[: -self.held_out]
        starts = torch.randint(len(tokens) - self.length, (count,), generator=random).tolist()
        rows = torch.stack([tokens[start : start + self.length - 1] for start in starts])
        return torch.cat([torch.zeros(count, 1, dtype=torch.long), rows], dim=1)

    def idle(self, ids: torch.Tensor) -> torch.Tensor:
        return (torch.arange(ids.shape[1]) > 0).expand_as(ids)


def build(task: Task, vocab: int, seed: int) -> GatedLlamaForCausalLM:
    torch.manual_seed(seed)
    config = GatedLlamaConfig(
        vocab_size=vocab,
        hidden_size=task.width,
        intermediate_size=task.inner or task.width * 8 // 3,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.key_heads,
        max_position_embeddings=2 * task.length,
        use_qk_norm=task.qk_norm,
        gate_type=task.gate_type,
        gate_bias=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GatedLlamaForCausalLM(config)


@torch.no_grad()
def glance(model: nn.Module, data: Triggers | Python, windows: torch.Tensor) -> tuple[float, float]:
    """The loss, and the attention that idle queries give the first token."""
    idle, given, losses = data.idle(windows), [], []

    def see(layer: int, start: int, first: int, weights: torch.Tensor, output: torch.Tensor) -> None:
        asked = idle[rows, start : start + weights.shape[2]].to(weights.device)
        given.append((weights[..., 0].mean(1) * asked).sum().item())

    with watched(model, see):
        for start in range(0, len(windows), max(1, 2**14 // data.length)):
            rows = slice(start, start + max(1, 2**14 // data.length))
            ids = windows[rows].to(model.device)
            losses += [model(ids, labels=ids, use_cache=False).loss.item()] * len(ids)
    return statistics.fmean(losses), sum(given) / (idle.sum().item() * model.config.num_hidden_layers)


@contextmanager
def quantized(model: nn.Module) -> Iterator[None]:
    """W8A8 per tensor, simulated: weights and inputs of the layers' linears, symmetric, by their largest; no gates."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().max() / 127
        return (x / step).round() * step

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear) and "attn_gate" not in name:
                    stack.callback(setattr, linear.weight, "data", linear.weight.data)
                    linear.weight.data = rounded(linear.weight.data)
                    stack.callback(linear.register_forward_pre_hook(lambda m, inputs: (rounded(inputs[0]),)).remove)
        yield


def look(model: nn.Module, data: Triggers | Python) -> dict[str, float]:
    """Everything that is compared, on windows that no training saw."""
    model.eval()
    windows = data.sample(*WINDOWS["evaluation"])
    report = measure(model, Tokenizer(), windows, batch_size=64, compared_windows=len(windows))
    with quantized(model):
        quantized_loss, _ = glance(model, data, windows)
    return {
        "loss": report.loss,
        "loss, gates reset to open": report.without_gates["open"][0],
        "first-token attention": report.attention.first_token,
        "first-token attention, idle queries": glance(model, data, windows)[1],
        "sink rate": report.attention.sink_rate[min(64, windows.shape[1])],
        "M-Act": report.activations.m_act,
        "largest activation": max(top[0] for top in report.activations.top3),
        "largest kurtosis": max(max(values) for values in report.activations.input_kurtosis.values()),
        "W8A8 loss penalty": quantized_loss - report.loss,
        "mean gate": statistics.mean(layer.mean for layer in report.gates.layers),
    }


@contextmanager
def outliers(model: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    """
    In the block, of the last forward: Σ ReLU(|x / rms(x)| − 4)² over channels at the inputs and outputs of the norms, a
    mean over tokens and norms, with the first token counted 256 times (takuma104/OutliersInLLM).
    """
    terms: list[torch.Tensor] = []

    def see(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        for x in (inputs[0], output):
            excess = (x / x.square().mean(-1, keepdim=True).sqrt()).abs() - 4
            sums = excess.relu().square().sum(-1)  # (B, T)
            terms.append(sums.mean() + 255 * sums[:, 0].mean() / sums.shape[1])

    def mean() -> torch.Tensor:
        value = torch.stack(terms).mean()
        terms.clear()
        return value

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                stack.callback(norm.register_forward_hook(see).remove)
        yield mean


def objective(model: nn.Module, recipe: Recipe, teacher: nn.Module | None, stack: ExitStack) -> Callable:
    """The loss of some ids (B, T) under a recipe."""
    penalty = stack.enter_context(outliers(model)) if recipe.penalty == "outliers" else None
    attention = recipe.penalty == "attention"
    if attention:
        model.set_attn_implementation("eager")
        stack.callback(model.set_attn_implementation, "sdpa")

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        outputs = model(ids, labels=None if teacher else ids, use_cache=False, output_attentions=attention)
        loss = outputs.loss
        if teacher:
            with torch.no_grad():
                wanted = teacher(ids, use_cache=False).logits.log_softmax(-1)
            got = outputs.logits.log_softmax(-1)
            loss = nn.functional.kl_div(got, wanted, reduction="none", log_target=True).sum(-1).mean()
        if penalty:
            loss = loss + PENALTY["outliers"] * penalty()
        if attention:
            share = torch.stack([weights[..., 0].mean() for weights in outputs.attentions]).mean()
            loss = loss + PENALTY["attention"] * share
        return loss

    return loss_of


def make_optimizer(model: nn.Module, lr: float, steps: int, warmup: int, gate_lr: float | None = None) -> tuple:
    groups = gate_parameter_groups(model, lr, gate_lr, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup, max(0.05, (steps - step) / (0.4 * steps)))
    )
    return optimizer, schedule


def step_of(model: nn.Module, loss: torch.Tensor, optimizer, schedule) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def train_base(name: str, task: Task, data: Triggers | Python, text: str, seed: int, device: str, work: Path) -> tuple:
    """The base, its gates open and never trained, and its curve (step, loss, attention); goes on where it stopped."""
    made_of = {"task": asdict(task), "text": text}
    model = build(task, data.vocab, seed).to(device)
    for _, parameter in gate_parameters(model):
        parameter.requires_grad = False
    optimizer, schedule = make_optimizer(model, task.lr, task.steps, max(1, task.steps // 30))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    path, curve, windows = work / f"{name}-{seed}.pt", [], data.sample(*WINDOWS["curve"])
    every = max(1, task.steps // 20)
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if {key: saved.get(key) for key in made_of} == made_of:
            curve = saved["curve"]
            for part, module in parts.items():
                module.load_state_dict(saved[part])
    begun = curve[-1][0] if curve else 0
    for step in tqdm(range(begun, task.steps), f"{name}, seed {seed}: base", task.steps, initial=begun, unit=" steps"):
        ids = data.sample(task.batch, 10**6 * seed + step).to(device)
        step_of(model, model(ids, labels=ids, use_cache=False).loss, optimizer, schedule)
        if (step + 1) % every == 0:
            curve.append((step + 1, *glance(model, data, windows)))
            state = {part: module.state_dict() for part, module in parts.items()}
            torch.save({**state, "curve": curve, **made_of}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return model, curve


def heal_steps(task: Task) -> int:
    return max(1, round(HEAL_SHARE * task.steps))


def retrofit(base: nn.Module, name: str, recipe: Recipe, task: Task, data: Triggers | Python, seed: int) -> tuple:
    """The model that a recipe makes of the base, and (step, loss, attention) as it went."""
    model, curve, windows = copy.deepcopy(base), [], data.sample(*WINDOWS["curve"])
    if recipe.edit:
        settings = Desink(key="zero" if recipe.edit == "zero" else "fitted")
        desink(model, data.sample(*WINDOWS["calibration"]), settings)
    if recipe.edit == "key":
        open_gates(model)
    if recipe.fold:
        fold_first_token(model, data.sample(*WINDOWS["calibration"]))
    curve.append((0, *glance(model, data, windows)))
    if not recipe.tokens:
        return model, curve
    for key, parameter in model.named_parameters():
        parameter.requires_grad = recipe.gates or ".attn_gate." not in key
    if recipe.lora:
        from peft import get_peft_model

        from gated_llama import gated_lora_config

        torch.manual_seed(seed)
        model = get_peft_model(model, gated_lora_config(r=8, mlp=True))
    steps = recipe.tokens * heal_steps(task)
    lr = HEAL_RATE * task.lr
    optimizer, schedule = make_optimizer(model, 10 * lr if recipe.lora else lr, steps, max(1, steps // 10), 50 * lr)
    with ExitStack() as stack:
        loss_of = objective(model, recipe, base if recipe.teacher else None, stack)
        for step in tqdm(range(steps), f"seed {seed}: {name}", unit=" steps", leave=False):
            ids = data.sample(task.batch, 10**6 * seed + task.steps + step).to(base.device)
            step_of(model, loss_of(ids), optimizer, schedule)
            if (step + 1) % max(1, steps // 8) == 0:
                curve.append((step + 1, *glance(model, data, windows)))
    return (model.merge_and_unload() if recipe.lora else model), curve


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    for gates in gate_modules(model).values():
        for gate in gates:
            gate.proj.weight.zero_()
            gate.proj.bias.zero_()


def config_of(task: Task) -> dict:
    return {**asdict(task), "heal_steps": heal_steps(task), "heal_rate": HEAL_RATE, "penalty": PENALTY}


def run(args: argparse.Namespace) -> None:
    sizes = ("layers", "width", "heads", "length", "batch", "steps")
    task = replace(TASKS[args.task], **{size: getattr(args, size) for size in sizes if getattr(args, size)})
    data = Python(task) if task.data == "python" else Triggers(task)
    recipes = [name for name in args.recipes if not (RECIPES[name].fold and task.data == "bare triggers")]
    torch.set_float32_matmul_precision("high")  # on GPUs
    args.work.mkdir(parents=True, exist_ok=True)
    common = {"task": args.task, "config": config_of(task), "text": digest(data.sample(*WINDOWS["evaluation"]))}
    for seed in args.seeds:
        entries = [{**common, "seed": seed, "recipe": name} for name in (BASE, *recipes)]
        done = [{key: record[key] for key in entries[0]} for record in read_records(RECORDS)]
        entries = [entry for entry in entries if entry not in done]
        if not entries:
            continue
        base, curve = train_base(args.task, task, data, common["text"], seed, args.device, args.work)
        for entry in entries:
            name, model = entry["recipe"], base
            if name != BASE:
                model, curve = retrofit(base, name, RECIPES[name], task, data, seed)
            if args.device == "cuda":
                entry["gpu"] = torch.cuda.get_device_name()
            entry |= {"measured": look(model, data), "curve": curve, **circumstances()}
            keep_record(RECORDS, entry, *common, "seed", "recipe")
            shown = ", ".join(f"{what} {value:.4g}" for what, value in entry["measured"].items())
            print(f"{args.task}, seed {seed}, {name}: {shown}", flush=True)


def records_of(name: str) -> list[dict]:
    """Those of a task at the size that it has here."""
    config = config_of(TASKS[name])
    return [record for record in read_records(RECORDS) if record["task"] == name and record["config"] == config]


def compared(records: list[dict]) -> dict[str, dict[str, list[float]]]:
    """By recipe what is compared, a number a base: ratios to it, and to as much training of it without gates."""
    found = {((record["text"], record["seed"]), record["recipe"]): record["measured"] for record in records}
    rows: dict[str, dict[str, list[float]]] = {}
    for (of, recipe), now in sorted(found.items()):
        long = recipe in RECIPES and RECIPES[recipe].tokens > 1
        base, reference = found.get((of, BASE)), found.get((of, LONG_REFERENCE if long else REFERENCE))
        if base is None or reference is None:
            continue
        values = {
            "attention": now["first-token attention, idle queries"],
            "attention ratio": now["first-token attention"] / base["first-token attention"],
            "activation ratio": now["largest activation"] / base["largest activation"],
            "loss": 100 * (now["loss"] / reference["loss"] - 1),
            "loss, gates open": 100 * (now["loss, gates reset to open"] / reference["loss"] - 1),
            "quantized": now["W8A8 loss penalty"],
        }
        for what, value in values.items():
            rows.setdefault(recipe, {}).setdefault(what, []).append(value)
    return {name: rows[name] for name in (BASE, *RECIPES) if name in rows}


def table(records: list[dict]) -> str:
    def shown(values: list[float], form: str) -> str:
        low, middle, high = (format(round(f(values), int(form[-2])) + 0.0, form) for f in (min, statistics.median, max))
        return middle if low == high else f"{middle} ({low} to {high})"

    lines = [
        "| | bases | first-token attention, after / before | largest activation, after / before | loss, against "
        "training without gates | … with the gates reset to open | W8A8 loss penalty, nats |",
        "|---|---|---|---|---|---|---|",
        "| *goal* | *3* | *≤ 0.25* | *≤ 0.1* | *≤ +0.5 %* | *much more* | *≤ 0.25 of the base's* |",
    ]
    for name, row in compared(records).items():
        losses = [shown(row[what], "+.2f") + " %" for what in ("loss", "loss, gates open")]
        ratios = [shown(row[what], ".2f") for what in ("attention ratio", "activation ratio")]
        cells = [name, str(len(row["loss"])), *ratios, *losses, shown(row["quantized"], ".4f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(records: list[dict], path: Path) -> None:
    """Where idle queries look while a recipe is trained; what is left of the sink in the end, and what that costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    course, sink, loss = figure.subplots(1, 3, width_ratios=[5, 4, 4])
    for number, name in enumerate(DRAWN):
        for curve in (record["curve"] for record in records if record["recipe"] == name):
            steps, _, given = zip(*curve, strict=True)
            course.plot(steps, given, color=f"C{number}", marker=".", label=name)
    labels = dict(zip(*reversed(course.get_legend_handles_labels()), strict=True))
    course.legend(labels.values(), labels.keys(), fontsize=7)
    course.set(title="idle queries' attention on the first token", xlabel="step", ylim=(0, 1))
    rows = compared(records)
    for place, row in enumerate(rows.values()):
        sink.plot(row["attention ratio"], [place] * len(row["loss"]), "o", color="C0", alpha=0.6)
        loss.plot(row["loss"], [place] * len(row["loss"]), "o", color="C0", alpha=0.6)
    sink.set(title="first-token attention, after / before", xlim=(0, 1.1), yticks=range(len(rows)))
    sink.set_yticklabels(rows, fontsize=7)
    loss.set(title="loss against training without gates, %", xscale="symlog", yticks=[])
    for axes, goal in ((sink, 0.25), (loss, 0.5)):
        axes.axvline(goal, color="black", linewidth=0.8, linestyle=":", label="goal")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="deep", help="(default: deep)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--recipes", choices=RECIPES, nargs="*", default=list(RECIPES), help="(default: all)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--work", type=Path, default=Path("build/retrofit"), help="bases (default: build/retrofit)")
    for size in ("layers", "width", "heads", "length", "batch", "steps"):
        parser.add_argument(f"--{size}", type=int, help="of the base (default: as the task has it)")
    parser.add_argument("--write", action="store_true", help="run nothing: write table and figure from the records")
    args = parser.parse_args()
    if args.write:
        write_table("retrofit", table(records_of("deep")))
        write_table("retrofit python", table(records_of("python, small")))
        draw(records_of("deep"), FIGURE)
    else:
        run(args)


if __name__ == "__main__":
    sys.exit(main())
