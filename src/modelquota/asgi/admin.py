"""`QuotaAdmin`: quotas are listed, read, set and removed over HTTP, by requests with a token of their own."""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import hmac
import json
import posixpath
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import parse_qsl, unquote_to_bytes

from modelquota._log import log
from modelquota.asgi.body import BodyReader, BodyRefusedError
from modelquota.asgi.exchange import close_unanswered
from modelquota.asgi.refusal import send_answer
from modelquota.asgi.types import Header, Receive, Scope, Send
from modelquota.errors import CapacityError, ManagerClosedError, QuotaConfigError
from modelquota.protocols.paths import below_root
from modelquota.protocols.refusal import Answer, json_answer
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.http import ADMIN_PATH, ADMIN_PATH_ACCEPTED
from modelquota.quota.limits import Limit

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager
    from modelquota.quota.patterns import DefaultQuota

__all__ = ["QuotaAdmin", "etag_of"]

TOKEN_ACCEPTED: Final = "the token of the admin API, 16 to 512 visible ASCII characters"
"""What a token may be, for error messages, which never show one."""

MOST_LISTED: Final = 1000
"""Most quotas in one answer."""

MAX_BODY_BYTES: Final = 64 << 10
"""The largest body that is read: all fields of a quota take less than a tenth of it."""

BODY_SECONDS: Final = 10.0
"""How long a body may take to arrive."""

_TOKEN: Final = re.compile(r"[!-~]{16,512}")
_PATH: Final = re.compile(ADMIN_PATH)
_LIST_METHODS: Final = ("GET", "HEAD", "OPTIONS")
_ONE_METHODS: Final = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS")
_INFO: Final = 20
_COMMON: Final[list[Header]] = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
_CHALLENGE: Final = b'Bearer realm="modelquota"'


class QuotaAdmin:
    """ASGI application: reads and changes the quotas of a manager. Every request has to carry the token.

    ``GET`` of its path lists the quotas; ``GET``, ``PUT``, ``PATCH`` and ``DELETE`` of an id below it read, set, change
    and remove one. ``If-Match`` with the ``ETag`` of a quota makes sure that no one else has changed it.
    ``modelquota docs http`` has all of it.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager whose quotas to read and change.
    token : str
        What requests have to send as ``Authorization: Bearer TOKEN``: 16 to 512 visible ASCII characters.

    Raises
    ------
    QuotaConfigError
        The token is not accepted. The message does not show it.

    Examples
    --------
    With Starlette or FastAPI: ``app.mount("/quotas", QuotaAdmin(manager, token=os.environ["ADMIN_TOKEN"]))``.
    """

    def __init__(self, manager: ResourceQuotaManager, *, token: str) -> None:
        require_token("token", token)
        self.manager = manager
        self._digest = _digest(token.encode())
        self._bodies = BodyReader(MAX_BODY_BYTES, 16 * MAX_BODY_BYTES, BODY_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "http":
            await self.serve(below_root(scope["path"], scope.get("root_path", "")), scope, receive, send)

    async def serve(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; `path` is what follows the path of this application."""
        unread = True
        try:
            # Nothing that a request says is looked at before its token is.
            self._require_token(scope)
            request = _Request(path, scope)
            if request.method in ("PUT", "PATCH"):
                request.require_json()
                body = await self._bodies.read(request.length, receive)
                if body is None:
                    await close_unanswered(send)
                    return
                self._bodies.release(body)
                unread = False
                request.body = body
            answer = await asyncio.to_thread(self._act, request)  # a row may be locked by a process that is stopped
        except BodyRefusedError as error:
            unread = error.more
            answer = _refusal(error.status, error.code or "invalid_body", error.message)
        except _RefusedError as error:
            answer = error.answer
        headers = [*answer.headers, *_COMMON]
        # The unread rest of a body must not be parsed as the next request; HTTP/2 has no such header.
        if unread and not await self._bodies.drain(scope, receive) and scope.get("http_version", "1").startswith("1"):
            headers.append((b"connection", b"close"))
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send_answer(Answer(answer.status, headers, body), send)

    def _require_token(self, scope: Scope) -> None:
        given = [bytes(value) for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        challenge = _CHALLENGE
        if given:
            challenge += b', error="invalid_token"'
            scheme, _, token = given[0].strip().partition(b" ")
            # Digests are of equal length: neither the time nor the length of a comparison says how the token begins.
            right = hmac.compare_digest(_digest(token.strip()), self._digest)
            if right and len(given) == 1 and scheme.lower() == b"bearer":
                return
        message = "send the token of the admin API as Authorization: Bearer TOKEN"
        raise _RefusedError(401, "unauthorized", message, [(b"www-authenticate", challenge)])

    def _act(self, request: _Request) -> Answer:
        """Do what is asked. Takes locks, and is repeated if someone else changes the quota at the same moment."""
        try:
            return self._done(request)
        except RecursionError:  # also from an error that shows the value
            raise _RefusedError(400, "invalid_json", "the body has too many brackets") from None

    def _done(self, request: _Request) -> Answer:
        try:
            if request.method == "OPTIONS":
                return Answer(204, [(b"allow", request.allow)], b"")
            if request.model_id is None:
                return json_answer(200, self._listed(*request.selection()), [])
            if request.method in ("GET", "HEAD"):
                return self._read(request)
            if request.method == "DELETE":
                return self._remove(request)
            return self._set(request, request.fields())
        except QuotaConfigError as error:
            shown = QuotaConfigError(error.field, error.value, _in_json(error.accepted))
            # Lists and objects only as the message shows them: they may have more brackets than the client can parse.
            value = None if isinstance(shown.value, list | dict) else shown.value
            raise _RefusedError(
                400, "invalid_value", f"{shown}", field=shown.field, value=value, accepted=shown.accepted
            ) from None
        except CapacityError as error:
            raise _RefusedError(503, "too_many_models", f"{error}") from None
        except ManagerClosedError as error:
            raise _RefusedError(503, "overloaded", f"{error}") from None

    def _listed(self, prefix: str, after: str, most: int) -> dict[str, Any]:
        ids = sorted(model_id for model_id in self.manager.list_models() if model_id.startswith(prefix))
        begin = bisect.bisect_right(ids, after) if after else 0
        chosen = ids[begin : begin + most]
        quotas = [quota for model_id in chosen if (quota := self.manager.get_quota(model_id)) is not None]
        return {
            "quotas": [_shown(quota) for quota in quotas],
            "next": chosen[-1] if begin + most < len(ids) else None,
            "total": len(ids),
            "default_quota": _patterns(self.manager.default_quota),
        }

    def _read(self, request: _Request) -> Answer:
        report = self.manager.get_model_report(request.id)
        if report is None:
            raise request.not_found()
        usage = {name: getattr(report.usage, name) for name in report.usage.__dataclass_fields__}
        for name in ("left", "percent"):
            usage[name] = {limit.name.lower(): usage[name][limit] for limit in Limit}
        for name in ("allowed_requests", "denied_requests", "waited_requests", "warned_requests"):
            usage[name] = getattr(report, name)
        meters = [meter.model_id for meter in report.meters]
        return _quota_answer(200, report.quota, usage=usage, meters=meters)

    def _set(self, request: _Request, fields: dict[str, Any]) -> Answer:
        while True:
            old = self.manager.get_quota(request.id)
            if request.method == "PUT":
                new = ResourceQuotaConfig.from_dict({"model_id": request.id, **fields})
            elif old is not None:
                new = ResourceQuotaConfig.from_dict({**old.to_dict(), **fields})
            else:
                raise request.not_found()
            request.require_match(old)
            if self.manager.replace_quota(old, new, named=True):
                break
        before = {} if old is None else old.to_dict()
        changes = {name: value for name, value in new.to_dict().items() if before.get(name, ...) != value}
        log(_INFO, "the admin API has set the quota of %r for %s: %r", request.id, request.client, changes)
        return _quota_answer(201 if old is None else 200, new)

    def _remove(self, request: _Request) -> Answer:
        while True:
            old = self.manager.get_quota(request.id)
            if old is None:
                raise request.not_found()
            request.require_match(old)
            if self.manager.replace_quota(old, None):
                log(_INFO, "the admin API has removed the quota of %r for %s", request.id, request.client)
                return Answer(204, [], b"")


class _Request:
    """What a request with the right token asks for; raises _RefusedError if it asks for something else."""

    def __init__(self, path: str, scope: Scope) -> None:
        self.method: str = scope["method"]
        self.body = b""
        self._scope = scope
        self.model_id = path[1:] or None
        methods = _LIST_METHODS if self.model_id is None else _ONE_METHODS
        self.allow = ", ".join(methods).encode()
        if self.method not in methods:
            message = f"this path has the methods {', '.join(methods)}"
            raise _RefusedError(405, "method_not_allowed", message, [(b"allow", self.allow)])
        try:
            # Servers replace what is not UTF-8, and another quota would be meant.
            unquote_to_bytes(scope.get("raw_path") or b"").decode()
        except UnicodeDecodeError:
            raise _RefusedError(400, "invalid_id", "the path is not UTF-8") from None

    @property
    def id(self) -> str:
        """The id that the path names."""
        assert self.model_id is not None
        return self.model_id

    @property
    def length(self) -> bytes | None:
        """The header ``content-length``."""
        return next(iter(self._header(b"content-length")), None)

    @property
    def client(self) -> str:
        """The address of the client, for the log."""
        client = self._scope.get("client")
        return str(client[0]) if client else "a client without an address"

    def require_json(self) -> None:
        """Require that the body is plain JSON, which a form of another site cannot be."""
        kinds = [value.partition(b";")[0].strip().lower() for value in self._header(b"content-type")]
        if kinds != [b"application/json"]:
            message = "send the fields of a quota as JSON, with Content-Type: application/json"
            raise _RefusedError(415, "unsupported_media_type", message, [(b"accept", b"application/json")])
        if any(value.strip().lower() not in (b"", b"identity") for value in self._header(b"content-encoding")):
            message = "send the body uncompressed"
            raise _RefusedError(415, "unsupported_media_type", message, [(b"accept-encoding", b"identity")])

    def fields(self) -> dict[str, Any]:
        """Return the fields in the body."""
        try:
            found = json.loads(
                self.body.decode("utf-8-sig"),
                object_pairs_hook=_object,
                parse_constant=_no_constant,
                parse_float=_finite,
            )
        except ValueError as error:  # also from UTF-8, and from an integer with too many digits
            reason = str(error).partition("\n")[0][:200]
            raise _RefusedError(400, "invalid_json", f"the body is not valid JSON: {reason}") from None
        if not isinstance(found, dict):
            raise _RefusedError(400, "invalid_json", "the body is not a JSON object with the fields of a quota")
        if "model_id" in found:
            raise QuotaConfigError("model_id", found["model_id"], "no model_id: the path names the id")
        return found

    def selection(self) -> tuple[str, str, int]:
        """Return what the query selects of a list: prefix, after, limit."""
        chosen = {"prefix": "", "after": "", "limit": str(MOST_LISTED)}
        try:
            query = parse_qsl(
                self._scope.get("query_string", b"").decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=len(chosen),
            )
        except ValueError:
            raise _RefusedError(400, "invalid_value", f"the query is not {', '.join(chosen)}, each once") from None
        for name, value in query:
            if name not in chosen:
                raise QuotaConfigError(name, value, f"one of the parameters {', '.join(chosen)}")
            chosen[name] = value
        limit = chosen["limit"]
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= MOST_LISTED):
            raise QuotaConfigError("limit", limit, f"an integer from 1 to {MOST_LISTED}")
        return chosen["prefix"], chosen["after"], int(limit)

    def require_match(self, quota: ResourceQuotaConfig | None) -> None:
        """Require that the quota is one that the headers ``if-match`` and ``if-none-match`` ask for."""
        for name, wanted in ((b"if-match", True), (b"if-none-match", False)):
            given = b",".join(self._header(name)).decode("latin-1")
            if not self._header(name):
                continue
            # Proxies that compress answers make an ETag weak; it is still that of the whole quota.
            tags = {tag.strip().removeprefix("W/") for tag in given.split(",")}
            if (quota is not None and bool(tags & {"*", etag_of(quota)})) is not wanted:
                now = "there is none" if quota is None else f"its ETag is {etag_of(quota)}"
                headers = [] if quota is None else [(b"etag", etag_of(quota).encode())]
                message = f"the quota is not as {name.decode()} requires: {now}"
                raise _RefusedError(412, "precondition_failed", message, headers)

    def not_found(self) -> _RefusedError:
        """Return the error for an id without a quota."""
        return _RefusedError(404, "not_found", f"there is no quota for {self.id!a}")

    def _header(self, wanted: bytes) -> list[bytes]:
        return [bytes(value) for name, value in self._scope.get("headers", ()) if name.lower() == wanted]


class _RefusedError(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, code: str, message: str, headers: list[Header] | None = None, **more: Any) -> None:
        super().__init__(status, code)
        self.answer = _refusal(status, code, message, headers, **more)


def _refusal(status: int, code: str, message: str, headers: list[Header] | None = None, **more: Any) -> Answer:
    return json_answer(status, {"error": {"code": code, "message": message, **more}}, headers or [])


def etag_of(quota: ResourceQuotaConfig) -> str:
    """Return the ETag of a quota: a digest of its id and limits, whatever it has used.

    Examples
    --------
    >>> one, other = ResourceQuotaConfig("llama"), ResourceQuotaConfig("llama", max_ram_mb=5)
    >>> etag_of(one) == etag_of(other.replace(max_ram_mb=2048)), etag_of(one) == etag_of(other), len(etag_of(one))
    (True, False, 34)
    """
    text = json.dumps(quota.to_dict(), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def require_token(name: str, token: object) -> str:
    """Return a token; raise QuotaConfigError, which does not show it, if it is not accepted: it may keep nobody out."""
    if isinstance(token, str) and _TOKEN.fullmatch(token):
        return token
    raise QuotaConfigError(name, None if token is None else "...", TOKEN_ACCEPTED)


def admin_path(admin: str | None, page: str | None) -> tuple[str, str | None]:
    """Return the path of the admin API without a slash at its end, and the same path relative to that of the page.

    Raises QuotaConfigError if it is not a path, or one with the page in it.
    """
    path = admin.rstrip("/") if isinstance(admin, str) else ""
    if not _PATH.fullmatch(path):
        raise QuotaConfigError("admin", admin, ADMIN_PATH_ACCEPTED)
    if page is None:
        return path, None
    if f"{page}/".startswith(f"{path}/"):
        raise QuotaConfigError("page", page, f"a path that is not in that of the admin API, {path}")
    return path, posixpath.relpath(path, posixpath.dirname(page))


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _quota_answer(status: int, quota: ResourceQuotaConfig, **more: Any) -> Answer:
    return json_answer(status, {**_shown(quota), **more}, [(b"etag", etag_of(quota).encode())])


def _shown(quota: ResourceQuotaConfig) -> dict[str, Any]:
    return {"id": quota.model_id, "etag": etag_of(quota), "quota": _fields(quota)}


def _fields(quota: ResourceQuotaConfig) -> dict[str, Any]:
    fields = quota.to_dict()
    del fields["model_id"]
    return fields


def _patterns(default: DefaultQuota | None) -> dict[str, Any] | None:
    """Return the quotas for ids that have none, by pattern; None if a function decides on them."""
    if default is None:
        return {}
    if isinstance(default, ResourceQuotaConfig):
        return {"*": _fields(default)}
    if isinstance(default, Mapping):
        return {pattern: _fields(quota) for pattern, quota in default.items()}
    return None


def _in_json(accepted: str) -> str:
    """What is accepted, in the words of JSON: without those for Python and for quota files."""
    return re.sub(r"\((None)( or inf)?; [^)]*\)", "(null)", accepted)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    """Parse a number; one that is too large would read as infinite, which is no limit."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large")
    return number
