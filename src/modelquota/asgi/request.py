"""A request as the middleware sees it, and what it asks of the quotas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelquota.asgi.types import ASGIApp, Scope
from modelquota.protocols.body import parse_body

__all__ = ["ASGIApp", "Demand", "IncomingRequest", "Scope", "header_of"]

_NOTHING: Mapping[str, str] = {}


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
        The prompt's part of it: counted for an answer that does not report it.
    ram_needed_mb, ssd_needed_mb : int
        Memory that the request holds, in MB (2**20 bytes).
    timeout : float or None
        The longest wait in seconds; never longer than ``grace_period_sec`` of the model.
    priority : int
        Higher is served first.
    guessed_tokens : int
        The part of the estimate that is a guess, since the request bounds no output: the middleware cuts it to what the
        smallest limit leaves, so that a guess makes no request impossible.
    """

    model_id: str | tuple[str, ...]
    estimated_tokens: int
    prompt_tokens: int = 0
    ram_needed_mb: int = 0
    ssd_needed_mb: int = 0
    timeout: float | None = None
    priority: int = 0
    guessed_tokens: int = 0

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
        The whole body, as it was sent.
    params : mapping of str to str
        What the names in the route's pattern matched, such as ``model``.
    """

    __slots__ = ("_fields", "_json", "_most", "body", "params", "scope")

    def __init__(
        self,
        scope: Scope,
        body: bytes,
        params: Mapping[str, str] = _NOTHING,
        *,
        fields: Mapping[bytes, bytes] | None = None,
        max_body_bytes: int = 32 << 20,
    ) -> None:
        self.scope = scope
        self.body = body
        self.params = params
        self._fields = dict([*scope.get("headers", ())][::-1]) if fields is None else fields
        self._most = max_body_bytes
        self._json: dict[str, Any] | None = None

    def header(self, name: str) -> str | None:
        """Return the first header of this name, ignoring case, or None."""
        return header_of(self.scope.get("headers", ()), name.lower().encode("latin-1"))

    def json(self) -> dict[str, Any]:
        """Return the body as an object: JSON, decompressed if need be, or the fields of a form.

        Raises RequestRefusedError: 400 if it is not an object, 413 if it is too large once decompressed, 415 if its
        content encoding is not known.
        """
        if self._json is None:
            kind = self._fields.get(b"content-type", b"").decode("latin-1")
            encoding = self._fields.get(b"content-encoding", b"").decode("latin-1")
            self._json = parse_body(self.body, kind, encoding, self._most)
        return self._json


def header_of(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    """Return the first header of this name, in lower case, or None."""
    for name, value in headers:
        if name.lower() == wanted:
            return bytes(value).decode("latin-1")
    return None
