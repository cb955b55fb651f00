"""Every exception that modelquota raises on purpose, each with the figures of the case as attributes.

Wrong types and figures in the arguments of a check are plain `TypeError` and `ValueError`, as for any Python function.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelquota._core.table.result import QuotaCheckResult


class QuotaError(Exception):
    """The base of all errors below: catch it to catch everything that is modelquota's own."""


class QuotaConfigError(QuotaError, ValueError):
    """A field of a quota has a value that is not accepted, or is no field at all.

    Raised where a config is made or read, before anything has changed. Correct the field that is named.

    Parameters
    ----------
    field : str
        Name of the field.
    value : object
        What was given.
    accepted : str
        What is accepted instead, with its range and unit.

    Examples
    --------
    >>> print(QuotaConfigError("max_ram_mb", -1, "an integer from 0 to 2**62"))
    max_ram_mb=-1 is not accepted; expected an integer from 0 to 2**62
    """

    def __init__(self, field: str, value: object, accepted: str) -> None:
        # All arguments stay in `args`, so that the error survives pickling.
        super().__init__(field, value, accepted)
        self.field = field
        self.value = value
        self.accepted = accepted

    def __str__(self) -> str:
        return f"{self.field}={_shown(self.value)} is not accepted; expected {self.accepted}"


class QuotaFileError(QuotaConfigError):
    """A quota file says something that is not accepted.

    Raised by `load_quotas`, which then loads nothing. Correct the file where the message points. A file that cannot be
    opened or read at all is an `OSError`.

    Parameters
    ----------
    path : str or os.PathLike
        The file; kept as str.
    table : str
        The table as its header names it, such as ``models."llama"``; empty for the top level.
    field : str
        The key in that table; empty where the table itself is what is not accepted.
    value : object
        What stands there; with neither table nor field, what the TOML parser said of the file, with line and column.
    accepted : str
        What is accepted instead.
    line : int or None
        Where it stands, from 1; None where it has no line of its own, or where the parser's words name it.

    Examples
    --------
    >>> print(QuotaFileError("quotas.toml", 'models."llama"', "max_ram_mb", -1, "an integer from 0 to 2**62", 7))
    quotas.toml: line 7: [models."llama"]: max_ram_mb=-1 is not accepted; expected an integer from 0 to 2**62
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        table: str,
        field: str,
        value: object,
        accepted: str,
        line: int | None = None,
    ) -> None:
        super().__init__(field, value, accepted)
        self.path = os.fspath(path)
        self.table = table
        self.line = line
        self.args = (self.path, table, field, value, accepted, line)

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}: line {self.line}"
        if self.field:
            return f"{where}: [{self.table}]: {super().__str__()}" if self.table else f"{where}: {super().__str__()}"
        what = f"[{self.table}] is not accepted" if self.table else self.value
        return f"{where}: {what}; expected {self.accepted}"


class UnknownModelError(QuotaError, KeyError):
    """A verb that needs a known model was given an id that has no quota.

    The id was never set, or `remove_quota` has forgotten it. Call `set_quota` first.

    Parameters
    ----------
    model_id : str
        The id that is not known.
    message : str, optional
        A sentence that says more than the usual one.

    Examples
    --------
    >>> print(UnknownModelError("llama"))
    no quota is set for model 'llama'; call set_quota for it first
    """

    def __init__(self, model_id: str, message: str | None = None) -> None:
        super().__init__(model_id, message)
        self.model_id = model_id
        self.message = message

    def __str__(self) -> str:
        return self.message or f"no quota is set for model {_shown(self.model_id)}; call set_quota for it first"


class QuotaExceededError(QuotaError):
    """A request was denied, or waited as long as it may and was not admitted. Nothing has been charged.

    Wait for `retry_after_ms` where that is no None, free memory or ask for less where it is, or tell the client.

    Parameters
    ----------
    result : QuotaCheckResult
        The denial: which limit of which model, with the numbers.
    """

    def __init__(self, result: "QuotaCheckResult") -> None:
        super().__init__(result)
        self.result = result

    @property
    def retry_after_ms(self) -> int | None:
        """Milliseconds after which the same request passes if nothing else is admitted meanwhile, or None."""
        return self.result.retry_after_ms

    def __str__(self) -> str:
        return f"model {_shown(self.result.model_id)}: {self.result.reason}"


class ModelLockedError(QuotaExceededError):
    """Nothing could be decided in time: a process that does not run has locked the model.

    Raised by `acquire` and `acquire_async` at the end of the wait. A process was stopped (SIGSTOP, a debugger, a paused
    container) within the few nanoseconds of a decision. Let it run, or end it: then its lock is taken over.

    Parameters
    ----------
    result : QuotaCheckResult
        A denial without a limit.
    """

    def __str__(self) -> str:
        return (
            f"model {_shown(self.result.model_id)}: nothing could be decided in time; its lock is held by a process "
            "that does not run (stopped, or paused): let it run, or end it"
        )


class ManagerClosedError(QuotaError, RuntimeError):
    """A verb was called on a manager, a handle, a grant or a view that has been closed.

    Raised also by waits that `close` ends. Do not use them after ``close()``, or make another manager.

    Parameters
    ----------
    what : str
        What is closed.

    Examples
    --------
    >>> print(ManagerClosedError())
    the manager is closed; make another one
    """

    def __init__(self, what: str = "manager") -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"the {self.what} is closed; make another one"


class GrantClosedError(QuotaError, RuntimeError):
    """A grant was to be changed after it had been settled, cancelled or released.

    Settle or cancel a grant once, while it is open, and count tokens before that.

    Parameters
    ----------
    verb : str
        What was to be done.
    stage : str
        What had been done before: ``"settled"``, ``"cancelled"`` or ``"released"``.

    Examples
    --------
    >>> print(GrantClosedError("add", "released"))
    add comes too late: the grant has been released
    """

    def __init__(self, verb: str, stage: str) -> None:
        super().__init__(verb, stage)
        self.verb = verb
        self.stage = stage

    def __str__(self) -> str:
        return f"{self.verb} comes too late: the grant has been {self.stage}"


class CapacityError(QuotaError, RuntimeError):
    """A table is full: of models, of processes that share a state, of open grants, or of lines.

    Nothing is evicted to make room, since that would forgive what the evicted model has used. Remove models that are no
    longer needed, or make the manager with a larger ``max_models``.

    Parameters
    ----------
    max_models : int
        The bound.
    what : str
        What is bounded.
    remedy : str
        What to do.

    Examples
    --------
    >>> print(CapacityError(2))
    all 2 places for models are taken; remove_quota a model or make the manager with a larger max_models
    """

    def __init__(
        self,
        max_models: int,
        what: str = "models",
        remedy: str = "remove_quota a model or make the manager with a larger max_models",
    ) -> None:
        super().__init__(max_models, what, remedy)
        self.max_models = max_models
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"all {self.max_models} places for {self.what} are taken; {self.remedy}"


class StateFileError(QuotaError, OSError):
    """A file is no state file that this version can use: damaged, cut off, foreign, or newer. It is left as it was.

    Give another path, use the version that wrote the file, or move the file away to begin anew (which refills quotas).
    If others can change the file, make it one's own, or open it with ``trust_file=True``.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The file; kept as str.
    message : str
        What is wrong with it.

    Examples
    --------
    >>> print(StateFileError("quota.state", "it is not a state file of modelquota"))
    quota.state cannot be used: it is not a state file of modelquota
    """

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes], message: str) -> None:
        self.path = os.fsdecode(path)
        self.message = message
        super().__init__(self.path, message)

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {self.message}"


class TraceError(QuotaError, ValueError):
    """A request trace cannot be read as one.

    Raised before anything is replayed. Correct the file where the message points. A file that cannot be opened or read
    at all is an `OSError`.

    Parameters
    ----------
    message : str
        What stands there and what was expected.
    path : str or os.PathLike
        The file; kept as str.
    line : int or None
        Line in the file, from 1, where the header is line 1; None where the whole file is meant.
    column : str or None
        Name of the column; None where the whole line is meant.

    Examples
    --------
    >>> print(TraceError("expected a whole number of tokens, found 'many'", "t.csv", line=7, column="ContextTokens"))
    t.csv: line 7: column ContextTokens: expected a whole number of tokens, found 'many'
    """

    def __init__(
        self, message: str, path: str | os.PathLike[str], line: int | None = None, column: str | None = None
    ) -> None:
        self.path = os.fspath(path)
        super().__init__(message, self.path, line, column)
        self.message = message
        self.line = line
        self.column = column

    def __str__(self) -> str:
        line = "" if self.line is None else f"line {self.line}: "
        column = "" if self.column is None else f"column {self.column}: "
        return f"{self.path}: {line}{column}{self.message}"


_SHOWN_CHARS = 80


def _shown(value: object) -> str:
    """Return the repr of a value, shortened so that a wrong value of any size leaves a message of one line."""
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than sys.get_int_max_str_digits() allows
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"
