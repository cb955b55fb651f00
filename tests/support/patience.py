"""Waiting in a test for what other threads, processes and servers do."""

import time
from collections.abc import Callable

PATIENCE = 30
"""Seconds in which anything has happened, however busy the machine."""


def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; AssertionError where it does not in time."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "nothing happened"
        time.sleep(0.0005)
