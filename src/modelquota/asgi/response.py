"""How many tokens a response used: from its `usage` if it has one, otherwise from the events that passed.

Nothing here keeps more than `MOST_HELD` bytes of a response, however long it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from modelquota._core.table.grant import Grant
from modelquota.quota.config import MAX_COUNT

MOST_HELD: Final = 1 << 16
"""Most bytes of a response that are kept to find its usage: the last ones, if it is longer."""

# Quotes inside a JSON string are escaped, so this can only be a key whose value is an object.
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_TOTALS = (("total_tokens",), ("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))
_WORD_BYTES = 16
_MOST_TRIED = 4
_USAGE_BYTES = 4096
_DECODER = json.JSONDecoder()


def total_tokens(usage: Any) -> int | None:
    """Return the tokens that a ``usage`` object reports, prompt and output; None if it reports none.

    Examples
    --------
    >>> total_tokens({"input_tokens": 5, "output_tokens": 7}), total_tokens({"total_tokens": -1})
    (12, None)
    """
    if isinstance(usage, dict):
        for fields in _TOTALS:
            counts = [count for field in fields if type(count := usage.get(field)) is int and 0 <= count <= MAX_COUNT]
            if len(counts) == len(fields):
                return min(sum(counts), MAX_COUNT)
    return None


def last_usage(text: bytes) -> int | None:
    """Return the tokens of the last ``usage`` in JSON, which may lack its beginning; None if it has none."""
    # Both are bounded, since a response may consist of nothing else: a usage is some 300 bytes long.
    for match in list(_USAGE.finditer(text))[: -_MOST_TRIED - 1 : -1]:
        try:
            usage, _ = _DECODER.raw_decode(text[match.end() : match.end() + _USAGE_BYTES].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        total = total_tokens(usage)
        if total is not None:
            return total
    return None


def event_tokens(data: bytes) -> int:
    """Return how many tokens the data of one server-sent event has: the default of `QuotaMiddleware`.

    An event with text counts one, since most servers send a token at a time, or one for every four bytes if the text is
    longer than 16. An event without text, such as one that only has the finish reason, counts nothing.

    Examples
    --------
    >>> event_tokens(b'{"choices": [{"delta": {"content": " mountain"}}]}')
    1
    >>> event_tokens(b'{"choices": [{"delta": {"role": "assistant"}, "finish_reason": null}]}')
    0
    """
    try:
        event = _DECODER.decode(data.decode())  # json.loads would first guess the encoding
    except (ValueError, RecursionError):
        return 0
    if not isinstance(event, dict):
        return 0
    choices = event.get("choices")
    if isinstance(choices, list):
        parts = [_text_bytes(choice) for choice in choices if isinstance(choice, dict)]
    elif isinstance(event.get("delta"), str):  # an event of the Responses API
        parts = [_utf8_bytes(event["delta"])]
    else:
        return 0
    return sum(1 if length <= _WORD_BYTES else -(-length // 4) for length in parts if length)


def _text_bytes(choice: dict[str, Any]) -> int:
    """Bytes of text in one choice of a chat or completion stream."""
    text = choice.get("text")
    if isinstance(text, str):
        return _utf8_bytes(text)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return 0
    length = sum(_utf8_bytes(part) for field, part in delta.items() if isinstance(part, str) and field != "role")
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            length += sum(_utf8_bytes(part) for part in function.values() if isinstance(part, str))
    return length


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


_NO_WORK = (401, 403, 404, 405)  # statuses of requests that never reached a model


class ResponseMeter:
    """Counts the tokens of a response as it passes, and settles its grant at the end.

    Parameters
    ----------
    grant : Grant
        An open grant.
    status : int
        HTTP status of the response.
    headers : iterable of (bytes, bytes)
        Headers of the response.
    prompt_tokens : int
        Tokens of the prompt, counted when a stream begins.
    chunk_tokens : callable
        Given the data of an event, returns its tokens.
    """

    __slots__ = (
        "_buffer",
        "_chunk_tokens",
        "_cut",
        "_data",
        "_events",
        "_failed",
        "_free",
        "_grant",
        "_json",
        "_total",
    )

    def __init__(
        self,
        grant: Grant,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        prompt_tokens: int,
        chunk_tokens: Callable[[bytes], int],
    ) -> None:
        kind = b""
        encoded = False
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value.partition(b";")[0].strip().lower()
            elif lower == b"content-encoding":
                encoded = value.strip().lower() not in (b"", b"identity")
        self._grant = grant
        self._chunk_tokens = chunk_tokens
        self._failed = status >= 400
        self._free = 300 <= status < 400 or status in _NO_WORK
        readable = not encoded and not self._failed and not self._free
        self._events = readable and kind == b"text/event-stream"
        self._json = readable and (kind == b"application/json" or kind.endswith(b"+json"))
        self._buffer = bytearray()
        self._data: list[bytes] = []
        self._cut = False
        self._total: int | None = None
        if self._events:
            grant.add(prompt_tokens)

    def feed(self, body: bytes) -> None:
        """Read a piece of the body."""
        if self._events:
            self._feed_events(body)
        elif self._json:
            self._keep(body)

    def finish(self, *, complete: bool) -> None:
        """Settle by the usage that the response reports; without one, keep what was counted, or the estimate.

        A response with an error status used no tokens. One for which no model did anything (a redirect, a request that
        is not allowed, a model that does not exist) is not even charged the request. One that was cut off used what had
        passed.
        """
        if self._free:
            self._free = False
            self._grant.cancel()
            return
        if self._events and (self._buffer or self._data):
            self._line(bytes(self._buffer))
            self._dispatch()
        elif self._json and complete and self._total is None:
            self._total = self._usage_of_json()
        if self._total is not None:
            self._grant.settle(self._total)
        elif self._failed:
            self._grant.settle(0)
        self._events = self._json = self._failed = False
        self._total = None

    def _keep(self, body: bytes) -> None:
        self._buffer += body
        if len(self._buffer) > MOST_HELD:
            del self._buffer[:-MOST_HELD]
            self._cut = True

    def _usage_of_json(self) -> int | None:
        """The usage at the top level of the body, or the last one in it if only its end was kept."""
        if not self._cut:
            try:
                answer = json.loads(self._buffer)
            except (ValueError, RecursionError):
                return None
            return total_tokens(answer.get("usage")) if isinstance(answer, dict) else None
        return last_usage(bytes(self._buffer))

    def _feed_events(self, body: bytes) -> None:
        if b"\r" in body:  # normalize the three line endings; one split over two pieces only adds an empty line
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = body.split(b"\n")
        for line in lines:
            if self._buffer:
                self._keep(line)
                line = bytes(self._buffer)
                self._buffer.clear()
            if line:
                self._line(line)
            else:
                self._dispatch()
        self._keep(rest)

    def _line(self, line: bytes) -> None:
        if self._cut or len(line) > MOST_HELD:  # too long to keep or parse: only its usage matters
            self._cut = False
            self._note_usage(line[-MOST_HELD:])
        elif line.startswith(b"data:"):
            self._data.append(line[5:].strip())
            if len(self._data) > 1 and sum(map(len, self._data)) > MOST_HELD:
                self._dispatch()

    def _dispatch(self) -> None:
        """Count an event that has ended."""
        if not self._data:
            return
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        if data != b"[DONE]":
            self._note_usage(data)
            tokens = self._chunk_tokens(data)
            if tokens:
                self._grant.add(tokens)

    def _note_usage(self, data: bytes) -> None:
        if b'"usage"' in data:
            total = last_usage(data)
            if total is not None:
                self._total = total
