# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `gated-llama inspect --out` keeps in measurements.json: read again, and as numbers to compare."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gated_llama.errors import UserError


MEASUREMENTS_NAME = "measurements.json"
WANTED = {"model", "windows", "length", "loss", "attention", "activations", "gates", "sentence", "without_gates"}
INSPECTION = Path("inspection", MEASUREMENTS_NAME)  # where a checkpoint's own are, by `--out FOLDER/inspection`


def write_measurements(measured: Iterable, folder: Path) -> Path:
    """Write measurements.json, one line per model."""
    path = folder / MEASUREMENTS_NAME
    path.write_text("[" + ",\n".join(each.to_json() for each in measured) + "]\n", encoding="utf-8")
    return path


def read_measurements(paths: list[str | Path]) -> list[dict]:
    """
    Read one or more measurements.json files.

    Raises:
        UserError: a file is not one that `gated-llama inspect --out` wrote.
    """
    measured = []
    for path in map(Path, paths):
        try:
            models = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as measurements: {error}.") from None
        whole = isinstance(models, list) and models and all(isinstance(m, dict) and m.keys() >= WANTED for m in models)
        if not whole:
            raise UserError(f"{path} holds no measurements: take a measurements.json of `gated-llama inspect --out`.")
        measured += models
    return measured


@dataclass(frozen=True)
class Row:
    """
    A row of the table that compares models.

    Attributes:
        name: what is compared; with {length} it is one row for each length, and `value` takes that too.
        value: of a model; None where it has none.
        source: by whose definition.
        form: of the value.
        relative: compared by the ratio, not by the difference; where there is one.
        aim: -1 if less is better, 0 if neither is.
    """

    name: str
    value: Callable[..., float | None]
    source: str = ""
    form: str = ".4f"
    relative: bool = True
    aim: int = -1


def _of_gates(state: str, number: int) -> Callable[[dict], float | None]:
    return lambda model: model["without_gates"][state][number] if model["without_gates"] else None


def _cost(name: str) -> Callable[[dict], float | None]:
    return lambda model: model.get("quantization", {}).get(name)


def _largest_kurtosis(model: dict, name: str) -> float | None:
    found = [kurtosis for kurtosis in model["activations"]["input_kurtosis"][name] if kurtosis is not None]
    return max(found, default=None)


ROWS = [
    Row("Loss, nats a token", lambda m: m["loss"], "windows apart, every predicted token"),
    Row("Perplexity", lambda m: math.exp(m["loss"]), form=".3f"),
    Row("Attention to the first token", lambda m: m["attention"]["first_token"], "F-Attn, Qiu et al."),
    Row("… of queries from the 17th on", lambda m: m["attention"]["first_token_later"]),
    Row(
        "Sink rate, {length} tokens",
        lambda m, length: m["attention"]["sink_rate"].get(length),
        "ε = 0.3, first token, Gu et al.",
        ".1%",
    ),
    Row("Largest activation", lambda m: m["activations"]["m_act"], "M-Act, Qiu et al.", ".4g"),
    Row("Layers with |x| > 100", lambda m: m["activations"]["above_100"], form=".0%", relative=False),
    Row(
        "Layers with massive activations",
        lambda m: m["activations"]["massive"],
        "and > 1000 medians, Sun et al.",
        ".0%",
        relative=False,
    ),
    Row(
        "Kurtosis into o_proj, largest",
        lambda m: _largest_kurtosis(m, "o_proj"),
        "Bondarenko et al.",
        ".4g",
    ),
    Row("Kurtosis into down_proj, largest", lambda m: _largest_kurtosis(m, "down_proj"), "", ".4g"),
    *(
        Row(f"Cost of {name}", _cost(name), "simulated, nats a token", "+.3f", relative=False)
        for name in ("W8A8, static per tensor", "W8A8, dynamic per tensor", "W8A8, per token")
    ),
    Row("Loss, gates as trained", _of_gates("trained", 0), "on a part of the text", aim=0),
    Row("Loss, gates open", _of_gates("open", 0), "g → 1", aim=0),
    Row("Loss, gates inverted", _of_gates("inverted", 0), "g → 2 − g", aim=0),
    Row("KL from trained, gates open", _of_gates("open", 1), relative=False, aim=0),
    Row("KL from trained, gates inverted", _of_gates("inverted", 1), relative=False, aim=0),
]
NOTHING = "–"  # where a model has no such value
TOLD = 0.005  # from this change on it is said to be better or worse


def summary_rows(measured: list[dict]) -> list[tuple[str, str, list[str]]]:
    """The rows of the table: what it is, by whose definition, the value for each model."""
    return [
        (name, row.source, [NOTHING if value is None else format(value, row.form) for value in values])
        for name, row, values in _values(measured)
    ]


def differences(measured: list[dict]) -> list[list[str]]:
    """For each of the rows how each further model differs from the first, "better" or "worse" where that is clear."""
    return [[_difference(row, values[0], value) for value in values[1:]] for _, row, values in _values(measured)]


def _values(measured: list[dict]) -> list[tuple[str, Row, list[float | None]]]:
    found = []
    for row in ROWS:
        if "{length}" not in row.name:
            found.append((row.name, row, [row.value(model) for model in measured]))
            continue
        for length in measured[0]["attention"]["sink_rate"]:
            found.append((row.name.format(length=length), row, [row.value(model, length) for model in measured]))
    return [(name, row, values) for name, row, values in found if any(value is not None for value in values)]


def _difference(row: Row, one: float | None, other: float | None) -> str:
    if one is None or other is None:
        return ""
    relative = row.relative and one != 0
    change = other / one - 1 if relative else other - one
    if relative:
        text = f"{100 * change:+.1f} %" if abs(change) < 0.5 else f"× {other / one:.3g}"
    else:
        text = f"{round(100 * change):+} points" if row.form.endswith("%") else format(change, "+.3f")
    if abs(change) < TOLD or not row.aim:
        return text
    return f"{text}, {'better' if change * row.aim > 0 else 'worse'}"
