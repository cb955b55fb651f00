"""The screen of `modelquota top`: the models, nearest to a limit first, redrawn in place until q or Ctrl-C."""

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from modelquota.cli.format import counted
from modelquota.cli.status import status_table, totals_line
from modelquota.reading.reader import QuotaReader
from modelquota.reading.report import QuotaStats
from modelquota.reading.utilization import read_utilization

__all__ = ["Top", "run_top"]

# Headline, an empty line, the heading of the table, the line on models left out, and the totals.
OTHER_LINES = 5


class Top:
    """Draws the screen; keeps the totals of the previous one, to show rates per second."""

    def __init__(self, manager: QuotaReader, console: Console) -> None:
        self._manager = manager
        self._console = console
        self._before: tuple[float, QuotaStats] = monotonic(), manager.get_stats()

    def screen(self) -> RenderableType:
        """Read the manager and draw as many models as the terminal has lines for."""
        found, stats, now = read_utilization(self._manager), self._manager.get_stats(), monotonic()
        room = max(self._console.height - OTHER_LINES, 1)
        shown = found.by_family()[:room]
        left = len(found) - len(shown)
        table = status_table(found, shown, console=self._console) if shown else Text("no models")
        lines = [self._headline(len(found), stats, now), Text(), table]
        if left:
            lines.append(Text(f"and {counted(left, 'model')} with less pressure", "dim"))
        lines.append(totals_line(stats, self._manager.enforcement_enabled))
        self._before = now, stats
        return Group(*lines)

    def _headline(self, models: int, stats: QuotaStats, now: float) -> Text:
        then, before = self._before
        seconds = max(now - then, 1e-3)
        checks = stats.total_checks - before.total_checks
        denied = max(stats.denied_requests - before.denied_requests, 0)  # a request that waits is not denied yet
        return Text.assemble(
            ("modelquota top", "bold"),
            (f"  {counted(models, 'model')}  {checks / seconds:,.0f} checks/s", "dim"),
            (f"  {denied / seconds:,.0f} denied/s   q to quit", "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )


def run_top(manager: QuotaReader, console: Console, *, interval_sec: float = 1.0, seconds: float | None = None) -> None:
    """Show a manager until q or Ctrl-C, or for `seconds`; needs a terminal.

    Raises
    ------
    ValueError
        The console is not a terminal.
    """
    if not console.is_terminal:
        raise ValueError("top needs a terminal; `modelquota status` prints the same once")
    top = Top(manager, console)
    end = None if seconds is None else monotonic() + seconds
    with suppress(KeyboardInterrupt), _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(top.screen(), refresh=True)
            wait = interval_sec if end is None else min(interval_sec, end - monotonic())
            if wait <= 0 or keys.ends(wait):
                return


class _Keys:
    """Waits, and reports whether q was typed in the meantime."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def ends(self, wait_sec: float) -> bool:
        if self._descriptor is None:
            sleep(wait_sec)
            return False
        ready, _, _ = select.select([self._descriptor], [], [], wait_sec)
        if not ready:
            return False
        typed = os.read(self._descriptor, 64)  # not through sys.stdin, which would buffer more than one key
        return not typed or b"q" in typed.lower()


@contextmanager
def _keys() -> Iterator[_Keys]:
    """Read keys one by one, if there is a keyboard, and restore the terminal at the end."""
    if not sys.stdin.isatty():
        yield _Keys(None)
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield _Keys(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
