# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Draw measurements: PNG figures, and a page that holds them, their tables and the text, and fetches nothing."""

import base64
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_llama.checkpoints.measurements import differences, summary_rows
from gated_llama.errors import UserError
from gated_llama.inspection.verdict import verdict


TEMPLATE = Path(__file__).with_name("page.html.jinja")
# One scale for gates everywhere: 0 shut, 1 open, 2 the most; blue lets less through, red more.
GATES = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
SHARES = {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}
matplotlib.rcParams["font.family"] = ["DejaVu Sans"]  # comes with matplotlib


def draw(measured: list[dict], folder: str | Path, head: str | None = None) -> Path:
    """
    Write to `folder` the page `index.html` and its figures as PNG files, one a panel.

    Args:
        measured: models as read from measurements.json, to stand beside each other.
        head: `LAYER.HEAD` whose attention map is shown; None: the one that gives the first token nearest to half of its
            attention, so that there is something else to see.

    Raises:
        UserError: there is no such head.
    """
    folder = Path(folder)
    layers = measured[0]["attention"]["heads"]
    chosen = chosen_head(head, len(layers), len(layers[0])) if head else _with_half_a_sink(layers)
    for number, model in enumerate(measured):
        model["name"] = Path(model["model"]).name or f"model {number + 1}"
        _hide_open_gates(model)
    figures = []
    for name, title, text, panels in FIGURES:
        images = []
        for number, (described, figure) in enumerate(panels(measured, *chosen)):
            path = folder / f"{name}-{number + 1}.png"
            figure.savefig(path, dpi=120, facecolor="white")
            images.append((described, base64.b64encode(path.read_bytes()).decode()))
        if images:
            figures.append({"name": name, "title": title, "text": text, "images": images})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"gate_colour": gate_colour, "ratio_colour": ratio_colour}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        models=measured,
        verdict=verdict(measured),
        figures=figures,
        numbers=list(zip(summary_rows(measured), differences(measured), strict=True)),
        zip=zip,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def _hide_open_gates(model: dict) -> None:
    """Gates that let all pass have nothing to show: the model is drawn as one that has none."""
    if model["gates"] and not any(layer["moved"] for layer in model["gates"]["layers"]):
        model.update(gates=None, without_gates=None)
        for text in filter(None, (model["text"], model["sentence"])):
            text.update(gates=None, query_gates=None)


def gate_colour(gate: float) -> str:
    """The colour of a gate on its scale, as CSS, light enough for dark text."""
    return to_hex(matplotlib.colormaps[GATES["cmap"]](0.2 + 0.6 * min(2.0, max(0.0, gate)) / 2))


def ratio_colour(ratio: float) -> str:
    """CSS colour of a token's length over the median: white up to 2, darkest from 500 on, dark text stays readable."""
    share = np.log(max(2.0, ratio) / 2) / np.log(250)
    return to_hex(matplotlib.colormaps["YlOrRd"](0.75 * min(1.0, share)))


Panels = list[tuple[str, Figure]]  # with what stands for each where it cannot be seen


def _panel(width: float = 4.6, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.title.set_wrap(True)  # names of models may be long
    return figure, axes


def _image(
    values, title: str, x: str, y: str, scale: dict, size: tuple[float, float] = (4.6, 3.6)
) -> tuple[str, Figure]:
    figure, axes = _panel(*size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    image = axes.imshow(np.asarray(values), aspect="auto", interpolation="nearest", **scale)
    axes.set(title=title, xlabel=x, ylabel=y)
    figure.colorbar(image, ax=axes)
    return title, figure


def _with_tokens(panel: tuple[str, Figure], tokens: list[str], *which: str) -> tuple[str, Figure]:
    labels = [token.replace("$", r"\$").strip() or "␣" for token in tokens]
    axes = panel[1].axes[0]
    if "x" in which:
        axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=9)
    if "y" in which:
        axes.set_yticks(range(len(tokens)), labels, fontsize=9)
    return panel


def _sentence(measured: list[dict], layer: int, head: int) -> Panels:
    """Where a query's attention goes, what its gates let through, and what is left, in one layer."""
    if not all(model["sentence"] for model in measured):
        return []
    panels = []
    for model in measured:
        shown = model["sentence"]
        tokens, query = shown["tokens"], shown["query"]
        own = min(layer, len(shown["maps"]) - 1)  # a smaller model has no such layer, or head
        own_head = min(head, len(shown["maps"][own]) - 1)
        attention = np.array(shown["attention"][own])  # (heads, tokens)
        name, size = model["name"], (4.6, 4.2)
        panels.append(
            _image(
                shown["maps"][own][own_head], f"{name}: layer {own}, head {own_head}", "looks at", "token", SHARES, size
            )
        )
        _with_tokens(panels[-1], tokens, "x", "y")
        panels.append(
            _image(attention, f"{name}: attention of “{tokens[query].strip()}”", "looks at", "head", SHARES, size)
        )
        _with_tokens(panels[-1], tokens, "x")
        if not shown["query_gates"]:
            continue
        gates = np.array(shown["query_gates"][own])
        figure, axes = _panel(*size)
        bars = axes.barh(range(len(gates)), gates, color=[gate_colour(gate) for gate in gates], edgecolor="grey")
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{name}: its gates, 0 shut, 1 open", xlim=(0, 2.2), xlabel="gate", ylabel="head")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        panels.append((axes.get_title(), figure))
        panels.append(_image(attention * gates[:, None], f"{name}: what is left", "looks at", "head", SHARES, size))
        _with_tokens(panels[-1], tokens, "x")
    return panels


def chosen_head(head: str, layers: int, heads: int) -> tuple[int, int]:
    """
    Layer and number of a head that is named so, as `"3.1"`.

    Raises:
        UserError: there is none.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", head)
    if match is None or not (int(match[1]) < layers and int(match[2]) < heads):
        raise UserError(f"there is no head {head}: name one from 0.0 to {layers - 1}.{heads - 1}, layer and head.")
    return int(match[1]), int(match[2])


def _with_half_a_sink(layers: list[list[float]]) -> tuple[int, int]:
    shares = np.array(layers)
    return tuple(map(int, np.unravel_index(np.abs(shares - 0.5).argmin(), shares.shape)))


def _sinks(measured: list[dict], layer: int, head: int) -> Panels:
    return [
        _image(model["attention"]["heads"], f"{model['name']}: attention to its first token", "head", "layer", SHARES)
        for model in measured
    ]


def _by_layer(measured: list[dict], layer: int, head: int) -> Panels:
    panels = []
    figure, axes = _panel()
    for model in measured:
        activations = model["activations"]
        axes.plot([top[0] for top in activations["top3"]], marker=".", label=f"{model['name']}, largest")
        axes.plot(activations["median"], linestyle=":", label=f"{model['name']}, median")
    axes.set(title="|x| in the residual stream", yscale="log", xlabel="layer")
    panels.append((axes.get_title(), figure))
    for name in ("o_proj", "down_proj"):
        figure, axes = _panel()
        for model in measured:
            axes.plot(model["activations"]["input_kurtosis"][name], marker=".", label=model["name"])
        axes.set(title=f"kurtosis into {name}", yscale="log", xlabel="layer")
        panels.append((axes.get_title(), figure))
    return _with_legends(panels)


def _with_legends(panels: Panels) -> Panels:
    for _, figure in panels:
        figure.axes[0].legend(fontsize=8)
        figure.axes[0].grid(alpha=0.3)
    return panels


def _gates(measured: list[dict], layer: int, head: int) -> Panels:
    panels = []
    for model in (model for model in measured if model["gates"]):
        gates = model["gates"]
        panels.append(_image(gates["heads"], f"{model['name']}: mean gate", "head", "layer", GATES))
        counts = np.sum(gates["histogram"], axis=0)
        edges = np.linspace(0, gates["histogram_end"], len(counts) + 1)
        figure, axes = _panel()
        axes.stairs(counts / counts.sum(), edges, fill=True, color="tab:grey")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{model['name']}: all gates, 0 shut, 1 open", xlabel="gate", ylabel="share", xlim=(0, 2))
        panels.append((axes.get_title(), figure))
        kinds = {kind: row["mean"] for kind, row in gates["kinds"].items() if row["tokens"]}
        figure, axes = _panel()
        axes.barh(list(kinds), kinds.values(), color=[gate_colour(gate) for gate in kinds.values()], edgecolor="grey")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{model['name']}: mean gate by kind of token", xlim=(0, 2), xlabel="gate")
        axes.invert_yaxis()
        panels.append((axes.get_title(), figure))
    return panels


def _lengths(measured: list[dict], layer: int, head: int) -> Panels:
    (loss_figure, losses), (rate_figure, rates) = _panel(), _panel()
    for model in measured:
        places, values = zip(*model["loss_by_position"], strict=True)
        losses.plot(places, values, marker="o", label=model["name"])
        by_length = model["attention"]["sink_rate"]
        rates.plot([int(length) for length in by_length], by_length.values(), marker="o", label=model["name"])
    losses.set(title="loss by position", xscale="log", xlabel="from token", ylabel="nats a token")
    rates.set(title="sink rate by length", xscale="log", xlabel="tokens", ylim=(-0.02, 1.02))
    return _with_legends([("loss by position", loss_figure), ("sink rate by length", rate_figure)])


# Name of the file, title, what it shows, how it is drawn.
FIGURES: list[tuple[str, str, str, Callable[[list[dict], int, int], Panels]]] = [
    (
        "sinks",
        "Attention to the first token, by layer and head",
        "The mean over queries and windows, on one scale. Where a head gives its first token most of its attention, it "
        "has an attention sink there.",
        _sinks,
    ),
    (
        "sentence",
        "Where attention goes, and what the gates let through",
        "One layer, and one head of it: unless another was chosen, the one that gives the first token nearest to half "
        "of its attention. First the head's map, where a bright first column is a sink. Then the attention of one "
        "token by head, and, of a gated model, its gates and what they leave of it.",
        _sentence,
    ),
    ("gates", "Gates", "One scale: 0 shut, 1 open, 2 the most.", _gates),
    ("activations", "Activations, by layer", "Logarithmic. Kurtosis is what hurts quantization.", _by_layer),
    ("lengths", "Length", "Loss by position in the window, and the sink rate of its first tokens.", _lengths),
]
