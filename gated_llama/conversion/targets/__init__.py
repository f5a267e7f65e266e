# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The formats that a gated checkpoint can be exported to: a file for each, whose `target` says what is written."""

TARGETS = ("base", "qwen3_5", "lfm3", "official", "gguf")
GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # as GGMLQuantizationType names them
