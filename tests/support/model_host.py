"""A host as a node sees it, in plain Python: its use is summed from logs of what it admitted."""

from collections import deque

from modelquota.cluster.book import Rows
from modelquota.cluster.quantities import (
    COMPONENTS,
    CONCURRENCY,
    KEEP,
    LEVELS,
    MILLION,
    UNLIMITED,
    WINDOW_SECONDS,
    component_of,
)

NS = 10**9
GRANTS = component_of(CONCURRENCY)
AS_IT_IS = (KEEP,) * COMPONENTS


def components(**limits):
    """A row of limits: requests_per_minute=..., requests_per_second=(rate, burst), or concurrent_requests=...."""
    row = [UNLIMITED] * COMPONENTS
    row[GRANTS] = limits.pop("concurrent_requests", UNLIMITED)
    for name, limit in limits.items():
        kind = 0 if name.startswith("requests") else 1
        window = ("second", "minute", "hour", "day", "month").index(name.rpartition("_")[2])
        if window == 0:
            rate, burst = limit
            row[5 * kind] = -(-rate // 1) + burst
            row[10 + 2 * kind], row[11 + 2 * kind] = rate * MILLION, (max(rate, 1) + burst) * MILLION
        else:
            row[5 * kind + window] = limit
    return row


class ModelRow:
    def __init__(self, model_id, limits):
        self.model_id = model_id
        self.limits = limits
        self.windows = [
            (at, at // 5, WINDOW_SECONDS[at % 5] * NS * 61 // 60) for at in range(10) if limits[at] != UNLIMITED
        ]
        self.caps = [(drain, cap, (cap - 11) // 2) for drain, cap in LEVELS.values() if limits[cap] != UNLIMITED]
        self.share([0] * COMPONENTS)
        self.logs = {at: deque() for at, _, _ in self.windows}
        self.sums = dict.fromkeys(self.logs, 0)
        self.levels = {drain: 0 for drain, _, _ in self.caps}  # in 10**-15 of a request or token
        self.level_ns = 0
        self.open = 0
        self.charged = [0, 0]
        self.clear()
        self.starved = 0
        self.changed = True

    def share(self, held):
        self.held = held
        self.bounds = [min(pair) for pair in zip(held, self.limits, strict=True)]

    def clear(self):
        self.peak, self.needed, self.changed = [0, 0], [0, 0], False

    def advance(self, now_ns):
        for at, _, counted_ns in self.windows:
            log = self.logs[at]
            while log and log[0][0] <= now_ns - counted_ns:
                self.sums[at] -= log.popleft()[1]
        for drain, _, _ in self.caps:
            self.levels[drain] = max(0, self.levels[drain] - self.bounds[drain] * (now_ns - self.level_ns))
        self.level_ns = now_ns

    def used(self):
        row = [0] * COMPONENTS
        for at, total in self.sums.items():
            row[at] = total
        for drain, cap, _ in self.caps:
            row[cap] = -(-self.levels[drain] // NS)
        row[GRANTS] = self.open
        return row

    def fits(self, bounds, request):
        for at, kind, _ in self.windows:
            if self.sums[at] + request[kind] > bounds[at]:
                return False
        for drain, cap, kind in self.caps:
            if self.levels[drain] + request[kind] * MILLION * NS > bounds[cap] * NS:
                return False
        return self.limits[GRANTS] == UNLIMITED or self.open < bounds[GRANTS]

    def admit(self, now_ns, tokens, leased):
        request = (1, tokens)
        if not leased or not self.fits(self.bounds, request):
            if self.fits(self.limits, request):
                self.starved += 1
                self.needed = [max(pair) for pair in zip(self.needed, request, strict=True)]
                self.changed = True
            return False
        for at, kind, _ in self.windows:
            self.logs[at].append((now_ns, request[kind]))
            self.sums[at] += request[kind]
        for drain, _, kind in self.caps:
            self.levels[drain] += request[kind] * MILLION * NS
        for kind in range(2):
            self.charged[kind] += request[kind]
            self.peak[kind] = max(self.peak[kind], request[kind])
        self.open += 1
        self.changed = True
        return True


class ModelHost:
    """A `Host`. `clock` returns the time of its machine in ns."""

    def __init__(self, clock, quotas, boot="boot"):
        self.now_ns = clock
        self.boot = boot
        self.rows = {code: ModelRow(model_id, limits) for code, (model_id, limits) in enumerate(quotas.items())}
        self.end_ns = 0
        self.saved = b""

    def row(self, model_id):
        return next(row for row in self.rows.values() if row.model_id == model_id)

    def begin(self, model_id, tokens):
        """Whether a request is admitted; then it is open until `end`."""
        now_ns = self.now_ns()
        row = self.row(model_id)
        row.advance(now_ns)
        return row.admit(now_ns, tokens, now_ns < self.end_ns)

    def end(self, model_id):
        self.row(model_id).open -= 1

    def open(self, model_id):
        return self.row(model_id).open

    @property
    def starved(self):
        return any(row.starved for row in self.rows.values())

    def codes(self, changed):
        codes = [code for code, row in self.rows.items() if row.changed or not changed]
        return sorted(codes, key=lambda code: not any(self.rows[code].needed)) if changed else codes

    def names(self, codes):
        return [self.rows[code].model_id for code in codes]

    def lease_end_ns(self):
        return self.end_ns

    def renew_lease(self, end_ns):
        self.end_ns = end_ns

    def load(self):
        return self.saved

    def save(self, data):
        assert len(data) <= 240
        self.saved = data

    def exchange(self, codes, asked, below_used=False):
        rows = [self.rows[code] for code in codes]
        answers = []
        for at, row in enumerate(rows):
            row.advance(self.now_ns())
            used = row.used()
            if asked[at] != AS_IT_IS:
                least = [0] * COMPONENTS if below_used else used
                held = [
                    has if share == KEEP else max(share, min(least[component], has)) if share < has else share
                    for component, (has, share) in enumerate(zip(row.held, asked[at], strict=True))
                ]
                row.share(held)
            answers.append(
                (True, tuple(row.held), used, row.limits, tuple(row.charged), row.peak, row.needed, row.starved, 0)
            )
            row.clear()
        return Rows(*zip(*answers, strict=True))
