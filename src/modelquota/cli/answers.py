"""How a command says no: one line on stderr, and an exit code that a script can tell from others."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from modelquota.cli.text import printable
from modelquota.errors import QuotaError, UnknownModelError

__all__ = [
    "EXIT_NO",
    "EXIT_READER_LEFT",
    "EXIT_UNUSABLE_INPUT",
    "Commands",
    "Output",
    "answering",
    "say",
    "unusable",
]

EXIT_NO = 1
"""The answer is no: a model is not known, or a figure is above what was asked about."""

EXIT_UNUSABLE_INPUT = 2
"""An argument or a file cannot be used, or an extra is missing."""

EXIT_READER_LEFT = 1
"""The reader of the output has closed it, as `head` does: the status with which Python and click end then."""


class Output(Console):
    """A console that leaves it to `Commands` to end if its reader has left."""

    def on_broken_pipe(self) -> None:
        """As rich has it: called while the BrokenPipeError is handled."""
        raise


class Commands(TyperGroup):
    """Commands whose reader may leave at any time: they end without a word, with `EXIT_READER_LEFT`."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """As click has it."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # and not while the interpreter ends, where nobody could catch it
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError, ValueError):  # not every stream has a descriptor
                os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            raise typer.Exit(EXIT_READER_LEFT) from None
        return result


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
    except BrokenPipeError:  # that is about the output, see `Commands`
        raise
    except OSError as error:
        raise unusable(errors, f"{error.filename or path}: {error.strerror or error}") from None
    except (QuotaError, ValueError, ImportError) as error:
        raise unusable(errors, str(error)) from None
