"""Histories of a cluster in virtual time: real nodes and the shipped script, over a network and machines that fail.

One seed is one history. Each history ends with the question that matters: did any window or level, over all hosts and
in true time, hold more than its limit? And after each step, of hosts whose lease has not ended: have they more requests
open than the limit of concurrency?
"""

import copy
import heapq
import itertools
from collections import defaultdict
from random import Random

from lua_store import SCRIPT, LuaServer
from manager_host import SimulatedHost
from model_host import GRANTS, NS, ModelHost, components

from modelquota.cluster.node import Node
from modelquota.cluster.pace import Pace
from modelquota.cluster.quantities import LEVELS, MILLION, UNLIMITED, WINDOW_SECONDS, quantities_of
from modelquota.cluster.store import parse_reply, quantities_in

BASE = "mq:{sim:0}:"
WALL_NS = 10**18  # the server's clock when a history begins


class Machine:
    """A host, its process (if it runs), and the node that leads it."""

    def __init__(self, world, number, host):
        self.world = world
        self.number = number
        self.host = host
        self.node = None
        self.pace = None
        self.stopped_until = 0
        self.attempt = 0  # of the step that is scheduled: an older one is void
        # -- of one that was copied, or is the copy: since when, until when that cannot have been known, and its number
        self.unfenced_since = None
        self.known_ns = None
        self.copied_number = 0
        self.cut_until = 0
        self.twin = None
        self.begun = []  # of requests that are open, when they began
        self.unleased_ns = 0  # when it had no lease last

    @property
    def leased(self):
        return self.host.now_ns() < self.host.lease_end_ns()

    @property
    def runs(self):
        return self.node is not None and self.stopped_until <= self.world.now_ns

    def start(self):
        self.node = self.world.node_class(self.host, self.world.lease_ns, token=self.world.token)
        self.pace = Pace(self.world.renew_ns, self.world.chance)
        self.world.at(self.world.now_ns, self.step, self.next_attempt())

    def next_attempt(self):
        self.attempt += 1
        return self.attempt

    def wake(self):
        self.world.at(max(self.pace.due_ns(), self.world.now_ns), self.step, self.next_attempt())

    def wake_if_idle(self):
        if not self.node.busy:
            self.wake()

    def step(self, attempt):
        if attempt != self.attempt or self.node is None:
            return
        if not self.runs:
            self.world.at(self.stopped_until, self.step, attempt)
            return
        request = self.node.prepare()
        self.world.send(self, self.node, request)
        self.world.at(self.world.now_ns + NS // 2, self.give_up, self.next_attempt())

    def give_up(self, attempt):
        if attempt == self.attempt and self.node is not None:
            self.pace.failed(self.world.now_ns)
            self.wake()

    def receive(self, node, request, reply):
        if node is not self.node:
            return
        if not self.runs:
            self.world.at(self.stopped_until, self.receive, node, request, reply)
            return
        if self.unfenced_since is not None and self.known_ns is None and request.number > self.copied_number:
            self.known_ns = self.world.now_ns
        fenced = node.fenced
        waits = node.awaits(request)
        grew = node.adopt(request, reply)
        if node.fenced != fenced:
            self.world.fenced(self)
        if waits:
            self.pace.answered(self.world.now_ns, grew)
            self.wake()


class Simulation:
    """One history. `limits` are those of the only model; `load` are requests a second that come to each host.

    If it `lowers` them, all hosts have the half of each from some time on.
    """

    def __init__(
        self, seed, *, script=SCRIPT, node_class=Node, real=False, faults=True, nodes=None, limits=None, load=None,
        lease_sec=None, lowers=False,
    ):  # fmt: skip
        self.chance = chance = Random(seed)
        self.script = script
        self.node_class = node_class
        self.now_ns = 0
        self.events = []
        self.order = itertools.count()
        self.log = []  # time, requests, tokens, machine
        self.outside = set()  # indices of what is outside of the guarantee
        self.crowd = None  # what was wrong with the number of open requests first
        self.faulty = faults
        long = chance.random() < 0.5
        self.named_limits = limits or self.draw_limits(long)
        self.limits = components(**self.named_limits)
        self.real = real
        self.lease_ns = (lease_sec or chance.choice((4, 8))) * NS
        self.renew_ns = NS
        self.duration_ns = (120 if long else 40) * NS
        self.quiet = not faults
        self.server = LuaServer(script, run_id=self.token())
        self.up = True
        self.wall_ns = WALL_NS
        self.replica = None
        self.lowered_ns = None
        self.holds_ns = None  # from when on the lowered limits hold: a lease after a store that does not learn has them
        self.forgotten, self.forgotten_ns, self.told = False, 0, set()
        self.machines = []
        for _ in range(nodes or chance.randint(2, 4)):
            self.add_machine().start()
        self.load = load
        if lowers:
            self.duration_ns += 2 * self.lease_ns + 40 * NS
            self.at(int(chance.uniform(5, 25) * NS), self.lower)
        if faults:
            self.at(0, self.fault)
            self.at(0, self.replicate)

    def draw_limits(self, long):
        chance = self.chance
        if chance.random() < 0.2:
            return {"concurrent_requests": chance.randint(3, 30)}
        if long:
            limits = {"requests_per_minute": chance.randint(20, 200)}
            if chance.random() < 0.5:
                limits["tokens_per_minute"] = chance.randint(200, 4000)
            return limits
        rate = chance.randint(2, 10)
        return {"requests_per_second": (rate, chance.randint(0, 20 * rate))}

    def token(self):
        return f"{self.chance.getrandbits(128):032x}"

    def lower(self):
        self.limits = [limit if limit == UNLIMITED else max(1, limit // 2) for limit in self.limits]
        self.lowered_ns = self.now_ns
        for machine in self.machines:
            row = machine.host.row("m")
            row.limits, row.changed = self.limits, True
            row.share(row.held)

    # -- machines

    def is_told(self):
        """Whether the store has the limits that were lowered, and has learned."""
        limits = self.server.data.get(f"{BASE}m:m", {}).get("limits")
        meta = self.server.data[f"{BASE}meta"]
        has_learned = int(meta["learning"]) <= int(meta["clock"]) and meta["run"] == self.server.run_id
        return has_learned and limits is not None and quantities_in(limits) == quantities_of(self.limits)

    def clock_of(self, drift):
        start = self.chance.randrange(10**15)
        return lambda: start + self.now_ns + int(self.now_ns * drift)

    def add_machine(self):
        drift = self.chance.uniform(-5e-5, 5e-5)
        clock, boot = self.clock_of(drift), self.token()
        if self.real:
            host = SimulatedHost(clock, self.named_limits, boot)
        else:
            host = ModelHost(clock, {"m": self.limits}, boot)
        machine = Machine(self, len(self.machines), host)
        self.machines.append(machine)
        self.at(self.now_ns, self.traffic, machine)
        return machine

    def fenced(self, machine):
        """What it admitted since it was copied, within the share of both, is outside of the guarantee."""
        if machine.unfenced_since is None:
            return
        until_ns = self.now_ns if machine.known_ns is None else machine.known_ns
        for at, entry in enumerate(self.log):
            if entry[3] is machine and machine.unfenced_since <= entry[0] <= until_ns:
                self.outside.add(at)
        for twin in self.machines:
            if twin.twin is machine.twin:
                twin.unfenced_since = None

    def traffic(self, machine):
        """Requests of one machine, in bursts and pauses."""
        chance = self.chance
        if machine.runs:
            for _ in range(1 if self.load else chance.choice((0, 1, 1, 2, 5, 20))):
                tokens = chance.randint(1, 20)
                if machine.host.begin("m", tokens):
                    self.began(machine, tokens, chance.expovariate(1 / chance.choice((0.1, 1, 10))))
                elif machine.host.starved:
                    machine.pace.urge()
                    machine.wake_if_idle()
        self.at(self.now_ns + int(chance.expovariate(self.load or 3) * NS), self.traffic, machine)

    def began(self, machine, tokens, lasts_sec):
        """A request was admitted."""
        self.log.append((self.now_ns, 1, tokens, machine))
        machine.begun.append(self.now_ns)
        self.at(self.now_ns + int(lasts_sec * NS), self.end_request, machine, self.now_ns)

    def end_request(self, machine, begun_ns):
        """A request ends, on a machine that is stopped not before it goes on."""
        if machine.stopped_until > self.now_ns:
            self.at(machine.stopped_until, self.end_request, machine, begun_ns)
        else:
            machine.host.end("m")
            machine.begun.remove(begun_ns)

    # -- the network

    def at(self, time_ns, action, *arguments):
        heapq.heappush(self.events, (time_ns, next(self.order), action, arguments))

    def delay(self):
        chance = self.chance
        if not self.quiet and chance.random() < 0.03:
            return int(chance.uniform(0, 15) * NS)
        return int(chance.uniform(0.0002, 0.02) * NS)

    def copies(self):
        if self.quiet:
            return 1
        return self.chance.choices((0, 1, 2), (0.05, 0.9, 0.05))[0]

    def send(self, machine, node, request):
        for _ in range(self.copies()):
            self.at(self.now_ns + self.delay(), self.arrive, machine, node, request, self.now_ns)

    def arrive(self, machine, node, request, sent_ns):
        server = self.server
        if not self.up or machine.cut_until > self.now_ns:
            return
        server.time_ns = self.wall_ns + self.now_ns
        reply = parse_reply(server.evaluate(request.keys(BASE), request.arguments()))
        if self.lowered_ns is not None and self.holds_ns is None and self.is_told():
            self.holds_ns = self.now_ns + self.lease_ns
        if self.forgotten:  # its learning begins with the first request, and lasts a lease
            self.forgotten = False
            self.at(self.now_ns + self.lease_ns - NS // 2, self.end_of_learning, self.told)
        if sent_ns >= self.forgotten_ns:
            self.told.add(machine)
        for _ in range(self.copies()):
            self.at(self.now_ns + self.delay(), machine.receive, node, request, reply)

    # -- faults

    def fault(self):
        chance = self.chance
        self.at(self.now_ns + int(chance.expovariate(1 / 6) * NS), self.fault)
        chance.choice(
            (self.crash, self.crash, self.stop, self.clone, self.cut, self.cut, self.outage, self.restart,
             self.forget_all, self.fail_over, self.jump, self.newcomer)
        )()  # fmt: skip

    def some_machine(self):
        running = [machine for machine in self.machines if machine.node is not None]
        return self.chance.choice(running) if running else None

    def crash(self):
        """A process dies; the next one goes on with the host's state, later, or never."""
        machine = self.some_machine()
        if machine is not None:
            machine.node = None
            if self.chance.random() < 0.7:
                self.at(self.now_ns + int(self.chance.choice((0.1, 3, 30)) * NS), self.come_back, machine)

    def come_back(self, machine):
        if machine.node is None:
            machine.start()

    def stop(self):
        machine = self.some_machine()
        if machine is not None:
            machine.stopped_until = self.now_ns + int(self.chance.uniform(0.5, 25) * NS)

    def cut(self):
        """A host does not reach the store for a while, and goes on with its shares."""
        machine = self.some_machine()
        if machine is not None:
            machine.cut_until = self.now_ns + int(self.chance.uniform(0.5, 15) * NS)

    def newcomer(self):
        if len(self.machines) < 7:
            self.add_machine().start()

    def clone(self):
        machine = self.some_machine()
        if self.real or machine is None or len(self.machines) >= 7 or machine.unfenced_since is not None:
            return
        twin = Machine(self, len(self.machines), None)
        clock = machine.host.now_ns
        twin.host = copy.deepcopy(machine.host, {id(clock): clock})
        self.machines.append(twin)
        twin.begun, twin.unleased_ns = list(machine.begun), machine.unleased_ns
        machine.twin = twin.twin = object()
        for one in (machine, twin):
            one.unfenced_since, one.known_ns = self.now_ns, None
            one.copied_number = machine.node.number
        twin.start()
        self.at(self.now_ns, self.traffic, twin)

    def outage(self, away_sec=None):
        if self.up:
            self.up = False
            self.at(self.now_ns + int((away_sec or self.chance.choice((0.5, 3, 12))) * NS), self.recover)

    def recover(self):
        self.up = True

    def restart(self, away_sec=None):
        """The server restarts, and has kept what it acknowledged."""
        self.server = LuaServer(self.script, self.token(), self.server.data)
        self.outage(away_sec)

    def has_unknown_copies(self):
        """Whether two hosts have one id: a server that forgets which of them it has seen cannot tell them apart."""
        return any(machine.unfenced_since is not None for machine in self.machines)

    def forget_all(self):
        """The server restarts empty."""
        if self.has_unknown_copies():
            return
        self.server = LuaServer(self.script, self.token())
        self.forgotten, self.forgotten_ns, self.told = True, self.now_ns, set()

    def fail_over(self):
        """A replica is promoted, which lacks the last seconds' writes."""
        if self.replica is not None and not self.has_unknown_copies():
            self.server = LuaServer(
                self.script, self.token(), {key: dict(fields) for key, fields in self.replica.items()}
            )
            self.forgotten, self.forgotten_ns, self.told = True, self.now_ns, set()

    def replicate(self):
        self.replica = self.server.snapshot()
        self.at(self.now_ns + int(self.chance.uniform(0.1, 8) * NS), self.replicate)

    def end_of_learning(self, told):
        """What hosts have used that did not tell a forgetful server in time is outside of the guarantee."""
        unknown = set(self.machines) - told
        self.outside.update(at for at, entry in enumerate(self.log) if entry[3] in unknown)

    def jump(self):
        self.wall_ns += int(self.chance.choice((-3600, -5, 0.3, 5, 3600)) * NS)

    # -- judgement

    def run(self):
        """Run the history; returns what went wrong, as text, or None."""
        while self.events and self.events[0][0] <= self.duration_ns:
            self.now_ns, _, action, arguments = heapq.heappop(self.events)
            for machine in self.machines:
                if not machine.leased:
                    machine.unleased_ns = self.now_ns
            action(*arguments)
            if self.crowd is None and self.limits[GRANTS] != UNLIMITED and not self.has_unknown_copies():
                self.count_open()
        if self.real:
            for machine in self.machines:
                machine.host.table.close()
        return self.excess()

    def open_requests(self, since_ns=-1):
        """How many requests are open that began since then, on hosts whose lease has not ended since they began."""
        return sum(
            begun_ns > max(since_ns, machine.unleased_ns)
            for machine in self.machines
            if machine.leased
            for begun_ns in machine.begun
        )

    def count_open(self):
        if self.lowered_ns is not None and self.holds_ns is None:
            return
        count = self.open_requests(-1 if self.holds_ns is None else self.holds_ns)
        if count > self.limits[GRANTS]:
            self.crowd = f"{count} of {self.limits[GRANTS]} requests are open at {self.now_ns / NS} s"

    def exclude_copies(self):
        """What a copy admitted that never reached the store again, within the share of both, is outside too."""
        for machine in self.machines:
            if machine.unfenced_since is not None and machine.known_ns is None:
                self.fenced(machine)

    def excess(self):
        self.exclude_copies()
        admitted = [entry for at, entry in enumerate(self.log) if at not in self.outside]
        if self.lowered_ns is not None:
            holds_ns = self.holds_ns
            admitted = [] if holds_ns is None else [entry for entry in admitted if entry[0] > holds_ns]
        for at in range(10):
            if self.limits[at] == UNLIMITED:
                continue
            window_ns, kind = WINDOW_SECONDS[at % 5] * NS, at // 5
            total, first = 0, 0
            for entry in admitted:
                total += entry[1 + kind]
                while admitted[first][0] <= entry[0] - window_ns:
                    total -= admitted[first][1 + kind]
                    first += 1
                if total > self.limits[at]:
                    return (
                        f"{total} of {self.limits[at]} in a window of {WINDOW_SECONDS[at % 5]} s at {entry[0] / NS} s"
                    )
        for drain, cap in LEVELS.values():
            if self.limits[cap] == UNLIMITED:
                continue
            level, before_ns = 0, 0
            for entry in admitted:
                level = max(0, level - self.limits[drain] * (entry[0] - before_ns))
                level += entry[1 + (cap - 11) // 2] * MILLION * NS
                before_ns = entry[0]
                if level > self.limits[cap] * NS:
                    return f"level {level / NS / MILLION} of {self.limits[cap] / MILLION} at {entry[0] / NS} s"
        return self.crowd

    def admitted_by_window(self, window_ns, begin_ns):
        """Requests admitted in each window from `begin_ns` on."""
        counts = defaultdict(int)
        for time_ns, requests, _, _ in self.log:
            if time_ns >= begin_ns:
                counts[(time_ns - begin_ns) // window_ns] += requests
        return counts
