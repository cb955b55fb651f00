"""What a client is told when its request is not served, before a protocol puts it into its own words."""

from __future__ import annotations

import enum
import json
from typing import Any, NamedTuple

Header = tuple[bytes, bytes]


class RefusalKind(enum.Enum):
    """Why a request is not served."""

    RATE_LIMIT = "rate_limit"
    """Over a limit for now; a retry helps."""
    QUOTA_SPENT = "quota_spent"
    """The hour, the day or the month is used up."""
    NEVER_FITS = "never_fits"
    """The request exceeds a limit by itself."""
    OVERLOADED = "overloaded"
    """Memory or concurrency of the model is in use; or another shortage of the server."""
    INVALID = "invalid"
    """The request is not accepted, by its `status`: 400, 401, 404, 413, 415, ..."""


class Refusal(NamedTuple):
    """Why a request is not served, as `Protocol.refuse` takes it.

    Attributes
    ----------
    kind : RefusalKind
    status : int
        The HTTP status, unless the protocol has one of its own for the kind.
    message : str
        For the user.
    code : str or None
        For programs, in the words of OpenAI's API.
    param : str or None
        The field of the request that is wrong.
    unit : str
        What the limit counts: ``"requests"`` or ``"tokens"``; empty if it is something else.
    retry_ms : int or None
        Milliseconds until a retry may help.
    """

    kind: RefusalKind
    status: int
    message: str
    code: str | None = None
    param: str | None = None
    unit: str = ""
    retry_ms: int | None = None


class Answer(NamedTuple):
    """A complete response.

    Attributes
    ----------
    status : int
    headers : list of (bytes, bytes)
        Names in lower case; ``content-type`` and ``content-length`` are among them.
    body : bytes
    """

    status: int
    headers: list[Header]
    body: bytes


def json_answer(status: int, value: Any, headers: list[Header]) -> Answer:
    """Return a response of JSON: in ASCII, since a message may quote half of a surrogate pair."""
    body = json.dumps(value).encode()
    return Answer(
        status, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers], body
    )
