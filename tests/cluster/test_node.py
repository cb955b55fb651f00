"""Nodes over the simulated store, in virtual time: many models, and models and limits that come and go."""

import itertools
import json

import pytest

pytest.importorskip("lupa", reason="the simulated store needs lupa")

from lua_store import LuaServer, LuaStore
from manager_host import SimulatedHost, config_of
from model_host import NS, ModelHost, ModelRow, components

from modelquota.cluster.node import MAX_MODELS, Node
from modelquota.cluster.pace import URGENT_NS, Pace

BASE = "mq:{test:0}:"
LEASE_NS = 10 * NS


class World:
    """A simulated store whose learning is over, and the time of its nodes."""

    def __init__(self):
        self.server = LuaServer()
        self.store = LuaStore(self.server, BASE)
        self.now_ns = 10**15
        self.hosts = []
        self.live(11, self.node({}))

    def pass_sec(self, seconds):
        self.now_ns += int(seconds * NS)

    def host(self, quotas):
        return ModelHost(lambda: self.now_ns, quotas)

    def node(self, quotas):
        return Node(self.host(quotas), LEASE_NS)

    def manager_node(self, limits):
        """A node over a real manager, with a model m."""
        node = Node(SimulatedHost(lambda: self.now_ns, limits, "boot"), LEASE_NS)
        self.hosts.append(node.host)
        return node

    def exchange(self, request):
        self.server.time_ns = 10**18 + self.now_ns
        return self.store.exchange(request)

    def step(self, *nodes):
        """One exchange of each node."""
        for node in nodes:
            request = node.prepare()
            node.adopt(request, self.exchange(request))

    def live(self, seconds, *nodes):
        """An exchange of each node every 0.2 s."""
        for _ in range(round(seconds * 5)):
            self.pass_sec(0.2)
            self.step(*nodes)

    def sums(self, model_id, quantity):
        """What is taken of a model's quantity, and of this what was handed over."""
        sums = json.loads(self.server.data[f"{BASE}m:{model_id}"]["sums"])
        return sums[2 * quantity + 1], sums[2 * quantity + 2]


@pytest.fixture
def world():
    world = World()
    yield world
    for host in world.hosts:
        host.table.close()


def many(count, **limits):
    return {f"m{number}": components(**limits) for number in range(count)}


def use(world, node):
    """Have each model of a node admit one request."""
    world.live(2, node)
    left = [row.model_id for row in node.host.rows.values()]
    for _ in range(10):
        left = [model_id for model_id in left if not node.host.begin(model_id, 1)]
        world.live(1, node)
    assert not left


def leave(world, node):
    """Have a node leave; how many requests that takes."""
    for count in range(20):
        if node.left:
            return count
        request = node.leave()
        node.adopt(request, world.exchange(request))
    raise AssertionError("it does not leave")


@pytest.mark.parametrize("fenced", [False, True])
def test_a_node_that_leaves_hands_over_what_each_of_many_models_has_used_once(world, fenced):
    node = world.node(many(2 * MAX_MODELS + 50, requests_per_minute=100))
    use(world, node)
    if fenced:  # another node uses its id: what that request was to hand over is handed over by the next
        node.adopt(node.leave(), world.exchange(node.leave()))
        request = node.leave()
        node.adopt(request, world.exchange(request._replace(nonce="wrong")))
        assert node.fenced == 1
    leave(world, node)
    assert {world.sums(f"m{number}", 1)[1] for number in range(2 * MAX_MODELS + 50)} == {1}
    assert len(world.server.data[f"{BASE}ghosts"]) < 2 * MAX_MODELS + 60


# -- more models than one request has


def test_models_that_are_busy_leave_room_for_those_that_are_denied(world):
    models = many(2 * MAX_MODELS + 88, requests_per_minute=10**6)
    node = world.node(models)
    node.host.rows[999] = ModelRow("late", components(requests_per_minute=10))
    world.live(2, node)
    admitted = set()

    def ask_all(times):
        for _ in range(times):
            admitted.update(model_id for model_id in models if node.host.begin(model_id, 1))
            world.live(0.2, node)

    ask_all(10)
    assert admitted == set(models)
    while node.host.begin("late", 1):
        pass
    ask_all(2)
    assert node.host.begin("late", 1)


def test_a_round_tells_each_model_about_once_and_then_waits_for_the_next_renewal(world):
    models = many(3 * MAX_MODELS, requests_per_minute=20)
    one, other = world.node(models), world.node(models)
    world.live(3, one, other)
    for _ in range(5):
        for model_id in models:  # more than there is: each time there is something to tell of all of them
            one.host.begin(model_id, 1)
            other.host.begin(model_id, 1)
        world.live(1, other)
        told = []
        while not told or one.waits:
            request = one.prepare()
            told += [model.model_id for model in request.models]
            one.adopt(request, world.exchange(request))
            world.pass_sec(0.01)
            for model_id in models:
                one.host.begin(model_id, 1)
    assert MAX_MODELS < len(told) < 1.5 * len(models)


def test_a_store_that_was_restarted_is_told_of_all_models_at_once(world):
    node = world.node(many(4 * MAX_MODELS, requests_per_minute=100))
    use(world, node)
    while node.waits:
        world.step(node)
    world.server.run_id = "b" * 40
    end_ns = node.host.lease_end_ns()
    world.step(node)
    requests = 0
    while node.waits:
        assert node.host.lease_end_ns() == end_ns
        world.pass_sec(0.01)
        world.step(node)
        requests += 1
    assert requests == 4
    assert node.host.lease_end_ns() > end_ns


def test_what_did_not_fit_is_sent_at_once_and_does_not_count_as_a_request_in_vain():
    pace = Pace(NS)
    for now_ns in range(0, 5 * URGENT_NS, URGENT_NS):
        pace.urge()
        pace.answered(now_ns, grew=False, more=True)
        assert pace.due_ns() == now_ns + URGENT_NS
    pace.answered(now_ns, grew=False)
    assert pace.due_ns() >= now_ns + 0.8 * NS
    pace.urge()
    assert pace.due_ns() == now_ns + 2 * URGENT_NS


# -- limits that go and come back

DAY = {"requests_per_day": 100_000}
LIMITED = {"requests_per_hour": 100} | DAY


def admitted(world, node, seconds, nodes=None):
    """How many requests a node admits in that time, while all exchange."""
    count = 0
    for _ in range(round(seconds * 5)):
        while node.host.begin("m", 1):
            count += 1
        world.live(0.2, *(nodes or [node]))
    return count


def set_limits(limits, *nodes):
    for node in nodes:
        node.host.now_ns()
        node.host.table.set_quota(config_of("m", limits))


@pytest.mark.parametrize("away_sec", [0.2, 30])
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_a_limit_that_is_taken_away_and_set_again_refills_nothing(world, away_sec, leaves, first):
    a, b = nodes = [world.manager_node(LIMITED) for _ in range(2)]
    world.live(1, *nodes)
    assert admitted(world, a, 5, nodes) == 100
    set_limits(DAY, *nodes)
    world.live(away_sec, *nodes)
    if leaves:
        leave(world, a)
        nodes = [b]
    set_limits(LIMITED, *nodes)
    world.step(nodes[min(first, len(nodes) - 1)])
    assert admitted(world, b, 30, nodes) == 0
    assert world.sums("m", 2)[0] == 100


@pytest.mark.parametrize(
    ("limits", "away", "limit"),
    [
        (LIMITED, DAY, 100),
        ({"requests_per_second": (1, 99)}, DAY, 100),
        ({"concurrent_requests": 10}, DAY, 10),
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_a_limit_of_any_kind_that_is_away_for_a_moment_refills_nothing(world, limits, away, limit, restarts):
    a, b = nodes = [world.manager_node(limits) for _ in range(2)]
    world.live(1, *nodes)
    assert limit <= admitted(world, a, 5, nodes) <= limit + 5
    set_limits(away, *nodes)
    world.live(1, *nodes)
    if restarts:
        a = Node(a.host, LEASE_NS)  # another process of the host goes on
        world.live(1, a, b)
    set_limits(limits, b)
    again = admitted(world, b, 3)  # before the other host says that it has this limit, too
    set_limits(limits, a)
    again += admitted(world, b, 2, [b, a])
    assert again <= (8 if "requests_per_second" in limits else 0)


def test_a_limit_that_returns_on_one_host_first_is_kept_by_the_others_from_their_next_exchange(world):
    a, b = nodes = [world.manager_node(limits) for limits in (DAY, LIMITED)]
    world.step(b, a)  # the ledger has no limit of an hour
    world.live(1, *nodes)
    assert admitted(world, b, 5, nodes) >= 100
    set_limits(LIMITED, a)
    assert admitted(world, a, 20, nodes) == 0
    assert admitted(world, b, 1, nodes) == 0


def test_a_removed_model_hands_over_what_a_limit_had_counted_that_was_taken_away(world):
    a, b = nodes = [world.manager_node(LIMITED) for _ in range(2)]
    world.live(1, *nodes)
    assert admitted(world, a, 5, nodes) == 100
    set_limits(DAY, *nodes)
    world.live(1, *nodes)
    a.host.table.remove_quota("m")
    world.live(1, *nodes)
    set_limits(LIMITED, b)
    assert admitted(world, b, 20, nodes) == 0


def test_a_model_that_was_denied_for_lack_of_share_is_the_first_of_those_that_have_changed(world):
    host = world.manager_node(LIMITED).host
    for model_id in "abc":
        host.table.set_quota(config_of(model_id, LIMITED))
    assert host.names(host.codes(True)) == ["m", "a", "b", "c"]
    assert not host.begin("b", 1)
    assert host.names(host.codes(True))[0] == "b"
    assert sorted(host.names(host.codes(True))) == ["a", "b", "c", "m"]


# -- models that go


@pytest.mark.parametrize("others", [1, 100])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_model_that_is_removed_and_set_again_refills_nothing(world, others, restarts):
    a, b = nodes = [world.manager_node(LIMITED) for _ in range(2)]
    for number in range(others):
        a.host.table.set_quota(config_of(f"other{number}", LIMITED))
    world.live(2, *nodes)
    assert admitted(world, a, 5, nodes) == 100
    a.host.table.remove_quota("m")
    a.host.table.set_quota(config_of("m", LIMITED))
    if restarts:
        a = Node(a.host, LEASE_NS)  # the process before did not tell it
    assert admitted(world, a, 1, [a, b]) == 0
    assert admitted(world, b, 20, [a, b]) == 0
    assert world.sums("m", 2)[0] >= 100


def test_of_many_models_that_are_gone_after_a_restart_some_end_in_each_exchange(world):
    models = many(1000, requests_per_minute=100)
    node = world.node(models)
    use(world, node)
    node.host.rows.clear()
    node = Node(node.host, LEASE_NS)
    left = []
    for _ in range(9):
        world.step(node)
        world.pass_sec(0.2)
        left.append(sum(field.startswith("m:") for field in world.server.data[f"{BASE}node:{node.node_id}"]))
    assert left[-1] == 0
    assert max(before - after for before, after in itertools.pairwise(left)) <= 256
    assert all(1 <= taken == lent for taken, lent in (world.sums(model_id, 1) for model_id in models))


@pytest.mark.parametrize("again", [False, True])
def test_a_share_of_a_model_that_a_node_no_longer_has_after_a_restart_ends_when_its_use_has_aged_out(world, again):
    limits = {"requests_per_minute": 100}
    a, b = world.manager_node(limits), world.manager_node(limits)
    a.host.table.set_quota(config_of("other", limits))
    world.live(1, a, b)
    assert admitted(world, a, 5, [a, b]) == 100
    a.host.table.remove_quota("m")
    a = Node(a.host, LEASE_NS)  # the process before did not tell it
    world.live(1, a, b)
    if again:
        a.host.table.set_quota(config_of("m", limits))
    assert admitted(world, b, 50, [a, b]) == 0
    assert admitted(world, b, 20, [a, b]) == 100
    assert world.sums("m", 1) == (100, 0)


def test_a_model_whose_open_requests_are_more_than_its_share_binds_no_other(world):
    limits = {"concurrent_requests": 10}
    a, b = nodes = [world.manager_node(limits) for _ in range(2)]
    for node in nodes:
        node.host.table.set_quota(config_of("other", LIMITED))
    world.live(2, *nodes)
    assert admitted(world, a, 5, nodes) == 10
    set_limits({"concurrent_requests": 5}, *nodes)
    world.live(1, *nodes)
    world.pass_sec(2 * LEASE_NS / NS)
    a = Node(a.host, LEASE_NS)
    world.live(2, a, b)
    assert a.host.begin("other", 1)
    assert not a.host.begin("m", 1)
    assert admitted(world, b, 2, [a, b]) == 0


def test_a_restart_alone_ends_no_share(world):
    models = many(MAX_MODELS + 50, requests_per_minute=100)
    node = world.node(models)
    use(world, node)
    node = Node(node.host, LEASE_NS)
    sinces = []
    for _ in range(20):
        request = node.prepare()
        sinces.append(request.since)
        node.adopt(request, world.exchange(request))
        world.pass_sec(0.2)
    assert sum(map(bool, sinces)) == 1
    assert all(taken >= 1 and lent == 0 for taken, lent in (world.sums(model_id, 1) for model_id in models))
