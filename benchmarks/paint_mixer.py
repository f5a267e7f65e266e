# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The paint mixer: from a value to the output there are two linear maps, and two linear maps are one.

In the task a window is a paint and a question, and the answer is one of the paint's features: the question says which
is to be kept. All features share their answers, so that adding what the question says to what the paint holds cannot
separate them; the two must be multiplied. One layer without an MLP, one head, with and without gates, and with as many
parameters more that are linear, once between value and output and once beside them. Attention is even, so that the path
from value to output is all there is, or learned, since softmax is a gate too, of one value a head. Writes a table for
people, a figure to docs/ and one JSON line a run to benchmarks/results/.

    python benchmarks/paint_mixer.py [--seeds 0 1 2] [--steps 2000]
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.models.llama.modeling_llama import LlamaAttention

from configuration_gated import GatedLlamaConfig
from measured import RESULTS, ROOT, circumstances, keep_record, read_records, write_table
from modeling_gated import GatedLlamaForCausalLM
from training import Claim, train


RECORDS = RESULTS / "paint_mixer.jsonl"
FEATURES, VALUES = 4, 4
PAINTS = VALUES**FEATURES  # every combination is a paint, with a token of its own
BOS, QUESTION, ANSWER, PAINT = 0, 1, 1 + FEATURES, 1 + FEATURES + VALUES  # the first token of each kind
RATE, BATCH, WIDTH = 1e-2, 128, 32
LINEAR = ("ungated", "longer path", "added path")
KINDS = (*LINEAR, "headwise", "elementwise")
ATTENTION = ("even", "learned")
SHAPE = {
    "vocab_size": PAINT + PAINTS,
    "hidden_size": WIDTH,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


def windows() -> torch.Tensor:
    """Every paint with every question: token ids (PAINTS · FEATURES, 4), beginning, paint, question, answer."""
    rows = []
    for number, features in enumerate(itertools.product(range(VALUES), repeat=FEATURES)):
        rows += [[BOS, PAINT + number, QUESTION + n, ANSWER + value] for n, value in enumerate(features)]
    return torch.tensor(rows)


class WithAddedPath(LlamaAttention):
    """Control: as many parameters as an elementwise gate, on the same input, added instead of multiplied: Y + X W."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.added = nn.Linear(config.hidden_size, self.o_proj.in_features, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output + self.o_proj(self.added(hidden_states)), weights


def make(kind: str, attention: str) -> PreTrainedModel:
    """
    A model of one layer whose MLP adds exactly nothing, being zero at its end and not trained. With `"even"` attention
    queries and keys are zero too, so that every token looks at all so far alike, and the last norm is left out: without
    gates the logits are then exactly a sum of what the question and what the paint give.
    """
    if kind in ("headwise", "elementwise"):
        model = GatedLlamaForCausalLM(GatedLlamaConfig(**SHAPE, gate_type=kind, gate_scale=1.0, gate_init="normal"))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer = model.model.layers[0]
    if kind == "added path":
        layer.self_attn = WithAddedPath(model.config, 0)
        layer.self_attn.apply(model._init_weights)
    elif kind == "longer path":
        longer = nn.Linear(WIDTH, WIDTH, bias=False)
        model._init_weights(longer)
        layer.self_attn.o_proj = nn.Sequential(longer, layer.self_attn.o_proj)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    layer.mlp.requires_grad_(False)
    if attention == "even":
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            nn.init.zeros_(projection.weight)
            projection.requires_grad_(False)
        model.model.norm = nn.Identity()
    return model


def paint_alone() -> tuple[float, float]:
    """
    Loss and accuracy of who knows the paint and not the question. With even attention no model without gates can have a
    lower loss: its logits are a sum of the question's and the paint's; the loss is convex in both, and the task stays
    the same when values are renamed, so that averaging over all names lowers it, and leaves a question that favours no
    value.
    """
    features = windows()[:, 3].view(PAINTS, FEATURES) - ANSWER
    shares = functional.one_hot(features, VALUES).float().mean(1)  # (PAINTS, VALUES)
    return torch.special.entr(shares).sum(1).mean().item(), shares.amax(1).mean().item()


def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    every = windows()
    labels = every.masked_fill(torch.arange(4) < 3, -100)  # the answer alone is learned
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(every), (BATCH,), generator=generator)
        yield every[chosen], labels[chosen]


@torch.no_grad()
def look(model: PreTrainedModel) -> tuple[dict[str, float], torch.Tensor | None]:
    """Loss and accuracy over all there is; and the gates of each question (FEATURES, WIDTH), if there are so many."""
    every = windows()
    elementwise = getattr(model.config, "gate_type", None) == "elementwise"
    outputs = model(every[:, :3], use_cache=False, **({"output_gates": True} if elementwise else {}))
    logits, answers = outputs.logits[:, -1], every[:, 3]
    found = {
        "loss": functional.cross_entropy(logits, answers).item(),
        "accuracy": (logits.argmax(-1) == answers).float().mean().item(),
    }
    return found, outputs.gates[0][:FEATURES, -1] if elementwise else None  # the first paint's windows


def run(kind: str, attention: str, seed: int, steps: int) -> tuple[dict, torch.Tensor | None]:
    set_seed(seed)
    model = make(kind, attention)
    name = f"{attention} attention, {kind}, seed {seed}"
    curve = train(model, batches(seed), steps=steps, rate=RATE, name=name)
    found, gates = look(model)
    record = {
        "kind": kind,
        "attention": attention,
        "seed": seed,
        "steps": steps,
        "rate": RATE,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **found,
        "curve": curve,
        **circumstances(),
    }
    return record, gates


def claims(records: list[dict]) -> list[Claim]:
    """What the task is to show, in every seed."""
    bound, _ = paint_alone()
    found = []
    for attention in ATTENTION:
        lines = [line for line in records if line["attention"] == attention]
        gated = min(line["accuracy"] for line in lines if line["kind"] == "elementwise")
        linear = [line for line in lines if line["kind"] in LINEAR]
        most, least = max(line["accuracy"] for line in linear), min(line["loss"] for line in linear)
        found.append(Claim(f"{attention}: elementwise solves it", f"{gated:.1%} right at least", gated >= 0.99))
        found.append(Claim(f"{attention}: every run without gates is worse", f"{most:.1%} at most", most < gated))
        if attention == "even":
            says = f"even: without gates no loss is below the bound, {bound:.4f}"
            found.append(Claim(says, f"{least:.4f} at least", least > bound - 1e-3))
    return found


def table(records: list[dict]) -> str:
    """For people and the README: means over seeds."""
    rows = ["| | trained parameters | attention | loss | right answers (each seed) |", "|---|---|---|---|---|"]
    for attention in ATTENTION:
        for kind in KINDS:
            lines = [line for line in records if (line["kind"], line["attention"]) == (kind, attention)]
            if lines:
                right = ", ".join(f"{line['accuracy']:.1%}" for line in lines)
                loss = sum(line["loss"] for line in lines) / len(lines)
                rows.append(f"| {kind} | {lines[0]['parameters']:,} | {attention} | {loss:.4f} | {right} |")
    loss, accuracy = paint_alone()
    rows.append(f"| the paint known, the question not | | | {loss:.4f} | {accuracy:.1%} |")
    return "\n".join(rows) + "\n"


def draw(records: list[dict], gates: torch.Tensor) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, attention in zip(axes, ATTENTION, strict=False):
        for number, kind in enumerate(KINDS):
            curves = [r["curve"] for r in records if (r["kind"], r["attention"]) == (kind, attention)]
            for place, curve in enumerate(curves):
                ax.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=1, label=None if place else kind)
        ax.axhline(paint_alone()[0], color="black", linestyle=":", label="without the question")
        ax.set(title=f"{attention} attention", xlabel="step", ylabel="loss, nats", ylim=(0, 2))
        ax.legend(fontsize=7)
    order = gates.argmax(0).argsort(stable=True)
    image = axes[2].imshow(gates[:, order], aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
    axes[2].set(title="elementwise: what each question lets through", xlabel="channel, sorted", ylabel="question")
    axes[2].set_yticks(range(FEATURES), [f"feature {n + 1}?" for n in range(FEATURES)])
    figure.colorbar(image, ax=axes[2], label="gate")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=2000, help="of training (default: 2000)")
    args = parser.parse_args()
    records, shown = [], None
    for attention, kind, seed in itertools.product(ATTENTION, KINDS, args.seeds):
        record, gates = run(kind, attention, seed, args.steps)
        records.append(record)
        keep_record(RECORDS, record, "kind", "attention", "seed")
        shown = gates if shown is None else shown
    draw(records, shown).savefig(ROOT / "docs" / "paint_mixer.png", dpi=80, facecolor="white")
    print(table(records))
    for claim in claims(records):
        print(claim)
    write_table("paint mixer", table(read_records(RECORDS)))


if __name__ == "__main__":
    main()
