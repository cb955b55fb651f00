"""Reads an answer as it passes: how many tokens it reports, or else how many passed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, Final

from modelquota._log import log
from modelquota.protocols.content import text_of
from modelquota.protocols.protocol import Protocol
from modelquota.protocols.usage import Report, UsageScanner, capped
from modelquota.quota.tokens import Tokens

MOST_HELD: Final = 1 << 18
"""Most bytes of an answer, or of one event of a stream, that are held to be parsed; of longer ones only the usage."""

_WARNING: Final = 30
_MOST_SHAPES: Final = 16  # tries to find the shape that the events of a stream share
_MOST_KINDS: Final = 64
_DECODER: Final = json.JSONDecoder()
_EVENTS, _LINES, _JSON, _OTHER = range(4)
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
_LINE_TYPES: Final = (b"application/x-ndjson", b"application/ndjson", b"application/jsonlines", b"application/jsonl")


class AnswerReader:
    """Reads one answer: `feed` it the body as it passes, then ask for its `tokens`.

    Parameters
    ----------
    protocol : Protocol
        How the answer is to be read.
    content_type : bytes
        The header of the answer.
    prompt_tokens : int
        The prompt as it was estimated, for an answer that does not report it.
    outputs : int
        How many outputs were asked for; 0 if the model only reads its input.
    readable : bool
        False if the body is compressed, so that nothing can be read.
    count_event : callable, optional
        Given the data of a server-sent event, returns its tokens, instead of the protocol. If it raises, that is
        logged, and the protocol counts.
    read_usage : callable, optional
        Given the parsed answer, or a parsed event of a stream, returns the tokens that it reports, or None; what it
        returns last is what was used. If it raises, that is logged, and the protocol's own places count.
    track : bool
        Whether to keep what `ending` needs.

    Attributes
    ----------
    is_stream : bool
        Whether it is a stream of events, of which `feed` counts each.
    passed : int
        Tokens of output that were counted so far.
    """

    __slots__ = (
        "_buffer",
        "_count_event",
        "_data",
        "_kind",
        "_last",
        "_outputs",
        "_prefix",
        "_prompt_tokens",
        "_protocol",
        "_read_usage",
        "_report",
        "_scanner",
        "_shapes",
        "_suffix",
        "_told",
        "_track",
        "is_stream",
        "passed",
    )  # fmt: skip

    def __init__(
        self,
        protocol: Protocol,
        content_type: bytes = b"",
        prompt_tokens: int = 0,
        *,
        outputs: int = 1,
        readable: bool = True,
        count_event: Callable[[bytes], int] | None = None,
        read_usage: Callable[[Any], Tokens | None] | None = None,
        track: bool = False,
    ) -> None:
        kind = _OTHER
        if readable and content_type == b"application/json":
            kind = _JSON
        elif readable:
            name = content_type.partition(b";")[0].strip().lower()
            if name == b"application/json":
                kind = _JSON
            elif name == b"text/event-stream":
                kind = _EVENTS
            elif name in _LINE_TYPES:
                kind = _LINES
            elif name.endswith(b"+json"):
                kind = _JSON
        self._kind = kind
        self._protocol = protocol
        self._prompt_tokens = prompt_tokens
        self._outputs = outputs
        self._count_event = count_event
        self._read_usage = read_usage
        self._told: Tokens | None = None
        self._track = track
        self._buffer: bytes | bytearray = b""
        self._data: list[bytes] = []
        self._last: dict[str, dict[str, Any]] = {}
        self._report: Report | None = None
        self._scanner: UsageScanner | None = None
        self._prefix = self._suffix = b""
        self._shapes = 0
        self.is_stream = kind in (_EVENTS, _LINES)
        self.passed = 0

    @property
    def at_boundary(self) -> bool:
        """Whether no event of the stream is incomplete."""
        return not self._buffer and not self._data and self._scanner is None

    def last_boundary(self, body: bytes) -> int:
        """Return where the last event that is complete ends in the piece that was fed last; 0 if none does."""
        if self.at_boundary:
            return len(body)
        if self._kind == _LINES:
            return body.rfind(b"\n") + 1
        return max((at + len(end) for end in _BLANK_LINES if (at := body.rfind(end)) >= 0), default=0)

    def feed(self, body: bytes) -> int:
        """Read a piece of the body; return how many tokens of output it has, if it is of a stream."""
        kind = self._kind
        if kind == _JSON:
            self._hold(body)
            return 0
        if kind == _OTHER:
            return 0
        prefix = self._prefix
        if prefix and body.startswith(prefix) and body.endswith(self._suffix) and not self._buffer:
            length = len(body) - len(prefix) - len(self._suffix)
            text = body[len(prefix) : len(prefix) + length]
            if length > 0 and b'"' not in text and b"\\" not in text and b"\n" not in text and b"\r" not in text:
                tokens = 1 if length <= 16 else -(-length // 4)
                self.passed += tokens
                if self._report is not None:
                    self._report.output_since += tokens
                return tokens
        before = self.passed
        self._feed_lines(body)
        return self.passed - before

    def tokens(self, *, complete: bool = True) -> Tokens | None:
        """Return what the answer used: as it reports, or else as it passed. None if it could not be read.

        Parameters
        ----------
        complete : bool
            Whether the whole answer has passed.
        """
        if self.is_stream:
            self._end_lines()
            if self._told is not None:
                return self._told
            found = None if self._report is None else self._report.tokens(self._prompt_tokens, self.passed)
            return capped(self._prompt_tokens, 0, self.passed) if found is None else found
        if self._kind == _JSON and complete:
            return self._tokens_of_json()
        return None

    def ending(self) -> bytes:
        """Return the events that end the stream here, as if its longest output had been reached."""
        return self._protocol.ending(self._last, self.passed)

    def _hold(self, body: bytes) -> None:
        """Hold the body of an answer, or only read its usage, if it is long."""
        if self._scanner is not None:
            self._scanner.feed(body)
            return
        if not self._buffer and len(body) <= MOST_HELD:
            self._buffer = body  # most answers come in one piece
            return
        if type(self._buffer) is bytes:
            self._buffer = bytearray(self._buffer)
        self._buffer += body
        if len(self._buffer) > MOST_HELD:
            self._scan(bytes(self._buffer))

    def _scan(self, data: bytes) -> None:
        self._buffer = b""
        self._scanner = UsageScanner(self._protocol.usage)
        self._scanner.feed(data)

    def _noted(self) -> Report:
        if self._report is None:
            self._report = Report()
        return self._report

    def _tokens_of_json(self) -> Tokens | None:
        protocol = self._protocol
        if self._scanner is None and self._read_usage is None:
            counts = protocol.usage_at_end(bytes(self._buffer))
            if counts is not None:
                return Tokens(*counts)
        report = self._noted()
        if self._scanner is not None:
            self._scanner.finish()
            self._scanner.report(report, add=protocol.adds_lists)
            # what passed was not counted, so that a report of nothing is not to be believed
            return None if self._outputs and not report.output else report.tokens(self._prompt_tokens, 0)
        try:
            answer = json.loads(self._buffer)
        except (ValueError, RecursionError):
            return None
        self._ask(answer)
        if self._told is not None:
            return self._told
        answers = protocol.answers_of(answer)
        if answers is not None:
            report.read_all(protocol.usage_tree, [[item] for item in answers])
        else:
            report.read(protocol.usage_tree, answer)
        self.passed = self._answer_tokens(answer) if self._outputs and not report.output else 0
        found = report.tokens(self._prompt_tokens, self.passed)
        return capped(self._prompt_tokens, 0, self.passed) if found is None and self.passed else found

    def _answer_tokens(self, answer: Any) -> int:
        try:
            return self._protocol.answer_tokens(answer)
        except RecursionError:
            return 0

    def _feed_lines(self, body: bytes) -> None:
        if b"\r" in body:  # normalize the three line endings; one split over two pieces only adds an empty line
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        alone = self.at_boundary
        *lines, rest = body.split(b"\n")
        shown: Any = None
        events = 0
        for line in lines:
            if self._scanner is not None:
                self._scanner.feed(line)
                self._end_scan()
                continue
            if self._buffer:
                line = bytes(self._buffer) + line
                self._buffer = b""
            if len(line) > MOST_HELD:
                self._scan(line)
                self._end_scan()
            elif self._kind == _LINES:
                shown = self._event(line) if line.strip() else shown
            elif line:
                self._line(line)
            elif self._data:
                shown = self._dispatch()
                events += 1
        if rest:
            self._hold(rest)
        elif alone and events == 1 and shown is not None and not self._buffer and not self._data:
            self._learn_shape(body, shown)

    def _end_lines(self) -> None:
        if self._scanner is not None:
            self._end_scan()
        rest = bytes(self._buffer)
        self._buffer = b""
        if self._kind == _LINES:
            if rest.strip():
                self._event(rest)
        else:
            if rest:
                self._line(rest)
            self._dispatch()

    def _end_scan(self) -> None:
        scanner, self._scanner = self._scanner, None
        if scanner is not None:
            scanner.finish()
            scanner.report(self._noted(), add=False)

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
            if len(self._data) > 1 and sum(map(len, self._data)) > MOST_HELD:
                self._dispatch()

    def _dispatch(self) -> Any:
        """Count an event that has ended."""
        if not self._data:
            return None
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        return None if data == b"[DONE]" else self._event(data)

    def _event(self, data: bytes) -> Any:
        """Count an event; return it, parsed, if it has only text."""
        try:
            event = _DECODER.decode(data.decode())  # json.loads would first guess the encoding
        except (ValueError, RecursionError):
            self._add(self._counted(data, None))
            return None
        tokens = self._counted(data, event)
        self._add(tokens)
        if self._track and isinstance(event, dict):
            self._keep_last(event)
        if self._read_usage is not None:
            self._ask(event)
            return None
        reported = self._noted().read(self._protocol.usage_tree, event) if isinstance(event, dict) else True
        return event if tokens and not reported and self._count_event is None else None

    def _ask(self, value: Any) -> None:
        """Ask the hook of the user what an answer or event reports."""
        if self._read_usage is None:
            return
        try:
            told = self._read_usage(value)
            self._told = told if isinstance(told, Tokens) else self._told
        except Exception as error:
            self._read_usage = None
            _log_once("usage= raised %s; such answers are read without it", repr(error))

    def _counted(self, data: bytes, event: Any) -> int:
        if self._count_event is not None:
            try:
                return min(max(int(self._count_event(data)), 0), 2**61 - self.passed)
            except Exception as error:
                self._count_event = None
                _log_once("the counter of tokens raised %s; such streams are counted without it", repr(error))
        try:
            return min(self._protocol.event_tokens(event, self.passed), 2**61 - self.passed) if self._outputs else 0
        except RecursionError:
            return 0

    def _add(self, tokens: int) -> None:
        if tokens:
            self.passed += tokens
            if self._report is not None:
                self._report.output_since += tokens

    def _keep_last(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        last = self._last
        if len(last) < _MOST_KINDS:
            last[kind if isinstance(kind, str) else ""] = event
            choices = event.get("choices")
            if isinstance(choices, list) and choices and isinstance(choices[0], dict):
                last[f"#{choices[0].get('index', 0)}"] = event

    def _learn_shape(self, body: bytes, event: Any) -> None:
        """Remember what surrounds the text: the next event is the same but for its text, and need not be parsed.

        The shape is used only if the piece is byte for byte the same outside of one string, in which no quote and no
        escape is, so that it has the same structure.
        """
        if self._shapes >= _MOST_SHAPES:
            return
        self._shapes += 1
        lengths = [length for length in text_of(event) if length]
        text = _text_in(event)
        if text is None or '"' in text or "\\" in text or not text.isprintable():
            return
        written = text.encode()
        quoted = b'"%b"' % written
        if lengths == [len(written)] and body.count(quoted) == 1:
            at = body.index(quoted) + 1
            self._prefix, self._suffix = body[:at], body[at + len(written) :]


@functools.lru_cache(maxsize=256)
def _log_once(message: str, error: str) -> None:
    """Log what a function of the user raised: once, since it may do so for every event of every stream."""
    log(_WARNING, message, error)


def _text_in(event: Any) -> str | None:
    """The text of an event of the usual shapes."""
    choices = event.get("choices")
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict):
        delta = choices[0].get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choices[0].get("text")
    else:
        delta = event.get("delta")
        text = delta.get("text") if isinstance(delta, dict) else delta
    return text if isinstance(text, str) else None
