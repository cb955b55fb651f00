"""What does a million rows of a trace cost: to read them, to replay them, and to find quotas for them?"""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness.results import Row, at_most

QUESTION = "tuning"
REQUESTS = 1_000_000
FEW = 2_000
MOST_S = 4.0

# In a process of its own, so that the memory is that of the work.
PROGRAM = """
import json, resource, sys
from time import perf_counter, process_time
from modelquota import ResourceQuotaConfig
from modelquota.tuning.replay import replay
from modelquota.tuning.trace import read_trace
from modelquota.tuning.tune import tune

started = perf_counter()
trace = read_trace(sys.argv[1])
read = perf_counter()
generous = ResourceQuotaConfig("m", max_requests_per_second=50, max_tokens_per_second=200_000, burst_tokens=400_000,
                               max_tokens_per_hour=10**9, max_tokens_per_day=10**11, max_requests_per_hour=10**6,
                               max_requests_per_day=10**8, on_violation="queue")
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
    "tuned": tuned - waited_at, "processor": processor, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


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

    def run():
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, check=True, timeout=600)
        return json.loads(done.stdout)

    found = bench.once(run)
    memory, processor = found.pop("MB"), found.pop("processor")
    for step, seconds in found.items():
        bench.add(Row(QUESTION, f"{form}, 1,000,000 rows {step}", seconds, "s"))
    total = found["read"] + found["replayed"] + found["tuned"]
    bench.add(Row(QUESTION, f"{form}, read, replayed and tuned", total, "s", targets=(at_most(MOST_S),)))
    bench.add(Row(QUESTION, f"{form}, the same in processor time, with the start", processor, "s"))
    bench.add(Row(QUESTION, f"{form}, peak memory", memory, "MB"))
