"""What the oracle counts of tokens by kind, and where a plain count is one of output tokens."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from modelquota import ResourceQuotaConfig, Tokens

Amount = int | Tokens
"""Tokens of a request, by kind or as one count."""

_MOST = 2**62


def counted(config: ResourceQuotaConfig, tokens: Amount) -> int:
    """What tokens count at a model: a plain count as it is, the others weighted and rounded up once."""
    if not isinstance(tokens, Tokens):
        return tokens
    weights = [Fraction(Decimal(repr(weight))) for weight in config.token_weights]
    amounts = (tokens.input, tokens.cached, tokens.output)
    return min(_MOST, math.ceil(sum(weight * amount for weight, amount in zip(weights, amounts, strict=True))))


def with_output(estimate: Amount, output: int) -> Tokens:
    """An estimate with so many output tokens instead of its own; of a plain estimate nothing else is known."""
    if isinstance(estimate, Tokens):
        return Tokens(estimate.input, estimate.cached, output)
    return Tokens(output=output)


def most_output(config: ResourceQuotaConfig, estimate: Amount, charged: int) -> int:
    """The most output tokens that are within what was charged, found by halving."""
    low, high = 0, _MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        if counted(config, _unchecked(estimate, middle)) <= charged:
            low = middle
        else:
            high = middle
    return low


def _unchecked(estimate: Amount, output: int) -> Tokens:
    """`with_output`, whose sum may be beyond what a request may have."""
    rest = with_output(estimate, 0)
    tokens = Tokens()
    for name, amount in (("input", rest.input), ("cached", rest.cached), ("output", output)):
        object.__setattr__(tokens, name, amount)
    return tokens
