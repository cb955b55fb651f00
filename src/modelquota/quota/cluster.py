"""What the table ``[cluster]`` of a quota file may say, and `RedisStore` be given: its fields, values and meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from modelquota.errors import QuotaConfigError
from modelquota.quota.fields import FileField, check_fields, choice, number, text

__all__ = ["CLUSTER_FIELDS", "HIDDEN", "LEASE_SEC", "RENEW_SEC", "check_cluster", "has_password", "shown"]

HIDDEN: Final = "a text that is not shown"
"""What errors have in place of a text that may have a password."""

LEASE_SEC: Final = 60.0
RENEW_SEC: Final = 1.0

_MAY_HAVE_PASSWORD: Final = re.compile(r"://[^/]*@|password=", re.IGNORECASE)

CLUSTER_FIELDS: Final[Mapping[str, FileField]] = {
    field.name: field
    for field in (
        text(
            "url",
            "Redis or Valkey. One with a password belongs in the variable MODELQUOTA_REDIS_URL, which goes before it.",
            'a URL without a user and a password, such as "rediss://host:6379/0"; one with a password is not for a '
            "file: set it as MODELQUOTA_REDIS_URL",
            r"^(rediss?|unix)://(?!.*[Pp][Aa][Ss][Ss][Ww][Oo][Rr][Dd]=)[^@\s]+$",
        ),
        text(
            "namespace",
            "Hosts with the same one share their limits.",
            "1 to 64 letters, digits, '.', '_' and '-'",
            r"^[A-Za-z0-9._-]{1,64}$",
        ),
        number("lease_sec", "How long a host goes on without the store; the same on all hosts.", 2, 3600, " s"),
        number("renew_sec", "How often a host exchanges its shares, at most half of lease_sec.", 0.1, 1800, " s"),
        choice("on_store_down", "What a host does without the store.", "lease_only", "deny", "share", "allow"),
        FileField(
            "wait_replicas",
            "How many replicas must have what was written.",
            "an integer from 0 to 16",
            lambda value: type(value) is int and 0 <= value <= 16,
            {"type": "integer", "minimum": 0, "maximum": 16},
        ),
    )
}
"""The fields of ``[cluster]``, by name; the schema of quota files follows them."""


def check_cluster(fields: Mapping[str, Any]) -> None:
    """Raise QuotaConfigError for the first field of ``[cluster]`` that is not one, or whose value is not accepted."""
    check_fields("cluster", CLUSTER_FIELDS, fields)
    lease_sec, renew_sec = fields.get("lease_sec", LEASE_SEC), fields.get("renew_sec", RENEW_SEC)
    if renew_sec > lease_sec / 2:
        raise QuotaConfigError("renew_sec", renew_sec, f"at most {lease_sec / 2:g} s, half of lease_sec")


def has_password(url: str | None) -> bool:
    """Whether a URL has a user or a password, as far as can be said; one that cannot be read may have."""
    if not url:
        return False
    try:
        return "@" in url or "password=" in urlsplit(url).query.lower()
    except ValueError:
        return True


def shown(value: Any) -> Any:
    """Return a value as an error may show it: without a text in it that looks like a URL with a password.

    Examples
    --------
    >>> shown("redis://:secret@host:6379"), shown(["a@b"])
    ('a text that is not shown', ['a@b'])
    """
    return HIDDEN if _MAY_HAVE_PASSWORD.search(repr(value)) else value
