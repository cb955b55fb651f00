"""Finds the line of a key in a TOML text, using the standard library's parser, which does not report line numbers."""

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


def find_line(text: str, keys: Sequence[str]) -> int | None:
    r"""Return the line, from 1, on which the value of a key path begins; None if it is not in the text.

    The first lines of the text are parsed, more or fewer of them by bisection, so that only the standard parser defines
    what TOML is. A part that ends within a string or an array of several lines is not valid TOML; the part one line
    shorter is tried instead.

    Examples
    --------
    >>> find_line("[defaults]\n[models.a]\nmax_ram_mb = -1", ["models", "a", "max_ram_mb"])
    3
    """
    lines = text.split("\n")
    parsed: dict[int, Any] = {0: {}}

    def beginning(count: int) -> tuple[int, Any]:
        """The largest number of first lines, up to `count`, that is valid TOML, and the document in them."""
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
