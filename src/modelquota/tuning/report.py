"""What a replay reports: of all requests, and of each model's and user's part."""

from dataclasses import dataclass
from typing import Any

from modelquota.quota.limits import Limit


@dataclass(frozen=True, slots=True)
class ModelReplay:
    """What the quotas did with one model's part of a trace, or one user's.

    Attributes
    ----------
    model_id : str
        The id of the model, or of the user.
    requests, admitted : int
        Requests in the trace, and how many of them were admitted, at once or after a wait.
    warned : int
        Admitted over a limit, because the action is `warn`.
    denied : dict of Limit to int
        Denied requests by the first limit each one violated, in the order in which limits are judged; every
        limit is a key, with 0 if it denied nothing.
    never : int
        Denied requests that would not fit after any wait: they cost more than the limit itself.
    waited, timed_out : int
        Requests that waited and were admitted, and that waited and were denied in the end. 0 if the replay does not
        wait.
    median_wait_ms, p99_wait_ms, longest_wait_ms : float or None
        How long those that waited and were admitted had to wait; None if none did. Of more than half a million
        different waits, median and p99 are exact to one part in 16,000.
    tokens, tokens_admitted : int
        Tokens of all kinds, of all requests and of those admitted.
    longest_retry_after_ms : int or None
        Longest retry time that was reported to a denied request; None if none was reported.
    median_retry_after_ms : float or None
        The median of the same times, as exact as that of the waits.
    peak_requests, peak_tokens : int
        The most that was admitted in any second, not just in seconds aligned to the clock.
    peak_requests_asked, peak_tokens_asked : int
        The most that was requested in any second, admitted or not.
    """

    model_id: str
    requests: int
    admitted: int
    warned: int
    denied: dict[Limit, int]
    never: int
    waited: int
    timed_out: int
    median_wait_ms: float | None
    p99_wait_ms: float | None
    longest_wait_ms: float | None
    tokens: int
    tokens_admitted: int
    longest_retry_after_ms: int | None
    median_retry_after_ms: float | None
    peak_requests: int
    peak_tokens: int
    peak_requests_asked: int
    peak_tokens_asked: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; `denied` by the limits' names in lower case."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"denied": {limit.name.lower(): count for limit, count in self.denied.items()}}


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Outcome of a replay.

    Attributes
    ----------
    trace : str
        Path of the trace's file.
    requests : int
        Total number of requests.
    duration_ns : int
        From the first request to the last, after `speed` was applied.
    speed : float
        How many times faster than in reality the trace was replayed.
    wait : bool
        Whether requests waited as `acquire` does, rather than being tried once.
    out_of_order : int
        Rows that the trace's file had out of order; see `modelquota.tuning.trace.read_trace`.
    core_time_ns : int
        Wall time spent deciding, without reading the trace or making this report.
    most_waiting : int
        The most requests that waited at one time.
    most_open : int or None
        The most requests that were admitted and not finished; None if the trace has no durations.
    models : tuple of ModelReplay
        The models that the requests are for, in order of first appearance in the trace's file.
    users : tuple of ModelReplay
        The same by user, of those that have a quota, if the replay is per user.
    """

    trace: str
    requests: int
    duration_ns: int
    speed: float
    wait: bool
    out_of_order: int
    core_time_ns: int
    most_waiting: int
    most_open: int | None
    models: tuple[ModelReplay, ...]
    users: tuple[ModelReplay, ...]

    @property
    def admitted(self) -> int:
        """Requests admitted, of all models."""
        return sum(model.admitted for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {
            "models": [model.to_dict() for model in self.models],
            "users": [user.to_dict() for user in self.users],
        }
