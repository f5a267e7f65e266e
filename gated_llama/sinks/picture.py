# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One picture of what became of a model's sinks. Needs matplotlib."""

from pathlib import Path

from gated_llama.sinks.judge import Judgement


def draw_sinks(before: Judgement, after: Judgement, path: Path) -> None:
    """Each head's attention to its most attended key, base beside result on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, judgement in zip(panels, ("before", "after"), (before, after), strict=True):
        image = axes.imshow(judgement.heads, vmin=0, vmax=1, aspect="auto", cmap="magma", interpolation="nearest")
        axes.set(title=f"{name}: sink rate {judgement.sink_rate:.1%}, loss {judgement.loss:.3f}", xlabel="head")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="attention to the head's most attended key")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
