"""The state files that earlier versions wrote, see `old_state`, and larger ones made of them."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.mapping import PAGE
from modelquota.statefile.layouts import OLD_LAYOUTS, OldLayout

DATA = Path(__file__).parent.parent / "sharing" / "data"
SAMPLES = ("layout3", "layout3-killed", "layout4", "layout4-killed", "layout5", "layout5-killed")


def unpack_sample(name: str, path: Path) -> Path:
    """Write a sample to a path, as a private file; returns the path."""
    content = content_of(name)
    return write_sparsely(path, content, used_pages(name))


@functools.cache
def content_of(name: str) -> bytes:
    """The bytes of a sample."""
    return gzip.decompress((DATA / f"{name}.state.gz").read_bytes())


@functools.cache
def used_pages(name: str) -> list[int]:
    """The pages of a sample that are not zero."""
    return pages_of(content_of(name))


def pages_of(content: bytes | bytearray) -> list[int]:
    """The pages that are not zero."""
    found: list[int] = np.unique(np.flatnonzero(np.frombuffer(content, np.uint8)) // PAGE).tolist()
    return found


def write_sparsely(path: Path, content: bytes | bytearray, pages: list[int] | None = None) -> Path:
    """Write a private file without its pages of zeros, which are nearly all of it; returns the path."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    with open(path, "r+b") as file:
        for page in pages_of(content) if pages is None else pages:
            file.seek(page * PAGE)
            file.write(content[page * PAGE : (page + 1) * PAGE])
        file.truncate(len(content))
    return path


def answers_of(name: str) -> dict[str, Any]:
    """What the version that wrote a sample reads in it and decides: ``{"end_ns": ..., "answers": [...]}``."""
    document: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return document


class OldParts:
    """The parts of a file with an old layout, in memory and writable, to be changed and written."""

    def __init__(self, version: int, content: bytes) -> None:
        self.layout: OldLayout = OLD_LAYOUTS[version]
        self.content = bytearray(content)
        self.header = np.frombuffer(self.content, self.layout.header, 1)[0:1]
        self.models = int(self.header["max_models"][0])
        rows, ledgers, self.names, self.size = self.layout.places(self.models)
        self.rows: NDArray[Any] = np.frombuffer(self.content, self.layout.row, self.models, rows)
        self.ledgers: NDArray[Any] = np.frombuffer(self.content, self.layout.ledger, self.models, ledgers)

    def name(self, row: int) -> str:
        """The id of the model in a row."""
        start = self.names + 16 * int(self.ledgers["name_offset"][row])
        return self.content[start : start + int(self.ledgers["name_size"][row])].decode()

    def row_of(self, name: str) -> int:
        """The row of a model."""
        alive = np.flatnonzero(self.rows["generation"] % 2)
        return next(int(row) for row in alive if self.name(int(row)) == name)

    def write(self, path: Path) -> Path:
        """Write the file, private; returns the path."""
        return write_sparsely(path, self.content)


def parts_of(name: str) -> OldParts:
    """The parts of a sample."""
    return OldParts(int(name[6]), content_of(name))


def multiplied(sample: OldParts, rows: list[int], names: list[str]) -> OldParts:
    """A file of the same layout with these models, which are like those in some rows of the sample, in turn.

    It has room for no more.
    """
    count = len(names)
    whole = OldParts(sample.layout.version, with_size(sample, count))
    chosen = np.resize(rows, count)
    whole.rows[:], whole.ledgers[:] = sample.rows[chosen], sample.ledgers[chosen]
    whole.header["row_count"] = count
    end = 0
    for row, name in enumerate(names):
        data = name.encode()
        capacity = 16
        while capacity < len(data):
            capacity *= 2
        whole.ledgers["name_offset"][row], whole.ledgers["name_capacity"][row] = end // 16, capacity
        whole.ledgers["name_size"][row] = len(data)
        whole.content[whole.names + end : whole.names + end + len(data)] = data
        end += capacity
    whole.header["names_used"] = end
    return whole


def with_size(sample: OldParts, max_models: int) -> bytes:
    """An empty file of the sample's layout with its header, for so many models."""
    content = bytearray(sample.layout.regions(max_models)[-1])
    content[: sample.layout.header.itemsize] = sample.content[: sample.layout.header.itemsize]
    header = np.frombuffer(content, sample.layout.header, 1)
    header["max_models"] = max_models
    return bytes(content)
