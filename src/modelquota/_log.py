"""Logging that no handler can turn into a failure of a verb."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


@functools.cache
def logger() -> logging.Logger:
    """Return the logger `modelquota`, which is quiet unless the program says otherwise."""
    import logging  # an eighth of the package's import, and most programs never meet a violation at start

    found = logging.getLogger("modelquota")
    found.addHandler(logging.NullHandler())
    return found


def log(level: int, message: str, *values: object) -> None:
    """Log, come what may: the decision has been taken, and a handler that raises must not keep it from its caller."""
    try:
        logger().log(level, message, *values)
    except Exception:
        import traceback

        traceback.print_exc()  # to sys.stderr, as logging itself does
