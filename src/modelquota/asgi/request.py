"""A request as the middleware sees it: its body, read up to a bound, and what it asks of the quotas."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from modelquota.errors import QuotaError
from modelquota.quota.config import MAX_MODEL_ID_BYTES

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_NO_JSON = "the body is not valid JSON"


class RequestRefusedError(QuotaError):
    """The request is answered with an HTTP error instead of being checked. No quota is touched.

    Raise it in a callable given to `QuotaMiddleware`, for a body that is not accepted or a key that is not known.

    Parameters
    ----------
    status : int
        HTTP status, 400 .. 599.
    message : str
        What is wrong, to show to the client.
    code : str, optional
        A short identifier, for programs.
    param : str, optional
        The field of the body that is wrong.

    Examples
    --------
    >>> print(RequestRefusedError(401, "this key is not known", code="invalid_api_key"))
    401: this key is not known
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of the quotas, as `ResourceQuotaManager.acquire_async` takes it.

    Attributes
    ----------
    model_id : str or tuple of str
        The model, or several ids that must all admit.
    estimated_tokens : int
        The prompt and the longest output.
    prompt_tokens : int
        The prompt's part of it: counted for a stream that ends without a final ``usage``.
    ram_needed_mb, ssd_needed_mb : int
        Memory that the request holds, in MB (2**20 bytes).
    timeout : float or None
        The longest wait in seconds; never longer than ``grace_period_sec`` of the model.
    priority : int
        Higher is served first.
    """

    model_id: str | tuple[str, ...]
    estimated_tokens: int
    prompt_tokens: int = 0
    ram_needed_mb: int = 0
    ssd_needed_mb: int = 0
    timeout: float | None = None
    priority: int = 0

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The ids as a tuple, even if there is only one."""
        return (self.model_id,) if isinstance(self.model_id, str) else self.model_id


class IncomingRequest:
    """A request whose body has been read.

    Attributes
    ----------
    scope : mapping
        The ASGI scope.
    body : bytes
        The whole body.
    """

    __slots__ = ("_json", "body", "scope")

    def __init__(self, scope: Scope, body: bytes) -> None:
        self.scope = scope
        self.body = body
        self._json: dict[str, Any] | None = None

    def header(self, name: str) -> str | None:
        """Return the first header of this name, ignoring case, or None."""
        wanted = name.lower().encode("latin-1")
        for key, value in self.scope.get("headers", ()):
            if key.lower() == wanted:
                return bytes(value).decode("latin-1")
        return None

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; raises RequestRefusedError (400) if it is not one."""
        if self._json is None:
            try:
                value = _DECODER.decode(self.body.decode())
            except ValueError as error:  # from UTF-8, JSON, or a number with too many digits
                raise RequestRefusedError(400, f"{_NO_JSON}: {_first_line(error)}", "invalid_json") from None
            except RecursionError:
                raise RequestRefusedError(400, f"{_NO_JSON}: too many brackets", "invalid_json") from None
            if not isinstance(value, dict):
                raise RequestRefusedError(400, "the body is not a JSON object", "invalid_json")
            self._json = value
        return self._json


def whole_number(body: Mapping[str, Any], field: str, *, least: int = 0) -> int | None:
    """Return a field that is an integer from `least` to 2**62; None if it is missing or null.

    Raises RequestRefusedError (400) for anything else: there is no telling how the application would read it.
    """
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= 2**62:
        raise RequestRefusedError(400, f"{field} is not an integer from {least} to 2**62", "invalid_value", field)
    return value


def model_name(body: Mapping[str, Any], field: str = "model") -> str:
    """Return the field that names the model; RequestRefusedError (400) if no quota can have it as an id."""
    value = body.get(field)
    if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_ID_BYTES and "\0" not in value:
        try:
            if value.isascii() or len(value.encode()) <= MAX_MODEL_ID_BYTES:
                return value
        except UnicodeEncodeError:  # half of a surrogate pair
            pass
    raise RequestRefusedError(
        400, f"{field} is not a string of 1 to {MAX_MODEL_ID_BYTES} bytes without NUL", "invalid_value", field
    )


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """Read the body, holding at most `most` bytes; None if the client disconnected before its end.

    Raises RequestRefusedError (413) as soon as it is known to be longer: by its header, or by the bytes received.
    """
    for name, value in scope.get("headers", ()):
        if name.lower() == b"content-length" and len(value) < 20 and value.isdigit() and int(value) > most:
            raise _too_large(most)
    first = await receive()
    if first["type"] != "http.request":
        return None
    body = first.get("body", b"")
    if len(body) > most:
        raise _too_large(most)
    if not first.get("more_body", False):
        return bytes(body)
    parts = bytearray(body)
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        more = message.get("more_body", False)
        part = message.get("body", b"")
        if len(parts) + len(part) > most:
            raise _too_large(most)
        parts += part
    return bytes(parts)


def route_path(scope: Scope) -> str:
    """The path below the mount point of the application, without a slash at the end."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return path.rstrip("/") if path.endswith("/") else path


def joined_ids(first: str | Sequence[str], then: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The ids of both, in order, each id once."""
    heads = (first,) if isinstance(first, str) else tuple(first)
    if not heads:
        return then
    ids = tuple(dict.fromkeys(heads + ((then,) if isinstance(then, str) else then)))
    return ids[0] if len(ids) == 1 else ids


def _too_large(most: int) -> RequestRefusedError:
    return RequestRefusedError(413, f"the body is larger than the {most:,} bytes that are accepted", "body_too_large")


def _first_line(error: ValueError) -> str:
    return str(error).partition("\n")[0][:200]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


# Shared: json.loads would create one for each call that has an option.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
