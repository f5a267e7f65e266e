# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Look inside a model: measure it, and draw the page."""

SENTENCE = "The grumpy cat sat on the mat, which was red."  # that is looked at token by token
