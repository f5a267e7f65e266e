# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the measurements of one model, or of one beside another, come to, in words."""

from gated_llama.inspection.collectors import SINK_SHARE


def verdict(measured: list[dict]) -> list[str]:
    """A sentence or two for each model, as read from measurements.json; the others are compared to the first."""
    first, *others = measured
    return [
        f"{first['name']} gives its first token {_of_attention(first)}. {_massive(first)}",
        *(f"{_after(first, other)} {_still_massive(first, other)}" for other in others),
    ]


def _of_attention(model: dict) -> str:
    heads = [share for layer in model["attention"]["heads"] for share in layer]
    sinks = sum(share > SINK_SHARE for share in heads)
    share = model["attention"]["first_token"]
    return f"{share:.0%} of its attention, and more than {SINK_SHARE:.0%} in {sinks} of {len(heads)} heads"


def _after(one: dict, other: dict) -> str:
    loss = other["loss"] / one["loss"] - 1
    activations = other["activations"]["m_act"] / one["activations"]["m_act"]
    change = "unchanged" if 0.9 < activations < 1.1 else f"{activations:.2g} times as large"
    return (
        f"{other['name']} gives it {_of_attention(other)}; its loss is {100 * loss:+.1f} %, and its largest "
        f"activations are {change}."
    )


def _still_massive(one: dict, other: dict) -> str:
    said = _massive(other)
    return "The same tokens are massive." if one.get("massive") and said == _massive(one) else said


def _massive(model: dict) -> str:
    tokens = model.get("massive") or []
    if not tokens:
        return "No token is massive."
    often = [token for token in tokens if token["seen"] * 4 >= model["windows"]] or tokens[:1]
    named = "; ".join(
        f"{'the first token' if token['first'] else repr(token['text'])}, from {token['written_by']} "
        f"to {token['removed_by'] or 'the end'}"
        for token in often[:3]
    )
    return f"Massive: {named}."
