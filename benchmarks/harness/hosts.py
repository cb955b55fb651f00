"""Hosts that share limits, in virtual time: managers, nodes and paces as shipped, over a function that runs the script.

A thousand hosts exchange and check in one process as they would on a thousand machines, only not as fast.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import count
from random import Random
from typing import Any

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota._core.table import shares
from modelquota.cluster.host import ManagerHost
from modelquota.cluster.node import Node
from modelquota.cluster.pace import Pace
from modelquota.cluster.store import parse_reply

NS = 10**9
TICKS = 40  # of asking, a second
BASE = "mq:{bench:0}:"


def script_in_virtual_time() -> str:
    """Return the shipped script, with the time of the host that calls it for that of the server."""
    script = files("modelquota.cluster").joinpath("exchange.lua").read_text(encoding="utf-8")
    was, now = "call('TIME')", "{tostring(floor(ARGV[8] / 1000)), tostring(ARGV[8] % 1000 * 1000)}"
    if script.count(was) != 1:
        raise ValueError(f"exchange.lua is expected to have {was} once")
    return script.replace(was, now)


class _Host(ManagerHost):
    def __init__(self, hosts: "Hosts", quotas: Mapping[str, Mapping[str, Any]]) -> None:
        self.hosts = hosts
        self.clock = ManualClock(hosts.now_ns)
        self.manager = ResourceQuotaManager(clock=self.clock, max_models=len(quotas))
        for model_id, limits in quotas.items():
            self.manager.set_quota(ResourceQuotaConfig.unlimited(model_id, on_violation="reject", **limits))
        shares.begin_sharing(self.manager)
        super().__init__(self.manager, "boot")

    def now_ns(self) -> int:
        self.clock.advance_ns(self.hosts.now_ns - self.clock.now_ns)
        return self.hosts.now_ns


class Hosts:
    """Hosts that ask for the models of `quotas`; `run` executes the script with keys and arguments.

    Attributes
    ----------
    demand : list of float
        Of each host, requests a second for each model, of `tokens` tokens each; 0 for one that is gone.
    asked, admitted, starved : int
        Requests of all hosts; `starved` were denied for lack of share.
    """

    def __init__(
        self,
        demand: Sequence[float],
        quotas: Mapping[str, Mapping[str, Any]],
        run: Callable[[list[str], list[str]], str],
        *,
        lease_sec: float,
        tokens: int = 100,
    ) -> None:
        self.demand = list(demand)
        self.models = list(quotas)
        self.tokens = tokens
        self.asked = self.admitted = self.starved = 0
        self.now_ns = 10**18
        self._run = run
        self._chance = Random(len(self.demand))
        self._events: list[tuple[int, int, Callable[[int], None], int]] = []
        self._order = count()
        self._hosts = [_Host(self, quotas) for _ in self.demand]
        self.nodes = [Node(host, int(lease_sec * NS)) for host in self._hosts]
        self._paces = [Pace(NS, self._chance) for _ in self.demand]
        self._owed = [0.0] * len(self.demand)
        for place in range(len(self.demand)):
            for action in (self._exchange, self._ask):
                self._at(self.now_ns + int(self._chance.random() * NS), action, place)

    def advance(self, seconds: float) -> None:
        """Let that much virtual time pass."""
        end_ns = self.now_ns + int(seconds * NS)
        while self._events[0][0] <= end_ns:
            self.now_ns, _, action, place = heapq.heappop(self._events)
            action(place)
        self.now_ns = end_ns

    def _at(self, time_ns: int, action: Callable[[int], None], place: int) -> None:
        heapq.heappush(self._events, (max(time_ns, self.now_ns), next(self._order), action, place))

    def _ask(self, place: int) -> None:
        host, pace = self._hosts[place], self._paces[place]
        host.now_ns()
        self._owed[place] += self.demand[place] / TICKS
        starved = 0
        while self._owed[place] >= 1:
            self._owed[place] -= 1
            for model_id in self.models:
                result = host.manager.check_quota(model_id, self.tokens)
                self.asked += 1
                self.admitted += result.allowed
                starved += result.starved
        if starved:
            self.starved += starved
            pace.urge()
            self._at(pace.due_ns(), self._exchange, place)
        self._at(self.now_ns + NS // TICKS, self._ask, place)

    def _exchange(self, place: int) -> None:
        pace, node = self._paces[place], self.nodes[place]
        if pace.due_ns() > self.now_ns or not self.demand[place]:
            return
        request = node.prepare()
        grew = node.adopt(request, parse_reply(self._run(request.keys(BASE), request.arguments())))
        pace.answered(self.now_ns, grew)
        self._at(pace.due_ns(), self._exchange, place)
