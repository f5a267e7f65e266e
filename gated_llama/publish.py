# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Send a checkpoint or an adapter to the Hub, once it has proved to be whole."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session, hf_raise_for_status
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)
from yaml import YAMLError

from gated_llama.checkpoints.card import (
    AUTO_CLASSES,
    bases_of,
    is_hub_id,
    saved_card,
    with_base,
    with_measurements,
    with_text_of,
)
from gated_llama.checkpoints.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    HTTPError,
    carried_files,
    read_checkpoint,
    read_header,
    read_json,
)
from gated_llama.checkpoints.measurements import INSPECTION, read_measurements
from gated_llama.conversion.families import GATED_TYPES, read_gated_config
from gated_llama.errors import UserError, first_line
from gated_llama.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TASKS, is_adapter


CARD = "README.md"
# Tokens of the Hub, keys of OpenAI and of AWS, private keys.
SECRET = re.compile(rb"\bhf_\w{30,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY")

# Run where the package cannot be imported, as by whoever loads the published model: names and shapes only, no weights.
WITHOUT_THE_PACKAGE = """
import sys
sys.path = [path for path in sys.path if path]  # or the folder's own json.py would be run
for name in ("gated_llama", *sys.argv[3:]):
    sys.modules[name] = None
import json, torch, transformers
folder, auto_class = sys.argv[1:3]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
with torch.device("meta"):
    model = getattr(transformers, auto_class).from_config(config, trust_remote_code=True)
tied = dict(model.all_tied_weights_keys)
tensors = transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())  # as in files
print(json.dumps([{key: [*tensor.shape] for key, tensor in tensors.items()}, tied]))
"""


@dataclass(frozen=True)
class Upload:
    """What `publish` did. `url` is that of the commit or of the pull request."""

    url: str
    commit: str


def contents_to_publish(folder: str | os.PathLike, *, base: str | None = None) -> dict[str, Path | bytes]:
    """
    The files that make up the checkpoint or adapter, by name: those of the folder, or what is sent in their place.
    Whatever else lies there, such as states of an optimizer, checkpoints of a run or `.env`, stays there.

    A card is written if there is none, and gets the numbers of `inspection/measurements.json` if there are any.

    Args:
        base: the Hub id of what it was made of; of an adapter, the converted checkpoint that it belongs to.

    Raises:
        UserError: the folder holds no whole gated checkpoint or adapter, one of its files holds a secret, its card has
            metadata that cannot be read, or its base is a folder of this machine.
    """
    if base is not None and not is_hub_id(base):
        raise UserError(f"{base!r} is no id of a Hub repository: give --base as OWNER/NAME.")
    folder = Path(folder)
    card = _read_card(folder / CARD) if (folder / CARD).is_file() else None
    if is_adapter(folder):
        read_header(folder, ADAPTER_WEIGHTS)
        names = [ADAPTER_WEIGHTS, *carried_files(folder)]
        config = _config_for_others(folder, base)
        base = config["base_model_name_or_path"]
        contents = {name: folder / name for name in names} | {ADAPTER_CONFIG: json.dumps(config, indent=2).encode()}
    else:
        checkpoint = read_checkpoint(folder)
        config = read_gated_config(checkpoint.config, str(folder / CONFIG_NAME))
        code = [path.name for path in GATED_TYPES[config.model_type].code_files]
        if missing := [name for name in code if not (folder / name).is_file()]:
            raise UserError(f"{folder / missing[0]} is missing: save_pretrained() of the model writes it.")
        indexed = [INDEX_NAME] if (folder / INDEX_NAME).is_file() else []
        names = [CONFIG_NAME, *code, *checkpoint.shards, *checkpoint.carried, *indexed]
        contents = {name: folder / name for name in names}
        card = card or saved_card(config, folder)
    card = with_base(card, base) if card and base else card
    if card and (local := [name for name in bases_of(card) if not is_hub_id(name)]):
        raise UserError(
            f"the card of {folder} names {local[0]!r} as base_model, which is no id on the Hub: publish that base if "
            "it is not there, and give its id with --base OWNER/NAME."
        )
    if card and (folder / INSPECTION).is_file():
        card = with_measurements(card, read_measurements([folder / INSPECTION]))
    if card:
        contents[CARD] = card.encode()
    for name, content in contents.items():
        if not name.endswith(".safetensors") and (found := SECRET.search(_bytes(content))):
            begin = found[0][:5].decode()
            raise UserError(f"{folder / name} holds what looks like a secret ({begin}…): take it out, and revoke it.")
    return dict(sorted(contents.items()))


def sizes_of(contents: dict[str, Path | bytes]) -> dict[str, int]:
    """In bytes."""
    return {name: c.stat().st_size if isinstance(c, Path) else len(c) for name, c in contents.items()}


def readable(size: int) -> str:
    """A number of bytes."""
    thousands = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**thousands:,.1f} {('', 'kB', 'MB', 'GB')[thousands]}" if thousands else f"{size} bytes"


def check_repository(repository: str) -> None:
    """
    Check that a repository has a valid name.

    Raises:
        UserError: it is no name that a repository can have, with its owner.
    """
    if not is_hub_id(repository):
        raise UserError(f"{repository!r} is no repository of the Hub: give OWNER/NAME, such as you/Llama-3.2-1B-gated.")


def _bytes(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _read_card(path: Path) -> str:
    try:
        return str(ModelCard.load(path))
    except (ValueError, OSError, YAMLError) as error:
        raise UserError(f"{path}: the metadata of the card cannot be read ({first_line(error)}): mend it.") from error


def check_loads(folder: str | os.PathLike, *, trust_remote_code: bool = False) -> None:
    """
    Build the checkpoint's model in a fresh process that cannot import this package, and compare the names and shapes of
    its parameters with the files'. That runs the folder's two code files. An adapter has none: it is put, names and
    shapes only, on the base that it names.

    Args:
        trust_remote_code: run them even if they are not those of this package.

    Raises:
        UserError: it does not load, a tensor is missing or too many, or the code is of another version.
    """
    folder = Path(folder)
    if is_adapter(folder):
        have = {key: info.shape for key, info in read_header(folder, ADAPTER_WEIGHTS).items()}
        return _compare(folder, _adapter_shapes(folder), have)
    checkpoint = read_checkpoint(folder)
    config = read_gated_config(checkpoint.config, str(folder / CONFIG_NAME))
    code = GATED_TYPES[config.model_type].code_files
    for own in code:
        if not trust_remote_code and (folder / own.name).read_bytes() != own.read_bytes():
            raise UserError(
                f"{folder / own.name} is not this version's: save the model again with this version, or let the check "
                "run it with --trust-remote-code."
            )
    auto_class = AUTO_CLASSES.get((checkpoint.config.get("architectures") or [""])[0])
    if auto_class is None:
        raise UserError(f"{folder / CONFIG_NAME} names no gated class in architectures: save_pretrained() writes it.")
    modules = [file.stem for file in code]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder.resolve()), auto_class, *modules]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{folder} does not load without this package: {reason}")
    shapes, tied = json.loads(done.stdout.splitlines()[-1])
    wanted = {key: tuple(shape) for key, shape in shapes.items()}
    have = {key: info.shape for key, info in checkpoint.tensors.items()}
    for pair in tied.items():  # one of two is enough, whichever
        stored = next((have[key] for key in pair if key in have), None)
        have |= dict.fromkeys(pair, stored) if stored else {}
    _compare(folder, wanted, have)


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the adapter's file must hold."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    from gated_llama.loading import base_of

    try:
        config = PeftConfig.from_pretrained(folder)
        base = AutoConfig.from_pretrained(base_of(folder), revision=config.revision)
        with torch.device("meta"):
            model = TASKS.get(config.task_type, AutoModelForCausalLM).from_config(base)
            model = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be put on its base, {base_of(folder)}: {first_line(error)}") from error
    return {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items()}


def _compare(folder: Path, wanted: dict[str, tuple[int, ...]], have: dict[str, tuple[int, ...]]) -> None:
    for key in sorted(wanted.keys() | have.keys()):
        if wanted.get(key) != have.get(key):
            raise UserError(f"{folder}: the model has {key} of shape {wanted.get(key)}, its files {have.get(key)}.")


def publish(
    folder: str | os.PathLike,
    repository: str,
    *,
    base: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Upload:
    """
    Upload [`contents_to_publish`] in one commit, the weights before it, one file at a time: a file that has arrived is
    not sent again by the next attempt, and nothing is visible before everything is there.

    Args:
        base: the Hub id of what it was made of; of an adapter, the converted checkpoint that it belongs to.
        revision: branch to commit to, made if it is not there.
        announce: hears of each file of weights.

    Raises:
        UserError: the folder is not whole, or the Hub refused; says what had arrived.
    """
    check_repository(repository)
    contents = contents_to_publish(folder, base=base)
    api, arrived = HfApi(token=token), []
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if CARD in contents:
            card = contents[CARD].decode()
            if api.file_exists(repository, CARD, revision=revision):
                there = api.hf_hub_download(repository, CARD, revision=revision, token=token)
                card = with_text_of(card, Path(there).read_text(encoding="utf-8"))
            _ask_about_card(api, card)  # before the weights go, not with the commit behind them
            contents[CARD] = card.encode()
        additions = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in contents.items()]
        for addition in additions:
            if addition.path_in_repo.endswith(".safetensors"):
                announce(f"{addition.path_in_repo}: {readable(addition.upload_info.size)} …")
                api.preupload_lfs_files(repository, [addition], create_pr=create_pr, revision=revision)
                arrived.append(addition.path_in_repo)
        commit = api.create_commit(
            repository,
            additions,
            commit_message="Upload gated attention" + (" (adapter)" if ADAPTER_CONFIG in contents else ""),
            create_pr=create_pr,
            revision=revision,
        )
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError, ValueError) as error:
        state = f"Arrived: {', '.join(arrived)}" if arrived else "No file of weights had arrived"
        reason = first_line(error).replace(token or "\0", "…")
        raise UserError(
            f"the Hub did not take {repository}: {reason} {state}; nothing is visible there yet. Run the same command "
            "again: what has arrived is not sent twice."
        ) from error
    return Upload(commit.pr_url or commit.commit_url, commit.oid)


def _ask_about_card(api: HfApi, card: str) -> None:
    """`ModelCard.validate`, which in client 1.x asks another Hub than the one in use."""
    body = {"repoType": "model", "content": card}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body)
    if response.status_code == 400:
        raise ValueError("; ".join(error["message"] for error in response.json()["errors"]))
    hf_raise_for_status(response)


def _config_for_others(folder: Path, base: str | None) -> dict:
    """An adapter's config with a base that others can load too."""
    config = read_json(folder / ADAPTER_CONFIG)
    named = str(config.get("base_model_name_or_path"))
    if base is None and (Path(named).is_dir() or not is_hub_id(named)):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names {named!r} as its base, which is no id on the Hub: publish that "
            "checkpoint if it is not there, and give its id with --base OWNER/NAME."
        )
    if base in (None, named):
        return config
    return {**config, "base_model_name_or_path": base, "revision": None}  # that was a commit of the other one


def loading_snippet(folder: str | os.PathLike, repository: str, commit: str) -> str:
    """Python that loads exactly this commit, weights and code."""
    if is_adapter(folder):
        return (
            "import gated_llama.adapters  # from the gated-llama package\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repository}", revision="{commit}")'
        )
    auto_class = AUTO_CLASSES[read_json(Path(folder) / CONFIG_NAME)["architectures"][0]]
    return (
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained(\n    "{repository}", revision="{commit}", trust_remote_code=True\n)'
    )
