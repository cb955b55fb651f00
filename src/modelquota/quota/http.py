"""What the tables ``[http]`` and ``[keys]`` of a quota file may say: the fields, their values and their meaning.

The HTTP layer reads these settings (`modelquota.asgi.Quota`, ``modelquota proxy``); nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from modelquota.errors import QuotaConfigError
from modelquota.quota.config import MAX_MODEL_ID_BYTES, MODEL_ID_ACCEPTED, plain_model_id
from modelquota.quota.fields import FileField, check_fields, choice, count, flag, number, text

__all__ = ["HTTP_FIELDS", "KEY_DIGITS", "check_http", "check_keys", "key_digits"]

KEY_DIGITS: Final = 32
"""Hexadecimal digits of the SHA-256 of an API key that identify it: 128 bits, which nobody can match on purpose."""

_FULL_DIGITS = 64
_HEX = re.compile(rf"[0-9a-fA-F]{{{KEY_DIGITS},{_FULL_DIGITS}}}")
_HEADER = r"^header:[A-Za-z0-9!#$%&'*+.^_`|~-]+$"


def _model(name: str, meaning: str) -> FileField:
    return FileField(
        name,
        meaning,
        MODEL_ID_ACCEPTED,
        _is_id,
        {"type": "string", "maxLength": MAX_MODEL_ID_BYTES, "pattern": "^[^\\u0000#]+(#[^\\u0000]+)?$"},
    )


def _is_id(value: Any) -> bool:
    try:
        plain_model_id("id", value)
    except QuotaConfigError:
        return False
    return True


def _choices(name: str, meaning: str, what: str, choices: tuple[str, ...]) -> FileField:
    def accepts(value: Any) -> bool:
        return value in choices if isinstance(value, str) else type(value) is list and all(v in choices for v in value)

    one = {"enum": list(choices)}
    return FileField(
        name,
        meaning,
        f"a list of {what}, or one of them: {', '.join(choices)}",
        lambda value: accepts(value) and value != [],
        {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]},
    )


ROUTE_TABLES: Final = ("openai", "anthropic", "azure", "gemini", "vllm", "sglang", "ollama")
"""The names of the tables of routes, as in `modelquota.protocols.tables`, which this room cannot import."""

_PATH = r"^/[!-~]*$"

ADMIN_PATH: Final = r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+/?"
"""The paths that the admin API may have, as a regular expression; no segment is ``..``."""

ADMIN_PATH_ACCEPTED: Final = 'a path of letters, digits and ._~-, such as "/quotas"'
"""The same for error messages."""

_LONGEST = 86_400

HTTP_FIELDS: Final[Mapping[str, FileField]] = {
    field.name: field
    for field in (
        text(
            "identity",
            "Who asks: decided together with the model. By default only the model is.",
            '"bearer", "openai-user" or "header:" and the name of a header',
            f"^(bearer|openai-user)$|{_HEADER}",
        ),
        text(
            "identity_namespace",
            "Put in front of every identity, so that no model can have its name.",
            "a str of 1 to 64 visible ASCII characters without *",
            r"^[!-)+-~]{1,64}$",
        ),
        choice("unknown_key", "What happens to a request whose API key is not in [keys].", "pass", "refuse"),
        _model("default_model", "The model of requests that name none."),
        _model("unknown_model", '"pass", "refuse", or the id that stands in for all models without a quota.'),
        _choices("routes", "Which protocols are counted. By default all are.", "tables of routes", ROUTE_TABLES),
        choice("unrouted", "What happens to a POST that nothing counts.", "pass", "refuse"),
        count("default_output_tokens", "Tokens of an output if the request sets no bound.", "tokens"),
        choice("at_limit", "What happens to a stream that runs past its limits.", "finish", "stop"),
        flag("cancel_on_disconnect", "Whether the handler of a client that disconnects is canceled."),
        count("max_body_bytes", "The largest body that is read.", "bytes", 1),
        count("max_inflight_bytes", "The most that all bodies in flight together may hold.", "bytes", 1),
        number("body_timeout", "How long a body may take to arrive.", 0.001, _LONGEST, " s"),
        choice("headers", "Which headers report what is left.", "all", "openai", "none"),
        number("retry_spread", "By which part Retry-After is spread upwards.", 0, 1, ""),
        count("busy_retry_seconds", "Retry-After if no time is known.", "s", 1),
        text("page", "The path of the live page. By default there is none.", 'a path that begins with "/"', _PATH),
        text(
            "admin",
            "The path of the admin API, which needs a token. By default there is none.",
            ADMIN_PATH_ACCEPTED,
            f"^{ADMIN_PATH}$",
        ),
        text(
            "admin_token_file",
            "The file with the token of the admin API, relative to the quota file's folder.",
            "a path",
            r"^[^\u0000]+$",
        ),
        text("metrics", "The path of the metrics for Prometheus.", 'a path that begins with "/"', _PATH),
        text(
            "ledger",
            "The file of a line for each request, relative to the quota file's folder. By default none.",
            "a path",
            r"^[^\u0000]+$",
        ),
        text("state", "The state file, relative to the quota file's folder.", "a path", r"^[^\u0000]+$"),
    )
}
"""The fields of ``[http]``, by name; the schema of quota files follows them."""


def check_http(fields: Mapping[str, Any]) -> None:
    """Raise QuotaConfigError for the first field of ``[http]`` that is not one, or whose value is not accepted."""
    check_fields("http", HTTP_FIELDS, fields)


def check_keys(names: Mapping[str, Any]) -> dict[str, str]:
    """Return the names in ``[keys]`` by the digits that identify each key; raises QuotaConfigError.

    Examples
    --------
    >>> check_keys({"2BB80D537B1DA3E38BD30361AA855686BDE0EACD7162FEF6A25FE97BF527A25B": "acme"})
    {'2bb80d537b1da3e38bd30361aa855686': 'acme'}
    """
    found: dict[str, str] = {}
    for digits, name in names.items():
        if _HEX.fullmatch(digits) is None:
            raise QuotaConfigError(
                digits,
                name,
                f"the SHA-256 of an API key as its name: {KEY_DIGITS} to {_FULL_DIGITS} hexadecimal digits",
            )
        if not _is_id(name):
            raise QuotaConfigError(digits, name, f"a name: {MODEL_ID_ACCEPTED}")
        found[digits[:KEY_DIGITS].lower()] = name
    return found


def key_digits(key: str | bytes) -> str:
    """Return the digits that identify an API key: the first 32 of its SHA-256.

    Examples
    --------
    >>> key_digits("secret")
    '2bb80d537b1da3e38bd30361aa855686'
    """
    import hashlib  # only where keys are used

    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()[:KEY_DIGITS]
