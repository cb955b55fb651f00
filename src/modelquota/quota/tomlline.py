"""On which line of a TOML text a key stands, asked of the parser of the standard library, which keeps no lines."""

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


def find_line(text: str, keys: Sequence[str]) -> int | None:
    r"""Return the line, from 1, on which the value of a key path begins; None where it is not in the text.

    The parser is asked about beginnings of the text, so that there is no second opinion on what TOML is: a beginning
    that ends within a string or an array of several lines is no TOML, and the one before it is taken.

    Examples
    --------
    >>> find_line("[defaults]\n[models.a]\nmax_ram_mb = -1", ["models", "a", "max_ram_mb"])
    3
    """
    lines = text.split("\n")
    parsed: dict[int, Any] = {0: {}}

    def beginning(count: int) -> tuple[int, Any]:
        """The longest beginning of at most so many lines that is TOML, and what it says."""
        while count not in parsed or parsed[count] is None:
            if count not in parsed:
                try:
                    parsed[count] = tomllib.loads("\n".join(lines[:count]))
                except tomllib.TOMLDecodeError:
                    parsed[count] = None
            else:
                count -= 1
        return count, parsed[count]

    end = bisect_left(range(len(lines) + 1), True, key=lambda count: _has(beginning(count)[1], keys))
    return beginning(end - 1)[0] + 1 if 0 < end <= len(lines) else None


def _has(table: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(table, dict) or key not in table:
            return False
        table = table[key]
    return True
