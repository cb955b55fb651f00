"""One node: what it tells the store, and what a reply changes. It does no input or output, and has no thread.

The node is the state that a host's processes share, not a process: one of them at a time leads, and calls this.
"""

from __future__ import annotations

import secrets
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

from modelquota.cluster.book import MARGIN_NS, NOTHING, Book, Rows
from modelquota.cluster.quantities import (
    COMPONENTS,
    KEEP,
    LEVELS,
    NAMES,
    QUANTITIES,
    UNLIMITED,
    asked_row,
    component_of,
    in_units,
)
from modelquota.cluster.status import Share
from modelquota.cluster.store import ModelRequest, Reply, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_MODELS: Final = 256
"""The most models of one request."""

_FIRST: Final = 64  # of each request: those that have changed while a round goes on, the urgent ones first
_LEAST_ROOM: Final = 32
_LOOKED_AT: Final = 64  # models that are looked at in each round, without a sign that something has changed
_LOOKED_AT_MOST: Final = 1024  # for one request, which takes some 20 ms of a processor
_IDLE_TOLD_NS: Final = 5_000_000_000  # so soon a node hears that others need what it keeps for a first request, ...
_IDLE_MODEL_NS: Final = 1_000_000  # ... or later: all nodes together tell of 1,000 such models a second, one of 10
_IDLE_NODES: Final = 100
_SLOW_MS: Final = 400  # how long a request may be on its way without moving what the store takes for this clock
_AS_IT_IS: Final = (KEEP,) * COMPONENTS


class Host(Protocol):
    """The shared state of one host, as a node sees it. Times are of the state's clock, which goes on in suspend."""

    boot: str
    """Names the clock: another one after a restart of the machine."""

    def now_ns(self) -> int:
        """Return the time."""

    def codes(self, changed: bool) -> list[int]:
        """Return the codes of all models, or, urgent ones first, of those that changed since they were exchanged."""

    def names(self, codes: Sequence[int]) -> list[str | None]:
        """Return their ids; None for one that has been removed."""

    def exchange(self, codes: Sequence[int], asked: Sequence[Sequence[int]], below_used: bool = False) -> Rows:
        """Set shares, below what is used only if that is said, and read what there is."""

    def lease_end_ns(self) -> int:
        """Return the end of the lease; 0 if there is none."""

    def renew_lease(self, end_ns: int) -> None:
        """Set the end of the lease."""

    def load(self) -> bytes:
        """Return what was saved, also by a process before this one; empty at first."""

    def save(self, data: bytes) -> None:
        """Keep up to 240 bytes."""


class Node:
    """The numbering, the shares and the lease of one host.

    `prepare` returns the request to send, the same one until it is answered; `adopt` takes an answer. Between the two,
    only the answer to that very request is taken.

    Parameters
    ----------
    host : Host
        The state of the host.
    lease_ns : int
        How long a share is valid after the request that renewed it was sent. The same on all nodes.
    token : callable, optional
        Returns a random text of 32 hexadecimal digits.
    """

    def __init__(self, host: Host, lease_ns: int, *, token: Callable[[], str] = lambda: secrets.token_hex(16)) -> None:
        self.host = host
        self.lease_ns = lease_ns
        self.generation = 0
        self.nodes = 1
        self.quotas = 0  # version of the published quotas
        self.fenced = 0
        self._token = token
        self._books: dict[int, Book] = {}
        self._starved_gone = 0
        self._gone: list[Book] = []
        self._unconfirmed: dict[int, None] | None = None
        self._round: dict[int, None] = {}  # what is still to be looked at in this round
        self._since = 0  # all models are told from this request on, and then what the store knows of others ends
        self._untold: set[int] = set()  # those that have not been
        self._pending: Request | None = None
        self._told: list[int] = []
        self._renews = False
        self._first_sent_ns = 0
        self._late_ms = 0  # by how much the clock that the store is told is behind the host's
        self._next_look = 0
        self._leaving = False
        self._handing: list[Book] = []  # what the request that is under way hands over, when it leaves
        self._valid_until_ns = host.lease_end_ns()
        self._resume()

    # -- who it is

    def _resume(self) -> None:
        """Go on as the process before did: with its id and number, and the request that it had under way."""
        node_id, number, nonce, token, quotas, clock, late = self._fields_of(self.host.load())
        self.quotas = int(quotas or 0)
        self.node_id, self.number, self.nonce = node_id or self._token(), int(number or 0), nonce
        self._clock_number, self._late_ms = int(clock or 0), int(late or 0)
        if token:
            # When it was sent first is not known: the clock gets another name, by which the store has seen none of it.
            self._clock_number, self._first_sent_ns = self._clock_number + 1, self.host.now_ns()
            self._save(token)
            # Which models it was about is not known any more. Without them it is either executed now, or its reply
            # is repeated; of that only the nonce is taken.
            self._pending = self._request("exchange", token, ())

    @staticmethod
    def _fields_of(saved: bytes) -> list[str]:
        """What _save() has written: id, number, nonce, token, version of the quotas, number and lateness of the clock.

        What is not there is empty.
        """
        return (saved.decode("ascii") + "      ").split(" ")[:7]

    def _save(self, token: str = "") -> None:
        fields = (self.node_id, self.number, self.nonce, token, self.quotas, self._clock_number, self._late_ms)
        self.host.save(" ".join(map(str, fields)).encode("ascii"))

    def _join_again(self) -> None:
        """Become a new node, since another one uses this id: nothing is held but what was used."""
        self.host.renew_lease(0)
        self._pending, self._valid_until_ns = None, 0
        self.fenced += 1
        self.node_id, self.number, self.nonce = self._token(), 0, ""
        self._save()
        self._unconfirmed = None
        self._give_limits_again()
        if self._leaving:  # what was to be handed over still is
            self._books.update((book.code, book) for book in self._handing)
        else:
            self._give_up_all()

    def _give_limits_again(self) -> None:
        for book in self._books.values():
            book.given = book.telling = ()

    def _give_up_all(self) -> None:
        codes = self.host.codes(False)
        self._shrink(codes, [NOTHING] * len(codes), below_used=True)
        for book in self._books.values():
            book.claim = NOTHING

    # -- requests

    def prepare(self) -> Request:
        """Return the request to send now: the one that has not been answered, or a new one."""
        now_ns = self.host.now_ns()
        if self._pending is None:
            self._start(now_ns)
        assert self._pending is not None
        boot_ms = now_ns // 10**6 - self._late_ms
        return self._pending._replace(boot=f"{self.host.boot}.{self._clock_number}", boot_ms=boot_ms)

    def _request(self, verb: str, token: str, models: Sequence[ModelRequest]) -> Request:
        return Request(verb, self.node_id, self.number, token, self.nonce, "", 0, self.lease_ns // 10**6, models)

    def _start(self, now_ns: int) -> None:
        if self._valid_until_ns <= now_ns:
            # What it held may have been given to others by now, once it had aged out. What it has used is a fact.
            self._give_up_all()
            self._unconfirmed = None
        if self._unconfirmed is None:
            self._tell_all()
        codes, models = self._to_tell(now_ns)
        self._send("exchange", now_ns, codes, models)

    def _send(self, verb: str, now_ns: int, codes: list[int], models: Sequence[ModelRequest]) -> None:
        self.number += 1
        token = self._token()
        self._save(token)
        since = 0 if self._untold or self._leaving else self._since
        self._pending, self._told = self._request(verb, token, models)._replace(since=since), codes
        self._first_sent_ns, self._renews = now_ns, verb == "exchange"

    @property
    def waits(self) -> bool:
        """Whether models wait for the next request, since they did not fit into the last one."""
        return bool(self._round)

    def _tell_all(self) -> None:
        """Have the store told of all models, before the lease goes on."""
        self._unconfirmed = dict.fromkeys(self.host.codes(False))
        self._round = dict(self._unconfirmed)
        self._since, self._untold = self.number + 1, set(self._unconfirmed)

    def _to_tell(self, now_ns: int) -> tuple[list[int], list[ModelRequest]]:
        """Look at the models that may have something to tell, return what to give back, and what to send.

        They are looked at in rounds, of several requests if there are many. Each is told once in a round, even if it
        changes again before the round ends. The next round is due when the next renewal is, or an urgent one.
        """
        assert self._unconfirmed is not None
        first = [code for code, book in self._books.items() if book.target is not None]
        first += self.host.codes(True)
        if not self._round:
            self._round = dict.fromkeys((*first, *self._unconfirmed, *self._some()))
        queue = iter(dict.fromkeys((*first[:_FIRST], *self._round)))
        wants: dict[int, tuple[int, ...]] = {}
        codes: list[int] = []
        looked_at = 0
        # As many at a time as there is room for: of what was looked at, all that is news is told.
        while looked_at < _LOOKED_AT_MOST and len(codes) <= MAX_MODELS - _LEAST_ROOM:
            some = list(islice(queue, MAX_MODELS - len(codes)))
            if not some:
                break
            looked_at += len(some)
            codes += self._look(some, wants, now_ns)
        told, models = [], []
        gone, self._gone = self._gone, []
        for book in gone:
            # what was used since the last exchange is not known: all of it may have been
            models.append(book.give_up(tuple(map(max, book.held, book.used))))
            told.append(-1)
        names = {book.model_id for book in gone}
        for code in codes:
            book = self._books[code]
            if book.model_id in names:  # registered again since: in the next request
                self._round[code] = None
                continue
            models.append(book.tell(wants[code], now_ns))
            told.append(code)
        return told, models

    def _look(self, codes: list[int], wants: dict[int, tuple[int, ...]], now_ns: int) -> list[int]:
        """Read some models and what they want, give back what they do not need; returns those that have news."""
        for code in codes:
            self._round.pop(code, None)
        self._read(codes, None, now_ns)
        codes = [code for code in codes if code in self._books]
        shrinking = {}
        for code in codes:
            wants[code] = self._books[code].wants(self.lease_ns / 10**9, self.nodes, now_ns)
            returned = self._books[code].returned(wants[code], now_ns)
            if returned is not None:
                shrinking[code] = returned
        if shrinking:
            self._shrink(list(shrinking), list(shrinking.values()))
        idle_told_ns = max(_IDLE_TOLD_NS, len(self._books) * max(self.nodes, _IDLE_NODES) * _IDLE_MODEL_NS)
        return [
            code
            for code in codes
            if code in self._books
            and (
                code in (self._unconfirmed or ())
                or code in shrinking
                or self._books[code].has_news(wants[code], now_ns, idle_told_ns)
            )
        ]

    def _some(self) -> list[int]:
        """Return a few of all codes, others each time."""
        everything = list(self._books)
        start = self._next_look % max(1, len(everything))
        self._next_look = start + _LOOKED_AT
        return everything[start : start + _LOOKED_AT]

    # -- shares

    def _read(
        self, codes: Sequence[int], asked: Sequence[Sequence[int]] | None, now_ns: int, below_used: bool = False
    ) -> None:
        if not codes:
            return
        rows = self.host.exchange(codes, [_AS_IT_IS] * len(codes) if asked is None else asked, below_used)
        unknown = [code for code in codes if code not in self._books]
        for code, name in zip(unknown, self.host.names(unknown), strict=True):
            if name is not None:
                self._books[code] = Book(code, name)
        for at, code in enumerate(codes):
            book = self._books.get(code)
            if book is None or not rows.alive[at]:
                self._forget(code)
            else:
                book.read(rows, at, now_ns)

    def _forget(self, code: int) -> None:
        book = self._books.pop(code, None)
        if self._unconfirmed is not None:
            self._unconfirmed.pop(code, None)
        self._untold.discard(code)
        if book is not None:
            self._starved_gone += book.starved
        if book is not None and (any(book.held) or any(book.used)):
            self._gone.append(book)

    def _shrink(self, codes: Sequence[int], shares: Sequence[tuple[int, ...]], below_used: bool = False) -> None:
        """Lower shares, and then the drains in proportion to the caps that are left, or to the levels above them."""
        now_ns = self.host.now_ns()
        self._read([code for code in codes if code not in self._books], None, now_ns)
        lower = {code: row for code, row in zip(codes, shares, strict=True) if code in self._books}
        rows = []
        for code, row in lower.items():
            asked = asked_row(self._books[code].limits, row, NOTHING)
            for drain, _ in LEVELS.values():
                asked[drain] = KEEP
            rows.append(asked)
        self._read(list(lower), rows, now_ns, below_used)
        drains = {}
        for code in lower:
            book = self._books.get(code)
            if book is not None:
                drains[code] = [KEEP] * COMPONENTS
                for quantity, (drain, _) in LEVELS.items():
                    drains[code][drain] = book.drain(quantity)
        levels = {code: self._books[code].used for code in drains}
        self._read(list(drains), list(drains.values()), now_ns)
        for code, used in levels.items():  # the store is told the levels that go with the drains
            book = self._books.get(code)
            if book is not None:
                book.used = tuple(map(max, used, book.used))

    # -- replies

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._pending is not None

    def awaits(self, request: Request) -> bool:
        """Whether this is the request that is under way."""
        pending = self._pending
        return pending is not None and request[1:4] == pending[1:4]  # id, number and token

    def adopt(self, request: Request, reply: Reply) -> bool:
        """Take the reply to a request; True if it brought more of something that was nearly used.

        A reply to anything but the request that is under way changes nothing.
        """
        if not self.awaits(request):
            return False
        now_ns = self.host.now_ns()
        if reply.status in ("fenced", "stale"):
            self._join_again()
            return False
        # The store may have taken the time at which this was sent for that at which it came. If that is far too late,
        # the clock that it is told goes back: then the store's own, which follows it, is never ahead.
        took_ms = now_ns // 10**6 - self._late_ms - reply.boot_ms
        self._late_ms = max(self._late_ms, took_ms - _SLOW_MS)
        told, self._told = self._told, []
        self._pending, self.nonce, self.nodes = None, reply.nonce, max(1, reply.nodes)
        self.quotas = reply.quotas or self.quotas  # a store that has lost them takes nothing back
        if reply.generation != self.generation:
            # A store that may have forgotten them is told of all models, before the lease goes on.
            self.generation = reply.generation
            self._give_limits_again()
            self._tell_all()
        # After a change of leader the request may have been executed as the process before had made it, with models
        # that are not known here: then no share is taken, and the next request tells the store what is held.
        grew = len(told) == len(reply.models) and self._adopt_shares(told, reply)
        if request.number >= self._since:
            self._untold.difference_update(told)
        if request.since == self._since and not reply.unended:
            self._since = 0
        self._save()
        if self._renews:
            end_ns = self._first_sent_ns + self.lease_ns - MARGIN_NS
            self._valid_until_ns = max(self._valid_until_ns, end_ns)
            if not self._unconfirmed and end_ns > self.host.lease_end_ns():
                self.host.renew_lease(end_ns)
        return grew

    def _adopt_shares(self, told: Sequence[int], reply: Reply) -> bool:
        now_ns = self.host.now_ns()
        growing, grown, shrinking, shrunk = [], [], [], []
        helped = False
        for code, answer in zip(told, reply.models, strict=True):
            book = self._books.get(code)
            if book is None:
                continue
            book.take(answer, now_ns, reply.learning_ms)
            up, down = [KEEP] * QUANTITIES, [KEEP] * QUANTITIES
            for quantity, share in enumerate(answer.share):
                if not book.is_limited(quantity):
                    continue
                if share is None:
                    up[quantity] = UNLIMITED
                elif share > book.held[quantity]:
                    up[quantity] = share
                    left, more = book.held[quantity] - book.used[quantity], share - book.held[quantity]
                    helped = helped or 2 * left <= more
                elif share < book.held[quantity] or book.is_whole[quantity]:
                    down[quantity] = share
                target = answer.target[quantity]
                if target is not None and target < min(book.used[quantity], book.held[quantity]):
                    down[quantity] = target  # more is used than there is: what ages out here is not used again
            if any(target is not None and target < held for target, held in zip(answer.target, book.held, strict=True)):
                book.target = answer.target
            if any(share != KEEP for share in down):
                shrinking.append(code)
                shrunk.append(tuple(down))
            if any(share != KEEP for share in up):
                growing.append(code)
                grown.append(asked_row(book.limits, up, book.used))
        if shrinking:
            self._shrink(shrinking, shrunk, below_used=True)
        if growing:
            self._read(growing, grown, now_ns)
        if self._unconfirmed is not None:
            # What one has used beyond what it was given is not its share: it admits nothing until that has aged out.
            for book in map(self._books.get, told):
                if book is not None and book.is_covered:
                    self._unconfirmed.pop(book.code, None)
        return helped

    @staticmethod
    def quotas_in(saved: bytes) -> int:
        """Return the version of the published quotas that a node has saved, for the other processes of its host."""
        return int(Node._fields_of(saved)[4] or 0)

    # -- for those who watch: another thread may ask, and sees what was last known

    @property
    def starved(self) -> int:
        """How many requests were denied for lack of share, though the limit of all hosts was not reached here."""
        return self._starved_gone + sum(book.starved for book in list(self._books.values()))

    def shares(self) -> Iterator[Share]:
        """Yield what this host holds, of each model that the store has answered about, each shared limit."""
        for book in list(self._books.values()):
            answer, held, used, limits = book.answer, book.held, book.used, book.limits
            if answer is None or not any(held):
                continue
            for quantity, (free, idle) in enumerate(zip(answer.free, answer.idle, strict=True)):
                whole = limits[component_of(quantity)]
                if free is not None and idle is not None and whole != UNLIMITED:
                    amounts = (whole, held[quantity], used[quantity], free, idle)
                    yield Share(book.model_id, NAMES[quantity], *(in_units(quantity, amount) for amount in amounts))

    # -- leaving

    @property
    def left(self) -> bool:
        """Whether the store has everything that `leave` hands over."""
        return self._leaving and self._pending is None and not self._books

    def leave(self) -> Request:
        """Give everything up: return a request that hands over what was used, or the one that is under way.

        Nothing is admitted any more. To be called, and its reply adopted, until `left`.
        """
        self.host.renew_lease(0)
        if self._pending is not None:
            return self.prepare()
        if not self._leaving:
            self._leaving = True
            self._give_up_all()
        models, told = [], []
        self._handing = [self._books.pop(code) for code in list(self._books)[:MAX_MODELS]]
        for book in self._handing:
            models.append(book.give_up(book.used))
            told.append(-1)
        self._send("exchange" if self._books else "leave", self.host.now_ns(), told, models)
        self._renews = False
        return self.prepare()
