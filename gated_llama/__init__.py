# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What is done *to* a gated model: convert a checkpoint, train its gates, look at them.

The package is light: it imports neither torch nor transformers until a name is used, and registers nothing; `import
modeling_gated` makes the Auto classes know GatedLlama.
"""

from importlib import import_module


__version__ = "0.1.0"

_HOME = {
    "ConversionResult": "conversion.convert",
    "ExportResult": "conversion.export",
    "FinetuneResult": "training.finetune",
    "FinetuneSettings": "training.finetune",
    "GateMonitor": "training.monitor",
    "Measurements": "inspection.measure",
    "MergeResult": "merge",
    "GateTraining": "training.trainer",
    "GatedTrainer": "training.trainer",
    "UserError": "errors",
    "VerificationError": "errors",
    "convert_checkpoint": "conversion.convert",
    "export_checkpoint": "conversion.export",
    "finetune_checkpoint": "training.finetune",
    "gate_parameter_groups": "gates",
    "gated_lora_config": "adapters",
    "load_adapter": "loading",
    "measure": "inspection.measure",
    "merge_adapter": "merge",
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
