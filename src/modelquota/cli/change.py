"""What `modelquota set`, `remove` and `reset-burst` do to a manager."""

from collections.abc import Sequence
from typing import Any

from modelquota.errors import QuotaConfigError, UnknownModelError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig

__all__ = ["parse_fields", "remove_models", "reset_bursts", "set_model"]


def parse_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """Read ``field=value`` words: whole numbers, numbers, ``unlimited``, names, and lists of names with commas.

    Raises
    ------
    QuotaConfigError
        A word without ``=``; whether a field accepts its value is judged by `ResourceQuotaConfig`.

    Examples
    --------
    >>> parse_fields(["max_ram_mb=1_024", "max_tokens_per_second=0.5", "max_ssd_mb=unlimited", "on_violation=reject"])
    {'max_ram_mb': 1024, 'max_tokens_per_second': 0.5, 'max_ssd_mb': None, 'on_violation': 'reject'}
    >>> parse_fields(["shadow_limits=ram,tokens_per_hour"]), parse_fields(["shadow_limits="])
    ({'shadow_limits': ['ram', 'tokens_per_hour']}, {'shadow_limits': []})
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        field, equals, word = assignment.partition("=")
        if not equals:
            raise QuotaConfigError(assignment, "", "field=value, such as max_ram_mb=1024 or max_ssd_mb=unlimited")
        field = field.strip()
        fields[field] = _names(word) if field == "shadow_limits" else _value(word.strip())
    return fields


def _names(word: str) -> list[str]:
    return [name.strip() for name in word.split(",") if name.strip()]


def _value(word: str) -> Any:
    if word in ("unlimited", "None"):
        return None
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word


def set_model(manager: ResourceQuotaManager, model_id: str, fields: dict[str, Any]) -> ResourceQuotaConfig:
    """Change the named limits of a known model, or give a new one these and the defaults; return its quota.

    Raises
    ------
    QuotaConfigError
        A field is not known or its value not accepted; nothing is changed.
    CapacityError
        The table is full.
    """
    if "model_id" in fields:
        raise QuotaConfigError("model_id", fields["model_id"], "any other field: a model's id cannot be changed")
    known = manager.get_quota(model_id)
    base = {"model_id": model_id} if known is None else known.to_dict()
    quota = ResourceQuotaConfig.from_dict({**base, **fields})
    manager.set_quota(quota)
    return quota


def remove_models(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    """Forget models, and what they have used; none of them where one is not known, which is an UnknownModelError."""
    _require_known(manager, model_ids)
    for model_id in model_ids:
        manager.remove_quota(model_id)


def reset_bursts(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    """Forgive the bursts of models; none of them where one is not known, which is an UnknownModelError."""
    _require_known(manager, model_ids)
    for model_id in model_ids:
        manager.reset_burst(model_id)


def _require_known(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    known = set(manager.list_models())
    for model_id in model_ids:
        if model_id not in known:
            raise UnknownModelError(model_id)
