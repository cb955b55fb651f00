"""Logging that never raises: a handler that fails cannot make a method of a manager fail."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


@functools.cache
def logger() -> logging.Logger:
    """Return the logger `modelquota`, which is silent unless the program configures logging."""
    import logging  # takes an eighth of the package's import time, and few programs log while they start

    found = logging.getLogger("modelquota")
    found.addHandler(logging.NullHandler())
    return found


def log(level: int, message: str, *values: object) -> None:
    """Log without ever raising: the decision is made, and a handler that fails must not keep it from the caller."""
    try:
        logger().log(level, message, *values)
    except Exception:
        import traceback

        traceback.print_exc()  # to sys.stderr, as logging itself does
