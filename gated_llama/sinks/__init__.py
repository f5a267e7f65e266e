# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Attention sinks and massive activations: find them, move a sink into the gates, calm what is massive."""
