"""What does a request pay for its line in the ledger, with the writer at work?"""

from time import perf_counter_ns

from benchmarks.harness.results import Row, at_most
from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.monitoring.ledger import Ledger
from modelquota.monitoring.ledger.line import request_line

QUESTION = "ledger"
RECORDS = 20_000
ROUNDS = 20
GRANTS = 200  # fewer than the writer's pause has room for: one of many rounds is free of it, and of everything else
GRANT_ROUNDS = 300
MOST_NS = 2_000
IDS = ("acme", "llama-70b")


def test_a_record(bench, tmp_path):
    """`record` in a loop, which leaves the writer no pause: its share of the interpreter is in the figure."""
    with Ledger(tmp_path / "usage.jsonl", buffer_size=1 << 22) as ledger:

        def ours():
            start_ns = perf_counter_ns()
            for _ in range(RECORDS):
                ledger.record(IDS, (100, 0, 50), (60, 40, 5), waited_us=5, duration_us=900)
            took_ns = perf_counter_ns() - start_ns
            ledger.flush()
            return took_ns / RECORDS

        series = bench.interleave(ROUNDS, ours)
    assert ledger.lost == 0
    bench.add(Row(QUESTION, "record() of a request", min(series["ours"]), targets=(at_most(MOST_NS),)))


def test_a_grant(bench, tmp_path):
    """`acquire` of a ledger, beside that of its manager: the difference is what the line costs its request."""
    manager = ResourceQuotaManager()
    for model_id in IDS:
        manager.set_quota(ResourceQuotaConfig.unlimited(model_id))

    def round_of(acquire):
        def ours():
            start_ns = perf_counter_ns()
            for _ in range(GRANTS):
                with acquire(IDS, 500) as grant:
                    grant.settle(320)
            return (perf_counter_ns() - start_ns) / GRANTS

        return ours

    with manager.ledger(tmp_path / "usage.jsonl", buffer_size=1 << 22) as ledger:
        series = bench.interleave(GRANT_ROUNDS, round_of(ledger.acquire), without=round_of(manager.acquire))
    assert ledger.lost == 0
    ours, without = min(series["ours"]), min(series["without"])
    bench.add(Row(QUESTION, "acquire, settle and release", ours, beside="without a ledger", beside_figure=without))
    bench.add(Row(QUESTION, "what a ledger adds to it", ours - without, targets=(at_most(MOST_NS),)))


def test_a_line(bench):
    """What the writer does for each request in its own time."""
    record = (1_700_000_000_000_000, IDS, (100, 0, 50), (60, 40, 5), "admitted", None, 5, 900, 0, None)

    def ours():
        start_ns = perf_counter_ns()
        for _ in range(RECORDS):
            request_line(record)
        return (perf_counter_ns() - start_ns) / RECORDS

    bench.add(Row(QUESTION, "formatting its line, in the writer", min(bench.interleave(ROUNDS, ours)["ours"])))
