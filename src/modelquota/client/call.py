"""What a request to an API needs of the quotas, and how its answer settles them: all but waiting and sending."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from modelquota._core.table.grant import Grant
from modelquota.asgi.charge import ChargeTable
from modelquota.asgi.ratelimit import most_tokens_at_once
from modelquota.asgi.refusal import Refuser
from modelquota.client.learn import charge_others, read_retry_after
from modelquota.client.pause import Pauses, pauses_of
from modelquota.errors import GrantClosedError, QuotaExceededError
from modelquota.manager import ResourceQuotaManager
from modelquota.protocols import (
    AnswerReader,
    Operation,
    PathTable,
    RequestRefusedError,
    estimate_of,
    operations,
    parse_body,
)
from modelquota.protocols.protocol import Protocol
from modelquota.quota.limits import ViolationAction
from modelquota.quota.tokens import Tokens
from modelquota.reading.unmetered import unmetered_of

Ids: TypeAlias = Callable[[str], str | Sequence[str] | None]

_CHARGES: Final = ChargeTable()
_TOO_MANY: Final = 429
_READABLE: Final = ("gzip", "deflate")
_PIECE: Final = 1 << 16
_PATIENCE: Final = 60.0  # seconds, for ids that have no quota: as the default of quotas


class Need(NamedTuple):
    """What one request needs.

    Attributes
    ----------
    ids : tuple of str
        The ids that must all admit it.
    tokens : int
        Its estimate.
    prompt_tokens : int
        The prompt's part of it.
    outputs : int
        How many outputs it asks for.
    priority : int
        Higher is served first.
    protocol : Protocol
        How its answer is read.
    """

    ids: tuple[str, ...]
    tokens: int
    prompt_tokens: int
    outputs: int
    priority: int
    protocol: Protocol

    @property
    def estimate(self) -> Tokens:
        """The estimate by kind."""
        return estimate_of(self.prompt_tokens, self.tokens)

    @property
    def line(self) -> tuple[str, ...]:
        """The id whose line pauses: the last one, as a model after its account."""
        return self.ids[-1:]

    @property
    def model_id(self) -> str | tuple[str, ...]:
        """The ids as `ResourceQuotaManager.acquire` takes them."""
        return self.ids[0] if len(self.ids) == 1 else self.ids


class Policy:
    """How requests are read and admitted: what both transports share. Thread-safe."""

    def __init__(
        self,
        manager: ResourceQuotaManager,
        *,
        ids: Ids | None,
        default_model: str | None,
        default_output_tokens: int,
        timeout: float | None,
        tables: Sequence[str] | None,
    ) -> None:
        found = operations() if tables is None else operations(tables)
        self.manager = manager
        self.pauses: Pauses = pauses_of(manager)
        self.timeout = timeout
        self._ids = ids
        self._default_model = default_model
        self._default_output_tokens = default_output_tokens
        self._paths: PathTable[Operation] = PathTable(found, anywhere=found)
        self._unmetered = unmetered_of(manager)

    def operation(self, method: str, path: str) -> tuple[Operation, Mapping[str, str]] | None:
        """Return the operation of a request; None if it runs no model."""
        found = self._paths.find(path) if method == "POST" else None
        return None if found is None or found[0].free else found

    def need(
        self, found: tuple[Operation, Mapping[str, str]], path: str, body: bytes, headers: Mapping[str, str]
    ) -> Need | None:
        """Return what a request needs; None if it cannot be counted, which is logged."""
        operation, params = found
        try:
            parsed = parse_body(body, headers.get("content-type", ""), headers.get("content-encoding", ""))
            reading = operation.read(parsed, params)
        except RequestRefusedError as error:  # the server will say so itself
            self._unmetered.count(path, str(error))
            return None
        model = reading.model or self._default_model
        if model is None:
            self._unmetered.count(path, "it names no model, and there is no default_model")
            return None
        said: Any = model if self._ids is None else self._ids(model)
        if said is None:
            return None
        ids = (said,) if isinstance(said, str) else tuple(dict.fromkeys(said))
        most = most_at_once(self.manager, ids) if reading.is_guess else None
        tokens = reading.estimate(self._default_output_tokens, most)
        return Need(ids, tokens, reading.prompt_tokens, reading.outputs, reading.priority, operation.protocol)

    def patience(self, ids: Sequence[str]) -> float:
        """Return the longest that a request may wait for a pause to end, in seconds, by the actions of its ids."""
        quotas = [self.manager.get_quota(model_id) for model_id in ids]
        graces = [
            0.0 if quota.on_violation is ViolationAction.REJECT else quota.grace_period_sec
            for quota in quotas
            if quota is not None
        ]
        longest = min(graces, default=_PATIENCE)
        return longest if self.timeout is None else min(longest, self.timeout)

    def note_headers(self, need: Need, status: int, headers: Mapping[str, str]) -> None:
        """Learn from the headers of an answer."""
        if status == _TOO_MANY:
            seconds = read_retry_after(headers)
            if seconds:
                self.pauses.begin(need.line, seconds)
        charge_others(self.manager, need.ids, headers)


def most_at_once(manager: ResourceQuotaManager, ids: Sequence[str]) -> int | None:
    """Return the most tokens that the ids ever admit at once, so that a guess does not make a request impossible."""
    quotas = [manager.get_quota(model_id) for model_id in ids]
    found = [most for quota in quotas if quota is not None and (most := most_tokens_at_once(quota)) is not None]
    return min(found, default=None)


class Refused(Exception):
    """A request is not sent: it is answered here.

    Attributes
    ----------
    status : int
    headers : list of (bytes, bytes)
    body : bytes
    """

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.body = body


def denied(policy: Policy, need: Need, error: QuotaExceededError) -> Refused:
    """Return the answer to a request that the quotas deny, in the protocol's own shape."""
    refuser = Refuser(policy.manager, 1, 0.0, "")
    answer = refuser.denial(error, need.protocol, [], ids=need.ids, sizes=(need.tokens, 0, 0))
    return Refused(answer.status, answer.headers, answer.body)


def paused(need: Need, seconds: float) -> Refused:
    """Return the answer to a request that would have to wait too long until the server may be asked again."""
    from modelquota.protocols.refusal import Refusal, RefusalKind

    wait_ms = max(int(seconds * 1000), 1)
    message = f"{need.ids[-1]}: the server asked for a pause of another {seconds:.1f} s."
    refusal = Refusal(RefusalKind.RATE_LIMIT, _TOO_MANY, message, "rate_limit_exceeded", None, "requests", wait_ms)
    headers = [(b"retry-after", b"%d" % max(-(-wait_ms // 1000), 1)), (b"retry-after-ms", b"%d" % wait_ms)]
    answer = need.protocol.refuse(refusal, headers)
    return Refused(answer.status, answer.headers, answer.body)


def readable_encodings(accepted: str) -> str | None:
    """Return the ``accept-encoding`` to send so that the answer can be read as it passes; None to leave it alone.

    Examples
    --------
    >>> readable_encodings("gzip, deflate, br, zstd"), readable_encodings("br"), readable_encodings("gzip")
    ('gzip, deflate', 'identity', None)
    """
    names = [name.strip() for name in accepted.split(",") if name.strip()]
    kept = [name for name in names if name.partition(";")[0].strip().lower() in (*_READABLE, "identity")]
    if len(kept) == len(names):
        return None
    return ", ".join(kept) or "identity"


class Counter:
    """Counts an answer as it passes, and settles its grant; every verb may be called again, and then does nothing.

    Parameters
    ----------
    grant : Grant
        An open grant.
    need : Need
        What it was acquired for.
    status : int
    headers : mapping
        Of the answer.
    """

    def __init__(self, grant: Grant, need: Need, status: int, headers: Mapping[str, str]) -> None:
        self._grant = grant
        self._status = status
        self._inflater: Any = None
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding in ("gzip", "x-gzip"):
            self._inflater = zlib.decompressobj(31)
        elif encoding == "deflate":
            self._inflater = zlib.decompressobj(15)
        charges_usage = _CHARGES.of(status) == "usage"
        self._reader = AnswerReader(
            need.protocol,
            headers.get("content-type", "").encode("latin-1", "replace"),
            need.prompt_tokens,
            outputs=need.outputs,
            readable=charges_usage and (self._inflater is not None or encoding in ("", "identity")),
        )
        self._done = False
        if charges_usage and self._reader.is_stream:
            grant.add(0)  # from here on only what passes counts, with the prompt

    def feed(self, piece: bytes) -> None:
        """Read a piece of the body, as it came over the wire."""
        if self._done:
            return
        if self._inflater is None:
            self._count(piece)
            return
        try:
            while piece:
                self._count(self._inflater.decompress(piece, _PIECE))
                piece = self._inflater.unconsumed_tail
        except zlib.error:  # the client will say so itself
            self._inflater = zlib.decompressobj()

    def _count(self, piece: bytes) -> None:
        tokens = self._reader.feed(piece)
        if tokens:
            self._grant.add(tokens)

    def finish(self, *, complete: bool) -> None:
        """Settle by what the answer reports, or else by what passed."""
        if self._done:
            return
        self._done = True
        try:
            charge = _CHARGES.of(self._status)
            if charge == "nothing":
                self._grant.cancel()
            elif charge == "request":
                self._grant.settle(Tokens())
            else:
                tokens = self._reader.tokens(complete=complete)
                if tokens is not None:
                    self._grant.settle(tokens)
        except GrantClosedError:  # the manager was closed in the meantime
            pass
        finally:
            self._grant.release()
