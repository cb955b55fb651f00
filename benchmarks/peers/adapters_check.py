"""Whether the adapters ask of each peer what they claim to: a peer that limits nothing would look fast."""

from collections.abc import Callable

from benchmarks.peers.protocol import DAY, HOUR, NS_PER_SECOND, SECOND, Peer, Rule, VirtualClock

PLENTY = (10**7, 10**9, 10**10)
# Powers of two per second, so that a limiter that keeps times as floats is not refused one admission by rounding.
FEW = (4, 5, 6)
TOKENS = 128


class AdapterError(AssertionError):
    """An adapter does not do the work it stands for; the message says which, and what came out."""


def check_adapter(peer: Peer) -> None:
    """Raise `AdapterError` unless every check of `peer` limits what it is to limit, no more and no less."""
    _check_one(peer)
    _check_six(peer)
    _check_each(peer)
    _check_large(peer)


def _check_one(peer: Peer) -> None:
    clock = VirtualClock()
    with peer.at(clock):
        check = peer.blocking(peer.one(Rule(128, 2)))
        _expect(peer, "one limit", _admitted(check), 128)
        clock.advance_ns(20 * NS_PER_SECOND)
        _expect(peer, "one limit, ten windows later", _admitted(check), 128)


def _check_six(peer: Peer) -> None:
    """Let the second, the hour and the day refuse in turn, of the requests first and of the tokens then."""
    few_tokens = tuple(TOKENS * amount for amount in FEW)
    for what, requests, tokens in (("requests", FEW, PLENTY), ("tokens", PLENTY, few_tokens)):
        periods = (SECOND, HOUR, DAY)
        rules = [Rule(amount, period) for amount, period in zip(requests, periods, strict=True)]
        rules += [Rule(amount, period, TOKENS) for amount, period in zip(tokens, periods, strict=True)]
        clock = VirtualClock()
        with peer.at(clock):
            check = peer.blocking(peer.six(rules))
            _expect(peer, f"{what} per second", _admitted(check), 4)
            clock.advance_ns(2 * NS_PER_SECOND)
            _expect(peer, f"{what} per hour", _admitted(check), 1)
            clock.advance_ns(2 * HOUR * NS_PER_SECOND)
            _expect(peer, f"{what} per day", _admitted(check), 1)


def _check_each(peer: Peer) -> None:
    with peer.at(VirtualClock()):
        check = peer.blocking(peer.each(Rule(2, HOUR), ["a", "b"]))
        _expect(peer, "the first key", _admitted(lambda: check(0)), 2)
        _expect(peer, "the second key", _admitted(lambda: check(1)), 2)


def _check_large(peer: Peer) -> None:
    with peer.at(VirtualClock()):
        check = peer.blocking(peer.one(Rule(250_000, HOUR, cost=100_000)))
        _expect(peer, "100,000 tokens of 250,000", _admitted(check), 2)


def _admitted(check: Callable[[], bool], attempts: int = 200) -> int:
    return sum(bool(check()) for _ in range(attempts))


def _expect(peer: Peer, what: str, admitted: int, expected: int) -> None:
    if admitted != expected:
        raise AdapterError(f"{peer.name}, {what}: {admitted} admitted where {expected} are right")
