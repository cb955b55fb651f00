"""One SVG of what `tune` found: for each model the frontiers of requests and tokens, with the point recommended."""

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit
from modelquota.tuning.frontier import Frontier
from modelquota.tuning.tuned import ModelTuning, TuneReport

__all__ = ["svg"]

WIDTH, ROW, PANEL_WIDTH, PANEL_HEIGHT = 960, 330, 380, 200
LEFT, TOP = 75, 90
TICKS = 4
STYLE = """
text { font: 12px sans-serif; fill: #333 } .title { font-size: 15px; font-weight: bold }
.axis { stroke: #999; fill: none } .grid { stroke: #ddd } .curve { stroke: #1f5fa8; stroke-width: 2; fill: none }
.area { fill: #c0392b; opacity: .08 } .now { fill: #c0392b } .then { fill: #1e8449 } .capacity { stroke: #b9770e }
.small { font-size: 11px }
"""


def svg(report: TuneReport) -> str:
    """Return the picture: a quota whose point is below a curve would have refused a request."""
    height = ROW * len(report.models) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Rate and burst of {escape(report.trace, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for place, model in enumerate(report.models):
        y = place * ROW
        parts.append(
            f'<text class="title" x="{LEFT - 55}" y="{y + 28}">{escape(_plain(model.model_id))}: '
            f"{model.requests:,} requests</text>"
        )
        for column, points in enumerate(model.frontiers):
            parts += _panel(report, model, points, LEFT + column * (PANEL_WIDTH + 90), y + TOP)
    return "\n".join([*parts, "</svg>", ""])


def _panel(report: TuneReport, model: ModelTuning, points: Frontier, x: float, y: float) -> Iterable[str]:
    record = CATALOGUE[Limit.REQUESTS_PER_SECOND if points.unit == "requests" else Limit.TOKENS_PER_SECOND]
    marks = [("recommended", "then", model.recommended)]
    if model.current is not None:
        marks.append(("current", "now", model.current))
    shown = [
        (label, kind, rate, float(getattr(quota, record.burst_field)))
        for label, kind, quota in marks
        if (rate := _rate(quota, record.quota_field)) is not None
    ]
    capacity = None
    if report.capacity is not None:
        found = report.capacity
        capacity = found.requests_per_second if points.unit == "requests" else found.tokens_per_second
    most_rate = max([*points.rates, *(mark[2] for mark in shown if mark[2] <= 2 * points.rates[-1]), 1e-9]) * 1.05
    most_burst = max([*points.bursts[1:], *(mark[3] for mark in shown[:1]), 1.0]) * 1.1

    def at(rate: float, burst: float) -> tuple[float, float]:
        across = x + PANEL_WIDTH * min(rate / most_rate, 1.0)
        return round(across, 1), round(y + PANEL_HEIGHT * (1 - min(burst / most_burst, 1.0)), 1)

    yield f'<text x="{x}" y="{y - 28}">{points.unit}: the smallest burst that refuses no request, by rate</text>'
    for rate in _ticks(most_rate):
        across = at(rate, 0)[0]
        yield f'<line class="grid" x1="{across}" x2="{across}" y1="{y}" y2="{y + PANEL_HEIGHT}"/>'
        yield f'<text class="small" x="{across}" y="{y + PANEL_HEIGHT + 16}" text-anchor="middle">{_short(rate)}</text>'
    for burst in _ticks(most_burst):
        down = at(0, burst)[1]
        yield f'<line class="grid" x1="{x}" x2="{x + PANEL_WIDTH}" y1="{down}" y2="{down}"/>'
        yield f'<text class="small" x="{x - 6}" y="{down + 4}" text-anchor="end">{_short(burst)}</text>'
    curve = [at(rate, burst) for rate, burst in zip(points.rates, points.bursts, strict=True)]
    outline = _path([*curve, at(points.rates[-1], 0), at(points.rates[0], 0)])
    yield f'<path class="area" d="{outline} Z"/><path class="curve" d="{_path(curve)}"/>'
    yield f'<path class="axis" d="M{x} {y} V{y + PANEL_HEIGHT} H{x + PANEL_WIDTH}"/>'
    yield (
        f'<text class="small" x="{x + PANEL_WIDTH}" y="{y + PANEL_HEIGHT + 34}" text-anchor="end">'
        f"{points.unit} per second</text>"
    )
    if capacity is not None and capacity <= most_rate:
        across = at(capacity, 0)[0]
        yield f'<line class="capacity" x1="{across}" x2="{across}" y1="{y}" y2="{y + PANEL_HEIGHT}"/>'
        yield f'<text class="small" x="{across + 4}" y="{y + 12}">hardware {_short(capacity)}/s</text>'
    for line, (label, kind, rate, burst) in enumerate(shown):
        across, down = at(rate, burst)
        yield f'<circle class="{kind}" cx="{across}" cy="{down}" r="5"/>'
        yield f'<circle class="{kind}" cx="{x + 8 + 215 * line}" cy="{y - 14}" r="4"/>'
        yield (
            f'<text class="small" x="{x + 17 + 215 * line}" y="{y - 10}">{label}: {_short(rate)}/s, burst '
            f"{_short(burst)}</text>"
        )


def _ticks(most: float) -> list[float]:
    """Return round numbers from 0 to `most`, some four of them."""
    unit = 10.0 ** math.floor(math.log10(most / TICKS))
    step = next(size * unit for size in (1, 2, 5, 10) if size * unit * TICKS >= most * 0.8)
    return [step * place for place in range(int(most / step) + 1)]


def _rate(quota: ResourceQuotaConfig, field: str) -> float | None:
    value = getattr(quota, field)
    return None if value is None else float(value)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{across} {down}" for across, down in points)


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1_000
    return f"{value:.3g}T"


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
