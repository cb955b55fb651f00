"""How many tokens passed, by what an event or an answer contains: for answers that report no usage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from modelquota.protocols.estimate import BYTES_PER_TOKEN

_WORD_BYTES: Final = 16
_DECODER: Final = json.JSONDecoder()
_MOST_NESTED: Final = 10_000  # parts looked at in one event


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
    return tokens_of_event(event)


def tokens_of_event(event: Any) -> int:
    """Return the tokens of a parsed event: of each output that it continues, as `event_tokens` says."""
    return sum(1 if length <= _WORD_BYTES else -(-length // BYTES_PER_TOKEN) for length in text_of(event) if length)


def tokens_of_answer(answer: Any) -> int:
    """Return the tokens of a whole answer: one for every four bytes of what was generated."""
    return -(-sum(text_of(answer)) // BYTES_PER_TOKEN)


def text_of(value: Any) -> Iterator[int]:
    """Yield the bytes of text of each output in an event or an answer, whatever its protocol."""
    if isinstance(value, list):  # batches of SGLang, streams of Gemini without server-sent events
        for item in value[:_MOST_NESTED]:
            if isinstance(item, dict):
                yield from text_of(item)
        return
    if not isinstance(value, dict):
        return
    delta = value.get("delta")
    if delta is not None:
        yield _delta(value, delta)
    for field in ("choices", "candidates", "output", "content"):
        parts = value.get(field)
        if isinstance(parts, list):
            for part in parts[:_MOST_NESTED]:
                if isinstance(part, dict):
                    yield _CONTENT[field](part)
    message = value.get("message")
    if isinstance(message, dict) and "type" not in value:  # Ollama; with a type, it is the empty start of Anthropic's
        yield _message(message)
    for field in ("response", "thinking"):
        if isinstance(value.get(field), str):  # Ollama's /api/generate
            yield _bytes(value[field])


def _delta(event: dict[str, Any], delta: Any) -> int:
    """Of the Responses API, and of transcriptions, a string; of Anthropic, an object."""
    if isinstance(delta, str):
        kind = event.get("type")
        return 0 if isinstance(kind, str) and kind.endswith("audio.delta") else _bytes(delta)
    if not isinstance(delta, dict):
        return 0
    return sum(
        _bytes(delta[field]) for field in ("text", "thinking", "partial_json") if isinstance(delta.get(field), str)
    )


def _choice(choice: dict[str, Any]) -> int:
    """A choice of a chat or a completion, or of a stream of one."""
    length = _bytes(choice["text"]) if isinstance(choice.get("text"), str) else 0
    for field in ("delta", "message"):
        if isinstance(choice.get(field), dict):
            length += _message(choice[field])
    return length


def _message(message: dict[str, Any]) -> int:
    """All text of a message: content, reasoning, refusals, calls of tools and functions, transcripts of audio."""
    length = 0
    for field, part in message.items():
        if isinstance(part, str):
            length += 0 if field in ("role", "id", "type", "name", "tool_name") else _bytes(part)
        elif field == "content" or field == "reasoning_details":
            length += sum(_part(item) for item in part[:_MOST_NESTED]) if isinstance(part, list) else 0
        elif field == "tool_calls" and isinstance(part, list):
            length += sum(_call(call.get("function", call)) for call in part[:_MOST_NESTED] if isinstance(call, dict))
        elif field == "function_call":
            length += _call(part)
        elif field == "audio" and isinstance(part, dict) and isinstance(part.get("transcript"), str):
            length += _bytes(part["transcript"])
    return length


def _part(part: Any) -> int:
    """A part of content, of any protocol."""
    if isinstance(part, str):
        return _bytes(part)
    if not isinstance(part, dict):
        return 0
    length = 0
    for field in ("text", "thinking", "refusal", "summary", "transcript", "arguments"):
        found = part.get(field)
        if isinstance(found, str):
            length += _bytes(found)
        elif isinstance(found, dict) and isinstance(found.get("value"), str):
            length += _bytes(found["value"])
    for field in ("functionCall", "input", "executableCode"):
        if isinstance(part.get(field), dict):
            length += _bytes(json.dumps(part[field], separators=(",", ":")))
    return length


def _candidate(candidate: dict[str, Any]) -> int:
    content = candidate.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    return sum(_part(part) for part in parts[:_MOST_NESTED]) if isinstance(parts, list) else 0


def _item(item: dict[str, Any]) -> int:
    """An item of the output of the Responses API: a message, reasoning, or a call of a function."""
    length = _bytes(item["arguments"]) if isinstance(item.get("arguments"), str) else 0
    for field in ("content", "summary"):
        if isinstance(item.get(field), list):
            length += sum(_part(part) for part in item[field][:_MOST_NESTED])
    return length


def _call(call: Any) -> int:
    if not isinstance(call, dict):
        return 0
    return sum(
        _bytes(part) if isinstance(part, str) else _bytes(json.dumps(part)) if isinstance(part, dict) else 0
        for part in call.values()
    )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


_CONTENT: Final = {"choices": _choice, "candidates": _candidate, "output": _item, "content": _part}
