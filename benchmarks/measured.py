# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Time and peak memory of one process."""

import json
import subprocess
import sys


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
