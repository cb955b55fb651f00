"""The frozen records that reading returns for a model and for a manager, and the text of a status report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import DENYING, Limit, LimitRecord, dollars

_NO_LIMIT: tuple[None, ...] = (None,) * (len(Limit) + 1)
_NOTHING = (0.0,) * (len(Limit) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUsage:
    """What a model has used, at one moment; ``ResourceUsage()`` is a model that has not been used.

    Attributes
    ----------
    current_ram_mb, current_ssd_mb : int
        Memory last reported by `update_memory_usage`, in MB (2**20 bytes), outside grants; may exceed the limit.
    peak_ram_mb, peak_ssd_mb : int
        Highest memory ever reported, in MB.
    requests_this_second, tokens_this_second : int
        Admitted in the rolling second.
    tokens_this_hour, requests_this_hour : int
        Admitted in the rolling 3,600 s; a slot that is partly expired counts in full.
    tokens_this_day, requests_this_day : int
        Admitted in the rolling 86,400 s; a slot that is partly expired counts in full.
    tokens_this_minute, requests_this_minute, tokens_this_month, requests_this_month : int or None
        Admitted in the rolling 60 s and 30 days; None until the model first has a limit in that window, from when on it
        is counted.
    burst_requests_used, burst_tokens_used : int
        How far the model has run ahead of its rate, as far as that is not yet repaid.
    total_violations : int
        Checks that violated a limit, each counted once; the sum of the next five.
    ram_violations, ssd_violations, rate_violations, quota_violations, concurrency_violations : int
        The same by type of the first violated limit.
    reserved_ram_mb, reserved_ssd_mb : int
        Memory held by open grants, in MB, in addition to what is reported.
    concurrent_requests : int
        Grants open now.
    queued_requests : int
        Requests waiting now.
    tokens_total, tokens_refunded_total : int
        Tokens charged since the model was registered, and how many of these were given back; the difference is what it
        has actually used. Both only grow.
    left : tuple of int or None
        What each limit still admits now, indexed by `Limit`: ``usage.left[Limit.TOKENS_PER_HOUR]``. None if the limit
        is not set; never negative. For a rate, what the rolling second or the burst leaves, whichever is less.
    percent : tuple of float
        Usage in percent of each limit, indexed the same way: ``usage.percent[Limit.RAM]``. 0.0 if it is not set; a
        limit of 0 is treated as 1; may exceed 100. For a rate, the larger of two: the rolling second in percent of
        ``ceil(rate) + burst``, and what has not drained yet in percent of ``max(rate, 1) + burst``.
    """

    current_ram_mb: int = 0
    peak_ram_mb: int = 0
    current_ssd_mb: int = 0
    peak_ssd_mb: int = 0
    requests_this_second: int = 0
    tokens_this_second: int = 0
    tokens_this_hour: int = 0
    tokens_this_day: int = 0
    requests_this_hour: int = 0
    requests_this_day: int = 0
    requests_this_minute: int | None = None
    tokens_this_minute: int | None = None
    requests_this_month: int | None = None
    tokens_this_month: int | None = None
    burst_requests_used: int = 0
    burst_tokens_used: int = 0
    total_violations: int = 0
    ram_violations: int = 0
    ssd_violations: int = 0
    rate_violations: int = 0
    quota_violations: int = 0
    concurrency_violations: int = 0
    reserved_ram_mb: int = 0
    reserved_ssd_mb: int = 0
    concurrent_requests: int = 0
    queued_requests: int = 0
    tokens_total: int = 0
    tokens_refunded_total: int = 0
    left: tuple[int | None, ...] = _NO_LIMIT
    percent: tuple[float, ...] = _NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model's quota and usage at one moment, and how the usage compares with the quota.

    Every percentage is one of ``usage.percent``: 0.0 if the limit is not set, and it may exceed 100.

    Attributes
    ----------
    model_id : str
        The model.
    quota : ResourceQuotaConfig
        Its limits.
    usage : ResourceUsage
        What it has used of them.
    ram_utilization, ssd_utilization : float
        Memory reported and reserved, in percent of its limit.
    requests_per_second, tokens_per_second : float
        Admitted in the rolling second: a rate, not a percentage.
    hourly_quota_used, daily_quota_used : float
        Tokens of the rolling 3,600 s and 86,400 s, in percent of their limit.
    hourly_requests_used, daily_requests_used : float
        Requests of the rolling 3,600 s and 86,400 s, in percent of their limit.
    allowed_requests, denied_requests, waited_requests, warned_requests : int
        Since the model was registered: requests admitted; denied for good; and of those admitted, how many waited first
        and how many violated a limit.
    tokens_charged, tokens_refunded : int
        As ``usage.tokens_total`` and ``usage.tokens_refunded_total``.
    meters : tuple of ModelReport
        The reports of the model's meters, by name, each read at a moment of its own.
    """

    model_id: str
    quota: ResourceQuotaConfig
    usage: ResourceUsage
    ram_utilization: float
    ssd_utilization: float
    requests_per_second: float
    tokens_per_second: float
    hourly_quota_used: float
    daily_quota_used: float
    hourly_requests_used: float
    daily_requests_used: float
    allowed_requests: int = 0
    denied_requests: int = 0
    waited_requests: int = 0
    warned_requests: int = 0
    tokens_charged: int = 0
    tokens_refunded: int = 0
    meters: "tuple[ModelReport, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaStats:
    """Totals since a manager was created, over all its models, including removed and unknown ones.

    A request counts once, however often it was tried: it is allowed, denied, or still waiting. One that waited and was
    then served is allowed, and not denied. A request whose violation only causes a warning is allowed.

    Attributes
    ----------
    total_checks : int
        Requests judged: the sum of allowed, rejected, throttled and queued, less those that waited and were served.
    total_violations : int
        Requests that violated a limit: the sum of rejected, throttled, queued and warned, and also that over all types.
    rejected_requests, throttled_requests, queued_requests : int
        Requests that violated a limit, by the action that was applied. Some of the throttled and queued ones may
        have waited and been served.
    ram_violations, ssd_violations, rate_violations, quota_violations : int
        Violations by type of the first violated limit.
    allowed_requests : int
        Requests admitted.
    warned_requests : int
        Requests admitted despite a violation.
    concurrency_violations : int
        Violations whose first violated limit is that of concurrent requests.
    recoveries : int
        How often something that a dead process had left behind was repaired: a row, a grant, a place in a queue.
    denied_requests : int
        Requests denied for good: those rejected, throttled and queued that were not served and do not wait.
    waited_requests : int
        Requests admitted after a wait; each is also counted as allowed.
    tokens_charged, tokens_refunded : int
        Tokens charged, and how many of these settling and cancelling gave back; the difference was actually used.
    """

    total_checks: int = 0
    total_violations: int = 0
    rejected_requests: int = 0
    throttled_requests: int = 0
    queued_requests: int = 0
    ram_violations: int = 0
    ssd_violations: int = 0
    rate_violations: int = 0
    quota_violations: int = 0
    allowed_requests: int = 0
    warned_requests: int = 0
    concurrency_violations: int = 0
    recoveries: int = 0
    denied_requests: int = 0
    waited_requests: int = 0
    tokens_charged: int = 0
    tokens_refunded: int = 0


def model_report(
    model_id: str,
    quota: ResourceQuotaConfig,
    usage: ResourceUsage,
    counts: Mapping[str, int] | None = None,
    meters: "tuple[ModelReport, ...]" = (),
) -> ModelReport:
    """Return the report that compares a model's usage with its quota; `counts` are the fields that count requests.

    Examples
    --------
    >>> from modelquota import ManualClock, ResourceQuotaManager
    >>> manager = ResourceQuotaManager(clock=ManualClock())
    >>> manager.set_quota("llama", max_tokens_per_hour=1000)
    >>> bool(manager.check_quota("llama", 250))
    True
    >>> report = model_report("llama", manager.get_quota("llama"), manager.get_usage("llama"))
    >>> report.ram_utilization, report.tokens_per_second, report.hourly_quota_used
    (0.0, 250.0, 25.0)
    """
    return ModelReport(
        model_id=model_id,
        quota=quota,
        usage=usage,
        ram_utilization=usage.percent[Limit.RAM],
        ssd_utilization=usage.percent[Limit.SSD],
        requests_per_second=float(usage.requests_this_second),
        tokens_per_second=float(usage.tokens_this_second),
        hourly_quota_used=usage.percent[Limit.TOKENS_PER_HOUR],
        daily_quota_used=usage.percent[Limit.TOKENS_PER_DAY],
        hourly_requests_used=usage.percent[Limit.REQUESTS_PER_HOUR],
        daily_requests_used=usage.percent[Limit.REQUESTS_PER_DAY],
        tokens_charged=usage.tokens_total,
        tokens_refunded=usage.tokens_refunded_total,
        meters=meters,
        **(counts or {}),
    )


def status_lines(reports: Sequence[ModelReport], stats: QuotaStats) -> str:
    """Return a status report as plain text: a table with a row for each model, and the totals below it.

    A cell is usage / limit; ``-`` means no limit, and a limit per second is shown as rate+burst. ``open`` is the grants
    open now. Numbers from 10,000 are cut, not rounded, to three digits, so that usage never looks larger than
    it is. Meters are below their model, and tokens that are money are shown as dollars.

    Examples
    --------
    >>> quota = ResourceQuotaConfig("llama", max_ssd_mb=None)
    >>> report = model_report("llama", quota, ResourceUsage(current_ram_mb=512, requests_this_second=150))
    >>> table = status_lines([report], QuotaStats(total_checks=150, allowed_requests=150))
    >>> for line in table.splitlines()[:2]:
    ...     print(line[:47])
    model      RAM MB  SSD MB   open     requests/s
    llama  512 / 2048   0 / -  0 / -  150 / 100+200
    """
    reports = [reports[place] for place in under_models([report.model_id for report in reports])]
    models = ["model", *shown_under_models([_printable(report.model_id) for report in reports])]
    violations = ["violations", *(_short(report.usage.total_violations) for report in reports)]
    shown = [record for record in DENYING if _is_counted(record, reports)]
    uses = [_uses(report, shown) for report in reports]
    columns = [
        [model.ljust(max(map(len, models))) for model in models],
        *map(_column, [record.heading for record in shown], zip(*uses, strict=True)),
        [count.rjust(max(map(len, violations))) for count in violations],
    ]
    table = ["  ".join(cells) for cells in zip(*columns, strict=True)] if reports else ["no models"]
    return "\n".join([*table, _totals(stats)])


def _is_counted(record: LimitRecord, reports: Sequence[ModelReport]) -> bool:
    """Whether any of the models counts what the limit is on: a minute or a month only once it has had a limit."""
    return any(getattr(report.usage, field) is not None for report in reports for field in record.usage_fields)


def _uses(report: ModelReport, shown: Sequence[LimitRecord]) -> list[tuple[str, str]]:
    """Return usage and limit for every column."""
    quota, usage = report.quota, report.usage
    cells = []
    for record in shown:
        text = dollars if quota.unit == "usd" and record.unit == "tokens" else _short
        burst = getattr(quota, record.burst_field) if record.is_rate else 0
        used = _used([getattr(usage, field) for field in record.usage_fields], text)
        cells.append((used, _limit(getattr(quota, record.quota_field), burst, text)))
    return cells


def _used(counts: Sequence[int | None], text: Callable[[float], str]) -> str:
    known = [count for count in counts if count is not None]
    return text(sum(known)) if known else "-"


def under_models(model_ids: Sequence[str]) -> list[int]:
    """Return the indices of the ids with each meter after its model; models and the meters of one stay in order.

    Examples
    --------
    >>> ids = ["a#x", "b", "a", "b#y", "c#z"]
    >>> [ids[place] for place in under_models(ids)]
    ['a', 'a#x', 'b', 'b#y', 'c#z']
    """
    families: dict[str, list[int]] = {}
    for place, model_id in enumerate(model_ids):
        families.setdefault(model_id.partition("#")[0], []).append(place)
    return [place for family in families.values() for place in sorted(family, key=lambda one: "#" in model_ids[one])]


def shown_under_models(model_ids: Sequence[str]) -> list[str]:
    """Return the ids, ordered by `under_models`, with a meter that is below its model as its name only.

    Examples
    --------
    >>> shown_under_models(["a", "a#x", "c#z"])
    ['a', '  #x', 'c#z']
    """
    there = set(model_ids)
    return [
        f"  #{name}" if name and model in there else model_id
        for model_id in model_ids
        for model, _, name in [model_id.partition("#")]
    ]


def _column(heading: str, uses: Sequence[tuple[str, str]]) -> list[str]:
    """Return heading and cells in one width, with the slashes of the cells aligned."""
    used_width, limit_width = (max(map(len, side)) for side in zip(*uses, strict=True))
    cells = [f"{used:>{used_width}} / {limit:>{limit_width}}" for used, limit in uses]
    return [cell.rjust(max(len(heading), len(cells[0]))) for cell in (heading, *cells)]


def _totals(stats: QuotaStats) -> str:
    return (
        f"total: {stats.total_checks:,} checks, {stats.allowed_requests:,} allowed"
        f" ({stats.warned_requests:,} with a warning, {stats.waited_requests:,} after a wait),"
        f" {stats.denied_requests:,} denied\n"
        f"actions: {stats.rejected_requests:,} rejected, {stats.throttled_requests:,} throttled,"
        f" {stats.queued_requests:,} queued; tokens: {stats.tokens_charged:,} charged,"
        f" {stats.tokens_refunded:,} refunded\n"
        f"violations: {stats.total_violations:,} ({stats.ram_violations:,} RAM, {stats.ssd_violations:,} SSD,"
        f" {stats.rate_violations:,} rate, {stats.quota_violations:,} quota,"
        f" {stats.concurrency_violations:,} concurrency)"
    )


def _limit(limit: float | None, burst: int, text: Callable[[float], str]) -> str:
    if limit is None:
        return "-"
    return f"{text(limit)}+{text(burst)}" if limit and burst else text(limit)


def _short(count: float) -> str:
    """Return a count in short form: ``950``, ``9999``, ``12.3k``, ``1.04M``; from 10,000 cut to three digits."""
    if count < 10_000:
        return f"{count:g}"
    if count >= 1e21:
        return f"{count:.3g}"
    digits = str(int(count))
    thousands = (len(digits) - 1) // 3
    point = len(digits) - 3 * thousands
    return f"{digits[:point]}.{digits[point:3]}".rstrip("0").rstrip(".") + "kMGTPE"[thousands - 1]


def _printable(model_id: str) -> str:
    """Return the id with any character escaped that would break the table or control the terminal."""
    return model_id if model_id.isprintable() else model_id.encode("unicode_escape").decode()
