"""Traces to replay: Azure's public one if it is beside the checkout, and always a small one of the same format."""

import random
from datetime import datetime, timedelta
from pathlib import Path

import pytest

AZURE_TRACE = Path(__file__).resolve().parents[2] / "../shared/traces/azure_llm_code_2023.csv"
AZURE_REQUESTS, SMALL_REQUESTS = 8_819, 2_000
TICKS_PER_SECOND = 10_000_000  # seven digits after the point, as Azure's timestamps have

needs_azure_trace = pytest.mark.skipif(not AZURE_TRACE.exists(), reason=f"the Azure trace is not at {AZURE_TRACE}")


def write_small_trace(path: Path) -> None:
    """Write 2,000 requests of about an hour, in bursts, with prompts of many sizes: the same ones on every machine."""
    rng = random.Random(2023)  # of which only random() is used: its sequence is promised to stay
    start = datetime(2023, 11, 16, 18, 17, 3)
    ticks = 9_799_600
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for _ in range(SMALL_REQUESTS):
        second = start + timedelta(seconds=ticks // TICKS_PER_SECOND)
        context, generated = 3 + int(7_400 * rng.random() ** 2.5), 1 + int(700 * rng.random() ** 8)
        lines.append(f"{second:%Y-%m-%d %H:%M:%S}.{ticks % TICKS_PER_SECOND:07},{context},{generated}")
        ticks += int((0.2 if rng.random() < 0.8 else 16) * rng.random() * TICKS_PER_SECOND)
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
