"""How a command says no: one line on stderr, and an exit code that a script can tell from others."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from modelquota.cli.format import printable
from modelquota.errors import QuotaError, UnknownModelError

__all__ = ["EXIT_NO", "EXIT_UNUSABLE_INPUT", "answering", "say", "unusable"]

EXIT_NO = 1
"""The answer is no: a model is not known, or a figure is above what was asked about."""

EXIT_UNUSABLE_INPUT = 2
"""An argument or a file cannot be used, or an extra is missing."""


def say(errors: Console, message: str) -> None:
    """Print one line, however narrow the terminal, so that a path in it can be copied and a script can match it."""
    errors.print(f"modelquota: {printable(message)}", markup=False, highlight=False, soft_wrap=True)


def unusable(errors: Console, message: str, code: int = EXIT_UNUSABLE_INPUT) -> typer.Exit:
    """Print an error, and return what is to be raised."""
    say(errors, f"error: {message}")
    return typer.Exit(code)


@contextmanager
def answering(errors: Console, path: object, *, unknown_model: int = EXIT_UNUSABLE_INPUT) -> Iterator[None]:
    """Turn what a command may run into about the file at `path` into a message and an exit code."""
    try:
        yield
    except UnknownModelError as error:
        raise unusable(errors, str(error), unknown_model) from None
    except (
        BrokenPipeError
    ):  # that is about the output: click ends without a word, and with 1, as Python's manual has it
        raise
    except OSError as error:
        raise unusable(errors, f"{error.filename or path}: {error.strerror or error}") from None
    except (QuotaError, ValueError, ImportError) as error:
        raise unusable(errors, str(error)) from None
