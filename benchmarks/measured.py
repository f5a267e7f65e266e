# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the benchmarks share: time and peak memory, their summary, records, the pages' tables."""

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# A process begins with the peak of the one that forked it, so a small one must do the forking.
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([status, time.perf_counter() - started, usage.ru_maxrss / 1024]))
"""


def run_measured(command: list) -> tuple[float, float]:
    """
    Returns:
        Seconds from start to end, and peak resident memory in MiB.
    """
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *map(str, command)], capture_output=True, text=True)
    status, seconds, peak = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return seconds, peak


def seconds_of(function, *args, **settings) -> float:
    started = time.perf_counter()
    function(*args, **settings)
    return time.perf_counter() - started


def peak_of(function, device: str) -> int:
    """Bytes that torch allocates at once while `function` runs, beyond those that it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def summary(values: list[float]) -> dict:
    quartiles = statistics.quantiles(values if len(values) > 1 else values * 2, n=4, method="inclusive")
    return {"median": quartiles[1], "q25": quartiles[0], "q75": quartiles[2], "n": len(values)}


def processor() -> str:
    """Its maker's name for it; what Python knows of it where there is no Linux."""
    told = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", told.read_text() if told.exists() else "", re.MULTILINE)
    return named[1] if named else platform.processor()


def circumstances(*packages: str) -> dict:
    """For every record: processor, instructions, GPU, versions of torch, Transformers and `packages`, commit, day."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        # oneDNN uses AMX too where there is such, unless it is told not to.
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability()),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", *packages)},
        },
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def models_parser(description: str) -> argparse.ArgumentParser:
    """Of a benchmark that makes a record of each of some models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="folders, plain or gated")
    parser.add_argument("--name", nargs="+", default=[], help="of each (default: the folder's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="run nothing: write the table from the records")
    return parser


def named(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Names and folders of the models that such a parser was given."""
    return list(zip(args.name or [folder.name for folder in args.models], args.models, strict=True))


def digest(windows: torch.Tensor) -> str:
    """Of the text that something was trained on: it is made of what is installed, so each machine has its own."""
    return hashlib.sha256(windows.long().contiguous().numpy().tobytes()).hexdigest()[:12]


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_record(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_record(path: Path, record: dict, *keys: str) -> None:
    """Add a line to the records of `path`, in place of an older one that has the same values at `keys`."""
    lines = [old for old in read_records(path) if any(old.get(key) != record[key] for key in keys)] + [record]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def table_between(name: str) -> re.Pattern:
    """What stands in a page between `<!-- name -->` and `<!-- /name -->`."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


def page_of(name: str) -> Path:
    """The one page with a table of this name."""
    (page,) = (page for page in PAGES if f"<!-- {name} -->" in page.read_text(encoding="utf-8"))
    return page


def read_table(name: str) -> str:
    return table_between(name).search(page_of(name).read_text(encoding="utf-8"))[0]


def write_table(name: str, table: str) -> None:
    page = page_of(name)
    page.write_text(table_between(name).sub(lambda match: table, page.read_text(encoding="utf-8")), encoding="utf-8")
