"""What do a million rows of a trace cost: to read them, to replay them, and to find quotas for them?"""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness.results import Row, at_most, ratio_at_most

QUESTION = "tuning"
REQUESTS = 1_000_000
FEW = 2_000
MOST_S = 4.0
MOST_GROWTH = 1.1

# In a process of its own, so that the memory is that of the work; ru_maxrss would have that of the parent, too.
BEGIN = """
import json, sys
from time import perf_counter, process_time
from modelquota import ResourceQuotaConfig
from modelquota.tuning.replay import Replay, replay
from modelquota.tuning.trace import TraceStream, read_trace
from modelquota.tuning.tune import tune

def peak_mb():
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)["VmHWM"].split()[0]) / 1024

generous = ResourceQuotaConfig("m", max_requests_per_second=50, max_tokens_per_second=200_000, burst_tokens=400_000,
                               max_tokens_per_hour=10**9, max_tokens_per_day=10**11, max_requests_per_hour=10**6,
                               max_requests_per_day=10**8, on_violation="queue")
started = perf_counter()
"""

PROGRAM = """
trace = read_trace(sys.argv[1])
read = perf_counter()
once = replay(trace, {"m": generous})
replayed = perf_counter()
processor = process_time()
waited = replay(trace, {"m": generous}, wait=True)
waited_at = perf_counter()
processor -= process_time()
report = tune(trace)
tuned = perf_counter()
processor += process_time()
assert len(trace) == once.requests == report.requests
print(json.dumps({
    "read": read - started, "replayed": replayed - read, "replayed, with waits": waited_at - replayed,
    "tuned": tuned - waited_at, "processor": processor, "MB": peak_mb(),
}))
"""

WHILE_READ = """
run = Replay({"m": generous}, wait=True)
for part in TraceStream(sys.argv[1]):
    run.feed(part)
report = run.report()
print(json.dumps({"replayed": perf_counter() - started, "MB": peak_mb(), "requests": report.requests}))
"""


def run(program, path):
    command = [sys.executable, "-c", BEGIN + program, str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=600).stdout)


def write_azure(path, requests):
    """A day of requests, at random, in the form of Azure's traces."""
    rng = np.random.default_rng(1)
    seconds = np.cumsum(rng.exponential(86_400 / REQUESTS, requests))
    prompts, outputs = rng.integers(10, 8_000, requests), rng.integers(1, 800, requests)
    times = np.datetime64("2023-11-16T18:17:03") + (seconds * 1e6).astype("timedelta64[us]")
    with open(path, "w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        rows = zip(times.astype(str).tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        file.writelines(f"{time.replace('T', ' ')}0,{prompt},{output}\n" for time, prompt, output in rows)


def write_mooncake(path, requests):
    rng = np.random.default_rng(2)
    times = np.cumsum(rng.exponential(86_400_000 / REQUESTS, requests)).astype(int)
    prompts, outputs = rng.integers(10, 8_000, requests), rng.integers(1, 800, requests)
    with open(path, "w") as file:
        first = 0
        for time, prompt, output in zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True):
            blocks = list(range(first, first + prompt // 512 + 1))
            first += max(len(blocks) - 1, 1)
            record = {"timestamp": time, "input_length": prompt, "output_length": output, "hash_ids": blocks}
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize(("form", "write"), [("Azure", write_azure), ("Mooncake", write_mooncake)])
def test_a_million_rows(bench, tmp_path, form, write):
    requests = REQUESTS if bench.enabled else FEW
    path = tmp_path / "trace"
    write(path, requests)
    found = bench.once(functools.partial(run, PROGRAM, path))
    memory, processor = found.pop("MB"), found.pop("processor")
    for step, seconds in found.items():
        bench.add(Row(QUESTION, f"{form}, 1,000,000 rows {step}", seconds, "s"))
    total = found["read"] + found["replayed"] + found["tuned"]
    bench.add(Row(QUESTION, f"{form}, read, replayed and tuned", total, "s", targets=(at_most(MOST_S),)))
    bench.add(Row(QUESTION, f"{form}, the same in processor time, with the start", processor, "s"))
    bench.add(Row(QUESTION, f"{form}, peak memory", memory, "MB"))


def test_a_replay_while_the_trace_is_read(bench, tmp_path):
    """Memory is the same for four times the rows."""
    requests = REQUESTS if bench.enabled else FEW
    found = []
    for times in (1, 4):
        path = tmp_path / f"trace{times}"
        write_azure(path, times * requests)
        found.append(bench.once(functools.partial(run, WHILE_READ, path)) if times == 1 else run(WHILE_READ, path))
        assert found[-1]["requests"] == times * requests
    one, four = found
    bench.add(Row(QUESTION, "Azure, 1,000,000 rows replayed while they are read", one["replayed"], "s"))
    case = "Azure, 4,000,000 rows replayed while they are read, peak memory"
    bench.add(Row(QUESTION, case, four["MB"], "MB", "1,000,000 rows", one["MB"], (ratio_at_most(MOST_GROWTH),)))
