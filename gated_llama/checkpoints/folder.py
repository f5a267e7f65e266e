# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoint folders: find them, read what is in them without loading it, carry files over, put a new one in place."""

import errno
import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from safetensors import SafetensorError, safe_open

from gated_llama.errors import UserError, first_line


if TYPE_CHECKING:
    from transformers import PreTrainedModel

try:  # the Hub client's own HTTP library
    from httpx2 import HTTPError
except ImportError:  # client 1.x
    from httpx import HTTPError

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SENTENCE_MODULES = "modules.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GATES_NAME = "model-gates.safetensors"
SINGLE_SHARD = "model-00001-of-00001.safetensors"  # a file called model.safetensors hides the index beside it

# What is carried over beside the weights. Everything else at hand is left behind, and named.
CARRIED = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
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
    "additional_chat_templates/*.jinja",
    GENERATION_CONFIG,
    "custom_generate/*.py",
    "custom_generate/requirements.txt",
    SENTENCE_MODULES,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
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
    gguf_file: str | None = None  # that was made dense into the folder
    quantized: str | None = None  # how its weights were

    @property
    def found_again_by(self) -> str:
        return self.name if self.on_hub else str(self.folder.resolve())


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
        carried = self.carried
        kept = {*self.shards, *carried, *REPLACED}
        folders = {path.name + "/" for path in self.folder.iterdir() if path.is_dir() and path.name != ".cache"}
        entered = {name.partition("/")[0] + "/" for name in carried if "/" in name}
        names = [*_names(self.folder), *(name for inner in entered for name in _inside(self.folder, inner))]
        return sorted({name for name in names if name not in kept} | (folders - entered))

    def size(self) -> int:
        """Bytes of all shards."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    def copy_carried(self, folder: Path) -> None:
        """Copy what is carried over to `folder`, but for what is there already."""
        for name in self.carried:
            target = folder / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.folder / name, target)


def save_model(model: "PreTrainedModel", folder: Path, **settings) -> None:
    """
    `model.save_pretrained(folder)`, but for its generation settings, which are carried over as a file: the oldest
    Transformers loads some that it refuses to save.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    try:
        if own is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, **settings)
    finally:
        if own is not None:
            model.generation_config = own
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)


def carried_files(folder: Path) -> list[str]:
    """
    Names of the files beside the weights that belong to a checkpoint: those of `CARRIED`, and those that they name.

    Raises:
        UserError: one of them names a file outside the folder.
    """
    references = _references(folder)
    folders = {pattern.partition("/")[0] for pattern in (*CARRIED, *references) if "/" in pattern}
    names = [*_names(folder), *(name for inner in folders for name in _inside(folder, inner))]
    return sorted(name for name in names if _belongs(name, references))


def _belongs(name: str, references: set[str]) -> bool:
    named = any(name == reference or (reference[-1] == "/" and name.startswith(reference)) for reference in references)
    return named or any(fnmatch(name, pattern) for pattern in CARRIED)


def _references(folder: Path) -> set[str]:
    """
    What a checkpoint's own JSON files name, folders with a slash behind: a tokenizer's code (in `auto_map`), with the
    code that it imports, and the modules of Sentence Transformers, such as its pooling. Code is copied, never run.
    """
    folders, code = set(), set()
    if (folder / TOKENIZER_CONFIG).is_file():
        auto_map = read_json(folder / TOKENIZER_CONFIG).get("auto_map") or {}
        for entry in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
            for reference in entry if isinstance(entry, list) else [entry]:
                if isinstance(reference, str) and "--" not in reference:  # that is the code of another repository
                    code.add(f"{reference.rpartition('.')[0]}.py")
    if (folder / SENTENCE_MODULES).is_file():
        for module in read_json(folder / SENTENCE_MODULES, of=list):
            path = posixpath.normpath(str(module.get("path") or "."))
            folders |= set() if path == "." else {f"{path}/"}
            kind = str(module.get("type") or "")
            if not kind.startswith("sentence_transformers."):
                code.add(f"{kind.partition('.')[0]}.py")
    names: set[str] = set()
    while new := code - names:
        names |= new
        for path in (folder / name for name in new if (folder / name).is_file()):
            imported = re.findall(r"^\s*(?:from|import)\s+\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            code |= {f"{module}.py" for module in imported}
    for name in folders | names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"a file of {folder} names {name!r}, which is not inside the folder: correct it.")
    return folders | names


def _inside(folder: Path, inner: str) -> list[str]:
    """Names of all files in a folder of `folder`, however deep."""
    return [path.relative_to(folder).as_posix() for path in (folder / inner).rglob("*") if path.is_file()]


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
        if wanted and (references := _references(Path(path))):
            wanted += [name for name in files if _belongs(name, references)]
            path = snapshot_download(source, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{source} is no local folder, and the Hub did not give it: {first_line(error)}") from error
    return Source(Path(path), str(source), Path(path).name, on_hub=True)


def hub_file(repository: str, name: str, *, what: str | None = None, **where) -> Path:
    """
    A file of a Hub repository in the Hub's cache, in the folder of its commit; downloaded if it is not there.

    Args:
        what: as which the file is spoken of; its name if None.
        where: as for `hf_hub_download`, such as `revision`.

    Raises:
        UserError: it is not there, or the Hub cannot be asked.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, name, **where))
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise UserError(
            f"{repository} is no local folder, and the Hub did not give its {what or name}: {first_line(error)}"
        ) from error


def _is_needed(name: str) -> bool:
    if name.startswith(("consolidated", "adapter")):
        return False
    in_root = "/" not in name and (name.endswith((".safetensors", ".json", ".py")) or name == "README.md")
    return in_root or any(fnmatch(name, pattern) for pattern in CARRIED)


def read_json(path: Path, of: type = dict) -> dict | list:
    """
    Read a JSON file.

    Raises:
        UserError: the file is missing, not readable, or does not hold a JSON object (or what else `of` says).
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a checkpoint folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): get a fresh copy of it.") from None
    if not isinstance(value, of):
        wanted = {dict: "object", list: "array"}[of]
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an {wanted}: get a fresh copy of it.")
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


def missing_tensors(wanted: Iterable[str], have: Iterable[str], *, tied: bool) -> list[str]:
    """Keys of `wanted` that are not there. Of tied embeddings one is enough, whichever: Transformers takes either."""
    wanted, have = set(wanted), set(have)
    twins = {key for key in wanted if tied and key.endswith(("embed_tokens.weight", "lm_head.weight"))}
    return sorted(wanted - have - (twins if twins & have else set()))


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_NAME
    contents = read_json(index)
    if "metadata" not in contents:
        raise UserError(f'{index} has no "metadata", which Transformers does not load: add "metadata": {{}}.')
    weight_map = contents.get("weight_map")
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
    The tensors of a safetensors file, read from its header alone.

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


def refuse_replacing(source: str | os.PathLike, output: str | os.PathLike) -> None:
    """
    Check that a new `output` would not take the file or folder `source` away.

    Raises:
        UserError: `output` is the source, or a folder around it.
    """
    source, output = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if source == output:
        raise UserError(f"{output} is the source itself: give another folder for the output.")
    if output in source.parents:
        raise UserError(f"the source {source} lies inside {output}: give an output elsewhere.")


def refuse_nesting(source: str | os.PathLike, output: str | os.PathLike) -> None:
    """
    Check that neither folder is, or lies inside, the other.

    Raises:
        UserError: one is the other, or lies inside it.
    """
    refuse_replacing(source, output)
    if Path(os.path.realpath(source)) in Path(os.path.realpath(output)).parents:
        raise UserError(f"{output} lies inside the source {source}: give an output elsewhere.")


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
    with work_folder(output, "partial", force=force) as partial:
        yield partial
        old = output.with_name(f".{output.name}.old-{os.getpid()}")
        if output.exists():
            output.rename(old)
        try:
            partial.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def work_folder(output: str | os.PathLike, kind: str, *, force: bool = False) -> Iterator[Path]:
    """
    Context manager: a hidden folder beside an `output` that may be written, gone at the end. What killed runs left is
    cleared first.

    Raises:
        UserError: as [`new_folder`] does.
    """
    output = Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give a folder to write.")
    folder = output.with_name(f".{output.name}.{kind}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(output)
        if output.is_dir() and any(output.iterdir()) and not force:
            raise UserError(f"{output} is not empty: give another folder, or --force to replace it.")
        _in_use.add(folder)
        folder.mkdir()
        yield folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{getattr(error, 'filename', None) or output}: {reason}; nothing was written.") from error
    finally:
        _in_use.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)


_in_use: set[Path] = set()  # work folders of this process


def _clear_remains(output: Path) -> None:
    """Clean up after a killed run: put back an old output that had been moved away, delete the rest."""
    for path in output.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(output.name)}\.(dense|partial|old)-(\d+)", path.name)
        # In a container the next run often has the number of the one that was killed.
        if match is None or path in _in_use or (int(match[2]) != os.getpid() and psutil.pid_exists(int(match[2]))):
            continue
        if match[1] == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)
