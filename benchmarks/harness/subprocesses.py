"""Measurements that need a process of their own: an import, and memory that nobody else has touched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import modelquota

ROOT = Path(__file__).parents[2]
#: Where this very package was found, however that was.
PACKAGE_PARENT = Path(modelquota.__file__).parents[1]
TIMEOUT_S = 300


def run_python(*arguments: str) -> str:
    """Run this interpreter, with the package and the benchmarks that run here, and return what it prints.

    Raises
    ------
    RuntimeError
        Where it fails; the message has all that it said.
    """
    paths = os.pathsep.join([str(ROOT), str(PACKAGE_PARENT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    if done.returncode:
        said = f"{done.stdout}{done.stderr}"
        raise RuntimeError(f"python {' '.join(arguments)} failed ({done.returncode}):\n{said}")
    return done.stdout


def run_module(module: str, *arguments: str) -> Any:
    """Run ``python -m module`` and return the JSON that it prints."""
    return json.loads(run_python("-m", module, *arguments))


def import_ns(module: str) -> int:
    """Import a module in a new interpreter and return nanoseconds of processor time.

    On an idle machine that is the time that it takes. The interpreter's own start is not counted.
    """
    program = f"from time import thread_time_ns as now_ns; s = now_ns(); import {module}; print(now_ns() - s)"
    return int(run_python("-c", program))


def resident_bytes() -> int:
    """Return the resident memory of this process, shared mappings included."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no line Rss:")
