# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every test runs with no Hub in reach; and code in a process where our modules are installed, or are not."""

import os
import textwrap


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from transformers.utils import logging

from fresh import run_fresh


logging.disable_progress_bar()

# In a fresh process: our modules look as if they were not installed, whatever the environment has.
NOT_INSTALLED = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("configuration_gated", "modeling_gated", "gated_llama")):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def pytest_ignore_collect(collection_path, config):
    """Slow tests, which need packages and minutes, are collected only where one of their markers is asked for."""
    return True if collection_path.name == "slow" and not config.option.markexpr else None


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh process in a folder of its own, with its own cache for remote code."""

    def run(code: str, *, installed: bool = True, environment: dict = os.environ):
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        script = ("" if installed else NOT_INSTALLED) + textwrap.dedent(code)
        return run_fresh(script, cwd=folder, environment=environment)

    return run
