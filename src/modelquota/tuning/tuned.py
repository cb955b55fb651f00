"""What `tune` returns: for each model what its traffic needs, and what quotas would have done with it."""

from dataclasses import dataclass
from typing import Any

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import Limit
from modelquota.tuning.advice import Concurrency, Estimates, LimitAdvice
from modelquota.tuning.capacity import Capacity
from modelquota.tuning.frontier import Frontier
from modelquota.tuning.report import ModelReplay
from modelquota.tuning.users import UserTuning
from modelquota.tuning.windows import WindowUse

__all__ = ["ModelTuning", "Scenario", "TuneReport"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What some quotas would have done with the trace.

    Attributes
    ----------
    name : str
        ``"current"``, ``"recommended"``, ``"recommended, tried once"``, and the latter with limits a tenth lower
        (``"limits -10 %"``), a tenth higher, and with more traffic (``"traffic x1.5"``).
    replay : ModelReplay
    """

    name: str
    replay: ModelReplay

    @property
    def denied_share(self) -> float:
        """The share of requests that were denied."""
        return (self.replay.requests - self.replay.admitted) / max(self.replay.requests, 1)

    @property
    def binding(self) -> Limit | None:
        """The limit that denied most; None if nothing was denied."""
        worst = max(self.replay.denied, key=self.replay.denied.__getitem__)
        return worst if self.replay.denied[worst] else None

    def to_dict(self) -> dict[str, Any]:
        """The scenario as plain JSON values."""
        binding = self.binding
        return {
            "name": self.name,
            "denied_share": self.denied_share,
            "binding_limit": None if binding is None else binding.name.lower(),
            "replay": self.replay.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class ModelTuning:
    """What one model's part of a trace needs.

    Attributes
    ----------
    model_id : str
    requests : int
    uses : tuple of WindowUse
        Peaks and percentiles of rolling windows.
    frontiers : tuple of Frontier
        Of requests and of tokens.
    limits : tuple of LimitAdvice
    concurrency : Concurrency or None
        None if the trace has no durations.
    estimates : Estimates
    current, recommended : ResourceQuotaConfig or None
        `current` is None if no quotas were given.
    scenarios : tuple of Scenario
    """

    model_id: str
    requests: int
    uses: tuple[WindowUse, ...]
    frontiers: tuple[Frontier, ...]
    limits: tuple[LimitAdvice, ...]
    concurrency: Concurrency | None
    estimates: Estimates
    current: ResourceQuotaConfig | None
    recommended: ResourceQuotaConfig
    scenarios: tuple[Scenario, ...]

    def scenario(self, name: str) -> Scenario | None:
        """Return the scenario of a name; None if there is none."""
        return next((scenario for scenario in self.scenarios if scenario.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "model_id": self.model_id,
            "requests": self.requests,
            "windows": [use.to_dict() for use in self.uses],
            "frontiers": [points.to_dict() for points in self.frontiers],
            "limits": [item.to_dict() for item in self.limits],
            "concurrency": None if self.concurrency is None else self.concurrency.to_dict(),
            "estimates": self.estimates.to_dict(),
            "current": None if self.current is None else self.current.to_dict(),
            "recommended": self.recommended.to_dict(),
            "scenarios": [scenario.to_dict() for scenario in self.scenarios],
        }


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What `tune` returns.

    Attributes
    ----------
    trace, format : str
        The trace's file, and what it was read as.
    requests : int
    duration_ns : int
        From the first request to the last.
    headroom, target_denied, scale : float
        As given.
    models : tuple of ModelTuning
        In order of first appearance in the trace.
    users : UserTuning or None
        None unless asked for.
    capacity : Capacity or None
        What the hardware holds, if a benchmark was given.
    warnings : tuple of str
    """

    trace: str
    format: str
    requests: int
    duration_ns: int
    headroom: float
    target_denied: float
    scale: float
    models: tuple[ModelTuning, ...]
    users: UserTuning | None
    capacity: Capacity | None
    warnings: tuple[str, ...]

    @property
    def quotas(self) -> dict[str, ResourceQuotaConfig]:
        """The recommended quotas by model."""
        return {model.model_id: model.recommended for model in self.models}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {
            "models": [model.to_dict() for model in self.models],
            "users": None if self.users is None else self.users.to_dict(),
            "capacity": None if self.capacity is None else self.capacity.to_dict(),
            "warnings": list(self.warnings),
        }
