"""The original specification's design as native code, measured by a native caller.

`original.zig` is the design, `measure.zig` the program that times it. Both are compiled by the ``ziglang`` package
(extra ``bench``) into the user's cache directory, once per source and compiler; nothing but that package is needed.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks.harness.build_cache import cache_directory

SOURCES = Path(__file__).parent
COMPILER = "ziglang"
BUILD_FLAGS = ("-O", "ReleaseFast", "-lc")
COMPILE_TIMEOUT_S = 300
MEASURE_TIMEOUT_S = 60


class NativeUnavailableError(RuntimeError):
    """The native original cannot be compiled or run here; the message says why and what to do."""


def measure() -> dict:
    """Compile the native original where that is not yet done, run it, and return its figures.

    Returns
    -------
    dict
        ``compiler`` and ``flags``; ``most_admitted_in_true_second``: how many requests a limit of 100 per second
        lets into one true second; ``checks``: a list of ``{"models", "threads", "ns", "median_ns"}``, nanoseconds
        of wall time per check over all threads, the least and the median of the rounds.

    Raises
    ------
    NativeUnavailableError
        Where the ``ziglang`` package is missing, or compiling or running fails.
    """
    figures = json.loads(_run([str(compile_original())], MEASURE_TIMEOUT_S))
    return {"compiler": f"zig {figures.pop('zig')}", "flags": " ".join(BUILD_FLAGS), **figures}


def compile_original() -> Path:
    """Compile the measuring program unless the cache holds it, and return its path."""
    cache = cache_directory()
    program = cache / f"original-{_fingerprint()}"
    if not program.exists():
        # Under a name of its own until it is whole: two runs at once, or one cut short, leave no half a program.
        unfinished = program.with_name(f"{program.name}.{os.getpid()}")
        command = [sys.executable, "-m", COMPILER, "build-exe", str(SOURCES / "measure.zig"), *BUILD_FLAGS]
        caches = ["--cache-dir", str(cache / "zig"), "--global-cache-dir", str(cache / "zig")]
        _run([*command, f"-femit-bin={unfinished}", *caches], COMPILE_TIMEOUT_S)
        unfinished.replace(program)
    return program


def _fingerprint() -> str:
    """Digest what the program depends on: its sources, the compiler and its flags, the machine."""
    try:
        compiler = metadata.version(COMPILER)
    except metadata.PackageNotFoundError:
        raise NativeUnavailableError(
            f"the {COMPILER} package, which compiles the native original, is not installed: "
            "pip install 'modelquota[bench]'"
        ) from None
    digest = hashlib.sha256("\0".join((compiler, *BUILD_FLAGS, platform.platform(), _cpu())).encode())
    for source in sorted(SOURCES.glob("*.zig")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """Name and features of the processor: the compiler uses all it finds, so a shared cache must tell them apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NativeUnavailableError(f"{' '.join(command)} took longer than {timeout_s:g} s") from None
    if done.returncode:
        raise NativeUnavailableError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")
    return done.stdout
