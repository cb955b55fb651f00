"""What does a limit that many hosts share cost: a check on a host, and the store?"""

from heapq import heapify, heapreplace
from random import Random
from time import monotonic, sleep

import numpy as np
import pytest
from patience import until

from benchmarks.harness.loops import Loop
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.results import FLOOR, Row, ratio_at_most
from modelquota import ResourceQuotaManager
from modelquota._core.table import shares

QUESTION = "cluster"
ROUNDS = 200
NS = 10**9
MODELS, REQUESTS = 20, 5
LEASE_SEC = 2
SECONDS = 6.0


def test_a_check_within_a_share(bench, manager, floor):
    """The same check in the same run, of a manager with shares and a lease, of one without, and of the floor."""
    sharing = ResourceQuotaManager()
    sharing.set_quota("llama", **GENEROUS)
    shares.begin_sharing(sharing)
    codes = shares.sharing_codes(sharing)
    limits = shares.exchange_shares(sharing, codes).limits
    shares.exchange_shares(sharing, codes, np.array(limits, np.int64))
    shares.renew_lease(sharing, shares.now_ns(sharing) + 3600 * NS)
    until(lambda: sharing.check_quota("llama", 100))  # a lease is seen when the next slot begins

    code = 'check_quota("llama", estimated_tokens=100)'
    ours = Loop(f"manager.{code}", manager=sharing)
    others = {"alone": Loop(f"manager.{code}", manager=manager).round_ns, "empty": ours.empty_round_ns}
    if floor:
        others["floor"] = Loop('floor.check("llama", estimated_tokens=100)', floor=floor).round_ns
    series = bench.interleave(ROUNDS, ours.round_ns, **others)
    loop_ns = min(series["empty"])
    least = {name: min(values) - loop_ns for name, values in series.items()}
    case = "a check within a share"
    bench.add(
        Row(QUESTION, f"{case}, and without", least["ours"], "ns", "alone", least["alone"], (ratio_at_most(1.1),))
    )
    if floor:
        bench.add(Row(QUESTION, case, least["ours"], "ns", FLOOR, least["floor"], (ratio_at_most(1.4),), judged=True))


class Hosts:
    """`count` hosts in this process, each with a state, a node and the pace of one.

    The limits are `each` request a second for every host, and an hour's that are not reached.
    """

    def __init__(self, count, each, store):
        from modelquota.cluster.host import ManagerHost, boot_id
        from modelquota.cluster.node import Node
        from modelquota.cluster.pace import Pace

        self.store = store
        self.chance = Random(count)
        self.hosts = []
        self.due = []
        self.asks = [0.0] * count
        for number in range(count):
            manager = ResourceQuotaManager(max_models=MODELS)
            for model in range(MODELS):
                manager.set_quota(
                    f"model-{model}",
                    max_requests_per_second=count * each,
                    max_requests_per_hour=10**6,
                    max_tokens_per_hour=10**9,
                    on_violation="reject",
                )
            shares.begin_sharing(manager)
            node = Node(ManagerHost(manager, boot_id()), LEASE_SEC * NS)
            self.hosts.append((manager, node, Pace(NS, self.chance)))
            self.due.append((monotonic() + self.chance.random(), number))
        heapify(self.due)

    def run(self, seconds):
        """Exchange whenever it is due; once a second each host asks for a few models."""
        end = monotonic() + seconds
        while self.due[0][0] < end:
            due, number = self.due[0]
            sleep(max(0.0, due - monotonic()))
            manager, node, pace = self.hosts[number]
            request = node.prepare()
            grew = node.adopt(request, self.store.exchange(request))
            pace.answered(shares.now_ns(manager), grew)
            if monotonic() >= self.asks[number]:
                self.asks[number] = monotonic() + 1
                for model in self.chance.choices(range(MODELS), k=REQUESTS):
                    if manager.check_quota(f"model-{model}", 100).starved:
                        pace.urge()
            heapreplace(self.due, (monotonic() + (pace.due_ns() - shares.now_ns(manager)) / NS, number))


@pytest.mark.parametrize("nodes", [10, 100])
@pytest.mark.parametrize(("each", "load"), [(100, "room is left"), (1, "more is wanted")])
def test_the_store(bench, nodes, each, load, tmp_path):
    """Calls a second of the store, and how much of a core it takes, with room in all limits or in none.

    1,000 nodes are ten times as much: an upper bound, since fair shares are not computed more often than once a second.
    """
    redis = pytest.importorskip("redis")
    from real_servers import Server, installed

    from modelquota.cluster import RedisStore

    def spent():
        cpu, calls = client.info("cpu"), client.info("commandstats")["cmdstat_evalsha"]["calls"]
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"], calls, monotonic()

    seconds = SECONDS if bench.enabled else 1.5
    with Server(installed("valkey"), tmp_path) as server, redis.Redis(port=server.port) as client:
        hosts = Hosts(nodes, each, RedisStore(server.url, lease_sec=LEASE_SEC))
        hosts.run(1.5 * LEASE_SEC if bench.enabled else 1.0)  # until it has learned
        before = spent()
        bench.once(lambda: hosts.run(seconds))
        cpu, calls, took = (after - was for after, was in zip(spent(), before, strict=True))
    for count, said in [(nodes, ""), *([(1_000, ", extrapolated")] if nodes == 100 else [])]:
        case, factor = f"{count:,} nodes{said}, {load}", count / nodes
        bench.add(Row(QUESTION, f"{case}: calls of the store", factor * calls / took, "/s"))
        bench.add(Row(QUESTION, f"{case}: of its core", factor * 100 * cpu / took, "%"))
    bench.add(Row(QUESTION, f"{nodes} nodes, {load}: its time for a call", 1e6 * cpu / calls, "µs"))
