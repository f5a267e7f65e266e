# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Make one checkpoint of another: to gates, from gates, verified."""
