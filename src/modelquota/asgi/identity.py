"""Who asks: the identities that a quota file can name, as callables for `QuotaMiddleware`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from modelquota.asgi.request import IncomingRequest
from modelquota.protocols.request import RequestRefusedError
from modelquota.quota.http import KEY_DIGITS, key_digits

Who: TypeAlias = Callable[[IncomingRequest], str | tuple[str, ...] | None]

_KEY_HEADERS: Final = (b"x-api-key", b"api-key", b"x-goog-api-key")
_USER_FIELDS: Final = ("user", "safety_identifier")
_LONGEST_NAME: Final = 128


def api_keys(request: IncomingRequest) -> list[bytes]:
    """Return the API keys of a request: bearer tokens, and the headers in which other protocols send one.

    All of them, each once: there is no telling which one the server behind checks, and a request that has a second key
    of its own making must not be counted for that one only.
    """
    found: dict[bytes, None] = {}
    for name, value in request.scope.get("headers", ()):
        name, key = name.lower(), bytes(value).strip()
        if name == b"authorization":
            scheme, _, token = key.partition(b" ")
            key = token.strip() if scheme.lower() == b"bearer" else b""
        elif name not in _KEY_HEADERS:
            continue
        if key:
            found[key] = None
    return list(found)


def identity_of(
    setting: str, key_names: Callable[[], Mapping[str, str]] = dict, *, refuse_unknown_keys: bool = False
) -> Who:
    """Return the callable for a setting of ``identity``.

    Parameters
    ----------
    setting : str
        ``"bearer"``: the name of the request's API key, or ``key:`` and the first digits of its SHA-256; of each key if
        there are several. A key itself is never kept, shown or logged. ``"header:x-tenant"``: the value of that header.
        ``"openai-user"``: the field ``user`` of the body, or else ``safety_identifier``.
    key_names : callable
        Returns the names of the keys that have one, as `Quotas.key_names`; called for each request.
    refuse_unknown_keys : bool
        Whether a request without a key that has a name is answered with 401.

    Examples
    --------
    >>> who = identity_of("bearer", lambda: {"2bb80d537b1da3e38bd30361aa855686": "acme"})
    >>> scope = {"headers": [(b"authorization", b"Bearer secret")]}
    >>> who(IncomingRequest(scope, b""))
    ('acme',)
    """
    if setting == "bearer":
        return _by_key(key_names, refuse_unknown_keys)
    if setting == "openai-user":
        return _by_user
    kind, _, name = setting.partition(":")
    if kind != "header" or not name:
        raise ValueError(f'identity={setting!r} is not accepted; expected "bearer", "openai-user" or "header:x-tenant"')
    return lambda request: request.header(name) or None


def _by_key(key_names: Callable[[], Mapping[str, str]], refuse_unknown_keys: bool) -> Who:
    def who(request: IncomingRequest) -> tuple[str, ...]:
        names = key_names()
        known, unknown = [], []
        for key in api_keys(request):
            digits = key_digits(key)
            if digits in names:
                known.append(names[digits])
            else:
                unknown.append(f"key:{digits}")
        if not refuse_unknown_keys:
            return (*known, *unknown)
        if not known:
            raise RequestRefusedError(401, "this API key is not known", code="invalid_api_key")
        return tuple(known)

    return who


def _by_user(request: IncomingRequest) -> str | None:
    body = request.json()
    for field in _USER_FIELDS:
        user = body.get(field)
        if isinstance(user, str) and user:
            if len(user) <= _LONGEST_NAME and user.isprintable():
                return user
            # As the names of keys: a client cannot choose a name that is too long to be an id.
            return f"user:{hashlib.sha256(user.encode('utf-8', 'surrogatepass')).hexdigest()[:KEY_DIGITS]}"
    return None
