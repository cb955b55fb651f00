"""What does a limit that many hosts share cost: a check on a host, and the store?"""

import numpy as np
import pytest
from patience import until

from benchmarks.harness.hosts import Hosts, script_in_virtual_time
from benchmarks.harness.loops import Loop
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.results import FLOOR, Row, ratio_at_most
from modelquota import ResourceQuotaManager
from modelquota._core.table import shares

QUESTION = "cluster"
ROUNDS = 200
NS = 10**9
MODELS = 20
DEMAND = 40  # requests a second of each host for each model
TOKENS = 100
LEASE_SEC = 3
SECONDS = 3


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


@pytest.mark.parametrize("nodes", [10, 100, 1_000])
@pytest.mark.parametrize(("room", "load"), [(10, "a tenth of it is wanted"), (0.5, "twice as much is wanted")])
def test_the_store(bench, nodes, room, load, tmp_path):
    """Calls a second of the store, how much of a core it takes, and how much of the limits is used.

    The server and the script are real, the hosts are in virtual time: a thousand do not fit into a machine. Each asks
    for 20 models, 40 times a second for each. The share of a core is the server's own time by the hosts' time.
    """
    if not bench.enabled and nodes > 10:
        pytest.skip("without figures one number of hosts is enough")
    redis = pytest.importorskip("redis")
    from real_servers import Server, installed

    def run(keys, arguments):
        return client.evalsha(digest, len(keys), *keys, *arguments).decode()

    def spent():
        cpu, calls = client.info("cpu"), client.info("commandstats")["cmdstat_evalsha"]["calls"]
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"], calls, hosts.admitted

    rate = int(DEMAND * room * nodes)
    hour = {"max_requests_per_hour": 3600 * rate, "max_tokens_per_hour": 3600 * rate * TOKENS}
    limits = {"max_requests_per_second": rate, "max_tokens_per_second": rate * TOKENS, **hour}
    bursts = {"burst_requests": 0, "burst_tokens": 0}
    quotas = {f"model-{number}": {**limits, **bursts} for number in range(MODELS)}
    with Server(installed("valkey"), tmp_path) as server, redis.Redis(port=server.port, protocol=2) as client:
        digest = client.script_load(script_in_virtual_time())
        hosts = Hosts([DEMAND] * nodes, quotas, run, lease_sec=LEASE_SEC, tokens=TOKENS)
        hosts.advance(LEASE_SEC + 3)  # until it has learned, and the shares are divided
        before = spent()
        bench.once(lambda: hosts.advance(SECONDS))
        cpu, calls, admitted = (after - was for after, was in zip(spent(), before, strict=True))
    # A second's limit is counted in 61 slots of 1/60 s.
    wanted = min(DEMAND * nodes, rate * 60 / 61) * MODELS * SECONDS
    case = f"{nodes:,} hosts, {load}"
    bench.add(Row(QUESTION, f"{case}: calls of the store", calls / SECONDS, "/s"))
    bench.add(Row(QUESTION, f"{case}: of its core", 100 * cpu / SECONDS, "%"))
    bench.add(Row(QUESTION, f"{case}: its time for a call", 1e6 * cpu / calls, "µs"))
    bench.add(Row(QUESTION, f"{case}: admitted of what could be", 100 * admitted / wanted, "%"))
