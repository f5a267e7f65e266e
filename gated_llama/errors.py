# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The two ways in which a command ends badly on purpose."""


class UserError(Exception):
    """The input or the environment is at fault: one sentence names the file or key and the remedy (exit code 2)."""


class VerificationError(Exception):
    """A result did not prove to be what it must be, so it was not kept (exit code 1)."""


def first_line(error: Exception) -> str:
    """What a library's error says in its first line, for a sentence of ours; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
