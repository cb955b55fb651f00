"""Is it faster than what else one could take: the original design as native code, and limiters written in Python?"""

import pytest

from benchmarks import native, peers
from benchmarks.harness.loops import OPERATIONS, Loop
from benchmarks.harness.models import require_no_violation
from benchmarks.harness.results import Row, ratio_at_most
from benchmarks.peers.handwritten import SixWindows
from benchmarks.peers.protocol import SIX_RULES, TOKENS
from modelquota import ResourceQuotaManager

NATIVE, PYTHON = "native original", "six limits of one key"
ROUNDS = 200
SLICES = 20
AMOUNTS = [rule.amount for rule in SIX_RULES]
OF_FASTEST_LIBRARY, OF_HANDWRITTEN = 40, 12


@pytest.fixture(scope="module")
def native_figures():
    try:
        return native.measure()
    except native.NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("models", "targets"), [(1, (ratio_at_most(1),)), (1_000, (ratio_at_most(1),)), (100_000, ())])
def test_native_original(bench, fleet_of, native_figures, models, targets):
    """The package is called from Python, the original from native code, with as many models in random order."""
    bench.note("native", native_figures)
    (native_ns,) = (each["ns"] for each in native_figures["checks"] if (each["models"], each["threads"]) == (models, 1))
    fleet = fleet_of(models if bench.enabled else 1)
    ids = fleet.random_ids(SLICES * OPERATIONS)
    ours = Loop("manager.check_quota(each, estimated_tokens=100)", ids, manager=fleet.manager)
    rounds = {"ours": ours.round_ns, "empty": ours.empty_round_ns}
    if fleet.floor:
        rounds["floor"] = Loop("floor.check(each, estimated_tokens=100)", ids, floor=fleet.floor).round_ns
    series = bench.interleave(ROUNDS, **rounds)
    case = f"from Python, {models:,} model{'s' * (models > 1)}"
    empty_ns = min(series["empty"])
    bench.add(Row(NATIVE, case, min(series["ours"]) - empty_ns, "ns", "native", native_ns, targets))
    if fleet.floor:
        # Where not even this is faster than native code, no decision called from Python can be.
        case = f"{case}, nothing decided"
        bench.add(Row(NATIVE, case, min(series["floor"]) - empty_ns, "ns", "native", native_ns))


@pytest.fixture
def six_limits():
    manager = ResourceQuotaManager()
    names = [f"max_{what}_per_{period}" for what in ("requests", "tokens") for period in ("second", "hour", "day")]
    manager.set_quota("model", **dict(zip(names, AMOUNTS, strict=True)))
    yield Loop(f'manager.check_quota("model", {TOKENS})', manager=manager)
    require_no_violation(manager)


def test_handwritten(bench, six_limits):
    limiter = SixWindows(tuple(AMOUNTS[:3]), tuple(AMOUNTS[3:]))
    theirs = Loop(f'limiter.check("model", {TOKENS})', limiter=limiter, operations=1_000)
    series = bench.interleave(ROUNDS, six_limits.round_ns, empty=six_limits.empty_round_ns, theirs=theirs.round_ns)
    ns, their_ns = (min(series[name]) - min(series["empty"]) for name in ("ours", "theirs"))
    targets = (ratio_at_most(1 / OF_HANDWRITTEN),)
    bench.add(Row(PYTHON, "beside a dict and a lock", ns, "ns", "hand-written", their_ns, targets))


def test_libraries(bench, six_limits):
    rows = peers.table() if bench.enabled else []
    bench.note("peers", [row.to_dict() for row in rows])
    series = bench.interleave(ROUNDS, six_limits.round_ns, empty=six_limits.empty_round_ns)
    ns = min(series["ours"]) - min(series["empty"])
    libraries = [row for row in rows if row.version]
    if not libraries and bench.enabled:
        pytest.skip("none of the libraries is installed: pip install 'modelquota[bench]'")
    fastest = min((row.six_limits_ns for row in libraries), default=None)
    for row in libraries:
        targets = (ratio_at_most(1 / OF_FASTEST_LIBRARY),) if row.six_limits_ns == fastest else ()
        case = f"beside {row.name}"
        bench.add(Row(PYTHON, case, ns, beside="library", beside_figure=row.six_limits_ns, targets=targets))
