# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoint folders: find them, read what is in them without loading it, carry files over, put a new one in place."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from gated_llama.errors import UserError, first_line


CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GATES_NAME = "model-gates.safetensors"
SINGLE_SHARD = "model-00001-of-00001.safetensors"  # a file called model.safetensors hides the index beside it

# What is carried over beside the weights. Everything else at hand is left behind, and named.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# Written anew by a conversion, so neither carried nor missed.
REPLACED = (CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, "README.md", ".gitattributes")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies, and how to speak of it."""

    folder: Path
    name: str  # Hub id, or the folder's name: a local path is nobody else's business
    revision: str | None  # commit on the Hub
    on_hub: bool


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it. `dtype` is safetensors' name, such as `BF16`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint folder whose headers, index and config.json have been read, and nothing else."""

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]

    @property
    def shards(self) -> list[str]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def carried(self) -> list[str]:
        return carried_files(self.folder)

    @property
    def left_behind(self) -> list[str]:
        kept = {*self.shards, *self.carried, *REPLACED}
        folders = {path.name + "/" for path in self.folder.iterdir() if path.is_dir() and path.name != ".cache"}
        return sorted({name for name in _names(self.folder) if name not in kept} | folders)

    def size(self) -> int:
        """Bytes of all shards."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)


def carried_files(folder: Path) -> list[str]:
    return sorted(name for name in _names(folder) if any(fnmatch(name, pattern) for pattern in CARRIED))


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.is_dir()]


def find_source(source: str | os.PathLike, revision: str | None = None) -> Source:
    """
    The local folder `source`, or the snapshot of the Hub repository `source` at `revision`, downloaded to the Hub cache
    as far as it is not there (only the files that a conversion needs).

    Raises:
        UserError: neither is there, or the Hub cannot be asked.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{source} is a local folder, which has no revision {revision!r}: leave --revision out.")
        return Source(folder, folder.resolve().name, None, on_hub=False)

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise UserError(f"{source} is neither a local folder nor the id of a Hub repository.") from None
    try:
        try:
            files = HfApi().list_repo_files(source, revision=revision)
            wanted = [name for name in files if _is_needed(name)]
        except OfflineModeIsEnabled:
            wanted = None  # whatever the cache holds
        path = snapshot_download(source, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{source} is no local folder, and the Hub did not give it: {first_line(error)}") from error
    return Source(Path(path), str(source), Path(path).name, on_hub=True)


def _is_needed(name: str) -> bool:
    if "/" in name or name.startswith(("consolidated", "adapter")):
        return False
    return name.endswith((".safetensors", ".json")) or name == "README.md" or any(fnmatch(name, p) for p in CARRIED)


def read_json(path: Path) -> dict:
    """
    Raises:
        UserError: the file is missing, not readable, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a checkpoint folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): get a fresh copy of it.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: get a fresh copy of it.")
    return value


def read_checkpoint(folder: Path) -> Checkpoint:
    """
    Read the config and the headers of a safetensors checkpoint, single or sharded, as Transformers would pick them.

    Raises:
        UserError: a file is missing, damaged, or contradicts another.
    """
    config = read_json(folder / CONFIG_NAME)
    if (folder / WEIGHTS_NAME).exists():  # Transformers, too, then ignores an index beside it
        return Checkpoint(folder, config, read_header(folder, WEIGHTS_NAME))
    if (folder / INDEX_NAME).exists():
        return Checkpoint(folder, config, _read_indexed(folder))
    if pickled := [name for name in _names(folder) if any(fnmatch(name, pattern) for pattern in PICKLED)]:
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are opened: if you trust "
            "them, load the model with Transformers and save_pretrained() it, which writes safetensors."
        )
    raise UserError(f"{folder} has no {WEIGHTS_NAME} and no {INDEX_NAME}: it holds no weights that can be read.")


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to file names: get a fresh copy of it.")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise UserError(f"{index} names the shard {shard!r}, which is not a file of this folder.")
        header = read_header(folder, shard)
        if doubled := sorted(tensors.keys() & header.keys()):
            raise UserError(f"{doubled[0]} is in two shards, {tensors[doubled[0]].file} and {shard}, of {folder}.")
        tensors.update(header)
    for key, shard in weight_map.items():
        if key not in tensors or tensors[key].file != shard:
            raise UserError(f"{index} says that {shard} holds {key}, but it does not: get fresh copies of both.")
    return tensors


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """
    Raises:
        UserError: the file is missing, cut off, or no safetensors file.
    """
    path = folder / name
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (a safe_open does not iterate)
            return {key: TensorInfo(name, s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download it again.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): download it again.") from None


def copy_file(source: Path, target: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Copy bytes, sharing them where the filesystem can (reflink); `on_bytes` hears of each portion."""
    with open(source, "rb", buffering=0) as read, open(target, "xb", buffering=0) as write:
        in_kernel = hasattr(os, "copy_file_range")
        while True:
            if in_kernel:
                try:
                    count = os.copy_file_range(read.fileno(), write.fileno(), 1 << 26)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                        raise
                    in_kernel = False  # not between these two filesystems: go on by hand where it stopped
                    continue
            else:
                block = read.read(1 << 24)
                count = 0
                while count < len(block):
                    count += write.write(block[count:])
            if count == 0:
                return
            on_bytes(count)


def link_file(source: Path, target: Path) -> None:
    """
    Give `target` the bytes of `source` without copying: a hard link, or a symbolic one where there can be none (another
    filesystem) and for the Hub cache, whose snapshots are symbolic links themselves.
    """
    if not source.is_symlink():
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
    target.symlink_to(source.resolve())


def refuse_nesting(source: Path, output: Path) -> None:
    """
    Raises:
        UserError: one is the other, or lies inside it.
    """
    source, output = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if source == output:
        raise UserError(f"{output} is the source itself: give another folder for the output.")
    if source in output.parents or output in source.parents:
        raise UserError(f"{output} and the source {source} lie inside each other: give an output elsewhere.")


@contextmanager
def new_folder(output: str | os.PathLike, *, force: bool = False) -> Iterator[Path]:
    """
    A folder to fill, beside `output`, that takes the name `output` once the block ends well and is gone if it does not.
    With `force` an old output makes way for it in the last moment, and comes back if that fails.

    Raises:
        UserError: `output` is a file, or a folder that is not empty and `force` was not given, or in the block a file
            could not be read or written.
    """
    output = Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give a folder to write.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(output)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; nothing was written.") from error
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UserError(f"{output} is not empty: give another folder, or --force to replace it.")

    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        if output.exists():
            output.rename(old)
        try:
            partial.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{getattr(error, 'filename', None) or output}: {reason}; nothing was written.") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_remains(output: Path) -> None:
    """What a killed run left beside `output`: an old output that had just made way comes back, the rest goes."""
    for path in output.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(output.name)}\.(partial|old)-(\d+)", path.name)
        if match is None or psutil.pid_exists(int(match[2])):
            continue
        if match[1] == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)
