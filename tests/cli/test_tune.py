"""`modelquota tune` and `replay` as a user calls them: tables, JSON, files, exit codes, one line for each mistake."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from asgi_client import Call
from traces import write_small_trace
from typer.testing import CliRunner

from modelquota import load_quotas
from modelquota.asgi import Quota
from modelquota.asgi.quota import _guards as guards
from modelquota.cli.app import app

CURRENT = """
[models.code]
max_tokens_per_second = 400
burst_tokens = 1000
max_tokens_per_hour = "unlimited"
on_violation = "queue"
grace_period_sec = 5
[defaults."user:*"]
max_tokens_per_hour = 50
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write_small_trace(Path("trace.csv"))
    Path("current.toml").write_text(CURRENT)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_from_a_trace_to_a_quotas_file(files):
    outcome = run("tune", "trace.csv", "--model", "code", "--write", "quotas.toml", "--plot", "tune.svg")
    assert outcome.exit_code == 0
    assert outcome.stderr.splitlines() == [
        "modelquota: note: trace.csv: read as Azure CSV, timestamps",
        "modelquota: note: tune.svg: the rate-burst frontiers",
    ]
    text = " ".join(outcome.stdout.split())
    for part in ("code", "busiest requests input", "smallest burst", "limit current lower recommended upper",
                 "would have admitted denied waited", "recommended, tried once", "default_output_tokens",
                 "less than one day was seen", "wrote quotas.toml: 1 model"):  # fmt: skip
        assert part in text
    assert max(map(len, outcome.stdout.splitlines())) <= 100
    assert load_quotas("quotas.toml")["code"].max_requests_per_second > 0
    assert run("replay", "trace.csv", "-q", "quotas.toml").exit_code == 0
    assert Path("tune.svg").read_text().startswith("<svg")


def test_what_was_written_is_served_with(files, monkeypatch):
    """From README: tune writes a file, and `Quota` has its limits."""
    assert run("tune", "trace.csv", "--model", "code", "--write", "quotas.toml").exit_code == 0
    monkeypatch.setenv("MODELQUOTA_QUOTAS", str(files / "quotas.toml"))
    monkeypatch.setenv("MODELQUOTA_STATE", str(files / "quota.state"))

    async def model(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def main():
        app = Quota(model)
        most = load_quotas("quotas.toml")["code"].max_tokens_per_minute
        body = {"model": "code", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": most + 1}
        assert (await Call(app, body=body | {"max_tokens": 5})).status == 200
        answer = await Call(app, body=body)
        assert answer.status == 400, answer.body
        assert b"tokens per" in answer.body

    try:
        asyncio.run(main())
    finally:
        guards.popitem()[1].manager.close()
    assert guards == {}


def test_a_model_that_nobody_has_named_is_told(files):
    outcome = run("tune", "trace.csv", "--write", "quotas.toml")
    assert "the trace names no model: the limits are for one called 'default'" in " ".join(outcome.stdout.split())
    assert "default" in load_quotas("quotas.toml")
    assert "names no model" not in run("tune", "trace.csv", "--model", "code").stdout
    Path("named.csv").write_text("TIMESTAMP,Model,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,chat,5,6\n")
    outcome = run("tune", "named.csv", "--model", "code")
    assert (outcome.exit_code, outcome.stderr.splitlines()[-1]) == (
        2, "modelquota: error: the trace names its models; leave out model='code'",
    )  # fmt: skip


def test_the_difference_to_the_current_quotas_is_shown(files):
    outcome = run("tune", "trace.csv", "--current", "current.toml", "--write", "current.toml")
    assert outcome.exit_code == 0
    assert "-max_tokens_per_second = 400\n" in outcome.stdout
    assert re.search(r"^\+max_tokens_per_second = \d+  # knee of the frontier", outcome.stdout, re.MULTILINE)
    loaded = load_quotas("current.toml")
    assert loaded["code"].on_violation == "queue"
    assert loaded.patterns["user:*"].max_tokens_per_hour == 50


def test_as_json_every_key_is_in_the_help(files):
    outcome = run("tune", "trace.csv", "-c", "current.toml", "--json", "--ttft", "100", "--tpot", "20")
    report = json.loads(outcome.stdout)
    assert report["models"][0]["concurrency"]["peak"] > 0
    assert [scenario["name"] for scenario in report["models"][0]["scenarios"]][:2] == ["current", "recommended"]
    text = run("tune", "--help").stdout
    for key in [*report, *report["models"][0]]:
        assert key in text


def test_conditions_for_a_pipeline(files):
    outcome = run("tune", "trace.csv", "-c", "current.toml", "--fail-if", "denied > 1%", "--fail-if", "p99_wait > 1h")
    assert outcome.exit_code == 2
    assert "the condition is 'p99_wait > 1h'" in outcome.stderr
    outcome = run("tune", "trace.csv", "-c", "current.toml", "--fail-if", "denied > 1%", "--fail-if", "p99_wait > 9s")
    assert outcome.exit_code == 1
    failed = [line for line in outcome.stderr.splitlines() if "failed" in line]
    assert len(failed) == 1
    assert re.fullmatch(r"modelquota: failed: code, current quotas: denied > 1% \(denied is \d+\.\d+%\)", failed[0])
    assert run("tune", "trace.csv", "--fail-if", "denied > 1%").exit_code == 0


def test_demand_beside_capacity(files):
    Path("bench.json").write_text(
        json.dumps(
            {"request_throughput": 2.0, "total_token_throughput": 9000.0, "max_concurrency": 8, "p99_ttft_ms": 900}
        )
    )
    outcome = run("tune", "trace.csv", "--capacity", "bench.json", "--slo", "p99_ttft=1000")
    assert outcome.exit_code == 0
    text = " ".join(outcome.stdout.split())
    assert "The hardware holds 2 requests/s, 9k tokens/s, 8 open at p99_ttft<=1000; the trace asks for 0.55" in text
    missed = run("tune", "trace.csv", "--capacity", "bench.json", "--slo", "p99_ttft=100")
    assert "No run met p99_ttft<=100." in missed.stdout


def test_quotas_side_by_side_and_waits(files):
    run("tune", "trace.csv", "--model", "code", "--write", "new.toml")
    outcome = run("replay", "trace.csv", "-q", "current.toml", "-q", "new.toml")
    assert outcome.exit_code == 0
    rows = {line.split()[0]: line.split() for line in outcome.stdout.splitlines() if line.strip()}
    assert rows["new.toml"][1:3] == ["100.0", "%"]
    assert float(rows["current.toml"][1]) < 90
    report = json.loads(run("replay", "trace.csv", "-q", "current.toml", "-q", "new.toml", "--json").stdout)
    assert [entry["quotas"] for entry in report["replays"]] == ["current.toml", "new.toml"]
    waited = report["replays"][0]["models"][0]
    assert waited["waited"] > 0
    assert 0 < waited["median_wait_ms"] <= waited["p99_wait_ms"] <= waited["longest_wait_ms"] <= 5_000
    once = json.loads(run("replay", "trace.csv", "-q", "current.toml", "--no-wait", "--json").stdout)["models"][0]
    assert once["waited"] == 0
    assert once["admitted"] < waited["admitted"]


def test_a_trace_from_standard_input(files):
    outcome = CliRunner().invoke(app, ["tune", "-", "--json"], input=Path("trace.csv").read_bytes())
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["trace"] == "standard input"


def test_users(files):
    Path("users.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens,User\n"
        + "".join(f"2023-11-16 18:{i // 60:02}:{i % 60:02},30,10,{'ann' if i % 3 else 'bob'}\n" for i in range(600))
    )
    outcome = run("tune", "users.csv", "--per", "user")
    assert outcome.exit_code == 0
    assert "ann" in outcome.stdout
    outcome = run("replay", "users.csv", "-q", "current.toml", "--per", "user", "--json")
    users = {user["model_id"]: user for user in json.loads(outcome.stdout)["users"]}
    assert users["user:ann"]["denied"]["tokens_per_hour"] == 399
    assert "user:bob" in run("replay", "users.csv", "-q", "current.toml", "--per", "user").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tune", "none.csv"], "none.csv: No such file or directory"),
        (["tune", "trace.csv", "--headroom", "lots"], "--headroom is 'lots'; expected a share such as 15% or 0.15"),
        (["tune", "trace.csv", "--target-denied", "70%"], "target_denied is 0.7; expected a share from 0 to 0.5"),
        (["tune", "trace.csv", "--map", "prompt"], "--map is 'prompt'; expected ROLE=COLUMN"),
        (["tune", "trace.csv", "--format", "azur"], "format is 'azur'; expected one of"),
        (["tune", "trace.csv", "--slo", "p99_ttft=5"], "--capacity, which is missing"),
        (["tune", "trace.csv", "--capacity", "none.json"], "none.json: No such file"),
        (["tune", "trace.csv", "--capacity", "trace.csv", "--slo", "p99"], "--slo is 'p99'; expected a latency"),
        (["tune", "trace.csv", "--per", "team"], "per is 'team'; expected user or prefix"),
        (["tune", "trace.csv", "--write", "no/where.toml"], "no/where.toml: No such file or directory"),
        (["tune", "trace.csv", "--current", "trace.csv"], "trace.csv:"),
        (["replay", "trace.csv", "-q", "current.toml", "--per", "team"], "--per is 'team'; expected user"),
        (["replay", "trace.csv", "-q", "current.toml", "--per", "user"], "the trace names no users"),
    ],
)
def test_unusable_input_is_one_message_and_exit_code_2(files, arguments, says):
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert says in outcome.stderr
    assert "Traceback" not in outcome.output
