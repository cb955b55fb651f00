"""The comparison as rows, as a text table and as bars to plot."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.peers.adapters_check import check_adapter
from benchmarks.peers.handwritten import DictAndLock
from benchmarks.peers.libraries import LIBRARIES
from benchmarks.peers.protocol import Peer
from benchmarks.peers.timing import bytes_per_key, least_keyed_ns, least_ns
from benchmarks.peers.true_window import most_admitted_by

PEERS: tuple[type[Peer], ...] = (DictAndLock, *LIBRARIES)
KEYS = 1_000
MEMORY_KEYS = 200
BUSY_CHECKS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One peer. Times are nanoseconds per admitted check; None throughout, with `unavailable`, without its library.

    `bytes_per_key` is after one request to each key under one limit, `bytes_per_busy_key` after 100.
    `most_admitted` is the most of a limit of 100 per 2 s that got into any true 2 s.
    """

    name: str
    version: str = ""
    one_limit_ns: float | None = None
    six_limits_ns: float | None = None
    keyed_ns: float | None = None
    large_ns: float | None = None
    bytes_per_key: int | None = None
    bytes_per_busy_key: int | None = None
    most_admitted: int | None = None
    unavailable: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


def table(progress: Callable[[str], object] = str) -> list[Row]:
    """Check every adapter, then measure every peer: one row each, in less than a minute.

    `progress` is called with the name of each peer as its turn comes.

    Raises
    ------
    AdapterError
        Where an adapter does not limit as it is to.
    RefusedError
        Where a check was refused while it was timed.
    """
    rows = []
    for make in PEERS:
        progress(make.name)
        try:
            peer = make()
        except ImportError as error:
            rows.append(Row(make.name, unavailable=f"{error}; pip install 'modelquota[bench]'"))
            continue
        check_adapter(peer)
        rows.append(_measured(peer))
    return rows


def _measured(peer: Peer) -> Row:
    return Row(
        name=peer.name,
        version=peer.version,
        one_limit_ns=least_ns(peer, peer.one_limit, peer.most_checks),
        six_limits_ns=least_ns(peer, peer.six_limits, peer.most_checks),
        keyed_ns=least_keyed_ns(peer, KEYS, peer.most_checks * 10),
        large_ns=least_ns(peer, peer.large, peer.most_large_checks),
        bytes_per_key=bytes_per_key(peer, MEMORY_KEYS, 1),
        bytes_per_busy_key=bytes_per_key(peer, MEMORY_KEYS, BUSY_CHECKS),
        most_admitted=most_admitted_by(peer),
    )


def bars(rows: Sequence[Row]) -> list[dict]:
    """Return what ``benchmarks.drawing.plot`` draws: for each peer one limit and six, the fastest of either first."""
    drawn = []
    for group, kind, field in (
        ("In Python, one limit", "peer-one", "one_limit_ns"),
        ("In Python, six limits of one key", "peer-six", "six_limits_ns"),
    ):
        named = [(getattr(row, field), row.name) for row in rows if not row.unavailable]
        drawn += [{"group": group, "label": name, "ns": ns, "kind": kind} for ns, name in sorted(named)]
    return drawn


HEADINGS = ("peer", "version", "one limit", "six limits", "1,000 keys", "100,000 tokens", "bytes/key", "busy", "of 100")


def render(rows: Sequence[Row]) -> str:
    """Return the rows as a text table, times in nanoseconds; its last column is the most admitted of 100 per 2 s."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    # Names to the left, figures to the right.
    sides = ("<", "<", *">" * (len(HEADINGS) - 2))
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    text = [layout.format(*line) for line in lines]
    text += [f"{row.name}: {row.unavailable}" for row in rows if row.unavailable]
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    figures = (
        row.one_limit_ns,
        row.six_limits_ns,
        row.keyed_ns,
        row.large_ns,
        row.bytes_per_key,
        row.bytes_per_busy_key,
        row.most_admitted,
    )
    return (row.name, row.version, *("-" if figure is None else f"{figure:,.0f}" for figure in figures))
