"""What serving benchmarks held: the files of vLLM and AIPerf, as they write them, and which loads met an objective."""

import json

import numpy as np
import pytest

from modelquota import TraceError
from modelquota.tuning.capacity import read_capacity
from modelquota.tuning.trace import Trace
from modelquota.tuning.tune import tune

VLLM = {
    "date": "20261101-120000",
    "endpoint_type": "openai",
    "model_id": "meta-llama/Llama-3.1-8B-Instruct",
    "num_prompts": 1000,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 64,
    "duration": 100.0,
    "completed": 1000,
    "failed": 0,
    "total_input_tokens": 800_000,
    "total_output_tokens": 200_000,
    "request_throughput": 10.0,
    "request_goodput": None,
    "output_throughput": 2000.0,
    "total_token_throughput": 10_000.0,
    "max_concurrent_requests": 66,
    "mean_ttft_ms": 90.0,
    "median_ttft_ms": 80.0,
    "std_ttft_ms": 10.0,
    "p99_ttft_ms": 400.0,
    "mean_tpot_ms": 20.0,
    "p99_tpot_ms": 30.0,
    "p99_itl_ms": 60.0,
    "mean_e2el_ms": 6_000.0,
}
AIPERF = {
    "schema_version": "1.0",
    "aiperf_version": "0.5.0",
    "request_throughput": {"unit": "requests/sec", "avg": 4.0},
    "request_latency": {
        "unit": "ms",
        "avg": 3000.0,
        "p50": 2900.0,
        "p99": 5000.0,
        "min": 1000,
        "max": 6000,
        "std": 9.0,
    },
    "time_to_first_token": {"unit": "ms", "avg": 100.0, "p50": 90.0, "p99": 900.0},
    "inter_token_latency": {"unit": "ms", "avg": 12.0, "p99": 20.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 800.0},
    "input_sequence_length": {"unit": "tokens", "avg": 550.0},
    "input_config": {"endpoint": {}},
}


def vllm(rate, p99_ttft, **more):
    return VLLM | {"request_throughput": rate, "p99_ttft_ms": p99_ttft, "total_token_throughput": 1_000 * rate} | more


@pytest.fixture
def write(tmp_path):
    def write(name, *records):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(record) for record in records))
        return path

    return write


def test_a_result_of_vllm(write):
    (run,) = read_capacity([write("bench.json", VLLM)]).runs
    assert (run.tool, run.model_id) == ("vllm", "meta-llama/Llama-3.1-8B-Instruct")
    assert (run.requests_per_second, run.tokens_per_second, run.output_tokens_per_second) == (10, 10_000, 2_000)
    assert run.concurrency == 64
    assert run.latencies_ms["p99_ttft"] == 400
    assert "std_ttft" not in run.latencies_ms
    (free,) = read_capacity([write("free.json", VLLM | {"max_concurrency": None})]).runs
    assert free.concurrency == pytest.approx(60)  # ten a second, of six seconds each


def test_a_result_of_aiperf(write):
    (run,) = read_capacity([write("profile_export_aiperf.json", AIPERF)]).runs
    assert (run.tool, run.requests_per_second) == ("aiperf", 4)
    assert run.tokens_per_second == 800 + 4 * 550
    assert run.concurrency == pytest.approx(12)
    assert run.latencies_ms["p99_ttft"] == 900
    assert run.latencies_ms["median_e2el"] == 2900
    effective = AIPERF | {"effective_concurrency": {"unit": "requests", "avg": 11.5}}
    assert read_capacity([write("b.json", effective)]).concurrency == 11.5


def test_the_highest_load_that_meets_the_objective(write):
    paths = [write(f"{rate}.json", vllm(rate, ttft)) for rate, ttft in ((20, 9_000), (5, 100), (12, 1_900))]
    held = read_capacity(paths, {"p99_ttft": 2_000, "mean_tpot": 50})
    assert held.objective == "p99_ttft<=2000, mean_tpot<=50"
    assert (held.requests_per_second, held.tokens_per_second, held.concurrency) == (12, 12_000, 64)
    assert [(run.requests_per_second, run.meets) for run in held.runs] == [(5, True), (12, True), (20, False)]
    assert read_capacity(paths).requests_per_second == 20
    assert read_capacity(paths, {"p99_ttft": 1}).requests_per_second is None
    sweep = write("sweep.jsonl", vllm(5, 100), vllm(12, 1_900))
    assert len(read_capacity([sweep]).runs) == 2


@pytest.mark.parametrize(
    ("records", "objective", "line", "column", "says"),
    [
        ([{"throughput": 5}], {}, 1, "request_throughput", "vllm bench serve --save-result` or AIPerf writes"),
        ([[5]], {}, 1, "request_throughput", "expected what"),
        ([VLLM, {"a": 5}], {}, 2, "request_throughput", "expected what"),
        ([VLLM | {"request_throughput": "5"}], {}, 1, "request_throughput", "a number of 0 or more, found '5'"),
        ([VLLM], {"p90_ttft": 5}, 1, "p90_ttft", "this run has mean_ttft, median_ttft, p99_ttft"),
        ([AIPERF | {"request_throughput": {"avg": None}}], {}, 1, "request_throughput", "has no avg"),
        ([AIPERF | {"time_to_first_token": {"unit": "h", "avg": 5}}], {}, 1, "time_to_first_token", "its unit is 'h'"),
    ],
)
def test_other_files_are_refused(write, records, objective, line, column, says):
    path = write("bench.json", *records)
    with pytest.raises(TraceError) as caught:
        read_capacity([path], objective)
    assert (caught.value.path, caught.value.line, caught.value.column) == (str(path), line, column)
    assert says in str(caught.value)


def test_no_json_and_no_latency(write, tmp_path):
    (tmp_path / "text.json").write_text("rate: 5\n")
    with pytest.raises(TraceError, match="text.json: line 1: not JSON"):
        read_capacity([tmp_path / "text.json"])
    for objective, says in (({"p99_latency": 5}, "'p99_latency'; expected a statistic and one of ttft, tpot, itl"),
                            ({"p99_ttft": 0}, "p99_ttft=0; expected milliseconds above 0")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            read_capacity([write("bench.json", VLLM)], objective)


def test_more_demand_than_capacity_is_said(write):
    count = 2_000
    trace = Trace(
        path="made",
        times_ns=np.arange(count) * 10**8,
        input_tokens=np.full(count, 5_000),
        cached_tokens=np.zeros(count, np.int64),
        output_tokens=np.zeros(count, np.int64),
    )
    report = tune(trace, capacity=read_capacity([write("bench.json", VLLM)]))
    (said,) = (warning for warning in report.warnings if "tokens per second" in warning)
    assert "are more than the 1e+04 that the benchmark held" in said
    assert report.to_dict()["capacity"]["requests_per_second"] == 10
