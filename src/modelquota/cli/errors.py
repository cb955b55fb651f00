"""Errors of the commands: one line on stderr, and an exit code that a script can distinguish."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from modelquota.cli.format import printable
from modelquota.errors import QuotaError, UnknownModelError

__all__ = ["EXIT_NO", "EXIT_UNUSABLE_INPUT", "answering", "quiet_log", "say", "unusable"]

EXIT_NO = 1
"""The answer is no: a model is not known, or a value is above the one given."""

EXIT_UNUSABLE_INPUT = 2
"""An argument or a file cannot be used, or an extra is missing."""


def say(errors: Console, message: str) -> None:
    """Print one line, however narrow the terminal, so that a path in it can be copied and a script can match it."""
    errors.print(f"modelquota: {printable(message)}", markup=False, highlight=False, soft_wrap=True)


def unusable(errors: Console, message: str, code: int = EXIT_UNUSABLE_INPUT) -> typer.Exit:
    """Print an error, and return the exception to raise."""
    say(errors, f"error: {message}")
    return typer.Exit(code)


@contextmanager
def answering(errors: Console, path: object, *, unknown_model: int = EXIT_UNUSABLE_INPUT) -> Iterator[None]:
    """Turn an error about the file at `path` into a message and an exit code."""
    try:
        yield
    except UnknownModelError as error:
        raise unusable(errors, str(error), unknown_model) from None
    except BrokenPipeError:  # about the output: click exits silently with 1, as Python's manual recommends
        raise
    except OSError as error:
        raise unusable(errors, f"{error.filename or path}: {error.strerror or error}") from None
    except (QuotaError, ValueError, ImportError) as error:
        raise unusable(errors, str(error)) from None


@contextmanager
def quiet_log() -> Iterator[None]:
    """Keep violations out of the terminal: the commands report all of them."""
    log = logging.getLogger("modelquota")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
