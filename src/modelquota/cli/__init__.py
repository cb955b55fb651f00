"""The command `modelquota`. Needs the extra `modelquota[cli]`, as nothing outside this folder does."""

import sys
from collections.abc import Sequence

__all__ = ["main"]

_OF_THE_EXTRA = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the answer is no, or the command was stopped early. 2: the arguments or a file cannot be used, or the
    extra `cli` is not installed; a message on stderr explains what to do.
    """
    try:
        from modelquota.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_THE_EXTRA:
            raise
        print("modelquota's command line needs the extra 'cli': pip install 'modelquota[cli]'", file=sys.stderr)
        return 2
    return run(arguments)
