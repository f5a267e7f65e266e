# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Train a gated model: as a command, as a `Trainer`, with a monitor of its gates."""
