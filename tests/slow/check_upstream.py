# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-upstream`: Transformers' own tests of a model, on ours and, as a control, on its Llama: what fails on both,
or is skipped for both, is this environment's doing.

They come from the source distribution of the installed version, which has some of their files only. STAND_INS replace
the others, so tests of generation, of exports and of pipelines do not run. TRANSFORMERS_SOURCE may name a clone of that
version instead, to run the first two (untried: none was in reach).
"""

import importlib
import os
import socket
import subprocess
import sys
import tarfile
import unittest
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from transformers import LlamaConfig, MixtralConfig

import modeling_gated
import modeling_gated_moe
from configuration_gated import GatedLlamaConfig
from configuration_gated_moe import GatedMoeConfig
from measured import ROOT


pytestmark = pytest.mark.upstream
pytest.importorskip("parameterized")  # which their tests need


VERSION = transformers.__version__
STAND_INS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": """
config_common_kwargs = {
    "dtype": "float16",
    "return_dict": False,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
    "distributed_testing_utils.py": """
import torch

_start_rank_processes = run_distributed = None  # ours: see `in_processes`
_set_rank_device = lambda rank: None
_get_rank_device = lambda rank: torch.device("cpu")
_get_distributed_device_type = lambda: "cpu"
_get_distributed_backend = lambda: "gloo"
""",
}


def source() -> Path:
    """A folder that holds the package `tests` of the installed version."""
    if clone := os.environ.get("TRANSFORMERS_SOURCE"):
        return Path(clone)
    build = ROOT / "build"
    folder = build / f"transformers-{VERSION}"
    if not (folder / "tests" / "__init__.py").exists():
        download = "pip download --quiet --no-deps --no-build-isolation --no-binary transformers".split()
        subprocess.run([sys.executable, "-m", *download, "--dest", build, f"transformers=={VERSION}"], check=True)
        with tarfile.open(build / f"transformers-{VERSION}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{folder.name}/tests/")]
            archive.extractall(build, members, filter="data")
    for name, text in STAND_INS.items():
        file = folder / "tests" / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_text() != text:  # other processes may be reading it
            file.write_text(text)
    return folder


sys.path.insert(0, str(source()))
common = importlib.import_module("tests.test_modeling_common")
configuration = importlib.import_module("tests.test_configuration_common")
training = importlib.import_module("tests.test_training_mixin")
tensor_parallel = importlib.import_module("tests.test_tensor_parallel_mixin")
fsdp = importlib.import_module("tests.test_fsdp_mixin")
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # all types


def in_processes(function, args: tuple, nprocs: int) -> None:
    """`function(rank, *args)` in processes that know our classes: what they are sent names this file."""
    torch.multiprocessing.spawn(call, (function, args), nprocs)


def call(rank: int, function, args: tuple) -> None:
    torch.set_num_threads(1)
    function(rank, *args)


def in_a_group(rank: int, function, args: tuple, size: int, port: int) -> None:
    names = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    function(rank, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_distributed(world_size: int):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return lambda function: lambda *args: in_processes(in_a_group, (function, args, world_size, port), world_size)


fsdp._start_rank_processes = in_processes
tensor_parallel.run_distributed = run_distributed


class Subject:
    """What the tests ask of a model: a small config, inputs, and the classes."""

    batch_size = 3
    seq_length = 7
    is_training = True
    num_labels = 3

    def __init__(self, library, prefix: str, config_class, **fields):
        self.config_class, self.fields = config_class, fields
        self.base_model_class = getattr(library, f"{prefix}Model")
        self.causal_lm_class = getattr(library, f"{prefix}ForCausalLM")
        heads = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
        heads = [getattr(library, prefix + head) for head in heads]
        self.all_model_classes = [self.base_model_class, self.causal_lm_class, *heads]
        config = self.get_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(config, name))

    def get_config(self):
        sizes = {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "num_labels": self.num_labels,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return self.config_class(**{**sizes, **self.fields})

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class CommonTests(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    training.TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    fsdp.FSDPTesterMixin,
):
    model_tester = None  # the mixins declare it abstract

    def setUp(self):
        self.model_tester = self.subject()
        self.all_model_classes = self.model_tester.all_model_classes

    def test_config(self):
        configuration.ConfigTester(self, config_class=self.model_tester.config_class).run_common_tests()


class TestLlama(CommonTests, unittest.TestCase):
    """The control."""

    def subject(self):
        return Subject(transformers, "Llama", LlamaConfig)


class TestHeadwise(CommonTests, unittest.TestCase):
    fields = {"gate_type": "headwise"}

    def subject(self):
        return Subject(modeling_gated, "GatedLlama", GatedLlamaConfig, gate_init="normal", **self.fields)


class TestElementwise(TestHeadwise):
    fields = {"gate_type": "elementwise"}


class TestQwenLike(TestHeadwise):
    """Sliding layers, QK norm, biases, shared keys."""

    fields = {
        "gate_bias": True,
        "use_qk_norm": True,
        "attention_bias": True,
        "attention_out_bias": False,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads": 4,
    }


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "moe_intermediate_size": 16}


class TestMixtral(CommonTests, unittest.TestCase):
    """The control of the mixtures of experts."""

    def subject(self):
        return Subject(transformers, "Mixtral", MixtralConfig, head_dim=16, **EXPERTS)


class TestMixtralLike(CommonTests, unittest.TestCase):
    fields = {"moe_type": "mixtral"}

    def subject(self):
        return Subject(modeling_gated_moe, "GatedMoe", GatedMoeConfig, gate_init="normal", **EXPERTS, **self.fields)

    def test_reverse_loading_mapping(self):
        """A model type of two families has the rules of both; a checkpoint is written by those of its own."""
        own = modeling_gated_moe.EXPERT_NAMES[self.fields["moe_type"]]
        with mock.patch.object(common, "get_model_conversion_mapping", lambda *args, **kwargs: deepcopy(own)):
            super().test_reverse_loading_mapping()


class TestQwen3MoeLike(TestMixtralLike):
    fields = {"moe_type": "qwen3_moe", "use_qk_norm": True, "gate_type": "elementwise", "norm_topk_prob": True}
