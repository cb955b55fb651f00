"""The command `modelquota tune`: from a trace to a quotas file."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelquota.cli.errors import EXIT_NO, answering, quiet_log, say
from modelquota.cli.format import counted
from modelquota.cli.traces import Map, Reading, TimeUnit, Tpot, TraceFile, TraceFormat, Ttft, shown_progress
from modelquota.cli.tune_tables import print_tuning
from modelquota.quota.file import Quotas, load_quotas
from modelquota.tuning.capacity import read_capacity
from modelquota.tuning.conditions import Condition, parse_condition
from modelquota.tuning.plot import svg
from modelquota.tuning.tune import TuneReport, tune
from modelquota.tuning.write import diff, quotas_file

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Add the command to an application."""

    @app.command("tune")
    def _tune(
        trace: TraceFile,
        current: Annotated[
            Path | None, typer.Option("--current", "-c", metavar="QUOTAS.toml", help="The quotas to compare with.")
        ] = None,
        headroom: Annotated[str, typer.Option(metavar="SHARE", help="How far above what was needed.")] = "15%",
        target_denied: Annotated[
            str, typer.Option(metavar="SHARE", help="The share of a model's requests that may be denied.")
        ] = "0.1%",
        scale: Annotated[
            float, typer.Option(metavar="FACTOR", help="How many times the traffic to look ahead to.")
        ] = 1.5,
        model: Annotated[
            str | None, typer.Option("--model", "-m", metavar="NAME", help="The model, for a trace that names none.")
        ] = None,
        per: Annotated[
            str | None,
            typer.Option(metavar="user|prefix", help="A quota for each user too; by prefix, only a table."),
        ] = None,
        capacity: Annotated[
            list[Path] | None,
            typer.Option(metavar="BENCH.json", help="Results of vLLM's or AIPerf's serving benchmark, one a load."),
        ] = None,
        slo: Annotated[
            list[str] | None,
            typer.Option(metavar="LATENCY=MS", help="What the benchmark has to meet, such as p99_ttft=2000."),
        ] = None,
        write: Annotated[
            Path | None, typer.Option("--write", "-w", metavar="FILE", help="Write the quotas; shows the difference.")
        ] = None,
        plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the rate-burst frontiers.")] = None,
        fail_if: Annotated[
            list[str] | None,
            typer.Option(metavar="CONDITION", help="Exit 1 if it holds, such as 'denied > 1%' or 'p99_wait > 2s'."),
        ] = None,
        format: TraceFormat = None,
        time_unit: TimeUnit = None,
        map: Map = None,
        ttft: Ttft = None,
        tpot: Tpot = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    ) -> None:
        """Turn a request trace into quotas: what was needed, what to set, and what either would have done.

        Shows for each model the peaks of rolling windows, the smallest burst for each rate, a lower, a recommended and
        an upper value of every limit beside the current one, and what the current and the recommended quotas would have
        done: denied by which limit, waited how long, with limits a tenth lower or higher, and with more traffic.

        **--write** writes a quotas file with the reason of each number as a comment. **--fail-if** is judged on the
        quotas of --current, or without it on the recommended ones; its values are denied, waited, timed_out (shares)
        and median_wait, p99_wait, longest_wait (times).

        **--json** prints one object: trace, format, requests, duration_ns, headroom, target_denied, scale, models (a
        list with model_id, requests, windows, frontiers, limits, concurrency, estimates, current, recommended,
        scenarios), users, capacity, warnings.

        **Exit code**: 0; 1 when a condition of --fail-if holds; 2 when an argument or a file cannot be used.
        """
        errors = Console(stderr=True)
        with quiet_log(), answering(errors, trace):
            conditions = [parse_condition(text) for text in fail_if or ()]
            shares = {"headroom": _share("headroom", headroom), "target_denied": _share("target-denied", target_denied)}
            objective = _objective(slo or [])
            if objective and not capacity:
                raise ValueError("--slo is about the benchmark of --capacity, which is missing")
            held = read_capacity(capacity, objective) if capacity else None
            quotas = None if current is None else load_quotas(current)
            with shown_progress(trace, errors) as progress:
                requests = Reading(format, time_unit, map, ttft, tpot).read(
                    trace, errors, progress("reading the trace")
                )
                report = tune(
                    requests,
                    quotas,
                    model=model,
                    scale=scale,
                    per=per,
                    capacity=held,
                    progress=progress("tuning"),
                    **shares,
                )
        if as_json:
            print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        else:
            print_tuning(report, Console())
        if write is not None:
            with answering(errors, write):
                _write(report, quotas, current, write, Console(stderr=True) if as_json else Console())
        if plot is not None:
            with answering(errors, plot):
                plot.write_text(svg(report), encoding="utf-8")
                say(errors, f"note: {plot}: the rate-burst frontiers")
        _fail_if(report, conditions, errors)


def _share(name: str, text: str) -> float:
    number, percent = (text.strip()[:-1], True) if text.strip().endswith("%") else (text.strip(), False)
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; expected a share such as 15% or 0.15") from None
    return value / 100 if percent else value


def _objective(texts: list[str]) -> dict[str, float]:
    objective = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            objective[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--slo is {text!r}; expected a latency and milliseconds, such as p99_ttft=2000")
    return objective


def _write(report: TuneReport, quotas: Quotas | None, current: Path | None, path: Path, console: Console) -> None:
    text = quotas_file(report, quotas, None if quotas is None else quotas.patterns)
    before = "" if current is None else current.read_text(encoding="utf-8-sig")
    path.write_text(text, encoding="utf-8")
    load_quotas(path)  # what was written is read again, so that a mistake here is not found in production
    if current is None:
        say(console, f"wrote {path}: {counted(len(report.models), 'model')}")
        return
    console.print(diff(before, text, str(current), str(path)), markup=False, highlight=False, soft_wrap=True, end="")
    say(console, f"wrote {path}")


def _fail_if(report: TuneReport, conditions: list[Condition], errors: Console) -> None:
    failed = False
    for model in report.models:
        scenario = model.scenario("current") or model.scenario("recommended")
        assert scenario is not None
        for condition in conditions:
            if condition.holds(scenario):
                failed = True
                say(
                    errors,
                    f"failed: {model.model_id}, {scenario.name} quotas: {condition.text} "
                    f"({condition.name} is {condition.found(scenario)})",
                )
    if failed:
        raise typer.Exit(EXIT_NO)
