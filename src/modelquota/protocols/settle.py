"""Settling a grant by kinds of tokens: the one place that knows what `Grant.settle` takes."""

from __future__ import annotations

from typing import Protocol

from modelquota.quota.tokens import Tokens


class SettlesTokens(Protocol):
    """What `settle` needs of a grant."""

    def settle(self, actual_tokens: int, /) -> None:
        """See `Grant.settle`."""


def settle(grant: SettlesTokens, tokens: Tokens) -> None:
    """Settle a grant by kinds of tokens."""
    grant.settle(tokens.total)  # becomes grant.settle(tokens) once the core takes kinds of tokens
