# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Write the shards of a new checkpoint from an old one: a shard in which nothing changes is carried over whole, any other
is written one tensor at a time, so that memory holds one tensor whatever the size of the model.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from gated_llama.checkpoints.folder import INDEX_NAME, Checkpoint, TensorInfo, copy_file, link_file


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """
    How one tensor of the new checkpoint is made.

    `info` tells where it goes (the shard's name), its dtype and its shape; `inputs` are the keys of the old tensors
    that `make` gets. Without `make` it is the one input as it is.
    """

    info: TensorInfo
    inputs: tuple[str, ...] = ()
    make: Callable[..., torch.Tensor] | None = None

    def then(self, change: Callable[[torch.Tensor], torch.Tensor], **info) -> "TensorPlan":
        """The tensor behind a `change`; `info` are the fields of `TensorInfo` that it changes, such as the shape."""

        def make(*found: torch.Tensor) -> torch.Tensor:
            return change(self.make(*found) if self.make else found[0])

        return replace(self, info=replace(self.info, **info), make=make)

    @property
    def size(self) -> int:
        """Bytes."""
        return int(re.sub(r"\D", "", self.info.dtype)) // 8 * math.prod(self.info.shape)  # F32, BF16, I64 …


def carried(key: str, info: TensorInfo, **changes) -> TensorPlan:
    """A tensor as it is, but for what `changes` says of its file or dtype."""
    return TensorPlan(replace(info, **changes), inputs=(key,))


def split_by_size(plans: dict[str, TensorPlan], limit: int, keep: str) -> dict[str, TensorPlan]:
    """New shard names, so that no shard but `keep`, which stays, exceeds `limit` bytes unless one tensor does."""
    shards: list[dict[str, TensorPlan]] = [{}]
    size = 0
    for key, plan in sorted(plans.items(), key=lambda item: (item[1].info.file, item[0])):
        if plan.info.file == keep:
            continue
        if shards[-1] and size + plan.size > limit:
            shards.append({})
            size = 0
        shards[-1][key] = plan
        size += plan.size
    named = {key: plan for key, plan in plans.items() if plan.info.file == keep}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        named |= {key: replace(plan, info=replace(plan.info, file=name)) for key, plan in shard.items()}
    return named


def write_shards(
    checkpoint: Checkpoint, plans: dict[str, TensorPlan], folder: Path, *, link: bool = False, progress: bool = True
) -> int:
    """
    Write every shard that `plans` name to `folder`; with `link`, those that are carried over are links.

    Returns:
        The bytes of shards that were carried over whole.
    """
    sources = _shards_to_carry(checkpoint, plans)
    shards = sorted({plan.info.file for plan in plans.values()})
    sizes = {shard: (checkpoint.folder / source).stat().st_size for shard, source in sources.items()}
    written = {shard: {k: r for k, r in plans.items() if r.info.file == shard} for shard in set(shards) - set(sources)}
    total = sum(sizes.values()) + sum(plan.size for shard in written.values() for plan in shard.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for shard in shards:
            bar.set_description(shard)
            if shard in written:
                _write_shard(checkpoint, written[shard], folder / shard, bar.update)
            elif link:
                link_file(checkpoint.folder / sources[shard], folder / shard)
                bar.update(sizes[shard])
            else:
                copy_file(checkpoint.folder / sources[shard], folder / shard, bar.update)
    return sum(sizes.values())


def _shards_to_carry(checkpoint: Checkpoint, plans: dict[str, TensorPlan]) -> dict[str, str]:
    """New name to old name of the shards that hold the same tensors, all of them as they are."""
    old: dict[str, set] = {}
    for key, info in checkpoint.tensors.items():
        old.setdefault(info.file, set()).add(key)
    new: dict[str, dict[str, TensorPlan]] = {}
    for key, plan in plans.items():
        new.setdefault(plan.info.file, {})[key] = plan
    found = {}
    for shard, members in new.items():
        source = checkpoint.tensors.get(next(iter(members)))
        if source is None or old[source.file] != members.keys():
            continue
        if all(
            plan.make is None and plan.inputs == (key,) and plan.info.dtype == checkpoint.tensors[key].dtype
            for key, plan in members.items()
        ):
            found[shard] = source.file
    return found


def _write_shard(
    checkpoint: Checkpoint, plans: dict[str, TensorPlan], path: Path, on_bytes: Callable[[int], None]
) -> None:
    """The safetensors format (huggingface/safetensors, README): the header's length, the header, the tensors' bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    # Widest first keeps every tensor aligned to its own width.
    ordered = sorted(plans.items(), key=lambda item: (-int(re.sub(r"\D", "", item[1].info.dtype)), item[0]))
    for key, plan in ordered:
        end = offset + plan.size
        header[key] = {"dtype": plan.info.dtype, "shape": list(plan.info.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, plan in ordered:
            tensor = _make(checkpoint, plan)
            if tensor.shape != plan.info.shape:
                raise AssertionError(f"{key} was made with shape {list(tensor.shape)}, not {list(plan.info.shape)}")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            on_bytes(plan.size)


def _make(checkpoint: Checkpoint, plan: TensorPlan) -> torch.Tensor:
    inputs = []
    for key in plan.inputs:
        with safe_open(checkpoint.folder / checkpoint.tensors[key].file, framework="pt") as file:
            inputs.append(file.get_tensor(key))
    tensor = plan.make(*inputs) if plan.make else inputs[0]
    dtype = DTYPES.get(plan.info.dtype)
    return tensor if dtype is None else tensor.to(dtype)


def write_index(folder: Path, plans: dict[str, TensorPlan]) -> None:
    """Write the index that joins the shards of `folder`."""
    weight_map = {key: plans[key].info.file for key in sorted(plans)}
    index = {"metadata": {"total_size": sum(plan.size for plan in plans.values())}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
