# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What is done *to* a gated model: convert a checkpoint, train its gates, look at them.

The package is light: it imports neither torch nor transformers until a name is used, and registers nothing; `import
modeling_gated` makes the Auto classes know GatedLlama.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # so that editors see the names that come lazily
    from gated_llama.adapters import gated_lora_config as gated_lora_config
    from gated_llama.conversion.convert import ConversionResult as ConversionResult
    from gated_llama.conversion.convert import convert_checkpoint as convert_checkpoint
    from gated_llama.conversion.export import ExportResult as ExportResult
    from gated_llama.conversion.export import export_checkpoint as export_checkpoint
    from gated_llama.data import token_windows as token_windows
    from gated_llama.errors import UserError as UserError
    from gated_llama.errors import VerificationError as VerificationError
    from gated_llama.gates import gate_parameter_groups as gate_parameter_groups
    from gated_llama.gates import train_only_gates as train_only_gates
    from gated_llama.inspection.measure import measure as measure
    from gated_llama.inspection.results import Measurements as Measurements
    from gated_llama.loading import load_adapter as load_adapter
    from gated_llama.merge import MergeResult as MergeResult
    from gated_llama.merge import merge_adapter as merge_adapter
    from gated_llama.sinks.move import move_sinks as move_sinks
    from gated_llama.sinks.recipe import desink_checkpoint as desink_checkpoint
    from gated_llama.sinks.result import DesinkResult as DesinkResult
    from gated_llama.sinks.settings import DesinkSettings as DesinkSettings
    from gated_llama.training.finetune import FinetuneResult as FinetuneResult
    from gated_llama.training.finetune import FinetuneSettings as FinetuneSettings
    from gated_llama.training.finetune import finetune_checkpoint as finetune_checkpoint
    from gated_llama.training.monitor import GateMonitor as GateMonitor
    from gated_llama.training.trainer import GatedTrainer as GatedTrainer
    from gated_llama.training.trainer import GateTraining as GateTraining


__version__ = "0.1.0"

_HOME = {
    "ConversionResult": "conversion.convert",
    "DesinkResult": "sinks.result",
    "DesinkSettings": "sinks.settings",
    "ExportResult": "conversion.export",
    "FinetuneResult": "training.finetune",
    "FinetuneSettings": "training.finetune",
    "GateMonitor": "training.monitor",
    "Measurements": "inspection.results",
    "MergeResult": "merge",
    "GateTraining": "training.trainer",
    "GatedTrainer": "training.trainer",
    "UserError": "errors",
    "VerificationError": "errors",
    "convert_checkpoint": "conversion.convert",
    "desink_checkpoint": "sinks.recipe",
    "export_checkpoint": "conversion.export",
    "finetune_checkpoint": "training.finetune",
    "gate_parameter_groups": "gates",
    "gated_lora_config": "adapters",
    "load_adapter": "loading",
    "measure": "inspection.measure",
    "merge_adapter": "merge",
    "move_sinks": "sinks.move",
    "token_windows": "data",
    "train_only_gates": "gates",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


# Modules that are in rooms now; under their old names they can be imported for one release more.
_MOVED = {
    **dict.fromkeys(("convert", "export", "families", "official", "tokenizer", "verify"), "conversion"),
    **dict.fromkeys(("card", "measurements", "shards"), "checkpoints"),
    **dict.fromkeys(("finetune", "monitor", "trainer"), "training"),
    "attention": "inspection",
}
_MOVED = {f"{__name__}.{old}": f"{__name__}.{room}.{old}" for old, room in _MOVED.items()}
_MOVED |= {
    f"{__name__}.checkpoint": f"{__name__}.checkpoints.folder",
    f"{__name__}.diagnose": f"{__name__}.inspection.measure",
    f"{__name__}.report": f"{__name__}.inspection.page",
}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name in _MOVED else None

    def create_module(self, spec):
        warnings.warn(f"{spec.name} is {_MOVED[spec.name]} now.", FutureWarning, stacklevel=2)
        module = import_module(_MOVED[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.spec  # importing it under the old name has put another there


if not any(type(finder).__name__ == "_OldNames" for finder in sys.meta_path):
    sys.meta_path.append(_OldNames())
