"""What `modelquota demo` runs and prints."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import pairwise
from statistics import median, quantiles
from time import monotonic_ns, perf_counter_ns

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from modelquota.cli.demo_table import LINES_OF_A_MODEL, demo_table
from modelquota.cli.format import duration
from modelquota.demo.traffic import MODELS, NS_PER_MS, NS_PER_SECOND, Lane, Tally, total
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, ViolationAction

__all__ = ["run_demo"]

REFRESHES_PER_SECOND = 4
# Headline, the heading of the table, and the footer line.
OTHER_LINES = 3
CHECKS_IN_A_ROW = 10_000
ROUNDS_IN_A_ROW = 20


def run_demo(console: Console, *, seconds: float, threads: int, seed: int | None) -> None:
    """Run the traffic of `MODELS` for some seconds on the real clock, show it live, and report.

    On a terminal a table is redrawn in place; otherwise only the last one is printed, without control codes.
    Ctrl-C ends the traffic early, with the same report.
    """
    manager = ResourceQuotaManager()
    for traffic in MODELS:
        manager.set_quota(traffic.quota)
    # A generator for each lane: lanes would draw from a shared one in random order.
    seeds = random.Random(seed)
    start_ns = monotonic_ns()
    end_ns = start_ns + round(seconds * NS_PER_SECOND)
    lanes = [
        Lane(manager, MODELS, share=1 / threads, rng=random.Random(seeds.random()), now=monotonic_ns)
        for _ in range(threads)
    ]

    def screen() -> RenderableType:
        elapsed_s = (min(monotonic_ns(), end_ns) - start_ns) / NS_PER_SECOND
        shown, spaced, over = len(MODELS), True, stop.is_set()
        if console.is_terminal and not over:
            # A table that does not fit cannot be redrawn in place, and rich would cut off the end, the footer line.
            room = console.height - OTHER_LINES
            spaced = room >= shown * (LINES_OF_A_MODEL + 1)
            shown = min(shown, max(room // LINES_OF_A_MODEL, 0))
        table = demo_table(manager, MODELS[:shown], total(lanes), width=console.width, spaced=spaced)
        footline = _footline(lanes, elapsed_s, seconds, over)
        return Group(_headline(threads), table, *([Text()] if spaced else []), footline)

    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="client") as pool:
        clients = [pool.submit(_drive, lane, stop, end_ns) for lane in lanes]
        live = Live(get_renderable=screen, console=console, refresh_per_second=REFRESHES_PER_SECOND)
        with live if console.is_terminal else nullcontext():
            try:
                wait(clients, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                pass
            finally:
                stop.set()
            wait(clients)
            ran_ms = (min(monotonic_ns(), end_ns) - start_ns) / NS_PER_MS
    for client in clients:
        client.result()
    if not console.is_terminal:
        console.print(screen())
    for paragraph in _closing(lanes, start_ns, ran_ms):
        console.print()
        console.print(paragraph)


def _drive(lane: Lane, stop: threading.Event, end_ns: int) -> None:
    """Step a lane whenever something is due, until `end_ns` or until `stop` is set."""
    while not stop.is_set() and (now_ns := monotonic_ns()) < end_ns:
        lane.step()
        stop.wait(max(min(lane.next_ns, end_ns) - now_ns, 0) / NS_PER_SECOND)


def _headline(threads: int) -> Text:
    return Text.assemble(
        ("modelquota demo", "bold"),
        (f"  {len(MODELS)} models, {threads} threads, generated traffic, the real clock", "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _footline(lanes: Sequence[Lane], elapsed_s: float, seconds: float, over: bool) -> Text:
    # How long they took is left to the closing report, which has room to explain it: threads wake up to cold caches.
    checks = sum(len(lane.check_ns) for lane in lanes)
    line = Text(f"{elapsed_s:.1f} of {seconds:g} s   {checks:,} checks", "dim", no_wrap=True, overflow="ellipsis")
    return line.append("" if over else "   Ctrl-C ends early")


def _closing(lanes: Sequence[Lane], start_ns: int, ran_ms: float) -> Iterator[RenderableType]:
    """Yield what was seen, how fast it was, and what to do next."""
    tallies = total(lanes)
    sent = sum(tally.sent for tally in tallies.values())
    yield Text.assemble(
        ("What you saw. ", "bold"),
        f"{sent:,} requests in {duration(ran_ms)}, and four ways to handle the ones over a limit:",
    )
    seen = Table.grid(padding=(0, 2, 0, 0))
    for traffic in MODELS:
        model_id = traffic.quota.model_id
        seen.add_row("", Text(model_id, "bold"), Text(_seen(traffic.quota, tallies[model_id], start_ns)))
    yield seen
    check_ns = [check_ns for lane in lanes for check_ns in lane.check_ns]
    if len(check_ns) > 1:
        yield Text.assemble(
            ("How fast. ", "bold"),
            f"{_check_in_a_row_ns():.0f} ns a check, {CHECKS_IN_A_ROW:,} in a row, the best of {ROUNDS_IN_A_ROW}. "
            "In the loop above, where threads "
            f"wake up for each request and find the caches cold, {median(check_ns):,.0f} ns in the median and "
            f"{quantiles(check_ns, n=100)[-1]:,.0f} at the 99th percentile; checks were timed one by one, "
            f"of which the timer takes some {_timer_ns():.0f} ns.",
        )
    yield Text.assemble(
        ("Next. ", "bold"),
        ("modelquota replay TRACE.csv --quotas quotas.toml", "cyan"),
        " tries limits on your own traffic. To ask before each request of your own loop: ",
        ("manager.check_quota(model, tokens)", "cyan"),
        ", shown in the README.",
    )


def _seen(quota: ResourceQuotaConfig, tally: Tally, start_ns: int) -> str:
    """Describe what the limits of a model did, in one sentence."""
    if not tally.denials or tally.first_violation_ns is None:
        return "stayed within its limits"
    limit = tally.denials.most_common(1)[0][0].label
    after = duration((tally.first_violation_ns - start_ns) / NS_PER_MS)
    match quota.on_violation:
        case ViolationAction.WARN:
            return f"let {tally.warned:,} requests through over its {limit}, with a warning each"
        case ViolationAction.REJECT:
            told = "" if tally.retry_after_ms is None else f"; the next may come in {duration(tally.retry_after_ms)}"
            return f"reached its {limit} after {after} and rejected {tally.denied:,} requests{told}"
    verb = "queued" if quota.on_violation is ViolationAction.QUEUE else "throttled"
    waits = f" after {duration(median(tally.waits_ms))} in the median" if tally.waits_ms else ""
    given_up = f"; {tally.denied:,} could not be admitted within {quota.grace_period_sec:g} s" if tally.denied else ""
    admitted = f"{len(tally.waits_ms):,} {'was' if len(tally.waits_ms) == 1 else 'were'} admitted{waits}"
    waiting = f"{tally.waiting:,} still {'waits' if tally.waiting == 1 else 'wait'}"
    return f"{verb} what exceeded its {limit}: {admitted}, {waiting}{given_up}"


def _timer_ns() -> float:
    """Measure what reading the timer adds to a single timed check."""
    readings = [perf_counter_ns() for _ in range(2_001)]
    return median(after - before for before, after in pairwise(readings))


def _check_in_a_row_ns() -> float:
    """Time of a check, as the average of many that are all admitted, loop included; the best of several rounds."""
    manager = ResourceQuotaManager()
    manager.set_quota(
        "timed",
        **{limit.quota_field: 1e12 if limit.is_rate else 10**15 for limit in CATALOGUE.values() if limit.window},
    )
    check_quota = manager.check_quota
    best_ns = float("inf")
    for _ in range(ROUNDS_IN_A_ROW):  # other work on the machine slows some of them down
        start_ns = perf_counter_ns()
        for _ in range(CHECKS_IN_A_ROW):
            check_quota("timed", 100)
        best_ns = min(best_ns, (perf_counter_ns() - start_ns) / CHECKS_IN_A_ROW)
    return best_ns
