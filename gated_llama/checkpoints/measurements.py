# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `gated-llama inspect --out` keeps in measurements.json: read again, and as numbers to compare."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from gated_llama.errors import UserError


MEASUREMENTS_NAME = "measurements.json"


def read_measurements(paths: list[str | Path]) -> list[dict]:
    """
    Raises:
        UserError: a file is not one that `gated-llama inspect --out` wrote.
    """
    measured = []
    for path in map(Path, paths):
        try:
            models = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as measurements: {error}.") from None
        if not isinstance(models, list) or not all(isinstance(m, dict) and "attention" in m for m in models):
            raise UserError(f"{path} holds no measurements: take a measurements.json of `gated-llama inspect --out`.")
        measured += models
    return measured


def _without_gates(model: dict, state: str) -> str:
    return "{:.4f} ({:.4f})".format(*model["without_gates"][state]) if model["without_gates"] else "no gates"


# What is compared: its name, by whose definition, the value of a model. A row with {length} is one for each length.
ROWS: list[tuple[str, str, Callable[..., str]]] = [
    ("Loss, nats a token", "windows apart, every predicted token", lambda m: f"{m['loss']:.4f}"),
    ("Perplexity", "", lambda m: f"{math.exp(m['loss']):.3f}"),
    ("Attention to the first token", "F-Attn, Qiu et al.", lambda m: f"{m['attention']['first_token']:.4f}"),
    ("… of queries from the 17th on", "", lambda m: f"{m['attention']['first_token_later']:.4f}"),
    (
        "Sink rate, {length} tokens",
        "ε = 0.3, first token, Gu et al.",
        lambda m, length: f"{m['attention']['sink_rate'].get(length, float('nan')):.1%}",
    ),
    ("Largest activation", "M-Act, Qiu et al.", lambda m: f"{m['activations']['m_act']:.4g}"),
    ("Layers with |x| > 100", "", lambda m: f"{m['activations']['above_100']:.0%}"),
    (
        "Layers with massive activations",
        "and > 1000 medians, Sun et al.",
        lambda m: f"{m['activations']['massive']:.0%}",
    ),
    (
        "Kurtosis into o_proj, largest",
        "Bondarenko et al.",
        lambda m: f"{max(m['activations']['input_kurtosis']['o_proj']):.4g}",
    ),
    (
        "Kurtosis into down_proj, largest",
        "",
        lambda m: f"{max(m['activations']['input_kurtosis']['down_proj']):.4g}",
    ),
    ("Loss with gates trained (KL from trained)", "the first windows alone", lambda m: _without_gates(m, "trained")),
    ("Loss with gates open (KL from trained)", "g → 1", lambda m: _without_gates(m, "open")),
    ("Loss with gates inverted (KL from trained)", "g → 2 − g", lambda m: _without_gates(m, "inverted")),
]


def summary_rows(measured: list[dict]) -> list[tuple[str, str, list[str]]]:
    """The rows of the table: what it is, by whose definition, the value for each model."""
    rows = []
    for name, source, value in ROWS:
        if "{length}" not in name:
            rows.append((name, source, [value(model) for model in measured]))
            continue
        for length in measured[0]["attention"]["sink_rate"]:
            rows.append((name.format(length=length), source, [value(model, length) for model in measured]))
    return rows
