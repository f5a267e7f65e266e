# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Draw measurements: PNG figures, and a page that holds them, their tables and the text, and fetches nothing."""

import base64
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_llama.checkpoints.measurements import summary_rows
from gated_llama.errors import UserError


TEMPLATE = Path(__file__).with_name("page.html.jinja")
# One scale for gates everywhere: 0 shut, 1 open, 2 the most; blue lets less through, red more.
GATES = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
SHARES = {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}
matplotlib.rcParams["font.family"] = ["DejaVu Sans"]  # comes with matplotlib


def draw(measured: list[dict], folder: str | Path, head: str | None = None) -> Path:
    """
    Write to `folder` the page `index.html` and its figures as PNG files.

    Args:
        measured: models as read from measurements.json, to stand beside each other.
        head: `LAYER.HEAD` whose attention map opens the page; None: the one that gives the first token the most.

    Raises:
        UserError: there is no such head.
    """
    folder = Path(folder)
    chosen = _chosen_head(measured, head)
    for number, model in enumerate(measured):
        model["name"] = Path(model["model"]).name or f"model {number + 1}"
    figures = []
    for name, title, text, draw_figure in FIGURES:
        figure = draw_figure(measured, *chosen)
        if figure is None:
            continue
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight", facecolor="white")
        image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        figures.append({"name": name, "title": title, "text": text, "image": image})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["gate_colour"] = gate_colour
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        models=measured, figures=figures, numbers=summary_rows(measured), zip=zip
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def gate_colour(gate: float) -> str:
    """The colour of a gate on its scale, as CSS, light enough for dark text."""
    return to_hex(matplotlib.colormaps[GATES["cmap"]](0.2 + 0.6 * min(2.0, max(0.0, gate)) / 2))


def _grid(models: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(columns * width, models * height), layout="constrained")
    return figure, figure.subplots(models, columns, squeeze=False)


def _image(axes, values, title: str, x: str, y: str, scale: dict):
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    image = axes.imshow(np.asarray(values), aspect="auto", interpolation="nearest", **scale)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.figure.colorbar(image, ax=axes)


def _tokens(axes, tokens: list[str], which: str) -> None:
    labels = [token.replace("$", r"\$").strip() or "␣" for token in tokens]
    if which == "x":
        axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=7)
    else:
        axes.set_yticks(range(len(tokens)), labels, fontsize=7)


def _sentence(measured: list[dict], layer: int, head: int) -> Figure | None:
    """Where a query's attention goes, what its gates let through, and what is left: one row a model, one layer."""
    if not all(model["sentence"] for model in measured):
        return None
    figure, rows = _grid(len(measured), 4, 4.2, 3.9)
    for model, axes in zip(measured, rows, strict=True):
        shown = model["sentence"]
        tokens, query = shown["tokens"], shown["query"]
        attention = np.array(shown["attention"][layer])  # (heads, tokens)
        _image(axes[0], shown["maps"][layer][head], f"{model['name']}: head {head}", "looks at", "token", SHARES)
        _tokens(axes[0], tokens, "x")
        _tokens(axes[0], tokens, "y")
        _image(axes[1], attention, f"attention of “{tokens[query].strip()}”", "looks at", "head", SHARES)
        _tokens(axes[1], tokens, "x")
        gates = np.array(shown["query_gates"][layer] if shown["query_gates"] else [1.0] * len(attention))
        bars = axes[2].barh(range(len(gates)), gates, color=[gate_colour(gate) for gate in gates], edgecolor="grey")
        axes[2].bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes[2].axvline(1, color="black", linewidth=0.8)
        title = "gates: 0 shut, 1 open" if shown["query_gates"] else "no gates: all passes"
        axes[2].set(title=title, xlim=(0, 2.2), xlabel="gate", ylabel="head")
        axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[2].invert_yaxis()
        _image(axes[3], attention * gates[:, None], "what is left", "looks at", "head", SHARES)
        _tokens(axes[3], tokens, "x")
    figure.suptitle(f"Layer {layer}")
    return figure


def _chosen_head(measured: list[dict], head: str | None) -> tuple[int, int]:
    shares = np.array(measured[0]["attention"]["heads"])
    if head is None:
        return tuple(map(int, np.unravel_index(shares.argmax(), shares.shape)))
    match = re.fullmatch(r"(\d+)\.(\d+)", head)
    if match is None or not (int(match[1]) < shares.shape[0] and int(match[2]) < shares.shape[1]):
        last = ".".join(str(size - 1) for size in shares.shape)
        raise UserError(f"there is no head {head}: name one from 0.0 to {last}, layer and head.")
    return int(match[1]), int(match[2])


def _sinks(measured: list[dict], layer: int, head: int) -> Figure:
    figure, rows = _grid(2, len(measured), 5, 3.6)
    for number, model in enumerate(measured):
        attention = model["attention"]
        _image(rows[0, number], attention["heads"], f"{model['name']}: attention", "head", "layer", SHARES)
        _image(rows[1, number], attention["sink_heads"], f"{model['name']}: sink rate", "head", "layer", SHARES)
    return figure


def _by_layer(measured: list[dict], layer: int, head: int) -> Figure:
    figure, axes = _grid(1, 3, 4.6, 3.6)
    for model in measured:
        activations = model["activations"]
        axes[0, 0].plot([top[0] for top in activations["top3"]], marker=".", label=f"{model['name']}, largest")
        axes[0, 0].plot(activations["median"], linestyle=":", label=f"{model['name']}, median")
        for ax, name in zip(axes[0, 1:], ("o_proj", "down_proj"), strict=True):
            ax.plot(activations["input_kurtosis"][name], marker=".", label=model["name"])
    axes[0, 0].set(title="|x| in the residual stream", yscale="log", xlabel="layer")
    for ax, name in zip(axes[0, 1:], ("o_proj", "down_proj"), strict=True):
        ax.set(title=f"kurtosis into {name}", yscale="log", xlabel="layer")
    for ax in axes[0]:
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    return figure


def _gates(measured: list[dict], layer: int, head: int) -> Figure | None:
    gated = [model for model in measured if model["gates"]]
    if not gated:
        return None
    figure, rows = _grid(len(gated), 3, 4.6, 3.6)
    for model, axes in zip(gated, rows, strict=True):
        gates = model["gates"]
        _image(axes[0], gates["heads"], f"{model['name']}: mean gate", "head", "layer", GATES)
        counts = np.sum(gates["histogram"], axis=0)
        edges = np.linspace(0, gates["histogram_end"], len(counts) + 1)
        axes[1].stairs(counts / counts.sum(), edges, fill=True, color="tab:grey")
        axes[1].axvline(1, color="black", linewidth=0.8)
        axes[1].set(title="all gates: 0 shut, 1 open", xlabel="gate", ylabel="share", xlim=(0, 2))
        kinds = {kind: row["mean"] for kind, row in gates["kinds"].items() if row["tokens"]}
        axes[2].barh(
            list(kinds), kinds.values(), color=[gate_colour(gate) for gate in kinds.values()], edgecolor="grey"
        )
        axes[2].axvline(1, color="black", linewidth=0.8)
        axes[2].set(title="mean gate by kind of token", xlim=(0, 2), xlabel="gate")
        axes[2].invert_yaxis()
    return figure


def _lengths(measured: list[dict], layer: int, head: int) -> Figure:
    figure, axes = _grid(1, 2, 5, 3.6)
    for model in measured:
        places, losses = zip(*model["loss_by_position"], strict=True)
        axes[0, 0].plot(places, losses, marker="o", label=model["name"])
        rates = model["attention"]["sink_rate"]
        axes[0, 1].plot([int(length) for length in rates], rates.values(), marker="o", label=model["name"])
    axes[0, 0].set(title="loss by position", xscale="log", xlabel="from token", ylabel="nats a token")
    axes[0, 1].set(title="sink rate by length", xscale="log", xlabel="tokens", ylim=(-0.02, 1.02))
    for ax in axes[0]:
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    return figure


# Name of the file, title, what it shows, how it is drawn.
FIGURES: list[tuple[str, str, str, Callable[[list[dict], int, int], Figure | None]]] = [
    (
        "sentence",
        "Where attention goes, and what the gates let through",
        "One head, the one that gives the first token the most unless another was chosen, and its layer. First the "
        "head's map, where a bright first column is an attention sink. Then the attention of one token by head, its "
        "gates, and the attention that is left after them.",
        _sentence,
    ),
    (
        "sinks",
        "Attention to the first token, and sinks, by layer and head",
        "Above, the mean over queries and windows; below, the share of windows in which it is above 0.3.",
        _sinks,
    ),
    ("gates", "Gates", "One scale: 0 shut, 1 open, 2 the most.", _gates),
    ("activations", "Activations, by layer", "Logarithmic. Kurtosis is what hurts quantization.", _by_layer),
    ("lengths", "Length", "Loss by position in the window, and the sink rate of its first tokens.", _lengths),
]
