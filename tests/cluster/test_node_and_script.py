"""Nodes and the shipped script in virtual time, over a network that loses nothing."""

import pytest

pytest.importorskip("lupa", reason="the simulated store needs lupa")

from lua_store import LuaServer, LuaStore
from model_host import NS, ModelHost, components

from modelquota.cluster.node import MARGIN_NS, Node

LEASE_NS = 5 * NS


class Cluster:
    """Hosts of the same limits that exchange in turn, each once a second, with one store."""

    def __init__(self, **quotas):
        self.now_ns = 1000 * NS
        self.up_ns = self.down_ns = 0  # how long a request and its reply are on their way
        self.jumped_ns = 0  # of the server's wall clock
        self.server = LuaServer()
        self.store = LuaStore(self.server)
        self.quotas = {model_id: components(**limits) for model_id, limits in quotas.items()}
        self.hosts = []

    def add_host(self):
        host = ModelHost(lambda: self.now_ns, dict(self.quotas))
        self.hosts.append(host)
        self.start(host)
        return host

    def start(self, host):
        """A process of the host begins, or takes over from another."""
        host.node = Node(host, LEASE_NS)

    def stop(self, host):
        host.node = None

    def exchange(self, host):
        request = host.node.prepare()
        self.now_ns += self.up_ns
        self.server.time_ns = self.now_ns + self.jumped_ns
        reply = self.store.exchange(request)
        self.now_ns += self.down_ns
        host.node.adopt(request, reply)
        return reply

    def run(self, seconds):
        end_ns = self.now_ns + seconds * NS
        while self.now_ns < end_ns:
            before_ns = self.now_ns
            for host in self.hosts:
                if host.node is not None:
                    self.exchange(host)
            self.now_ns = max(self.now_ns, before_ns + NS)

    def clock_ms(self):
        return int(self.server.data["mq:{test:0}:meta"]["clock"])

    def use(self, host, model_id, count, tokens=0):
        """How many of so many requests are admitted, if each that is denied is tried again after an exchange."""
        admitted = 0
        for _ in range(20):
            while admitted < count and host.begin(model_id, tokens):
                host.end(model_id)
                admitted += 1
            if admitted == count:
                break
            self.exchange(host)
        return admitted


def restart_without_lease(cluster, host):
    cluster.stop(host)
    cluster.now_ns += 2 * LEASE_NS
    cluster.start(host)


def test_a_model_over_its_limit_denies_and_the_others_of_its_host_do_not():
    cluster = Cluster(over={"requests_per_hour": 100}, other={"requests_per_minute": 1000})
    host, peer = cluster.add_host(), cluster.add_host()
    cluster.run(7)
    assert cluster.use(host, "over", 60) == 60
    assert cluster.use(peer, "over", 30) == 30
    cluster.run(2)
    for one in cluster.hosts:
        one.row("over").limits = components(requests_per_hour=50)
        one.row("over").changed = True
    restart_without_lease(cluster, host)
    cluster.run(3)
    assert cluster.use(host, "other", 50) == 50
    assert (host.begin("over", 0), peer.begin("over", 0)) == (False, False)
    cluster.now_ns += 61 * 60 * NS  # both uses age out at once, before either host exchanges again
    rows = [one.row("over") for one in cluster.hosts]
    for row in rows:
        row.advance(cluster.now_ns)
    assert [row.used()[2] for row in rows] == [0, 0]
    assert sum(row.bounds[2] for row in rows) <= 50  # what they had used is not their share
    cluster.run(3)
    assert cluster.use(host, "over", 20) == 20


@pytest.mark.parametrize(
    ("before", "after", "window_sec"),
    [
        ({"requests_per_minute": 120}, {"requests_per_minute": 60}, 60),
        ({"requests_per_second": (120, 0)}, {"requests_per_second": (60, 0)}, 1),
        ({"requests_per_second": (10, 600)}, {"requests_per_second": (10, 90)}, 10),
    ],
)
def test_a_limit_that_is_lowered_while_it_is_used_up_holds_over_all_hosts(before, after, window_sec):
    cluster = Cluster(m=before)
    hosts = [cluster.add_host() for _ in range(3)]
    cluster.run(7)
    admitted = []

    def serve(seconds):
        for tick in range(20 * seconds):
            for host in hosts:
                while host.begin("m", 0):
                    host.end("m")
                    admitted.append(cluster.now_ns)
                if tick % 7 == 0:
                    cluster.exchange(host)
            cluster.now_ns += NS // 20

    serve(70)
    for host in hosts:
        row = host.row("m")
        row.limits, row.changed = components(**after), True
        row.share(row.held)
    serve(130)  # a window or the level's hold, and a lease
    del admitted[:]
    serve(3 * window_sec)
    limit = 10 * 10 + 100 if window_sec == 10 else 60
    most = max(sum(at - window_sec * NS < other <= at for other in admitted) for at in set(admitted))
    assert 0.9 * min(limit, 100) <= most <= limit
    assert len({host.row("m").held[1 if window_sec == 60 else 11] for host in hosts}) <= 2  # and fairly


def test_tokens_charged_past_a_limit_count_against_all_hosts_and_bind_only_their_model():
    cluster = Cluster(over={"tokens_per_minute": 100}, other={"requests_per_minute": 1000})
    host, peer = cluster.add_host(), cluster.add_host()
    cluster.run(7)
    assert cluster.use(host, "over", 1, tokens=5) == 1
    row = host.row("over")
    row.logs[6].append((cluster.now_ns, 1000))  # a grant that is settled at far more than it had reserved
    row.sums[6] += 1000
    row.changed = True
    restart_without_lease(cluster, host)
    cluster.run(3)
    assert cluster.use(host, "other", 50) == 50
    assert not host.begin("over", 1)
    assert cluster.use(peer, "over", 1, tokens=1) == 0
    cluster.run(70)
    assert (cluster.use(host, "over", 10, tokens=4), cluster.use(peer, "over", 5, tokens=4)) == (10, 5)


def test_requests_that_are_open_keep_no_lease_from_a_host_if_the_ledger_does_not_limit_them():
    cluster = Cluster(m={"requests_per_minute": 100, "concurrent_requests": 5})
    host = cluster.add_host()
    host.row("m").open = 3  # as a process before this one has left it
    cluster.exchange(host)
    cluster.quotas["m"] = components(requests_per_minute=100)
    cluster.add_host()
    cluster.run(10)
    assert cluster.use(host, "m", 1) == 1


@pytest.mark.parametrize(("up_ms", "down_ms"), [(900, 0), (0, 900), (450, 450), (5_000, 5_000)])
def test_the_ledgers_clock_goes_on_however_slow_the_store_is(up_ms, down_ms):
    cluster = Cluster(m={"requests_per_minute": 1000})
    cluster.up_ns, cluster.down_ns = up_ms * 10**6, down_ms * 10**6
    host = cluster.add_host()
    cluster.run(20)
    began_ms, began_ns = cluster.clock_ms(), cluster.now_ns
    cluster.run(60)
    passed_ms = (cluster.now_ns - began_ns) // 10**6
    assert abs(cluster.clock_ms() - began_ms - passed_ms) <= 50
    if up_ms + down_ms < 1000:
        assert cluster.use(host, "m", 100) == 100


def test_a_store_that_was_away_learns_for_one_lease_however_long_it_was_away():
    cluster = Cluster(m={"requests_per_minute": 1000})
    host = cluster.add_host()
    cluster.run(8)
    for _ in range(100):  # one request, tried again and again
        host.node.prepare()
        cluster.now_ns += NS // 5
    cluster.server.run_id = "restarted"
    began_ns = cluster.now_ns
    while cluster.exchange(host).status == "learning" or cluster.now_ns == began_ns:
        cluster.now_ns += NS // 5
    assert LEASE_NS <= cluster.now_ns - began_ns <= LEASE_NS + NS


@pytest.mark.parametrize("dies", [False, True])
def test_a_wall_clock_that_jumps_after_a_slow_request_does_not_move_the_ledgers(dies):
    cluster = Cluster(m={"requests_per_minute": 1000})
    host = cluster.add_host()
    cluster.up_ns = 3 * NS
    if dies:  # it does not learn how long its first request took
        node = host.node
        node.adopt = lambda request, reply: None
        cluster.exchange(host)
        cluster.start(host)
    else:
        cluster.exchange(host)
    cluster.up_ns = 0
    cluster.jumped_ns = 3600 * NS
    for _ in range(10):
        cluster.now_ns += NS // 2
        cluster.exchange(host)
        assert cluster.clock_ms() <= (cluster.now_ns + MARGIN_NS) // 10**6 - 200


def test_a_request_that_is_slow_now_and_then_costs_the_ledgers_clock_less_than_that():
    cluster = Cluster(m={"requests_per_minute": 1000})
    host = cluster.add_host()
    cluster.run(5)
    began_ms, began_ns = cluster.clock_ms(), cluster.now_ns
    for _ in range(20):
        cluster.up_ns = 900 * 10**6
        cluster.exchange(host)
        cluster.up_ns = 0
        cluster.run(4)
    passed_ms = (cluster.now_ns - began_ns) // 10**6
    assert passed_ms - 21 * 500 <= cluster.clock_ms() - began_ms <= passed_ms


@pytest.mark.parametrize("returns", [False, True])
def test_time_without_any_host_counts_only_for_one_whose_clock_has_seen_it(returns):
    cluster = Cluster(m={"requests_per_minute": 100})
    host, peer = cluster.add_host(), cluster.add_host()
    cluster.run(7)
    assert cluster.use(peer, "m", 90) == 90
    for one in (host, peer):
        cluster.stop(one)
    cluster.now_ns += 120 * NS
    if returns:
        cluster.start(host)
    else:
        host = cluster.add_host()
    began_ns, admitted = cluster.now_ns, 0
    while admitted < 50 and cluster.now_ns < began_ns + 100 * NS:
        cluster.run(1)
        admitted += cluster.use(host, "m", 50 - admitted)
    waited_sec = (cluster.now_ns - began_ns) / NS
    assert waited_sec <= 3 if returns else 60 <= waited_sec <= 70


FIRST_LIMITS = {
    "requests_per_minute": 100,
    "tokens_per_minute": 100_000,
    "requests_per_second": (10, 5),
    "concurrent_requests": 16,
}


@pytest.mark.parametrize("idle_sec", [0, 30, 600])
def test_a_model_that_nobody_has_asked_for_admits_the_first_request_of_each_host(idle_sec):
    cluster = Cluster(m=FIRST_LIMITS)
    hosts = [cluster.add_host() for _ in range(4)]
    cluster.run(8)  # it has learned
    if idle_sec:
        assert [host.begin("m", 700) for host in hosts] == [True] * 4
        for host in hosts:
            host.end("m")
        cluster.run(idle_sec)
    for host in hosts:  # without an exchange
        assert host.begin("m", 700)
        assert host.row("m").starved == 0


def test_what_is_kept_for_a_first_request_is_as_large_as_the_last_ones():
    cluster = Cluster(m={"tokens_per_hour": 1_000_000})
    host, peer = cluster.add_host(), cluster.add_host()
    cluster.run(8)
    assert cluster.use(host, "m", 1, tokens=90_000) == 1
    cluster.run(60)
    assert host.begin("m", 90_000)
    assert not peer.begin("m", 90_000)
    assert cluster.use(peer, "m", 1, tokens=90_000) == 1


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"requests_per_minute": 12}, 12), ({"requests_per_second": (12, 0)}, 12), ({"concurrent_requests": 12}, 12)],
)
def test_what_idle_hosts_keep_goes_to_the_one_that_needs_it(limits, limit):
    cluster = Cluster(m=limits)
    hosts = [cluster.add_host() for _ in range(4)]
    cluster.run(8)
    hot, admitted = hosts[0], []
    for tick in range(20 * 30):
        while hot.begin("m", 0):
            admitted.append(cluster.now_ns)
            if "concurrent_requests" not in limits:
                hot.end("m")
        for host in hosts:
            if tick % 20 == 0 or (host is hot and tick % 4 == 0):
                cluster.exchange(host)
        cluster.now_ns += NS // 20
    if "requests_per_second" in limits:
        assert len([at for at in admitted if at > cluster.now_ns - 20 * NS]) >= 0.95 * 20 * limit
    else:
        assert len(admitted) == limit
    assert sum(host.row("m").starved for host in hosts[1:]) == 0
