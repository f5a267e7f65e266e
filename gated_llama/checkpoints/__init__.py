# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a checkpoint is on disk: its folder, its shards, its card, saved measurements."""
