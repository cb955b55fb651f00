"""Conditions for a continuous integration: ``denied > 1%`` ends a command with an exit code."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from modelquota.tuning.tuned import Scenario

__all__ = ["Condition", "parse_condition"]

_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([0-9.]+)\s*(%|ms|s|min)?\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_MS = {"ms": 1.0, "s": 1_000.0, "min": 60_000.0}
_VALUES: dict[str, tuple[str, Callable[[Scenario], float]]] = {
    "denied": ("%", lambda found: found.denied_share),
    "waited": ("%", lambda found: found.replay.waited / max(found.replay.requests, 1)),
    "timed_out": ("%", lambda found: found.replay.timed_out / max(found.replay.requests, 1)),
    "median_wait": ("ms", lambda found: found.replay.median_wait_ms or 0.0),
    "p99_wait": ("ms", lambda found: found.replay.p99_wait_ms or 0.0),
    "longest_wait": ("ms", lambda found: found.replay.longest_wait_ms or 0.0),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition, as text and as numbers: a share, or milliseconds."""

    text: str
    name: str
    sign: str
    value: float

    def holds(self, scenario: Scenario) -> bool:
        """Whether it holds of what quotas did with a trace."""
        return _COMPARE[self.sign](_VALUES[self.name][1](scenario), self.value)

    def found(self, scenario: Scenario) -> str:
        """Return the value that it is about, for a message."""
        unit, value = _VALUES[self.name]
        return f"{value(scenario):.3%}" if unit == "%" else f"{value(scenario):,.0f} ms"


def parse_condition(text: str) -> Condition:
    """Return the condition that a text says; raises ValueError, which lists what can be said."""
    match = _FORM.fullmatch(text)
    name = match[1] if match else ""
    try:
        if match is None or name not in _VALUES:
            raise ValueError(text)
        number, unit = float(match[3]), match[4]
        wants_share = _VALUES[name][0] == "%"
        if wants_share != (unit in (None, "%")):
            raise ValueError(text)
    except ValueError:
        raise ValueError(
            f"the condition is {text!r}; expected {', '.join(_VALUES)}, then > >= < or <=, then a share such as 1% or "
            "a time such as 500ms"
        ) from None
    return Condition(text.strip(), name, match[2], number / 100 if unit == "%" else number * _MS.get(unit or "", 1.0))
