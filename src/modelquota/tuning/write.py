"""A quotas file of what `tune` recommends, with the reason of each number beside it."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit
from modelquota.tuning.cells import NS_PER_SECOND
from modelquota.tuning.tuned import TuneReport

__all__ = ["diff", "quotas_file"]

_LIMITS = {record.quota_field for record in CATALOGUE.values() if record.limit is not Limit.QUEUE}
_DEFAULTS = {field.name: field.default for field in fields(ResourceQuotaConfig)}


def quotas_file(
    report: TuneReport,
    others: Mapping[str, ResourceQuotaConfig] | None = None,
    patterns: Mapping[str, ResourceQuotaConfig] | None = None,
) -> str:
    """Return a file that `load_quotas` reads: the recommended quotas, and unchanged those that are not tuned.

    Parameters
    ----------
    report : TuneReport
        From `tune`.
    others, patterns : mapping of str to ResourceQuotaConfig, optional
        Quotas of the current file, of models that the trace does not have and of patterns.
    """
    hours = report.duration_ns / NS_PER_SECOND / 3_600
    lines = [
        f"# Quotas for the traffic of {_plain(report.trace)} ({report.format}):",
        f"# {report.requests:,} requests in {hours:,.3g} h. Headroom {report.headroom:.0%}; at most "
        f"{report.target_denied:.2%} of a model's requests are denied if none waits.",
    ]
    lines += [f"# Beware: {_plain(warning)}" for warning in report.warnings]
    for model in report.models:
        reasons = {item.field: item.reason for item in model.limits if item.target is not None}
        reasons |= {
            item.burst_field: f"refuses at most the accepted share at {item.target:,g} per second, and headroom"
            for item in model.limits
            if item.burst_field
        }
        lines += ["", f"[models.{_quoted(model.model_id)}]", *_table(model.recommended, reasons)]
    written = {model.model_id for model in report.models}
    for name, quota in (others or {}).items():
        if name not in written:
            lines += ["", f"[models.{_quoted(name)}]  # not in the trace: as it was", *_table(quota, {})]
    kept = dict(patterns or {})
    if report.users is not None and report.users.recommended is not None and report.users.per == "user":
        recommended = report.users.recommended
        before = kept.pop(recommended.model_id, None)
        if before is not None:
            recommended = before.replace(**{name: getattr(recommended, name) for name in report.users.reasons})
        lines += ["", f"[defaults.{_quoted(recommended.model_id)}]", *_table(recommended, report.users.reasons)]
    for pattern, quota in kept.items():
        lines += ["", f"[defaults.{_quoted(pattern)}]  # as it was", *_table(quota, {})]
    return "\n".join(lines) + "\n"


def diff(before: str, after: str, before_name: str, after_name: str) -> str:
    """Return the difference of two files, as ``diff -u`` shows it."""
    return "".join(
        difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), before_name, after_name)
    )


def _table(quota: ResourceQuotaConfig, reasons: Mapping[str, str]) -> list[str]:
    lines = []
    for name, value in quota.to_dict().items():
        # A limit is always written, since a missing one is not "unlimited" but the default.
        if name == "model_id" or (name not in _LIMITS and name not in reasons and value == _default(name)):
            continue
        line = f"{name} = {_value(value)}"
        lines.append(f"{line}  # {_plain(reasons[name])}" if name in reasons else line)
    return lines


def _default(name: str) -> object:
    default = _DEFAULTS[name]
    return list(default) if isinstance(default, tuple) else default


def _value(value: object) -> str:
    if value is None:
        return '"unlimited"'
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and value < 1e15 else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return json.dumps(value)


def _quoted(name: str) -> str:
    """Return a TOML string; JSON's escapes are those of TOML but for surrogate pairs and DEL."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def _plain(text: str) -> str:
    """Return what a comment can hold: one line without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
