"""What the benchmarks share: the floors, how rounds are run, and the one table at the end."""

import gc
import shutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from benchmarks.floor.build import FloorUnavailableError, load_floor
from benchmarks.harness import table
from benchmarks.harness.build_info import build_info
from benchmarks.harness.loops import Loop, Round
from benchmarks.harness.models import GENEROUS, Fleet, require_no_violation
from benchmarks.harness.results import FLOOR, Row, Target, render
from modelquota import ResourceQuotaManager

ROUNDS = 200
#: The questions from the first to the last; what takes longest, and most memory, is last.
ORDER = (
    "single",
    "models",
    "meters",
    "denied",
    "batch",
    "grants",
    "threads",
    "processes",
    "http",
    "rivals",
    "memory",
    "reading",
    "import",
    "ledger",
    "cluster",
    "tuning",
    "floor",
    "growth",
)
ROWS = pytest.StashKey[list[Row]]()
NOTES = pytest.StashKey[list[str]]()


class Bench:
    """Runs rounds through pytest-benchmark and puts down what they say."""

    def __init__(self, benchmark: Any, rows: list[Row]) -> None:
        self._benchmark = benchmark
        self._rows = rows

    @property
    def enabled(self) -> bool:
        """False under ``--benchmark-disable``: everything runs once, and no figure means anything."""
        return self._benchmark.enabled

    def interleave(self, rounds: int, ours: Round, **others: Round) -> dict[str, list[float]]:
        """Run all rounds in turn, so that whatever the machine does meanwhile befalls all of them.

        Returns
        -------
        dict
            The nanoseconds per operation of each round, under ``ours`` and the names of the others.
        """
        series: dict[str, list[float]] = {name: [] for name in ("ours", *others)}

        def run_others() -> None:
            for name, other in others.items():
                series[name].append(other())

        def run_ours() -> None:
            series["ours"].append(ours())

        gc.collect()
        gc.disable()
        try:
            self._benchmark.pedantic(run_ours, setup=run_others, rounds=rounds, warmup_rounds=1)
        finally:
            gc.enable()
        return {name: values[1:] or values for name, values in series.items()}

    def once(self, work: Callable[[], Any]) -> Any:
        """Run what measures itself."""
        return self._benchmark.pedantic(work)

    def against_floor(
        self,
        question: str,
        case: str,
        ours: Loop | Round,
        floor: Loop | Round | None,
        *targets: Target,
        rounds: int = ROUNDS,
        judged: bool = True,
    ) -> None:
        """Measure a loop, or batches, and the floor: the least of all rounds each, the empty loop subtracted.

        `judged` is False where the figure hangs on memory that the whole machine shares.
        """
        others = {}
        if isinstance(ours, Loop):
            others["empty"] = ours.empty_round_ns
        if floor is not None:
            others["floor"] = _round_of(floor)
        series = self.interleave(rounds, _round_of(ours), **others)
        loop_ns = min(series.get("empty", [0.0]))
        ns = min(series["ours"]) - loop_ns
        if floor is None:
            self.add(Row(question, case, ns, targets=tuple(each for each in targets if each.of == "figure")))
        else:
            self.add(Row(question, case, ns, "ns", FLOOR, min(series["floor"]) - loop_ns, targets, judged))

    def add(self, row: Row) -> None:
        """Put a row into the table and into the JSON."""
        if self.enabled:
            self._rows.append(row)
            self._benchmark.extra_info.setdefault("rows", []).append(row.to_dict())

    def note(self, name: str, values: Any) -> None:
        """Put anything else into the JSON."""
        self._benchmark.extra_info[name] = values


def _round_of(timed: Loop | Round) -> Round:
    return timed.round_ns if isinstance(timed, Loop) else timed


@pytest.fixture
def bench(benchmark: Any, pytestconfig: pytest.Config) -> Bench:
    return Bench(benchmark, pytestconfig.stash[ROWS])


@pytest.fixture(scope="session")
def floors(pytestconfig: pytest.Config) -> ModuleType | None:
    """`benchmarks.floor.floor`, or None where it cannot be compiled: then figures stand alone."""
    try:
        return load_floor()
    except FloorUnavailableError as error:
        pytestconfig.stash[NOTES].append(f"No floors: {error}")
        return None


@pytest.fixture
def manager() -> Iterator[ResourceQuotaManager]:
    """One model, ``"llama"``, with every limit, none of which is met."""
    manager = ResourceQuotaManager()
    manager.set_quota("llama", **GENEROUS)
    yield manager
    require_no_violation(manager)


@pytest.fixture
def floor(floors: ModuleType | None) -> Any:
    """The floor with a row for that model, or None."""
    return floors and floors.FloorTable(["llama"])


@pytest.fixture(scope="session")
def fleet_of(floors: ModuleType | None) -> Iterator[Callable[..., Fleet]]:
    """Make a fleet, or give the one that was made: ``fleet_of(1_000, time_runs=False)``."""
    fleets: dict[tuple[int, bool], Fleet] = {}

    def fleet_of(count: int, *, time_runs: bool = True) -> Fleet:
        key = count, time_runs
        if key not in fleets:
            fleets[key] = Fleet(count, floors, time_runs=time_runs)
        return fleets[key]

    yield fleet_of
    for fleet in fleets.values():
        require_no_violation(fleet.manager)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[NOTES] = []
    # Its own table shows seconds per round, which mean nothing beside nanoseconds per check.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"bench_{question}" for question in ORDER]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(build_info())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        writer = terminalreporter
        headings, lines = render(rows)
        text = table.draw(headings, lines, colour=writer.hasmarkup, width=shutil.get_terminal_size().columns)
        writer.section("modelquota, beside what it stands on")
        writer.write(text)
        missed = sum(not row.meets(target) for row in rows for target in row.targets)
        targets = sum(len(row.targets) for row in rows)
        if targets:
            writer.write_line(f"{targets - missed} of {targets} targets met.")
    for note in config.stash[NOTES]:
        terminalreporter.write_line(note)
