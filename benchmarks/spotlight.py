# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The spotlight that cannot be switched off: softmax makes a head that has nothing to look at look somewhere all the same.

In the task, bigram text in which a trigger token is followed by what stood before it, attention is needed at triggers
and nowhere else. One layer with one head learns it without a gate and with one; the first is converted and plainly
fine-tuned, at three rates. What is measured is where the queries of the other tokens look, and what the gates let
through. Writes a table for people, a figure to docs/ and one JSON line a seed to benchmarks/results/.

    python benchmarks/spotlight.py [--seeds 0 1 2] [--steps 2000] [--finetune-steps 500]
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from configuration_gated import GatedLlamaConfig
from gated_llama import convert_checkpoint
from gated_llama.gates import GATE_RATE
from measured import RESULTS, ROOT, circumstances, keep_record, read_records, write_table
from modeling_gated import GatedLlamaForCausalLM
from training import Claim, train


RECORDS = RESULTS / "spotlight.jsonl"
BOS, TRIGGERS, VOCAB, LENGTH = 0, (1, 2, 3), 64, 64
TRIGGER_SHARE = 0.1  # how often a trigger follows a token that is not one
RATE, BATCH, POOL = 3e-3, 64, 2**14
FINETUNE_RATES = (1e-4, 1e-3, 3e-3)  # of the weights, from a usual one to that of training; gates have 50 times as much
SHOWN = 24  # tokens of a window that are drawn
SINK = 0.3  # the attention that makes a head a sink (Gu et al., arXiv 2410.10781)
TUNED = {f"converted, fine-tuned at {rate:g}": rate for rate in FINETUNE_RATES}
MODELS = ("ungated", "gated from scratch", "converted", *TUNED)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 8,  # a wide MLP learns to take away what an idle head adds, and the sink is less needed
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Language:
    """What follows what: `follow[a, b]` is the probability of b after a, which is no trigger. (VOCAB, VOCAB)"""

    follow: torch.Tensor

    @classmethod
    def made(cls, seed: int) -> "Language":
        generator = torch.Generator().manual_seed(seed)
        follow = torch.zeros(VOCAB, VOCAB)
        words = torch.arange(len(TRIGGERS) + 1, VOCAB)
        follow[:, words] = (1.5 * torch.randn(VOCAB, len(words), generator=generator)).softmax(-1)
        follow[1:] *= 1 - TRIGGER_SHARE  # a window does not begin with a trigger: there is nothing to copy
        follow[1:, TRIGGERS] = TRIGGER_SHARE / len(TRIGGERS)
        return cls(follow)

    def windows(self, count: int, seed: int) -> torch.Tensor:
        """Token ids (count, LENGTH), each window from BOS on."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.full((count, LENGTH), BOS)
        for place in range(1, LENGTH):
            last = ids[:, place - 1]
            drawn = torch.multinomial(self.follow[last], 1, generator=generator)[:, 0]
            ids[:, place] = torch.where(is_trigger(last), ids[:, place - 2], drawn)
        return ids


def is_trigger(ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(TRIGGERS))


def batches(pool: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        yield ids, ids


@torch.no_grad()
def look(model: PreTrainedModel, ids: torch.Tensor) -> tuple[dict[str, float], torch.Tensor, torch.Tensor | None]:
    """
    Means over `ids` (B, T) of what idle tokens and triggers do; and of the first window the attention (T, T) and the
    gates (T), None without gates.
    """
    gated = isinstance(model, GatedLlamaForCausalLM)
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True, use_cache=False, **({"output_gates": True} if gated else {}))
    model.set_attn_implementation("sdpa")
    attention = outputs.attentions[0][:, 0]  # (B, T, T)
    losses = functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    triggers = is_trigger(ids)
    idle = ~triggers
    idle[:, 0] = False  # the first token can look at nothing but itself
    before = functional.pad(attention.diagonal(-1, 1, 2), (1, 0))  # of each query on the token before it
    found = {
        "first": attention[..., 0][idle].mean(),
        "copied": before[triggers].mean(),
        "loss_idle": losses[idle[:, :-1]].mean(),
        "loss_trigger": losses[triggers[:, :-1]].mean(),
    }
    gates = outputs.gates[0][..., 0] if gated else None
    if gated:
        found |= {"gate_idle": gates[idle].mean(), "gate_trigger": gates[triggers].mean()}
    return {name: value.item() for name, value in found.items()}, attention[0], gates[0] if gated else None


def compare(seed: int, steps: int, finetune_steps: int) -> tuple[dict, dict[str, tuple], torch.Tensor]:
    """
    Returns:
        The record; for each model the attention and the gates of one window; that window.
    """
    language = Language.made(seed)
    pool, held_out = language.windows(POOL, 2 * seed + 1), language.windows(512, 2 * seed + 2)
    # The window that is drawn, the first, has the most triggers.
    held_out = held_out[is_trigger(held_out[:, :SHOWN]).sum(1).argsort(descending=True)]
    set_seed(seed)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    scratch = GatedLlamaForCausalLM(GatedLlamaConfig(**SHAPE, gate_scale=1.0, gate_init="normal"))
    curves, found, shown = {}, {}, {}

    def trained(name: str, model: PreTrainedModel, steps: int, rate: float, gate_rate: float | None = None) -> None:
        if steps:
            told = f"seed {seed}, {name}"
            curves[name] = train(model, batches(pool, seed), steps=steps, rate=rate, gate_rate=gate_rate, name=told)
        found[name], *shown[name] = look(model.eval(), held_out)

    trained("ungated", base, steps, RATE)
    trained("gated from scratch", scratch, steps, RATE)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(f"{folder}/base")
        convert_checkpoint(f"{folder}/base", f"{folder}/gated", progress=False)
        trained("converted", AutoModelForCausalLM.from_pretrained(f"{folder}/gated"), 0, 0.0)
        for name, rate in TUNED.items():
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/gated")
            trained(name, model, finetune_steps, rate, GATE_RATE * rate)
    evenly = torch.arange(1, LENGTH + 1).reciprocal()[None].expand(len(held_out), -1)
    idle = ~is_trigger(held_out[:, 1:])
    record = {
        "seed": seed,
        "steps": steps,
        "finetune_steps": finetune_steps,
        "rate": RATE,
        "evenly": evenly[:, 1:][idle].mean().item(),  # attention on the first token if it were spread evenly
        "models": found,
        "curves": curves,
        **circumstances(),
    }
    return record, shown, held_out[0]


def claims(records: list[dict]) -> list[Claim]:
    """What the task is to show, in every seed."""
    models = [record["models"] for record in records]
    sinks = [model["ungated"]["first"] for model in models]
    ratios = [model["gated from scratch"]["first"] / sink for model, sink in zip(models, sinks, strict=True)]
    gates = [model["gated from scratch"]["gate_trigger"] / model["gated from scratch"]["gate_idle"] for model in models]
    usual = next(iter(TUNED))
    left = [model[usual]["first"] / sink for model, sink in zip(models, sinks, strict=True)]
    return [
        Claim(f"ungated: idle queries are a sink, ≥ {SINK}", f"{min(sinks):.3f} at least", min(sinks) >= SINK),
        Claim("gated from scratch: ≤ .25 of that", f"{max(ratios):.2f} at most", max(ratios) <= 0.25),
        Claim("… gates of triggers ≥ 5 × those of idle tokens", f"{min(gates):.1f} × at least", min(gates) >= 5),
        Claim(f"{usual}: ≥ .75 of the sink is left", f"{min(left):.2f} at least", min(left) >= 0.75),
    ]


def table(records: list[dict]) -> str:
    """For people and the README: means over seeds."""
    columns = ("first", "gate_idle", "gate_trigger", "loss_idle", "loss_trigger")
    rows = [
        "| | idle queries on the first token (each seed) | gate, idle | gate, triggers | loss, idle | loss, triggers |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        found = [record["models"][name] for record in records]
        values = [f"{sum(f[c] for f in found) / len(found):.3f}" if c in found[0] else "–" for c in columns]
        firsts = ", ".join(f"{model['first']:.3f}" for model in found)
        values[0] += f" ({firsts})"
        rows.append(f"| {name} | {' | '.join(values)} |")
    evenly = sum(record["evenly"] for record in records) / len(records)
    rows.append(f"| attention spread evenly | {evenly:.3f} | | | | |")
    return "\n".join(rows) + "\n"


def draw(shown: dict[str, tuple], ids: torch.Tensor, tokens: int = SHOWN) -> Figure:
    """For four models the attention of one window, rows of triggers marked, and its gates."""
    names = ("ungated", "gated from scratch", *TUNED)[:3] + tuple(TUNED)[-1:]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(2, len(names), height_ratios=(3, 1), sharex=True)
    triggers = is_trigger(ids[:tokens])
    for column, name in enumerate(names):
        attention, gates = shown[name]
        image = axes[0, column].imshow(attention[:tokens, :tokens], cmap="magma", vmin=0, vmax=1)
        axes[0, column].set(title=name, ylabel="query (▸ trigger)", yticks=triggers.nonzero()[:, 0].tolist())
        axes[0, column].set_yticklabels(["▸"] * int(triggers.sum()))
        axes[1, column].set_title("no gate: all passes" if gates is None else "", fontsize=9)
        gates = torch.ones(tokens) if gates is None else gates[:tokens]
        colours = ["tab:red" if trigger else "tab:grey" for trigger in triggers]
        axes[1, column].bar(range(tokens), gates, color=colours)
        axes[1, column].set(xlabel="token", ylabel="gate")
    figure.colorbar(image, ax=axes[0], label="attention")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=2000, help="of training from scratch (default: 2000)")
    parser.add_argument("--finetune-steps", type=int, default=500, help="of the converted model (default: 500)")
    args = parser.parse_args()
    records = []
    for number, seed in enumerate(args.seeds):
        record, shown, ids = compare(seed, args.steps, args.finetune_steps)
        records.append(record)
        keep_record(RECORDS, record, "seed")
        if number == 0:
            draw(shown, ids).savefig(ROOT / "docs" / "spotlight.png", dpi=80, facecolor="white")
    print(table(records))
    for claim in claims(records):
        print(claim)
    write_table("spotlight", table(read_records(RECORDS)))


if __name__ == "__main__":
    main()
