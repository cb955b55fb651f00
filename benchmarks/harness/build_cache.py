"""Where what the benchmarks compile is kept: never in the source tree."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return the directory in the user's cache, made where it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "modelquota-benchmarks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory
