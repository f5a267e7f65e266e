# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Damaged checkpoints and killed runs: one sentence or a right result, the source untouched, nothing half done."""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama import UserError, convert_checkpoint
from tiny import published, source_model


SHARD = "model-00001-of-00002.safetensors"
CASES = 300


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return published(tmp_path_factory.mktemp("whole") / "source", source_model("llama"), shards=2)


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "source")


def header_of(path):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path, header, data, length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def garbage_header(path):
    write(path, b"{not json", header_of(path)[1])


def header_beyond_the_file(path):
    write(path, *header_of(path), length=1 << 40)


def overlapping_tensors(path):
    header, data = header_of(path)
    keys = [key for key in header if key != "__metadata__"]
    header[keys[0]]["data_offsets"] = header[keys[1]]["data_offsets"]
    write(path, header, data)


def another_shape(path):
    header, data = header_of(path)
    key = next(key for key, entry in header.items() if key != "__metadata__" and len(entry["shape"]) == 2)
    header[key]["shape"].reverse()
    header[key]["shape"] = [header[key]["shape"][0] * 2, header[key]["shape"][1] // 2]
    write(path, header, data)


def empty(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_loop(path):
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "damage",
    [cut, garbage_header, header_beyond_the_file, overlapping_tensors, another_shape, empty, a_folder, a_loop],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_shard_is_named(source, tmp_path, damage):
    damage(source / SHARD)
    with pytest.raises(UserError, match=SHARD):
        convert_checkpoint(source, tmp_path / "gated", progress=False)
    assert not any("gated" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("damage", [cut, empty, a_folder, a_loop], ids=lambda damage: damage.__name__)
def test_a_damaged_json_file_is_named(source, tmp_path, name, damage):
    damage(source / name)
    with pytest.raises(UserError, match=r"config\.json|index\.json|no weights that can be read"):
        convert_checkpoint(source, tmp_path / "gated", progress=False)
    assert not any("gated" in path.name for path in tmp_path.iterdir())


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
)


@st.composite
def mutations(draw):
    """One of the ways in which a checkpoint goes wrong, at random."""
    kind = draw(st.sampled_from(["bytes", "cut", "config", "drop", "index", "header"]))
    return kind, draw(st.integers(0, 10**6)), draw(st.binary(min_size=1, max_size=4)), draw(VALUES)


def mutate(folder, mutation):
    kind, number, content, value = mutation
    if kind in ("bytes", "cut"):
        path = sorted(path for path in folder.iterdir() if path.is_file())[number % 5]
        data = bytearray(path.read_bytes())
        at = number % max(1, len(data))
        path.write_bytes(data[:at] if kind == "cut" else data[:at] + content + data[at + len(content) :])
    elif kind == "header":
        header, data = header_of(folder / SHARD)
        key = sorted(key for key in header if key != "__metadata__")[number % (len(header) - 1)]
        field = ("dtype", "shape", "data_offsets")[number % 3]
        header[key][field] = value
        write(folder / SHARD, header, data)
    elif kind == "drop":
        sorted(path for path in folder.iterdir() if path.is_file())[number % 5].unlink()
    else:
        path = folder / ("config.json" if kind == "config" else "model.safetensors.index.json")
        full = json.loads(path.read_text())
        part = full if kind == "config" else full["weight_map"]
        part[sorted(part)[number % len(part)]] = value
        path.write_text(json.dumps(full))


@seed(2505_06708)
@settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutation=mutations())
def test_random_damage_is_refused_or_does_no_harm(whole, tmp_path, mutation):
    """Whatever the damage: a sentence and no output, or a checkpoint that loads. Never another exception."""
    source, output = tmp_path / "source", tmp_path / "gated"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(whole, source)
    mutate(source, mutation)
    before = hashes(source)
    try:
        convert_checkpoint(source, output, verify=False, progress=False)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        assert not output.exists()
    else:
        AutoModelForCausalLM.from_pretrained(output)
    assert hashes(source) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "gated"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_killed_at_random_moments(whole, tmp_path, existing):
    """
    25 times new and 25 times over an old output: under the output's name is a whole checkpoint or nothing, what lies
    beside it does not load (unless it is whole, and killed just before it got its name), and the next run finishes.
    """
    output = tmp_path / "gated"
    rng = random.Random(0)
    started = time.monotonic()
    convert_checkpoint(whole, output, verify=False, progress=False)
    usual = time.monotonic() - started
    complete = hashes(output)
    killed = 0
    for _ in range(25):
        if not existing:
            shutil.rmtree(output, ignore_errors=True)
        child = os.fork()
        if child == 0:  # no tidying up of the parent's: only the conversion
            tqdm.set_lock(threading.RLock())  # its own is the parent's too, who would wait for it once this is dead
            try:
                convert_checkpoint(whole, output, verify=False, force=True, progress=False)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, usual * 1.2))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        beside = [path for path in tmp_path.iterdir() if path.name.startswith(".gated.partial")]
        for path in beside:
            assert not (path / "config.json").exists() or hashes(path).keys() == complete.keys()
        if output.exists():
            assert hashes(output) == complete
    assert killed >= 5  # enough of them were cut short
    convert_checkpoint(whole, output, verify=False, force=True, progress=False)
    assert hashes(output) == complete
    assert [path.name for path in tmp_path.iterdir()] == ["gated"]
