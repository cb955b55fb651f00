"""The bytes of a trace: a file, standard input, or either compressed with gzip, in blocks that end with whole lines."""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from modelquota.errors import TraceError

NEWLINE = ord("\n")
STDIN = "-"
STDIN_NAME = "standard input"
# What is made of a block fits in a processor's cache: with a megabyte, JSON takes half as long again.
BLOCK_BYTES = 1 << 17
# A prompt of a million tokens has 2,000 blocks of 512 tokens, each with an id of up to 20 digits.
MAX_LINE_BYTES = 1 << 20

Progress = Callable[[int, int], None]

_NOT_TEXT = {
    b"\xff\xfe": "the file is UTF-16; save it as UTF-8",
    b"\xfe\xff": "the file is UTF-16; save it as UTF-8",
    b"PK": "the file is a ZIP archive or a spreadsheet; unpack it, or save it as CSV",
    b"PAR1": "the file is Parquet; convert it to CSV or JSONL",
    b"\x28\xb5\x2f\xfd": "the file is compressed with zstd; unpack it, or compress it with gzip",
}


def name_of(path: str | os.PathLike[str]) -> str:
    """Return the name that messages use for a trace: its path, or ``standard input`` for ``-``."""
    name = os.fspath(path)
    return STDIN_NAME if name == STDIN else name


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == STDIN:
        yield sys.stdin.buffer
    else:
        with open(path, "rb") as file:
            yield file


def blocks(path: str | os.PathLike[str], progress: Progress | None = None) -> Iterator[bytes]:
    """Yield the content without a byte order mark, unpacked, in blocks that end with a line end.

    Only the last block may end without one. `progress` is called as `progress(bytes_read, total_bytes)` after each
    block, with the bytes as stored; the total is 0 if it is not known.

    Raises
    ------
    TraceError
        The content is not text, or has a line of more than 1 MiB, or the compressed data is damaged.
    """
    name = name_of(path)
    # How many lines were yielded, for the errors that are found here.
    lines = 0
    with _opened(os.fspath(path)) as raw:
        size = 0 if raw is sys.stdin.buffer else os.fstat(raw.fileno()).st_size
        head = raw.read(BLOCK_BYTES)
        packed = head.startswith(b"\x1f\x8b")
        stored = len(head)
        unpacker = zlib.decompressobj(wbits=31)
        rest, first, block = b"", True, head
        while True:
            ended = not block
            try:
                unpacker, data = _unpack(unpacker, block) if packed else (unpacker, block)
            except zlib.error as error:
                raise TraceError(f"the gzip data is damaged ({error})", path=name, line=lines + 1) from None
            if ended and packed and not unpacker.eof:
                raise TraceError("the gzip data ends early; is the file complete?", path=name, line=lines + 1)
            data = rest + data
            if first and (data or ended):
                first = False
                for magic, advice in _NOT_TEXT.items():
                    if data.startswith(magic):
                        raise TraceError(advice, path=name, line=1)
                data = data.removeprefix(b"\xef\xbb\xbf")
            cut = len(data) if ended else _last_line_end(data)
            whole, rest = data[:cut], data[cut:]
            if whole:
                yield whole
                lines += count_of(whole, NEWLINE)
            if len(rest) > MAX_LINE_BYTES:
                raise TraceError(f"a line of more than {MAX_LINE_BYTES:,} bytes", path=name, line=lines + 1)
            if progress is not None:
                progress(stored, size)
            if ended:
                return
            block = raw.read(BLOCK_BYTES)
            stored += len(block)


def count_of(data: bytes, byte: int) -> int:
    """Return how often a byte is in the data; many times faster than `bytes.count`, which searches for each."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == byte))


def _last_line_end(data: bytes) -> int:
    """Return where to cut: after the last LF, or after a CR if there is no LF; a CR at the end may be half of CR LF."""
    return data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, -1) + 1


def _unpack(unpacker: "zlib._Decompress", block: bytes) -> tuple["zlib._Decompress", bytes]:
    """Unpack a block; the data may consist of several members, as logs that were rotated and concatenated do."""
    if unpacker.eof and block:
        unpacker = zlib.decompressobj(wbits=31)
    parts = [unpacker.decompress(block)]
    while unpacker.eof and unpacker.unused_data.lstrip(b"\0"):
        more = unpacker.unused_data
        unpacker = zlib.decompressobj(wbits=31)
        parts.append(unpacker.decompress(more))
    return unpacker, b"".join(parts)
