"""What a figure depends on beside the source: versions, and how the extensions were compiled."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import modelquota
from modelquota._core.table import table

# gcc and clang put down what they were called with, where debugging information is kept at all.
PRODUCER = re.compile(rb"GNU C\d*[^\0]{0,1000}|clang version [^\0]{0,1000}")


def build_info() -> dict[str, Any]:
    """Return versions and build flags, for the ``machine_info`` of the results."""
    return {
        "modelquota": modelquota.__version__,
        "numpy": np.__version__,
        "cython": _version("cython"),
        "compiler": compiler_of(Path(table.__file__)),
    }


def compiler_of(extension: Path) -> str:
    """Return compiler and flags as recorded in a compiled extension; ``"unknown"`` where nothing is recorded."""
    found = PRODUCER.search(extension.read_bytes())
    return found.group().decode("utf-8", "replace") if found else "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
