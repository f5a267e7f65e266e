# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `gated-llama inspect --out` keeps in measurements.json: read again, and as numbers to compare."""

import json
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


def summary_rows(measured: list[dict]) -> list[tuple[str, str, list[str]]]:
    """The rows of the table: what it is, by whose definition, the value for each model."""
    rows = [
        ("Loss, nats a token", "windows apart, every predicted token", lambda m: f"{m['loss']:.4f}"),
        ("Attention to the first token", "F-Attn, Qiu et al.", lambda m: f"{m['attention']['first_token']:.4f}"),
        ("… of queries from the 17th on", "", lambda m: f"{m['attention']['first_token_later']:.4f}"),
    ]
    for length in measured[0]["attention"]["sink_rate"]:
        rows.append(
            (
                f"Sink rate, {length} tokens",
                "ε = 0.3, first token, Gu et al.",
                lambda m, length=length: f"{m['attention']['sink_rate'].get(length, float('nan')):.1%}",
            )
        )
    activations = [
        ("Largest activation", "M-Act, Qiu et al.", lambda a: f"{a['m_act']:.4g}"),
        ("Layers with |x| > 100", "", lambda a: f"{a['above_100']:.0%}"),
        ("Layers with massive activations", "and > 1000 medians, Sun et al.", lambda a: f"{a['massive']:.0%}"),
        ("Kurtosis into o_proj, largest", "Bondarenko et al.", lambda a: f"{max(a['input_kurtosis']['o_proj']):.4g}"),
        ("Kurtosis into down_proj, largest", "", lambda a: f"{max(a['input_kurtosis']['down_proj']):.4g}"),
    ]
    rows += [(name, source, lambda m, f=f: f(m["activations"])) for name, source, f in activations]
    for state, what in (("trained", "the first windows alone"), ("open", "g → 1"), ("inverted", "g → 2 − g")):
        rows.append(
            (
                f"Loss with gates {state} (KL from trained)",
                what,
                lambda m, state=state: (
                    "{:.4f} ({:.4f})".format(*m["without_gates"][state]) if m["without_gates"] else "no gates"
                ),
            )
        )
    return [(name, source, [value(model) for model in measured]) for name, source, value in rows]
