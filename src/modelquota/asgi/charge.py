"""What a response costs, by its status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

Charge: TypeAlias = Literal["nothing", "request", "usage"]
"""Not even the request; the request, without tokens; or the request and the tokens that it used."""

_CHARGES: Final[tuple[Charge, ...]] = ("nothing", "request", "usage")
_NO_WORK: Final = (401, 403, 404, 405)  # statuses of requests that never reached a model
_CLASS: Final = re.compile(r"[1-5]xx")


class ChargeTable:
    """Finds what a status costs.

    Parameters
    ----------
    charge : mapping of int or str to str, optional
        By status, or by class of statuses such as ``"5xx"``: ``"nothing"``, ``"request"`` or ``"usage"``. A status that
        is not named costs ``"nothing"`` for 3xx, 401, 403, 404 and 405, ``"request"`` for other errors, and ``"usage"``
        otherwise.

    Raises
    ------
    ValueError
        A key is not a status or class, or a value is not one of the three.

    Examples
    --------
    >>> table = ChargeTable({429: "nothing", "5xx": "usage"})
    >>> table.of(200), table.of(404), table.of(429), table.of(500), table.of(422)
    ('usage', 'nothing', 'nothing', 'usage', 'request')
    """

    def __init__(self, charge: Mapping[int | str, Charge] | None = None) -> None:
        exact: dict[int, Charge] = {}
        classes: dict[int, Charge] = {}
        for status, cost in (charge or {}).items():
            if cost not in _CHARGES:
                raise ValueError(f"charge[{status!r}] is {cost!r}; accepted are {', '.join(map(repr, _CHARGES))}")
            if isinstance(status, str) and _CLASS.fullmatch(status):
                classes[int(status[0])] = cost
            elif isinstance(status, int) and not isinstance(status, bool) and 100 <= status <= 599:
                exact[status] = cost
            else:
                raise ValueError(f"charge has the key {status!r}; give a status from 100 to 599, or a class as '5xx'")
        self._costs = {
            status: exact.get(status) or classes.get(status // 100) or _by_default(status) for status in range(100, 600)
        }

    def of(self, status: int) -> Charge:
        """Return what a response with this status costs."""
        return self._costs.get(status, "request")


def _by_default(status: int) -> Charge:
    if status < 300:
        return "usage"
    return "nothing" if status < 400 or status in _NO_WORK else "request"
