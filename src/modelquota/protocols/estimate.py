"""How long a prompt is, without a tokenizer: text by its bytes, and media by their number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

BYTES_PER_TOKEN: Final = 4
"""Bytes of text that count as one token: the usual rule for English."""

MEDIA_TOKENS: Final = 1000
"""Tokens that an image, a piece of audio, a video or a file counts as, regardless of its size."""

MEDIA: Final = object()
"""Represents an uploaded file in a body that is a form."""

TEXT_FIELDS: Final = (
    "messages", "prompt", "input", "instructions", "system", "suffix", "tools", "functions", "response_format", "text",
)  # fmt: skip
"""Top-level fields of OpenAI's and Anthropic's APIs that a model reads."""

_TEXT: Final = frozenset(TEXT_FIELDS)
MEDIA_FIELDS: Final = frozenset((
    "image_url", "input_audio", "file", "file_data", "image", "images", "source", "inline_data", "inlineData",
    "fileData", "file_url", "video", "video_url", "audio", "audio_url", "image_data", "b64_json",
))  # fmt: skip
_MEDIA_KEYS: Final = frozenset((
    "url", "data", "file_data", "file_id", "fileUri", "file_uri", "b64_json", "bytes", "base64",
))  # fmt: skip
_LONG: Final = 1024
_HEAD: Final = 256  # of a data URL, in which its encoding is
_SHORTEST_MEDIA: Final = len("data:;base64,")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_=\r\n-]*")


def estimate_prompt(body: Mapping[str, Any]) -> int:
    """Estimate the tokens in the prompt of a request in OpenAI's or Anthropic's format.

    Text counts one token for four bytes, a prompt of token ids counts one each, and an image, a piece of audio or a
    file 1,000, whatever its size.

    Examples
    --------
    >>> estimate_prompt({"messages": [{"role": "user", "content": "What is the tallest mountain?"}]})
    9
    >>> estimate_prompt({"prompt": [15339, 11, 1917]})
    3
    """
    return estimate_values([value for field, value in body.items() if field in _TEXT])


def estimate_values(values: list[Any]) -> int:
    """Estimate the tokens in these parts of a body; the list is used up.

    An explicit stack instead of recursion: a body may be nested as deeply as its parser allows.
    """
    text_bytes = tokens = 0
    stack = values
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            length = len(value)
            if length < _SHORTEST_MEDIA:
                text_bytes += length if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
            elif (length >= _LONG and is_encoded(value)) or (value[:5] == "data:" and ";base64," in value[:_HEAD]):
                tokens += MEDIA_TOKENS
            else:
                text_bytes += length if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            if value.keys() & MEDIA_FIELDS:
                for field, part in value.items():
                    media = _media_items(field, part) if field in MEDIA_FIELDS else 0
                    if media:
                        tokens += media * MEDIA_TOKENS
                    else:
                        stack.append(part)
            else:
                stack += value.values()
        elif isinstance(value, list):
            if value and type(value[0]) is int:  # token ids, of which there may be millions
                tokens += len(value)
            else:
                for item in value:
                    content = item.get("content") if type(item) is dict and len(item) == 2 and "role" in item else None
                    if type(content) is str and len(content) < _LONG and content.isascii() and content[:5] != "data:":
                        text_bytes += len(content)  # the usual message, without a detour over the stack
                        stack.append(item["role"])
                    else:
                        stack.append(item)
        elif value is MEDIA:
            tokens += MEDIA_TOKENS
        elif value is not None:
            tokens += 1
    return tokens + -(-text_bytes // BYTES_PER_TOKEN)


def _media_items(field: str, part: Any) -> int:
    """How many media the value of a media field holds; 0 if it is something else, such as the schema of a tool."""
    if isinstance(part, str) or part is MEDIA:
        return int(field != "source")  # a source in words is a reference
    if isinstance(part, dict):
        return 1 if part.keys() & _MEDIA_KEYS else 0
    if isinstance(part, list) and part:
        return len(part) if all(_media_items(field, item) for item in part) else 0
    return 0


def is_encoded(text: str) -> bool:
    """Whether a text of at least 1,024 characters is base64 or a data URL rather than something to read.

    Only its beginning is looked at: no prose has upper case, lower case, digits and no space for that long.

    Examples
    --------
    >>> is_encoded("iVBORw0KGgoAAAANSUhEUgAA" * 50), is_encoded("x" * 2000), is_encoded("Words, 2 of them. " * 100)
    (True, False, False)
    """
    head = text[:_LONG]
    if head.startswith("data:"):
        return ";base64," in head
    return (
        _BASE64.fullmatch(head) is not None
        and not head.islower()
        and not head.isupper()
        and any(letter.isdigit() for letter in head)
    )
