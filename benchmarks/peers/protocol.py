"""What every peer is asked to do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any, ClassVar, NamedTuple

Verdict = bool | Coroutine[Any, Any, bool]
Check = Callable[[], Verdict]
KeyedCheck = Callable[[int], Verdict]

SECOND, HOUR, DAY = 1, 3_600, 86_400
NS_PER_SECOND = 1_000_000_000


class Rule(NamedTuple):
    """At most `amount` in `seconds`; one check takes `cost` of it."""

    amount: int
    seconds: int
    cost: int = 1


TOKENS = 100
# High enough that nothing is refused while a peer is timed, and ordered as pyrate-limiter demands: of two rules for
# the same thing the longer allows more, but less per second.
ONE_RULE = Rule(10**9, HOUR)
SIX_RULES = (
    Rule(10**7, SECOND),
    Rule(10**9, HOUR),
    Rule(10**10, DAY),
    Rule(10**9, SECOND, TOKENS),
    Rule(10**11, HOUR, TOKENS),
    Rule(10**12, DAY, TOKENS),
)
LARGE_RULE = Rule(10**12, HOUR, cost=100_000)


class VirtualClock:
    """Time that stands still until it is moved, in place of a library's own clock.

    It begins at a multiple of a day, so that windows aligned to the clock begin with it, and late enough to pass for
    a wall clock.
    """

    def __init__(self) -> None:
        self.now_ns = 20_000 * DAY * NS_PER_SECOND

    def seconds(self) -> float:
        return self.now_ns / NS_PER_SECOND

    def nanoseconds(self) -> int:
        return self.now_ns

    def advance_ns(self, ns: int) -> None:
        self.now_ns += ns


class Peer(ABC):
    """A limiter to compare with. Each method that gives a check gives it on fresh state.

    A check admits and charges (True), or refuses (False); it never waits. The checks of an `asynchronous` peer are
    coroutine functions.
    """

    name: ClassVar[str]
    #: The distribution it comes from; None for what is defined here.
    distribution: ClassVar[str | None] = None
    asynchronous: ClassVar[bool] = False
    #: How many checks one timing round may charge to one state: few for those that slow down as they fill.
    most_checks: ClassVar[int] = 20_000
    most_large_checks: ClassVar[int] = 2_000

    @property
    def version(self) -> str:
        return metadata.version(self.distribution) if self.distribution else ""

    @abstractmethod
    def one(self, rule: Rule) -> Check:
        """Check one key against one rule."""

    @abstractmethod
    def six(self, rules: Sequence[Rule]) -> Check:
        """Check one key against six rules, given in the order of `SIX_RULES`."""

    @abstractmethod
    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        """Check the key of the given index against one rule."""

    @abstractmethod
    def at(self, clock: VirtualClock) -> AbstractContextManager:
        """Let the peer read `clock` instead of its own while the context lasts."""

    def one_limit(self) -> Check:
        return self.one(ONE_RULE)

    def six_limits(self) -> Check:
        return self.six(SIX_RULES)

    def keyed(self, n: int) -> KeyedCheck:
        return self.each(ONE_RULE, [f"model-{i}" for i in range(n)])

    def large(self) -> Check:
        """Check a request of 100,000 tokens, charged by one call."""
        return self.one(LARGE_RULE)

    def blocking(self, check: Callable[..., Verdict]) -> Callable[..., bool]:
        """Give the check as a plain function, for use inside `at`."""
        return check
