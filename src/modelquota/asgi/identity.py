"""Who asks: the identities that a quota file can name, as callables for `QuotaMiddleware`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from modelquota.asgi.request import IncomingRequest
from modelquota.protocols.request import RequestRefusedError
from modelquota.quota.http import KEY_DIGITS, key_digits

Who: TypeAlias = Callable[[IncomingRequest], str | None]

# In this order, since a server that checks keys checks the first of those that its protocol knows.
_KEY_HEADERS: Final = ("x-api-key", "api-key", "x-goog-api-key")
_USER_FIELDS: Final = ("user", "safety_identifier")
_LONGEST_NAME: Final = 128


def api_key(request: IncomingRequest) -> str | None:
    """Return the API key of a request: its bearer token, or one of the headers in which other protocols send it."""
    scheme, _, token = (request.header("authorization") or "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    for name in _KEY_HEADERS:
        key = (request.header(name) or "").strip()
        if key:
            return key
    return None


def identity_of(
    setting: str, key_names: Callable[[], Mapping[str, str]] = dict, *, refuse_unknown_keys: bool = False
) -> Who:
    """Return the callable for a setting of ``identity``.

    Parameters
    ----------
    setting : str
        ``"bearer"``: the name of the request's API key, or ``key:`` and the first digits of its SHA-256. The key itself
        is never kept, shown or logged. ``"header:x-tenant"``: the value of that header. ``"openai-user"``: the field
        ``user`` of the body, or else ``safety_identifier``.
    key_names : callable
        Returns the names of the keys that have one, as `Quotas.key_names`; called for each request.
    refuse_unknown_keys : bool
        Whether a request without a key, or with one that has no name, is answered with 401.

    Examples
    --------
    >>> who = identity_of("bearer", lambda: {"2bb80d537b1da3e38bd30361aa855686": "acme"})
    >>> scope = {"headers": [(b"authorization", b"Bearer secret")]}
    >>> who(IncomingRequest(scope, b""))
    'acme'
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
    def who(request: IncomingRequest) -> str | None:
        key = api_key(request)
        if key is not None:
            digits = key_digits(key.encode("utf-8", "surrogateescape"))
            name = key_names().get(digits)
            if name is not None:
                return name
            if not refuse_unknown_keys:
                return f"key:{digits}"
        if refuse_unknown_keys:
            raise RequestRefusedError(401, "this API key is not known", code="invalid_api_key")
        return None

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
