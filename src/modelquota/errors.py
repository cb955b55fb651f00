"""Every exception that modelquota raises on purpose, each with the numbers of the case as attributes.

Wrong types and values in the arguments of a check are plain `TypeError` and `ValueError`, as for any Python function.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelquota._core.table.result import QuotaCheckResult


class QuotaError(Exception):
    """The base class of all errors below: catch it to catch every error that modelquota defines."""


class QuotaConfigError(QuotaError, ValueError):
    """A field of a quota has a value that is not accepted, or the field is unknown.

    Raised when a config is made or read, before anything has changed. Correct the field that is named.

    Parameters
    ----------
    field : str
        Name of the field.
    value : object
        The value that was given.
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
    """A quota file contains something that is not accepted.

    Raised by `load_quotas`, which then loads nothing. Correct the file at the place that the message names.
    A file that cannot be opened or read at all is an `OSError`.

    Parameters
    ----------
    path : str or os.PathLike
        The file; kept as str.
    table : str
        The table as in its header, such as ``models."llama"``; empty for the top level.
    field : str
        The key in that table; empty if the table itself is not accepted.
    value : object
        The value found there; with neither table nor field, the TOML parser's error message, with line and column.
    accepted : str
        What is accepted instead.
    line : int or None
        Its line, from 1; None if it has no line of its own, or if the parser's message names the line.

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
    """A method that needs a known model was given an id that has no quota.

    The quota was never set, or `remove_quota` has removed it. Call `set_quota` first.

    Parameters
    ----------
    model_id : str
        The id that is not known.
    message : str, optional
        Replaces the usual message.

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
    """A request was denied, or waited as long as allowed and was not admitted. Nothing has been charged.

    Wait for `retry_after_ms` if it is not None; otherwise free memory, request less, or report it to the client.

    Parameters
    ----------
    result : QuotaCheckResult
        The denial: the model, the violated limit and the numbers.
    """

    def __init__(self, result: "QuotaCheckResult") -> None:
        super().__init__(result)
        self.result = result

    @property
    def retry_after_ms(self) -> int | None:
        """Milliseconds after which the same request passes if nothing else is admitted in the meantime, or None."""
        return self.result.retry_after_ms

    def __str__(self) -> str:
        return f"model {_shown(self.result.model_id)}: {self.result.reason}"


class ModelLockedError(QuotaExceededError):
    """Nothing could be decided in time: a process that is not running holds the model's lock.

    Raised by `acquire` and `acquire_async` at the end of the wait. The process was stopped (SIGSTOP, a debugger, a
    paused container) within the few nanoseconds of a decision. Let it continue, or end it: then its lock is taken over.

    Parameters
    ----------
    result : QuotaCheckResult
        A denial that names no limit.
    """

    def __str__(self) -> str:
        return (
            f"model {_shown(self.result.model_id)}: nothing could be decided in time; its lock is held by a process "
            "that does not run (stopped, or paused): let it run, or end it"
        )


class ManagerClosedError(QuotaError, RuntimeError):
    """A method was called on a manager, a handle, a grant or a view that has been closed.

    Also raised by waits that `close` ends. Do not use the object after ``close()``; make another one.

    Parameters
    ----------
    what : str
        The kind of object that is closed.

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
    """An attempt to change a grant after it was settled, cancelled or released.

    Settle or cancel a grant once, while it is open, and count tokens before that.

    Parameters
    ----------
    verb : str
        The operation that was attempted.
    stage : str
        What was done to the grant before: ``"settled"``, ``"cancelled"`` or ``"released"``.

    Examples
    --------
    >>> print(GrantClosedError("add", "released"))
    cannot add: the grant has already been released
    """

    def __init__(self, verb: str, stage: str) -> None:
        super().__init__(verb, stage)
        self.verb = verb
        self.stage = stage

    def __str__(self) -> str:
        return f"cannot {self.verb}: the grant has already been {self.stage}"


class CapacityError(QuotaError, RuntimeError):
    """A table is full: of models, of processes that share a state, of open grants, or of queue entries.

    Nothing is evicted to make room, since that would forget what the evicted model has used. Remove models that are no
    longer needed, or create the manager with a larger ``max_models``.

    Parameters
    ----------
    max_models : int
        The size of the table.
    what : str
        What the table holds.
    remedy : str
        What to do about it.

    Examples
    --------
    >>> print(CapacityError(2))
    the table is full (2 models): call remove_quota(), or create the manager with a larger max_models
    """

    def __init__(
        self,
        max_models: int,
        what: str = "models",
        remedy: str = "call remove_quota(), or create the manager with a larger max_models",
    ) -> None:
        super().__init__(max_models, what, remedy)
        self.max_models = max_models
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"the table is full ({self.max_models} {self.what}): {self.remedy}"


class StateFileError(QuotaError, OSError):
    """A file is not a state file that this version can read: it is damaged, truncated, foreign or newer.

    The file is not modified. Give another path, use the version that wrote the file, or move the file away to start
    over (which refills the quotas). If other users can change the file, take ownership of it and remove their write
    permission, or open it with ``trust_file=True``.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The file; kept as str.
    message : str
        What is wrong with the file.

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
    """A file is not a valid request trace.

    Raised before anything is reported. Correct the file at the place that the message names. A file that cannot be
    opened or read at all is an `OSError`.

    Parameters
    ----------
    message : str
        What was found and what was expected.
    path : str or os.PathLike
        The file; kept as str.
    line : int or None
        Line in the file, from 1; the header is line 1. None if the whole file is meant.
    column : str or None
        Name of the column; None if the whole line is meant.

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
    """Return the repr of a value, shortened so that the message stays on one line however long the value is."""
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than sys.get_int_max_str_digits() allows
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"


class StoreError(QuotaError):
    """The store in which hosts share their limits cannot be used, or did not answer.

    Raised by a store's verbs. A node that shares through it logs it and tries again; its shares stay valid until the
    end of its lease. What to do is in the message, which never has the store's URL or credentials.

    Parameters
    ----------
    kind : str
        What is wrong, in one word: ``unreachable``, ``timeout``, ``credentials``, ``read_only``, ``out_of_memory``,
        ``loading``, ``eviction``, ``version``, ``format``, ``replicas`` or ``refused``.
    detail : str
        What was seen, and what to do.

    Examples
    --------
    >>> print(StoreError("read_only", "this is a replica; give the address of the primary"))
    the store is not usable (read_only): this is a replica; give the address of the primary
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"the store is not usable ({self.kind}): {self.detail}"
