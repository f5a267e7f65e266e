# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is kept of a run of `desink` until its output is written, to be gone on with; and how its processes agree."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel

from gated_llama.checkpoints.folder import read_json
from gated_llama.errors import UserError, VerificationError
from gated_llama.runs import begin_record, resume_record
from gated_llama.sinks.distil import process_of, write_whole
from gated_llama.sinks.result import DesinkResult


class Unfinished:
    """
    The folder beside the output from which a stopped run resumes: `desink.json` (settings, results) and weights. Only
    the first process writes.
    """

    def __init__(self, output: Path):
        output = Path(os.path.abspath(output))
        self.folder = output.with_name(f"{output.name}.unfinished")
        self.record = self.folder / "desink.json"
        self.gated = self.folder / "gated"  # the base, converted
        self.steps = 0
        self._unmoved = self.folder / "unmoved.safetensors"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.steps}.safetensors"

    @property
    def training(self) -> Path:
        """The file with the training state of the current step."""
        return self.folder / f"{self.steps}-training.safetensors"

    def keep_unmoved(self, layers: list[dict[str, torch.Tensor]]) -> None:
        """Keep what KV heads that were moved can be restored to, layer by layer."""
        if process_of()[0] == 0:
            weights = {f"{n} {name}": value for n, layer in enumerate(layers) for name, value in layer.items()}
            write_whole(self._unmoved, weights)

    def unmoved(self) -> list[dict[str, torch.Tensor]]:
        """Layer by layer, what was kept."""
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(self._unmoved).items():
            number, name = name.split()
            layers.setdefault(int(number), {})[name] = value
        return [layers[number] for number in sorted(layers)]

    @contextmanager
    def opened(self, asked: dict, *, resume: bool, force: bool) -> Iterator[None]:
        """
        Context manager, of all processes: the folder is removed at the end, unless the run failed and can go on.

        Raises:
            UserError: there is none to resume, or one that was not asked for; or the run was interrupted.
        """
        main = process_of()[0] == 0
        if not main:
            pass
        elif resume:
            self.steps = len(resume_record(self.record, asked).get("done", {}).get("steps", ()))
        elif self.folder.exists() and not force:
            raise UserError(f"{self.folder} is what a stopped run left: --resume goes on with it, --force begins anew.")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            begin_record(self.record, asked)
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, torch.OutOfMemoryError))
            judged = main and (resume or stopped) and "done" in read_json(self.record)
            is_kept = main and (self.steps > 0 or self.training.exists() or judged)
            if main and (isinstance(error, VerificationError) or not is_kept):
                shutil.rmtree(self.folder, ignore_errors=True)
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else "out of memory"
            if isinstance(error, UserError):
                what = str(error).removesuffix(".")
            if is_kept and (stopped or isinstance(error, UserError)):
                raise UserError(f"{what}: --resume goes on from what {self.folder} has kept.") from None
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(f"{what}: give a smaller --length, or a --device with more.") from None
            raise
        if main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def go_on(self, model: PreTrainedModel) -> DesinkResult | None:
        """The result so far, with its weights written to `model`; None if nothing was done yet."""
        done = read_json(self.record).get("done")
        if done is None:
            return None
        self.steps = len(done["steps"])
        self.restore(model)
        return DesinkResult.of(done)

    def restore(self, model: PreTrainedModel) -> None:
        """Write the weights that were kept last to `model`."""
        model.get_decoder().layers.load_state_dict(load_file(self.weights))

    def keep(self, model: PreTrainedModel, result: DesinkResult) -> None:
        """Layers alone: no step changes anything else."""
        old = (self.weights, self.training)
        self.steps = len(result.steps)
        if process_of()[0]:
            return
        write_whole(self.weights, model.get_decoder().layers.state_dict())
        record = read_json(self.record) | {"done": json.loads(result.to_json())}
        part = self.record.with_name(f"{self.record.name}.part")
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        part.replace(self.record)
        for path in set(old) - {self.weights}:
            path.unlink(missing_ok=True)


def from_main(value: Any) -> Any:
    """Broadcast the first process's value, so that all processes decide alike."""
    values = [value]
    if process_of()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def as_in_main(model: PreTrainedModel) -> None:
    """Give every process the weights of the first."""
    if process_of()[1] > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
