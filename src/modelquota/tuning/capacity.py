"""What the hardware holds: the results of serving benchmarks, and which load still met the latency wanted.

Read are the JSON files that ``vllm bench serve --save-result`` and AIPerf (``profile_export_aiperf.json``) write, one
file a run; a run at one load is one point, and several files are a sweep.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelquota.errors import TraceError

__all__ = ["Capacity", "Run", "read_capacity"]

MAX_FILE_BYTES = 1 << 30
# The latencies of an objective, by vLLM's names, and what AIPerf calls them.
LATENCIES = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_token_latency",
    "e2el": "request_latency",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a benchmark.

    Attributes
    ----------
    path : str
    tool : str
        ``"vllm"`` or ``"aiperf"``.
    model_id : str or None
    requests_per_second, tokens_per_second, output_tokens_per_second : float or None
        What was completed; tokens are prompt and response.
    concurrency : float or None
        The configured or effective concurrency, or by Little's law from the mean latency.
    latencies_ms : dict of str to float
        By percentile and name, such as ``"p99_ttft"``; those that the file has.
    meets : bool
        Whether the run met the objective; True without one.
    """

    path: str
    tool: str
    model_id: str | None
    requests_per_second: float
    tokens_per_second: float | None
    output_tokens_per_second: float | None
    concurrency: float | None
    latencies_ms: dict[str, float]
    meets: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the hardware holds at an objective: of the runs that met it, the one with the highest request rate.

    Attributes
    ----------
    objective : str
        As given, such as ``"p99_ttft<=2000"``; empty if there is none.
    requests_per_second, tokens_per_second, concurrency : float or None
        Of the best run; all None if no run met the objective.
    runs : tuple of Run
        By request rate.
    """

    objective: str
    requests_per_second: float | None
    tokens_per_second: float | None
    concurrency: float | None
    runs: tuple[Run, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"runs": [run.to_dict() for run in self.runs]}


def read_capacity(paths: Sequence[str | os.PathLike[str]], objective: Mapping[str, float] | None = None) -> Capacity:
    """Read results of serving benchmarks.

    Parameters
    ----------
    paths : sequence of str or path-like
        Files, each of one run, or with a JSON object a line.
    objective : mapping of str to float, optional
        The most that some latencies may be, in ms: ``{"p99_ttft": 2000, "p99_tpot": 50}``. The names are a statistic
        (mean, median, p90, p95, p99 ...) and ttft, tpot, itl or e2el.

    Raises
    ------
    TraceError
        A file is not such a result, or lacks a latency that the objective names.
    ValueError
        The objective names something else.
    """
    wanted = dict(objective or {})
    for name, most in wanted.items():
        statistic, _, latency = name.partition("_")
        if latency not in LATENCIES or not statistic:
            raise ValueError(
                f"the objective has {name!r}; expected a statistic and one of {', '.join(LATENCIES)}, such as p99_ttft"
            )
        if not most > 0:
            raise ValueError(f"the objective has {name}={most}; expected milliseconds above 0")
    runs = [run for path in paths for run in _runs(os.fspath(path), wanted)]
    runs.sort(key=lambda run: run.requests_per_second)
    best = max((run for run in runs if run.meets), key=lambda run: run.requests_per_second, default=None)
    return Capacity(
        objective=", ".join(f"{name}<={most:g}" for name, most in wanted.items()),
        requests_per_second=None if best is None else best.requests_per_second,
        tokens_per_second=None if best is None else best.tokens_per_second,
        concurrency=None if best is None else best.concurrency,
        runs=tuple(runs),
    )


def _runs(path: str, objective: Mapping[str, float]) -> list[Run]:
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read(MAX_FILE_BYTES)
        except UnicodeDecodeError as error:
            raise TraceError(f"not UTF-8 ({error.reason})", path=path, line=1) from None
    try:
        records = [json.loads(text)]
        lines = [1]
    except ValueError as error:
        lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        try:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise TraceError(f"not JSON ({error})", path=path, line=getattr(error, "lineno", 1)) from None
    if not records:
        raise TraceError("the file is empty; expected the JSON of a serving benchmark", path=path, line=1)
    return [_run(path, line, record, objective) for line, record in zip(lines, records, strict=True)]


def _run(path: str, line: int, record: Any, objective: Mapping[str, float]) -> Run:
    if isinstance(record, dict) and isinstance(record.get("request_throughput"), dict):
        run = _aiperf(path, line, record)
    elif isinstance(record, dict) and "request_throughput" in record:
        run = _vllm(path, line, record)
    else:
        raise TraceError(
            "no request_throughput; expected what `vllm bench serve --save-result` or AIPerf writes",
            path=path,
            line=line,
            column="request_throughput",
        )
    found = run.latencies_ms
    missing = [name for name in objective if name not in found]
    if missing:
        raise TraceError(
            f"the objective needs it; this run has {', '.join(found) or 'no latencies'}",
            path=path,
            line=line,
            column=missing[0],
        )
    meets = all(found[name] <= most for name, most in objective.items())
    return Run(**{name: getattr(run, name) for name in Run.__slots__} | {"meets": meets})


def _number(path: str, line: int, record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise TraceError(f"expected a number of 0 or more, found {value!r:.40}", path=path, line=line, column=key)
    return float(value)


def _vllm(path: str, line: int, record: Mapping[str, Any]) -> Run:
    rate = _number(path, line, record, "request_throughput")
    assert rate is not None
    latencies = {}
    for key in record:
        # such as p99_ttft_ms, mean_e2el_ms
        statistic, _, rest = key.partition("_")
        name = rest.removesuffix("_ms")
        if key.endswith("_ms") and name in LATENCIES and statistic != "std":
            value = _number(path, line, record, key)
            if value is not None:
                latencies[f"{statistic}_{name}"] = value
    concurrency = _number(path, line, record, "max_concurrency")
    if concurrency is None and "mean_e2el" in latencies:
        concurrency = rate * latencies["mean_e2el"] / 1_000
    model = record.get("model_id")
    return Run(
        path=path,
        tool="vllm",
        model_id=model if isinstance(model, str) else None,
        requests_per_second=rate,
        tokens_per_second=_number(path, line, record, "total_token_throughput"),
        output_tokens_per_second=_number(path, line, record, "output_throughput"),
        concurrency=concurrency,
        latencies_ms=latencies,
        meets=True,
    )


def _aiperf(path: str, line: int, record: Mapping[str, Any]) -> Run:
    def average(key: str) -> float | None:
        metric = record.get(key)
        return _number(path, line, metric, "avg") if isinstance(metric, dict) else None

    rate = average("request_throughput")
    if rate is None:
        raise TraceError("request_throughput has no avg", path=path, line=line, column="request_throughput")
    latencies = {}
    for name, key in LATENCIES.items():
        metric = record.get(key)
        if not isinstance(metric, dict):
            continue
        scale = {"ms": 1.0, "sec": 1_000.0, "s": 1_000.0, "us": 1e-3, "ns": 1e-6}.get(str(metric.get("unit", "ms")))
        if scale is None:
            raise TraceError(f"its unit is {metric.get('unit')!r}; expected ms", path=path, line=line, column=key)
        for statistic in metric:
            label = {"avg": "mean", "p50": "median"}.get(statistic, statistic)
            if label in ("mean", "median") or (statistic.startswith("p") and statistic[1:].isdigit()):
                value = _number(path, line, metric, statistic)
                if value is not None:
                    latencies[f"{label}_{name}"] = value * scale
    concurrency = average("effective_concurrency")
    if concurrency is None and "mean_e2el" in latencies:
        concurrency = rate * latencies["mean_e2el"] / 1_000
    tokens = average("total_token_throughput")
    output = average("output_token_throughput")
    prompt = average("input_sequence_length")
    if tokens is None and output is not None and prompt is not None:
        tokens = output + prompt * rate
    return Run(
        path=path,
        tool="aiperf",
        model_id=None,
        requests_per_second=rate,
        tokens_per_second=tokens,
        output_tokens_per_second=output,
        concurrency=concurrency,
        latencies_ms=latencies,
        meets=True,
    )
