"""The script, against real servers and by hand: the same answers everywhere, and nothing outside of its namespace."""

import json
import random

import pytest

from modelquota.cluster.quantities import QUANTITIES
from modelquota.cluster.store import GIVEN_UP, Ghost, ModelRequest, Quantity, Request, parse_reply

pytest.importorskip("lupa", reason="the simulated store needs lupa")
redis = pytest.importorskip("redis", reason="real servers are asked with redis-py")

from lua_store import SCRIPT, LuaServer, LuaStore  # noqa: E402
from real_servers import WHEELS, Server, binary_of  # noqa: E402

BASE = "mq:{test:0}:"
# The wall clock and the run_id of a real server cannot be set: both read them from a key.
STEERED = SCRIPT.replace("call('TIME')", "call('HMGET', string.sub(KEYS[1], 1, -5) .. 'time', 's', 'us')").replace(
    "call('INFO', 'server')", "call('HGET', string.sub(KEYS[1], 1, -5) .. 'time', 'info')"
)
NONE = (0,) * QUANTITIES


def quantities(*pairs):
    return tuple(Quantity(*pair or (None, 0)) for pair in pairs) + (Quantity(None, 0),) * (QUANTITIES - len(pairs))


def row(*values):
    return tuple(values) + (0,) * (QUANTITIES - len(values))


def make_request(node_id, number, nonce="", models=(), *, verb="exchange", token=None, boot="b", boot_ms=0):
    return Request(verb, node_id, number, token or f"t{number}", nonce, boot, boot_ms, 10_000, models)


def one(held=0, used=0, want=0, need=0, *, limit=100, hold_ms=60_000, replaces=0, ghosts=(), model_id="m", code=7):
    values = [row(value) for value in (held, used, want, need)]
    return ModelRequest(model_id, code, replaces, quantities((limit, hold_ms)), *values, ghosts)


class Ledger:
    """A simulated store whose learning is over, and the nodes that ask it."""

    def __init__(self):
        self.server = LuaServer()
        self.server.time_ns = 10**18
        self.store = LuaStore(self.server, BASE)
        self.last = {}
        self.ask("first")
        self.pass_ms(10_001)
        self.ask("first")

    def pass_ms(self, ms):
        self.server.time_ns += ms * 10**6

    def ask(self, node_id, *models, boot_ms=None, **fields):
        number, nonce = self.last.get(node_id, (0, ""))
        boot_ms = (self.server.time_ns - 10**18) // 10**6 if boot_ms is None else boot_ms
        reply = self.store.exchange(make_request(node_id, number + 1, nonce, models, boot_ms=boot_ms, **fields))
        if reply.nonce:
            self.last[node_id] = number + 1, reply.nonce
        return reply

    def share(self, node_id, **fields):
        return self.ask(node_id, one(**fields)).models[0].share[0]


@pytest.fixture
def ledger():
    return Ledger()


def test_nothing_is_granted_while_the_store_learns():
    store = LuaStore(LuaServer())
    reply = store.exchange(make_request("a", 1, models=[one(held=30, used=20, want=50)]))
    assert (reply.status, reply.learning_ms) == ("learning", 10_000)
    assert reply.models[0].share[0] == 30  # what a node says that it holds is believed, and no more is granted


def test_a_claim_after_learning_is_not_believed(ledger):
    assert ledger.share("a", held=30, used=20, want=20) == 20


def test_what_is_free_is_given_in_slices_and_never_more_than_the_limit(ledger):
    first = ledger.share("a", want=100)
    assert first == 50
    second = ledger.share("b", want=100)
    assert first + second <= 100
    for _ in range(20):
        ledger.pass_ms(200)
        first = ledger.share("a", held=first, used=0, want=100)
        second = ledger.share("b", held=second, used=0, want=100)
    assert first + second <= 100


def test_a_contended_limit_is_divided_fairly(ledger):
    shares = dict.fromkeys("abc", 0)
    wants = {"a": 10, "b": 100, "c": 100}
    for _ in range(10):
        for node_id, want in wants.items():
            ledger.pass_ms(150)
            reply = ledger.ask(node_id, one(held=shares[node_id], want=want)).models[0]
            shares[node_id] = reply.target[0]
    assert shares["a"] == 10
    assert abs(shares["b"] - shares["c"]) <= 2
    assert sum(shares.values()) >= 98


def test_the_records_of_all_nodes_are_read_only_when_the_division_has_to_change(ledger):
    reads, read = [], ledger.server.hgetall
    ledger.server.hgetall = lambda key: reads.append(key) or read(key)
    shares = dict.fromkeys("abc", 0)

    def exchange(times, **wants):
        del reads[:]
        for _ in range(times):
            for node_id, want in wants.items():
                ledger.pass_ms(150)
                reply = ledger.ask(node_id, one(held=shares[node_id], want=want)).models[0]
                shares[node_id] = min(reply.share[0], reply.target[0])
        return len(reads)

    exchange(1, a=10, b=10, c=10)
    assert exchange(5, a=12, b=15, c=10) == 0  # room is left
    assert exchange(8, a=100, b=100, c=10) > 0
    assert exchange(5, a=100, b=100, c=10) == 0  # it is divided, and nobody wants anything else
    assert (shares["c"], sum(shares.values()) >= 98, abs(shares["a"] - shares["b"]) <= 2) == (10, True, True)
    assert exchange(10, a=100, b=20, c=10) > 0


def test_a_node_that_used_more_than_its_share_is_counted_by_its_use(ledger):
    ledger.share("a", held=0, used=95, want=95)
    assert 0 < ledger.share("b", want=100) <= 5


def test_what_a_node_has_used_is_its_share_however_many_want_it(ledger):
    for _ in range(3):
        share = ledger.share("a", used=60, want=100)
        ledger.share("b", used=40, want=100)
        ledger.pass_ms(200)
    assert share == 60


def test_a_share_of_a_dead_node_stays_taken_until_its_use_has_aged_out(ledger):
    held = 0
    while held < 100:
        held = ledger.share("a", held=held, want=100)
        ledger.pass_ms(10)
    for waited_ms, expected in ((9_000, 0), (1_900, 0), (58_000, 0), (2_000, 50)):
        for _ in range(waited_ms // 100):
            ledger.pass_ms(100)
            share = ledger.share("b", want=100)
        assert share == expected, waited_ms


def test_what_a_dead_node_had_open_is_free_when_its_lease_has_ended(ledger):
    held = 0
    while held < 100:
        held = ledger.share("a", held=held, want=100, hold_ms=0)
        ledger.pass_ms(10)
    ledger.share("a", held=100, used=100, want=100, hold_ms=0)
    for waited_ms, expected in ((9_900, 0), (600, 50)):
        for _ in range(waited_ms // 100):
            ledger.pass_ms(100)
            share = ledger.share("b", want=100, hold_ms=0)
        assert share == expected, waited_ms
    assert ledger.share("a", held=0, used=100, want=100, hold_ms=0) == 0  # it is back, and what it uses counts
    assert ledger.share("b", held=50, want=100, hold_ms=0) == 50


def test_a_reply_says_what_is_free_and_what_dead_nodes_hold_unused(ledger):
    held = ledger.share("a", want=100)
    ledger.share("a", held=held, used=held - 1, want=100)
    (reply,) = ledger.ask("b", one(want=10)).models
    taken = 100 - reply.free[0] - reply.share[0]
    assert (reply.idle[0], reply.free[1], reply.idle[1]) == (0, None, None)
    for _ in range(110):
        ledger.pass_ms(100)
        (reply,) = ledger.ask("b", one(held=reply.share[0], want=10)).models
    assert (reply.idle[0], reply.free[0]) == (taken - (held - 1), 100 - taken - reply.share[0])


def forget(ledger, node_id):
    keys = [f"{BASE}{name}" for name in ("meta", "nodes", "ghosts", f"node:{node_id}")]
    return ledger.server.evaluate(keys, ["1", "forget", node_id, "0", "", "", "", "0", "0"])


def test_what_a_dead_node_held_is_free_when_it_is_forgotten(ledger):
    ledger.share("a", used=60, want=60)
    assert (forget(ledger, "a"), forget(ledger, "nobody")) == ("live", "unknown")
    for _ in range(110):
        ledger.pass_ms(100)
        assert ledger.share("b", want=100) <= 40
    assert forget(ledger, "a") == "forgotten"
    assert forget(ledger, "a") == "unknown"
    assert forget(ledger, "b") == "live"
    ledger.pass_ms(1000)
    assert ledger.ask("b", one(want=100)).models[0].free[0] == 50
    assert not [key for key in ledger.server.data if "node:a" in key]


def test_forgetting_one_node_leaves_what_others_handed_over(ledger):
    for node_id, amount in (("a", 30), ("b", 20)):
        ledger.ask(node_id, one(ghosts=[Ghost(0, amount, 60_000)]), verb="leave")
    assert forget(ledger, "a") == "forgotten"
    reply = ledger.ask("first", one(want=1)).models[0]
    assert reply.free[0] + reply.share[0] == 80


def test_a_version_of_published_quotas_is_never_used_again(ledger):
    keys = [f"{BASE}{name}" for name in ("meta", "nodes", "ghosts", "quotas")]
    first = int(ledger.server.evaluate(keys, ["1", "publish", "one"]))
    second = int(ledger.server.evaluate(keys, ["1", "publish", "two"]))
    assert 0 < first < second == ledger.ask("a").quotas
    assert ledger.server.data[f"{BASE}quotas"] == {"version": str(second), "text": "two"}
    ledger.server.data.clear()
    assert ledger.store.exchange(make_request("new", 1)).quotas == 0
    ledger.pass_ms(1)
    assert int(ledger.server.evaluate(keys, ["1", "publish", "one"])) > second


def test_what_was_handed_over_is_free_when_it_is_due(ledger):
    ledger.share("a", used=80, want=80)
    ledger.ask("a", one(ghosts=[Ghost(0, 30, 1_000), Ghost(0, 50, 5_000)]), verb="leave")
    share, shares = 0, []
    for _ in range(70):
        share = ledger.share("b", held=share, want=100)
        shares.append(share)
        ledger.pass_ms(100)
    assert max(shares[:10]) == 20
    assert max(shares[:50]) == 50
    assert shares[-1] == 100


HOLDS = (1_000, 2_000, 5_000)


def die_with_many(ledger, count):
    """A node that has 10 of three quantities of so many models is not heard of again; its models' ids."""
    models = []
    for at in range(count):
        values = [(10, 10, 10, *NONE[3:])] * 3
        models.append(
            ModelRequest(f"m{at}", 7, 0, quantities(*((100, hold_ms) for hold_ms in HOLDS)), NONE, *values[:2], NONE)
        )
    ledger.ask("a", *models)
    for _ in range(100):
        ledger.pass_ms(100)
        ledger.ask("b")
    return [model.model_id for model in models]


def taken_of(ledger, model_ids):
    """What is in shares of each quantity of these models, by what it is."""
    sums = [json.loads(ledger.server.data[f"{BASE}m:{model_id}"]["sums"])[1::2] for model_id in model_ids]
    return [{counts[quantity] for counts in sums} for quantity in range(3)]


def test_a_dead_node_with_many_models_is_buried_in_parts(ledger):
    model_ids = die_with_many(ledger, 1000)
    calls, call = [], ledger.server.call
    ledger.server.call = lambda command, *arguments: calls.append(command) or call(command, *arguments)
    longest = 0
    for tenth in range(300):
        ledger.pass_ms(100)
        del calls[:]
        ledger.ask("b")
        longest = max(longest, len(calls))
        if tenth == 5:
            assert taken_of(ledger, model_ids) == [{10}] * 3
        elif tenth == 16:
            assert taken_of(ledger, model_ids) == [{0}, {10}, {10}]
        elif tenth == 45:
            assert taken_of(ledger, model_ids) == [{0}, {0}, {10}]
        elif tenth == 65:
            assert taken_of(ledger, model_ids) == [{0}, {0}, {0}]
    assert longest < 2000
    assert not [key for key in ledger.server.data if key.startswith(f"{BASE}m:") or key == f"{BASE}node:a"]


def test_a_dead_node_that_returns_while_its_shares_end_has_what_is_left(ledger):
    model_ids = die_with_many(ledger, 1000)
    for _ in range(2):  # it is dead, and the first of its holds is over
        ledger.pass_ms(600)
        ledger.ask("b")
    assert taken_of(ledger, model_ids) == [{0, 10}, {10}, {10}]
    assert "pass" in ledger.server.data[f"{BASE}node:a"]
    ledger.ask("a")
    assert "pass" not in ledger.server.data[f"{BASE}node:a"]
    for _ in range(100):
        ledger.pass_ms(100)
        ledger.ask("b")
        ledger.ask("a")
    assert taken_of(ledger, model_ids) == [{0, 10}, {10}, {10}]


def test_hundreds_of_amounts_that_were_handed_over_are_free_within_a_few_exchanges(ledger):
    limits = quantities((100, 1_000), (100, 1_000), (100, 1_000))
    ghosts = [Ghost(quantity, 5, 1_000) for quantity in range(3)]
    models = [ModelRequest(f"m{at}", 7, 0, limits, NONE, NONE, NONE, NONE, ghosts) for at in range(250)]
    ledger.ask("a", *models, verb="leave")
    assert len(ledger.server.data[f"{BASE}ghosts"]) >= 750
    ledger.pass_ms(1_200)
    for _ in range(3):
        ledger.ask("first")
    assert not [key for key in ledger.server.data if key.startswith(f"{BASE}m:")]


def test_a_node_that_returns_resumes_its_share(ledger):
    held = ledger.share("a", want=40)
    for _ in range(120):  # past the end of its lease: it is a ghost
        ledger.pass_ms(100)
        ledger.share("b", want=0)
    assert "a" not in ledger.server.data[f"{BASE}nodes"]
    assert ledger.share("a", held=held, want=held) == held
    assert not [ghost for ghost in ledger.server.data.get(f"{BASE}ghosts", ()) if ghost.endswith(":a")]


def test_a_repeated_request_gets_its_reply_again_and_is_not_executed_twice(ledger):
    request = make_request("a", 1, models=[one(want=40)])
    reply = ledger.store.exchange(request)
    before = ledger.server.snapshot()
    assert ledger.store.exchange(request) == reply
    assert ledger.server.data == before


def test_a_repeated_request_writes_what_there_is_so_that_replicas_can_be_waited_for(ledger):
    request = make_request("a", 1, models=[one(want=40)])
    ledger.store.exchange(request)
    written, write = [], ledger.server.hset
    ledger.server.hset = lambda key, *pairs: written.append((key, *pairs)) or write(key, *pairs)
    ledger.store.exchange(request)
    assert written == [(f"{BASE}node:a", "number", "1")]


def test_an_earlier_request_is_ignored(ledger):
    ledger.ask("a", one(want=40))
    ledger.ask("a", one(held=25, want=40))
    before = ledger.server.snapshot()
    assert ledger.store.exchange(make_request("a", 1, models=[one(held=99)])).status == "stale"
    assert ledger.server.data == before


@pytest.mark.parametrize(("number", "token", "nonce"), [(1, "another", ""), (2, "t2", "wrong"), (7, "t7", "")])
def test_a_second_node_of_the_same_id_is_fenced(ledger, number, token, nonce):
    ledger.store.exchange(make_request("a", 1, models=[one(want=40)]))
    before = ledger.server.snapshot()
    assert ledger.store.exchange(make_request("a", number, nonce, token=token)).status == "fenced"
    assert ledger.server.data == before


def test_a_replica_learns_for_a_whole_lease_whoever_asks_first(ledger):
    """Its last writes are older than a lease; a node that they do not have asks before one that they have."""
    ledger.share("a", want=10)
    ledger.pass_ms(12_000)
    ledger.server.run_id = "b" * 40
    assert ledger.ask("unknown", one(held=30, want=30)).status == "learning"
    reply = ledger.ask("a", one(held=10, want=10))
    assert (reply.status, reply.learning_ms) == ("learning", 10_000)
    ledger.pass_ms(9_500)
    assert ledger.ask("late", one(held=50, used=50, want=50)).status == "learning"
    ledger.pass_ms(501)
    reply = ledger.ask("a", one(held=10, want=100))
    assert reply.status == "ok"
    assert reply.models[0].share[0] <= 20


def test_another_run_of_the_server_relearns(ledger):
    held = ledger.share("a", want=40)
    ledger.server.run_id = "b" * 40
    reply = ledger.ask("a", one(held=held, want=100))
    assert reply.status == "learning"
    assert reply.models[0].share[0] == held
    assert ledger.ask("b", one(want=100)).models[0].share[0] == 0


@pytest.mark.parametrize("jump_ms", [5_000, 3_600_000, 10**12])
def test_a_wall_clock_that_jumps_ahead_ends_no_lease(ledger, jump_ms):
    held = 0
    for _ in range(29):
        ledger.pass_ms(10)
        held = ledger.share("a", held=held, want=100)
    before_ms = (ledger.server.time_ns - 10**18) // 10**6
    ledger.pass_ms(jump_ms)
    for step in range(1, 60):  # b joins after the jump; a renews
        ledger.pass_ms(100)
        assert ledger.ask("b", one(want=100), boot_ms=step * 100).models[0].share[0] <= 100 - held
        if step % 10 == 0:
            assert ledger.ask("a", one(held=held, used=held, want=held), boot_ms=before_ms + step * 100).status == "ok"
    assert "a" in ledger.server.data[f"{BASE}nodes"]


def test_a_wall_clock_that_jumps_back_does_not_stop_the_ledgers(ledger):
    ledger.ask("a", one(want=1), boot_ms=0)
    ledger.server.time_ns -= 3_600 * 10**9
    clocks = []
    for step in range(5):
        ledger.server.time_ns += 10**9
        ledger.ask("a", one(want=1), boot_ms=1000 * step + 1000)
        clocks.append(int(ledger.server.data[f"{BASE}meta"]["clock"]))
    assert clocks[-1] - clocks[0] == 4_000


def test_a_large_request_is_admitted_before_small_ones_take_what_comes_back(ledger):
    shares = {"a": 0, "b": 0}
    for _ in range(8):  # b has all of it
        ledger.pass_ms(150)
        shares["b"] = ledger.share("b", held=shares["b"], want=100)
    for _ in range(8):
        ledger.pass_ms(150)
        shares["a"] = ledger.share("a", held=shares["a"], want=90, need=90)
        reply = ledger.ask("b", one(held=shares["b"], want=100)).models[0]
        shares["b"] = reply.target[0]
    assert shares["a"] >= 90
    assert sum(shares.values()) <= 100


def test_a_limit_that_is_lowered_is_reported_and_shares_return(ledger):
    held = ledger.share("a", want=50)
    known = ledger.ask("b", one(want=0, limit=20)).models[0]
    assert known.quantities == quantities((100, 60_000))
    assert ledger.ask("b", one(want=0, limit=20, replaces=known.version)).models[0].quantities is None
    reply = ledger.ask("a", one(held=held, want=50)).models[0]
    assert reply.quantities == quantities((20, 60_000))
    assert reply.target[0] <= 21


@pytest.mark.parametrize("forgotten", [False, True])
def test_limits_that_others_have_replaced_are_not_set_again_by_a_request_that_comes_late(ledger, forgotten):
    first = ledger.ask("a", one(want=5)).models[0].version
    if forgotten:  # nobody has the model any more, and somebody has it again
        assert ledger.share("a", held=0, want=0) == 0
        ledger.pass_ms(5)
        second = ledger.ask("b", one(want=5, limit=20)).models[0].version
    else:
        second = ledger.ask("b", one(want=5, limit=20, replaces=first)).models[0].version
    assert second > first
    late = ledger.ask("c", one(want=5, limit=50, replaces=first)).models[0]
    assert (late.version, late.quantities) == (second, quantities((20, 60_000)))
    assert ledger.ask("c", one(want=5, limit=50, replaces=second)).models[0].quantities is None


def test_a_model_that_nobody_has_any_more_leaves_nothing(ledger):
    before = set(ledger.server.data)
    held = ledger.share("a", want=50, model_id="gone")
    assert f"{BASE}m:gone" in ledger.server.data
    ledger.share("a", held=0, want=0, model_id="gone")
    assert held > 0
    assert set(ledger.server.data) - {f"{BASE}node:a"} == before


def test_hostile_ids_stay_within_the_namespace():
    server = LuaServer()
    hostile = ("}{other:0}:meta", "a\nb", "m:m", "{x}", "*", "ü\x01", "n" * 255, "mq:{other:0}:meta", ":", "1:2:3")
    store = LuaStore(server)
    for number, model_id in enumerate(hostile, 1):
        ghosts = [Ghost(0, 3, 1)]
        reply = store.exchange(make_request(f"node{number}", 1, models=[one(used=5, want=5, model_id=model_id)]))
        store.exchange(
            make_request(f"node{number}", 2, reply.nonce, [one(model_id=model_id, ghosts=ghosts)], verb="leave")
        )
    assert all(key.startswith(BASE) for key in server.data)
    server.time_ns += 10**10
    store.exchange(make_request("last", 1))
    assert not [key for key in server.data if key.startswith(f"{BASE}m:")]


def test_use_beyond_all_limits_leaves_the_sums_exact(ledger):
    for node_id in ("a", "b"):
        ledger.ask(node_id, one(used=2**62, want=50, limit=1000))
    assert ledger.share("c", want=50, limit=1000) == 0
    for node_id in ("a", "b"):
        ledger.ask(node_id, one(want=50, limit=1000))
    for _ in range(20):
        ledger.pass_ms(200)
        shares = [ledger.share(node_id, want=50, limit=1000) for node_id in ("a", "b", "c")]
    assert 0 < sum(shares) == json.loads(ledger.server.data[f"{BASE}m:m"]["sums"])[1] <= 1000


def test_a_share_of_another_code_is_handed_over_and_not_given_up_again(ledger):
    held = ledger.share("a", want=50, code=1)
    ghosts = [Ghost(0, held, 60_000)]
    assert ledger.share("a", want=0, code=2) == 0
    for _ in range(2):
        ledger.ask("a", one(code=1, replaces=GIVEN_UP, ghosts=ghosts))
    sums = json.loads(ledger.server.data[f"{BASE}m:m"]["sums"])
    assert sums[1:3] == [held, held]
    grown = ledger.share("a", want=10, code=2)
    ledger.ask("a", one(code=2, replaces=GIVEN_UP, ghosts=[Ghost(0, grown, 60_000)]))
    assert json.loads(ledger.server.data[f"{BASE}m:m"]["sums"])[1:3] == [held + grown] * 2


def test_numbers_keep_all_their_digits(ledger):
    limit = 2**53
    share = 0
    for _ in range(60):
        share = ledger.share("a", held=share, used=2**53 - 3, want=2**53 - 1, limit=limit)
        ledger.pass_ms(10)
    assert share == 2**53 - 1
    assert ledger.share("b", want=10, limit=limit) == 1


# -- against real servers


def dump(client):
    found = {}
    for key in client.scan_iter(BASE + "*"):
        text = key.decode("latin-1")
        if text == f"{BASE}time":
            continue
        if client.type(key) == b"hash":
            fields = client.hgetall(key)
            found[text] = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields.items()}
        else:
            found[text] = {
                member.decode("latin-1"): score for member, score in client.zrange(key, 0, -1, withscores=True)
            }
    return found


@pytest.mark.parametrize("kind", WHEELS)
def test_real_servers_answer_as_the_simulated_one(kind, tmp_path):
    if binary_of(kind) is None:
        pytest.skip(f"the wheel {WHEELS[kind][0]} is not installed")
    chance = random.Random(15)
    simulated = LuaServer(STEERED)
    with Server(kind, tmp_path) as server, redis.Redis(port=server.port, protocol=2) as client:
        digest = client.script_load(STEERED)
        held, numbers, versions, run_id, now_us = {}, {}, {}, "a" * 40, 10**15
        for _ in range(1500):
            now_us += chance.choice((10_000, 100_000, 1_000_000, 20_000_000))
            if chance.random() < 0.01:
                run_id = f"{chance.getrandbits(160):040x}"
            steering = {
                "s": str(now_us // 10**6),
                "us": str(now_us % 10**6),
                "info": f"# Server\r\nrun_id:{run_id}\r\n",
            }
            simulated.data[f"{BASE}time"] = steering
            client.hset(f"{BASE}time", mapping=steering)
            node_id = chance.choice("abcd")
            number, nonce = numbers.get(node_id, (0, ""))
            if chance.random() < 0.05:
                number = max(0, number - 1)
            models = []
            for model_id in chance.sample(["m", "ü:{}", "third"], chance.randint(0, 3)):
                has = held.get((node_id, model_id), (0, 0))
                used = [chance.randint(0, max(1, share)) for share in has]
                limits = quantities((chance.choice((100, 100, 90)), 60_000), None, (10**15, 3_600_000))
                fields = [(has[0], 0, has[1]), (used[0], 0, used[1])]
                fields.append((used[0] + chance.randint(0, 80), 0, used[1] + chance.randint(0, 10**15)))
                fields.append((chance.choice((0, 0, 60)), 0, 0))
                ghosts = [Ghost(2, 17, 5000)] if chance.random() < 0.05 else ()
                models.append(
                    ModelRequest(
                        model_id, chance.choice((7, 7, 7, 8)),
                        chance.choice((0, 0, 0, versions.get(model_id, 1), GIVEN_UP)), limits,
                        *(row(*field) for field in fields), ghosts,
                    )
                )  # fmt: skip
            request = make_request(
                node_id, number + 1, nonce, models, boot_ms=now_us // 1000,
                verb="leave" if chance.random() < 0.02 else "exchange", token=f"{number}",
            )  # fmt: skip
            keys, arguments = request.keys(BASE), request.arguments()
            real = client.evalsha(digest, len(keys), *keys, *arguments).decode()
            assert real == simulated.evaluate(keys, arguments)
            reply = parse_reply(real)
            if reply.nonce:
                numbers[node_id] = number + 1, reply.nonce
                for model, answer in zip(models, reply.models, strict=False):  # not of a repeated one
                    held[node_id, model.model_id] = (answer.share[0], answer.share[2])
                    versions[model.model_id] = answer.version
            elif reply.status == "fenced":
                numbers.pop(node_id)
        state = {key: fields for key, fields in simulated.data.items() if key != f"{BASE}time"}
        assert dump(client) == state
