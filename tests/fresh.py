# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Fresh processes in a fraction of a second: forks of one that has imported torch, Transformers and PEFT, which takes most
of the time of a start, and nothing of ours.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


PARENT = """
import json, os, sys, traceback
import peft, torch, transformers.trainer, transformers.models.llama.modeling_llama
assert not {"gated_llama", "modeling_gated", "configuration_gated"} & sys.modules.keys()
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(job["cwd"])
    for descriptor, path in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.argv = ["-c", *job["arguments"]]
    code = 0
    try:
        exec(compile(job["code"], "<fresh>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # tidying up what was imported would take as long again
"""
_parents: dict[str, tuple[subprocess.Popen, Path]] = {}  # by environment: the libraries read it as they are imported


def run_fresh(code: str, *arguments, cwd=".", environment: dict = os.environ) -> subprocess.CompletedProcess:
    """As `python -c CODE ARGUMENTS`, without warnings, and with an empty cache for remote code."""
    parent, folder = _parent({name: environment[name] for name in environment if name != "PYTEST_CURRENT_TEST"})
    shutil.rmtree(folder / "modules", ignore_errors=True)
    job = {"code": code, "arguments": [str(argument) for argument in arguments], "cwd": os.path.abspath(cwd)}
    job |= {name: str(folder / name) for name in ("out", "err")}
    for name in ("out", "err"):
        (folder / name).unlink(missing_ok=True)
    parent.stdin.write(json.dumps(job) + "\n")
    parent.stdin.flush()
    returncode = int(parent.stdout.readline())
    return subprocess.CompletedProcess(
        arguments, returncode, *((folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
    )


def run_command(*arguments, **where) -> subprocess.CompletedProcess:
    """`gated-llama ARGUMENTS`."""
    code = "import sys; from gated_llama.scripts.cli import main; sys.exit(main())"
    return run_fresh(code, *arguments, **where)


def _parent(environment: dict) -> tuple[subprocess.Popen, Path]:
    key = json.dumps(environment, sort_keys=True)
    if key not in _parents:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONWARNINGS": "ignore"}
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _parents[key] = parent, folder
    return _parents[key]
