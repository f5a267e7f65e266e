# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The formats that a gated checkpoint can be exported to: a file for each, whose `target` says what is written."""

TARGETS = ("base", "qwen3_5", "official")
