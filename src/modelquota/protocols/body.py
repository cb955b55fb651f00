"""From the bytes of a request to its parsed body: content encodings, byte order marks, UTF-16, JSON and forms."""

from __future__ import annotations

import json
import json.scanner
import re
import sys
import zlib
from collections.abc import Callable
from typing import Any, Final, NoReturn, cast

from modelquota.protocols.estimate import MEDIA
from modelquota.protocols.request import RequestRefusedError

_zstd: Any = None
if sys.version_info >= (3, 14):
    from compression import zstd as _zstd

LARGE: Final = 1 << 18
"""Bytes of JSON from which parsing takes so long that an event loop should not wait for it."""

_NO_JSON: Final = "the body is not valid JSON"
_GZIP, _ZLIB, _RAW = 31, 15, -15  # as zlib's `wbits`
_MOST_FIELDS: Final = 200
_MOST_PART_HEAD: Final = 4096
_BEGINS_AS_JSON: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_NAME: Final = re.compile(rb'name="((?:[^"\\]|\\.)*)"')
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)


def parse_body(data: bytes, content_type: str = "", content_encoding: str = "", most: int = 1 << 25) -> dict[str, Any]:
    """Return the body of a request as an object: JSON, or the fields of a form, whose files are `MEDIA`.

    What begins as JSON is read as JSON whatever its type is said to be: some servers do not look at the type.

    JSON may be UTF-8 with or without a byte order mark, UTF-16 or UTF-32; and compressed, with gzip or deflate, and
    with zstd from Python 3.14 on.

    Parameters
    ----------
    data : bytes
        The body.
    content_type, content_encoding : str
        The headers.
    most : int
        The most bytes that it may have once it is decompressed.

    Raises
    ------
    RequestRefusedError
        400 if it is not an object, 413 if it is larger than `most`, 415 if its encoding is not known.

    Examples
    --------
    >>> parse_body(b'{"model": "m"}')
    {'model': 'm'}
    """
    if content_encoding:
        data = decompress(data, content_encoding, most)
    if content_type[:19].lower() == "multipart/form-data" and not _BEGINS_AS_JSON.match(data):
        return parse_form(data, content_type)
    value = parse_json(data)
    if not isinstance(value, dict):
        raise RequestRefusedError(400, "the body is not a JSON object", "invalid_json")
    return value


def parse_json(data: bytes) -> Any:
    """Parse JSON; RequestRefusedError (400) if it is none. Large JSON is parsed so that other threads can run."""
    try:
        text = data.decode() if data[:1] in b"{[" and data[1:2] != b"\0" else data.decode(_encoding(data))
        if len(data) >= LARGE:
            return _decode_large(text)
        if text[:1] == "{":
            value, end = _SCAN(text, 0)  # decode() looks for space around it first
            if end == len(text):
                return value
        return _DECODER.decode(text)
    except ValueError as error:  # from UTF-8, JSON, or a number with too many digits
        reason = str(error).partition("\n")[0][:200]
        raise RequestRefusedError(400, f"{_NO_JSON}: {reason}", "invalid_json") from None
    except StopIteration:  # from the scanner, for a value that is missing
        raise RequestRefusedError(400, f"{_NO_JSON}: Expecting value", "invalid_json") from None
    except RecursionError:
        raise RequestRefusedError(400, f"{_NO_JSON}: too many brackets", "invalid_json") from None


def _encoding(data: bytes) -> str:
    return json.detect_encoding(data)


def decompress(data: bytes, encodings: str, most: int) -> bytes:
    """Undo the encodings of a ``content-encoding`` header, within `most` bytes."""
    names = [name.strip().lower() for name in encodings.split(",")]
    if len(names) > 2:
        _unknown(encodings)
    for name in reversed(names):
        if name in ("", "identity"):
            continue
        inflate = _INFLATERS.get(name)
        if inflate is None:
            _unknown(encodings)
        try:
            data = inflate(data, most + 1)
        except _BROKEN as error:
            raise RequestRefusedError(400, f"the body is not valid {name}: {error}", "invalid_encoding") from None
        if len(data) > most:
            raise too_large(most)
    return data


def accepted_encodings() -> str:
    """Return the encodings that `decompress` knows, for ``accept-encoding``."""
    return ", ".join(name for name in _INFLATERS if not name.startswith("x-"))


def too_large(most: int) -> RequestRefusedError:
    """Return the error for a body of more than `most` bytes."""
    return RequestRefusedError(413, f"the body is larger than the {most:,} bytes that are accepted", "body_too_large")


def _unknown(encodings: str) -> NoReturn:
    message = f"the content encoding {encodings[:80]!r} is not known; accepted are {accepted_encodings()}"
    raise RequestRefusedError(415, message, "unsupported_encoding")


def _inflate(data: bytes, most: int, *formats: int) -> bytes:
    for index, wbits in enumerate(formats):
        decompressor = zlib.decompressobj(wbits)
        try:
            found = bytearray(decompressor.decompress(data, most))
            while decompressor.unused_data and wbits == _GZIP and len(found) < most:  # a file of several members
                rest = decompressor.unused_data
                decompressor = zlib.decompressobj(wbits)
                found += decompressor.decompress(rest, most - len(found))
        except zlib.error:
            if index == len(formats) - 1:
                raise
            continue
        if not decompressor.eof and len(found) < most:
            raise EOFError("it is cut short")
        return bytes(found)
    raise AssertionError("no format")


def _gunzip(data: bytes, most: int) -> bytes:
    return _inflate(data, most, _GZIP)


def _undeflate(data: bytes, most: int) -> bytes:
    return _inflate(data, most, _ZLIB, _RAW)  # "deflate" is zlib's format, but some clients send it raw


def _unzstd(data: bytes, most: int) -> bytes:
    decompressor = _zstd.ZstdDecompressor()
    found: bytes = decompressor.decompress(data, most)
    if not decompressor.eof and len(found) < most:
        raise EOFError("it is cut short")
    return found


_INFLATERS: Final[dict[str, Callable[[bytes, int], bytes]]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _undeflate,
}
_BROKEN: tuple[type[Exception], ...] = (zlib.error, EOFError)
if _zstd is not None:
    _INFLATERS["zstd"] = _unzstd
    _BROKEN += (_zstd.ZstdError,)


def parse_form(data: bytes, content_type: str) -> dict[str, Any]:
    """Return the fields of a form (multipart/form-data): text as str, files as `MEDIA`, or a list of several."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise RequestRefusedError(400, "the form has no boundary", "invalid_form")
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    fields: dict[str, Any] = {}
    at = data.find(mark)
    if at < 0:
        raise RequestRefusedError(400, "the form does not begin with its boundary", "invalid_form")
    for _ in range(_MOST_FIELDS):
        if at < 0:
            break
        start = at + len(mark)
        if data[start : start + 2] == b"--":
            break
        at = data.find(b"\r\n" + mark, start)
        head_end = data.find(b"\r\n\r\n", start, start + _MOST_PART_HEAD)
        if at < 0 or head_end < 0 or head_end > at:
            raise RequestRefusedError(400, "the form is cut short", "invalid_form")
        head = data[start:head_end]
        name = _NAME.search(head)
        if name is not None:
            field = name[1].decode("utf-8", "replace")
            if b"filename" not in head:
                fields[field] = data[head_end + 4 : at].decode("utf-8", "replace")
            elif field in fields:  # several files of one name, as images to be changed
                before = fields[field]
                fields[field] = [*(before if isinstance(before, list) else [before]), MEDIA]
            else:
                fields[field] = MEDIA
        at += 2
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


# Shared: json.loads would create one for each call that has an option.
_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)
_SCAN: Final = _DECODER.scan_once  # type: ignore[attr-defined]

MOST_CONTAINERS: Final = 100_000
"""Most lists and objects in a large body: the garbage collector stops all threads while it looks at them."""

_NUMBERS: Final = re.compile(r"[\s\d.,eE+-]*+")
_PIECE: Final = 1 << 16
_FEW: Final = 1000
_PARSE_LIST: Final = json.decoder.JSONArray  # type: ignore[attr-defined]
_PARSE_OBJECT: Final = json.decoder.JSONObject  # type: ignore[attr-defined]


class _LargeDecoder(json.JSONDecoder):
    """Decodes so that other threads can run: the parser in C does not let them before it is done.

    The one in Python does, between any two values. Only strings, and lists of plain numbers, which may be as long as
    the body, are left to the one in C, piece by piece.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=_no_constant)
        self._containers = 0
        self.parse_array = self._parse_list
        self.parse_object = self._parse_object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _count(self) -> None:
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            raise ValueError(f"a large body may have at most {MOST_CONTAINERS:,} lists and objects")

    def _parse_object(self, *args: Any) -> Any:
        self._count()
        return _PARSE_OBJECT(*args)

    def _parse_list(self, text_and_end: tuple[str, int], *args: Any) -> tuple[Any, int]:
        self._count()
        text, at = text_and_end
        found: list[Any] = []
        while True:
            match = _NUMBERS.match(text, at, at + _PIECE)
            last = -1 if match is None or match.end() - at < _FEW else text.rfind(",", at, match.end())
            if last <= at:
                break
            found += _DECODER.decode(f"[{text[at:last]}]")
            at = last + 1
        if not found:
            return cast("tuple[Any, int]", _PARSE_LIST((text, at), *args))
        if text[at : at + 64].lstrip(" \t\n\r")[:1] == "]":  # after a comma
            raise json.JSONDecodeError("Expecting value", text, at)
        more, at = _PARSE_LIST((text, at), *args)
        return found + more, at


def _decode_large(text: str) -> Any:
    return _LargeDecoder().decode(text)
