# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The ways to train: what of a gated model learns, and what is written of it. A new one is a row of `WAYS` and its
functions. Imports nothing heavy, so that `--help` knows them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gated_llama.errors import UserError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gated_llama.checkpoints.folder import Checkpoint, Source


@dataclass(frozen=True)
class Written:
    """Where to a result is written, and how: `link` to what stays as it is; `main` in the first process only."""

    folder: Path
    checkpoint: "Checkpoint"  # that was trained
    dtype: "torch.dtype"
    link: bool
    main: bool


@dataclass(frozen=True)
class Way:
    """
    A way to train.

    Attributes:
        trained: what was, as the card says it.
        lr: the learning rate of the weights that is customary.
        prepare: of the loaded model, its source and the [`FinetuneSettings`], the one to train, with what learns set to
            `requires_grad`.
        write: the weights.
        is_adapter: of PEFT, on the checkpoint that was trained.
        in_fp32: everything learns, so everything is loaded in fp32.
        ignores: settings that have no say.
        quantizes, shards, links: whether frozen weights may be quantized, weights sharded, and files linked to.
    """

    trained: str
    lr: float
    prepare: Callable[["PreTrainedModel", "Source", Any], "torch.nn.Module"]
    write: Callable[["torch.nn.Module", Written], None]
    ignores: tuple[str, ...] = ()
    is_adapter: bool = False
    in_fp32: bool = False
    quantizes: bool = False
    shards: bool = True
    links: bool = False


def _with_lora(network: "PreTrainedModel", found: "Source", settings: Any) -> "torch.nn.Module":
    try:
        from peft import get_peft_model, prepare_model_for_kbit_training

        from gated_llama.adapters import gated_lora_config
    except ImportError as error:
        raise UserError("LoRA needs the peft package: `pip install peft`, or train the gates or all of it.") from error
    network.name_or_path = found.found_again_by  # what the adapter will name as its base
    lora = gated_lora_config(settings.lora_rank, mlp=settings.lora_mlp, revision=found.revision)
    with warnings.catch_warnings():
        # PEFT's use of a name that Transformers 5.23 deprecates is nothing that a user can mend.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        if settings.quantize:
            network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
        return get_peft_model(network, lora)


def _write_adapter(network: "torch.nn.Module", to: Written) -> None:
    from gated_llama.gates import gate_parameters

    for _, gate in gate_parameters(network):
        if gate.requires_grad:
            gate.data = gate.data.to(to.dtype)
    network.save_pretrained(to.folder, is_main_process=to.main)


def _only_gates(network: "PreTrainedModel", found: "Source", settings: Any) -> "torch.nn.Module":
    from gated_llama.gates import train_only_gates

    train_only_gates(network)
    return network


def _write_gates(network: "torch.nn.Module", to: Written) -> None:
    from gated_llama.checkpoints.folder import CONFIG_NAME, copy_file
    from gated_llama.gates import gate_parameters, write_with_gates
    from gated_llama.training.trainer import gathered

    gates = {name: gathered(gate) for name, gate in gate_parameters(network)}
    base = f"{network.base_model_prefix}."
    if not any(key.startswith(base) for key in to.checkpoint.tensors):  # the keys of a bare model under a causal name
        gates = {name.removeprefix(base): gate for name, gate in gates.items()}
    if to.main:
        write_with_gates(to.checkpoint, gates, to.folder, link=to.link, progress=False)
        copy_file(to.checkpoint.folder / CONFIG_NAME, to.folder / CONFIG_NAME)


def _everything(network: "PreTrainedModel", found: "Source", settings: Any) -> "torch.nn.Module":
    return network


def _write_everything(network: "torch.nn.Module", to: Written) -> None:
    from gated_llama.checkpoints.folder import save_model
    from gated_llama.training.trainer import is_sharded

    if not is_sharded(network):  # back from fp32: what is loaded again is then what is in memory now
        for parameter in network.parameters():
            parameter.data = parameter.data.to(to.dtype)
    save_model(network, to.folder, is_main_process=to.main)


LORA = ("lora_rank", "lora_mlp")

WAYS = {
    "lora": Way(
        "A LoRA adapter, and the gates trained whole beside it",
        2e-4,
        _with_lora,
        _write_adapter,
        is_adapter=True,
        quantizes=True,
        # PEFT trains a copy of the gates, and a sharded parameter cannot be copied (torch 2.13, peft 0.21).
        shards=False,
    ),
    "gates": Way(
        "The gates were trained; every other weight is as it was",
        2e-5,
        _only_gates,
        _write_gates,
        ignores=("lr", "weight_decay", *LORA),
        links=True,
    ),
    "full": Way("All weights were trained", 2e-5, _everything, _write_everything, ignores=LORA, in_fp32=True),
}
