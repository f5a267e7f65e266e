# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `desink` is to do, and how much text it spends on that."""

from dataclasses import dataclass, replace

from gated_llama.errors import UserError
from gated_llama.runs import check_seed
from gated_llama.sinks.judge import LATER


LONGEST = 4_096  # tokens of a row, where none is given: longer ones were not tried
CALM_ROWS = 1_024  # of what is calmed, whose layers learn on rows four times as long
SLIDING_ROWS = 4  # windows that a row is long, of what slides
HEALED = 65_536  # tokens on which gates are distilled
DAMPING = 32.0


@dataclass(frozen=True)
class DesinkSettings:
    """
    What to do, and how much text to spend on it.

    Attributes:
        calm_only: leave the sink where it is; only massive states become calm.
        max_loss: the share by which the loss on held-out text may rise. If None, .01, or .05 for what slides or becomes
            calm, which restores no KV head and costs more.
        calm_tokens: on which all layers are distilled from the base in the end, with a penalty on massive states, for
            whoever quantizes; 0 leaves all but the gates as they are.
        damping: the neurons that make sinks massive write so many times less; 1 leaves them. If None, 1, or
            `DAMPING` where layers learn, which make good what it costs.
        move_tokens: on which keys, values and gates are fitted in closed form.
        heal_tokens: on which the gates are distilled from the base afterwards; or 0. If None, `HEALED`, or 0 where all
            layers learn.
        sliding_window: let every layer see so many tokens only, for streams in constant memory; None leaves the layers
            as they are. Then all is fitted and measured so, against the base that sees its first tokens as well (see
            [`gated_llama.sinks.stream`]).
        length, batch_size: tokens of a row, if None `LONGEST` (`CALM_ROWS` for what becomes calm, four windows for what
            slides) or half of what the model is made for; rows of a step, in each process. What is fitted to short rows
            forgets to look back further, so the budget holds for texts four times as long too (as far as the model is
            made for them), for passages that come back in texts twice as long, and for short texts, which pay for long
            rows. Rows that are trained on are of several lengths, this one the longest for gates; for layers, four
            times as long.
        judged_tokens: of held-out text in rows, that are measured on; in two rows at least.
    """

    calm_only: bool = False
    max_loss: float | None = None
    calm_tokens: int = 0
    damping: float | None = None
    move_tokens: int = 32_768
    heal_tokens: int | None = None
    sliding_window: int | None = None
    length: int | None = None
    batch_size: int = 1
    judged_tokens: int = 8_192
    seed: int = 0

    @property
    def judged_windows(self) -> int:
        """Rows of held-out text that are measured on, of settings that have a length."""
        return max(2, self.judged_tokens // self.length)

    def suited_to(self, longest: int) -> "DesinkSettings":
        """With values in place of None: the length of a row that suits a model made for texts of so many tokens."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        usual = {"length": LONGEST, "damping": 1.0, "heal_tokens": HEALED, "max_loss": 0.01}
        if self.calm_tokens:
            damping = 1.0 if self.calm_only else DAMPING
            usual |= {"length": CALM_ROWS, "damping": damping, "heal_tokens": 0, "max_loss": 0.05}
        if self.sliding_window:
            usual |= {"length": SLIDING_ROWS * self.sliding_window, "max_loss": 0.05}
        usual["length"] = min(usual["length"], longest // 2)
        return replace(self, **usual | given)

    def check(self) -> None:
        """
        Check the settings.

        Raises:
            UserError: a setting has a value that it cannot have.
        """
        if self.calm_only and not self.calm_tokens:
            raise UserError("calm_only with calm_tokens 0 leaves nothing to do: give calm_tokens.")
        for name, none in {"damping": 1, "heal_tokens": 0}.items():
            if self.calm_only and getattr(self, name) not in (None, none):
                raise UserError(f"{name} has no say with calm_only, which leaves the sink: leave it out.")
        if self.sliding_window is not None and self.calm_only:
            raise UserError("a model that keeps its sink cannot slide: leave out calm_only or sliding_window.")
        if self.sliding_window is not None and self.sliding_window < LATER:
            raise UserError(f"sliding_window must be at least {LATER}, not {self.sliding_window}.")
        if None in (self.length, self.damping, self.heal_tokens, self.max_loss):  # of a model that is not known yet
            return self.suited_to(4 * LATER).check()
        for name in ("move_tokens", "length", "batch_size", "judged_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}.")
        if self.length < 2 * LATER:
            raise UserError(f"length must be at least {2 * LATER}, not {self.length}: sinks are seen by later tokens.")
        if self.move_tokens < 2 * self.length:
            raise UserError(f"move_tokens must be at least two rows, {2 * self.length}, not {self.move_tokens}.")
        if not self.max_loss >= 0 or self.heal_tokens < 0 or self.calm_tokens < 0:
            raise UserError("max_loss, calm_tokens and heal_tokens must not be negative.")
        check_seed(self.seed)
        if not self.damping >= 1:
            raise UserError(f"damping must be 1 or more, not {self.damping}.")
