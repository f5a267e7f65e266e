# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Send a checkpoint folder to the Hub, once it has proved to be whole."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from gated_llama.checkpoint import CONFIG_NAME, INDEX_NAME, read_checkpoint
from gated_llama.errors import UserError, first_line
from gated_llama.families import read_gated_config


CODE = ("configuration_gated.py", "modeling_gated.py")


def files_to_publish(folder: str | os.PathLike) -> dict[str, int]:
    """
    The files that make up the checkpoint, and their sizes in bytes; whatever else lies in the folder stays there.

    Raises:
        UserError: the folder holds no whole gated checkpoint.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    read_gated_config(checkpoint.config, str(folder / CONFIG_NAME))
    if missing := [name for name in CODE if not (folder / name).is_file()]:
        raise UserError(f"{folder / missing[0]} is missing: save_pretrained() of the model writes it.")
    others = [name for name in (INDEX_NAME, "README.md") if (folder / name).is_file()]
    names = [CONFIG_NAME, *CODE, *checkpoint.shards, *checkpoint.carried, *others]
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def publish(
    folder: str | os.PathLike,
    repository: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """
    Upload [`files_to_publish`] in one commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: the folder is not whole, or the Hub refused.
    """
    names = list(files_to_publish(folder))
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            create_pr=create_pr,
            revision=revision,
            commit_message="Upload a gated-llama checkpoint",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"the Hub did not take {repository}: {first_line(error)}") from error
    return commit.pr_url or commit.commit_url
