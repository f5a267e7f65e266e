# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `desink` did, as it is printed, written to the card, and kept."""

import json
from dataclasses import asdict, dataclass

from gated_llama.sinks.judge import LATER, Judgement
from gated_llama.sinks.stream import FIRST


@dataclass(frozen=True)
class Step:
    name: str
    tokens: int
    seconds: float
    undone: bool  # it cost more than it may
    judgement: Judgement  # after it
    note: str = ""

    @property
    def title(self) -> str:
        return self.name + (f": {self.note}" if self.note else "") + (", undone" if self.undone else "")


@dataclass(frozen=True)
class Sliding:
    """What slides, and the base's losses of longer texts past the rows' length, in nats a token."""

    window: int
    whole: float  # seeing all tokens
    without_first: float  # … the last `window` only


@dataclass(frozen=True)
class DesinkResult:
    """What `desink_checkpoint` did; `to_json()` is what `--json` prints."""

    output: str
    source: str
    revision: str | None
    text: str
    before: Judgement
    steps: list[Step]
    sliding: Sliding | None = None

    @property
    def columns(self) -> tuple[str, str]:
        """Over the two columns of `rows()`."""
        if not self.sliding:
            return "before", "after"
        last = f"last {self.sliding.window:,} tokens"
        return f"before: {last}, first {FIRST}", f"after: {last}"

    @property
    def after(self) -> Judgement:
        return self.steps[-1].judgement

    @classmethod
    def of(cls, fields: dict) -> "DesinkResult":
        """Read what `to_json()` wrote."""
        steps = [Step(**step | {"judgement": Judgement(**step["judgement"])}) for step in fields["steps"]]
        sliding = fields["sliding"] and Sliding(**fields["sliding"])
        return cls(**fields | {"before": Judgement(**fields["before"]), "steps": steps, "sliding": sliding})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def rows(self) -> list[tuple[str, str, str]]:
        """The rows of the table before/after: name, before, after."""
        one, other = self.before, self.after
        shown = [
            ("loss on held-out text, nats", "{:.4f}", lambda j: j.loss),
            ("… of longer texts, past the rows' length", "{:.4f}", lambda j: j.far),
            ("… of passages that come back", "{:.4f}", lambda j: j.recalled),
            ("… of short texts", "{:.4f}", lambda j: j.short),
            ("attention to the first token", "{:.3f}", lambda j: j.first_token),
            ("attention to the most attended key", "{:.3f}", lambda j: j.most_attended),
            ("heads and windows with a sink", "{:.1%}", lambda j: j.sink_rate),
            ("largest activation (M-Act)", "{:,.0f}", lambda j: j.m_act),
            *((f"{name}, cost", "{:+.3f}", lambda j, n=name: j.penalties[n]) for name in one.penalties),
            (f"last {LATER} tokens only, cost", "{:+.3f}", lambda j: j.short_window),
            (f"last {LATER} tokens and the first, cost", "{:+.3f}", lambda j: j.short_window_and_first),
        ]
        rows = [(name, form.format(value(one)), form.format(value(other))) for name, form, value in shown]
        if long := self.sliding:
            rows += [
                ("loss past the rows' length, where all is seen", f"{long.whole:.4f}", ""),
                (f"… where the last {long.window:,} tokens alone are", f"{long.without_first:.4f}", ""),
            ]
        return rows

    def verdict(self) -> str:
        one, other = self.before, self.after
        return (
            f"attention to sinks {one.most_attended:.3f} -> {other.most_attended:.3f}, sink rate {one.sink_rate:.1%}"
            f" -> {other.sink_rate:.1%}, largest activation {one.m_act:,.0f} -> {other.m_act:,.0f}, "
            f"loss {other.loss / one.loss - 1:+.2%}, of short texts {other.short / one.short - 1:+.2%}, "
            f"past the rows {other.far / one.far - 1:+.2%}, what comes back {other.recalled - one.recalled:+.3f} nats"
        )
