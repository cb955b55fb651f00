"""`Tokens`: what a request consists of, by kind of token."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Final

_MOST: Final = 2**62
_ACCEPTED: Final = "an integer from 0 to 2**62"


@dataclass(frozen=True, slots=True)
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

    input: int = 0
    cached: int = 0
    output: int = 0

    def __post_init__(self) -> None:
        for name in ("input", "cached", "output"):
            given = getattr(self, name)
            if type(given) is not int:
                if isinstance(given, bool) or not hasattr(given, "__index__"):
                    raise TypeError(f"{name}={given!r} is not accepted; expected {_ACCEPTED}")
                object.__setattr__(self, name, given := operator.index(given))
            if not 0 <= given <= _MOST:
                raise ValueError(f"{name}={_shown(given)} is not accepted; expected {_ACCEPTED}")
        if self.total > _MOST:
            raise ValueError(f"input + cached + output = {self.total} is not accepted; expected {_ACCEPTED}")

    @property
    def total(self) -> int:
        """All tokens, each counted once."""
        return self.input + self.cached + self.output

    def replace(self, **changes: int) -> Tokens:
        """Return a copy with the named counts changed."""
        return dataclasses.replace(self, **changes)


def _shown(count: int) -> str:
    return str(count) if abs(count) < 10**80 else f"<an int of {count.bit_length()} bits>"
