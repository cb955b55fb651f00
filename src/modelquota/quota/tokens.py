"""`Tokens`: what a request consists of, by kind of token."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Final, SupportsIndex, TypeAlias

TokenCount: TypeAlias = "SupportsIndex | Tokens"
"""What is accepted as a count of tokens: an integer that counts as it is, or tokens by kind."""

_MOST: Final = 2**62
_MICRO: Final = 1_000_000  # weights have up to 6 decimals
_ACCEPTED: Final = "an integer from 0 to 2**62"
_set: Final = object.__setattr__


@dataclass(frozen=True, slots=True, init=False)
class Tokens:
    """The tokens of one request, or of its estimate: a frozen value, which compares, hashes and pickles by its fields.

    Parameters
    ----------
    input : int
        Tokens of the prompt that the model had to read.
    cached : int
        Tokens of the prompt that were served from a cache; not included in `input`.
    output : int
        Tokens that were generated.

    Raises
    ------
    TypeError
        A count is not an integer (a bool is none).
    ValueError
        A count, or the sum of all three, is not in 0 .. 2**62.

    Examples
    --------
    >>> tokens = Tokens(input=100, output=20)
    >>> tokens.total, tokens.replace(cached=50).total
    (120, 170)
    """

    input: int
    cached: int
    output: int

    def __init__(self, input: int = 0, cached: int = 0, output: int = 0) -> None:
        if not (
            type(input) is int and type(cached) is int and type(output) is int
            and input >= 0 and cached >= 0 and output >= 0 and input + cached + output <= _MOST
        ):  # fmt: skip
            input, cached, output = _counts(input=input, cached=cached, output=output)
        _set(self, "input", input)
        _set(self, "cached", cached)
        _set(self, "output", output)

    @property
    def total(self) -> int:
        """All tokens, each counted once."""
        return self.input + self.cached + self.output

    def replace(self, **changes: int) -> Tokens:
        """Return a copy with the named counts changed."""
        return dataclasses.replace(self, **changes)


def counted(tokens: TokenCount, weights: tuple[float, float, float]) -> int:
    """Return what tokens count at an id with these ``token_weights``: a decision's count, for texts about it.

    Examples
    --------
    >>> counted(Tokens(input=1_200, cached=800, output=256), (3, 0.3, 15)), counted(500, (3, 0.3, 15))
    (7680, 500)
    """
    if not isinstance(tokens, Tokens):
        return operator.index(tokens)
    amounts = (tokens.input, tokens.cached, tokens.output)
    total = sum(round(weight * _MICRO) * amount for weight, amount in zip(weights, amounts, strict=True))
    return min(-(-total // _MICRO), _MOST)


def _counts(**given: object) -> list[int]:
    """Return the counts as plain integers; raises for one that is not accepted."""
    found = []
    for name, value in given.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}={value!r} is not accepted; expected {_ACCEPTED}")
        count = operator.index(value)
        if not 0 <= count <= _MOST:
            raise ValueError(f"{name}={_shown(count)} is not accepted; expected {_ACCEPTED}")
        found.append(count)
    if sum(found) > _MOST:
        raise ValueError(f"input + cached + output = {sum(found)} is not accepted; expected {_ACCEPTED}")
    return found


def _shown(count: int) -> str:
    return str(count) if abs(count) < 10**80 else f"<an int of {count.bit_length()} bits>"
