"""The demo: its traffic in simulated time, its screen on a pseudo-terminal and without one."""

import contextlib
import fcntl
import io
import math
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator

import pyte
import pytest
from rich.console import Console

from modelquota import Limit, ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cli.bars import UsageBar
from modelquota.cli.demo import _seen
from modelquota.cli.demo_table import demo_table
from modelquota.demo.traffic import CODE, CONVERSATION, MODELS, NS_PER_SECOND, Lane, Tally, Traffic, total

MODEL_IDS = [traffic.quota.model_id for traffic in MODELS]


def simulate(seconds: float, *, seed: int, lanes: int = 4, models=MODELS) -> tuple[ResourceQuotaManager, list[Lane]]:
    """Run the demo's traffic on a manual clock, from event to event."""
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock)
    for traffic in models:
        manager.set_quota(traffic.quota)
    rng = random.Random(seed)
    running = [
        Lane(manager, models, share=1 / lanes, rng=random.Random(rng.random()), now=lambda: clock.now_ns)
        for _ in range(lanes)
    ]
    while (due_ns := min(lane.next_ns for lane in running)) <= seconds * NS_PER_SECOND:
        clock.advance_ns(max(due_ns - clock.now_ns, 0))
        for lane in running:
            lane.step()
    return manager, running


@pytest.mark.parametrize("seed", range(5))
def test_every_action_is_seen_within_seconds(seed):
    manager, lanes = simulate(6, seed=seed)
    tallies = total(lanes)
    seconds = {model_id: (tally.first_violation_ns or math.inf) / NS_PER_SECOND for model_id, tally in tallies.items()}
    assert max(seconds.values()) < 6
    assert tallies["chat-70b"].denials[Limit.TOKENS_PER_SECOND] > 0
    assert tallies["code-34b"].denials[Limit.REQUESTS_PER_SECOND] > 0
    assert tallies["batch-13b"].denials[Limit.TOKENS_PER_HOUR] > 0
    assert tallies["dev-7b"].warned > 0
    assert tallies["dev-7b"].denied == 0
    assert tallies["batch-13b"].denied > 0
    for model_id, tally in tallies.items():
        assert tally.sent == tally.admitted + tally.denied + tally.waiting
        usage = manager.get_usage(model_id)
        assert usage is not None
        assert usage.requests_this_hour == tally.admitted
        assert usage.total_violations == tally.denials.total()
    stats = manager.get_stats()
    assert stats.total_checks == sum(len(lane.check_ns) for lane in lanes)
    assert stats.warned_requests == tallies["dev-7b"].warned


def test_those_who_wait_are_admitted_within_their_grace():
    _, lanes = simulate(30, seed=1)
    tallies = total(lanes)
    for traffic in MODELS:
        waits_ms = tallies[traffic.quota.model_id].waits_ms
        if traffic.quota.on_violation in ("throttle", "queue"):
            assert len(waits_ms) > 30
            assert 0 < max(waits_ms) <= traffic.quota.grace_period_sec * 1_000
            assert tallies[traffic.quota.model_id].denied > 0
        else:
            assert not waits_ms


def test_same_seed_same_traffic():
    def counts(seed: int) -> dict[str, Tally]:
        return total(simulate(5, seed=seed)[1])

    assert counts(3) == counts(3)
    assert counts(3) != counts(4)


class InTurn:
    """Lengths that number the requests: the first has one token, the next two."""

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, rng: random.Random) -> int:
        self.drawn += 1
        return self.drawn


def test_a_queue_is_first_come_first_served(monkeypatch):
    quota = ResourceQuotaConfig(
        "q", max_requests_per_second=2, burst_requests=0, on_violation="queue", grace_period_sec=3
    )
    admitted: list[int] = []
    original = ResourceQuotaManager.check_quota

    class Recording(ResourceQuotaManager):
        def check_quota(self, model_id, estimated_tokens):
            result = original(self, model_id, estimated_tokens)
            if result:
                admitted.append(estimated_tokens)
            return result

    monkeypatch.setitem(globals(), "ResourceQuotaManager", Recording)
    traffic = Traffic(quota, requests_per_second=4, lengths=InTurn())  # type: ignore[arg-type]
    _, (lane,) = simulate(20, seed=2, lanes=1, models=[traffic])
    assert lane.tallies["q"].denied > 10
    assert len(admitted) > 30
    assert admitted == sorted(set(admitted))


def test_lengths_are_those_of_the_traces():
    rng = random.Random(5)
    for lengths, median in ((CODE, 1_500 + 13), (CONVERSATION, 1_020 + 129)):
        drawn = sorted(lengths.draw(rng) for _ in range(4_001))
        assert drawn[2_000] == pytest.approx(median, rel=0.15)
        assert drawn[0] >= 2
        assert drawn[-1] <= lengths.prompt[2] + lengths.answer[2]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, ""), (0.5, "█████"), (1, "██████████"), (7, "██████████"), (-1, ""), (0.0625, "▋"), (0.99, "█████████▉")],
)
def test_usage_bar(fraction, text):
    console = Console(width=10, force_terminal=False, color_system=None)
    segment = next(iter(console.render(UsageBar(fraction))))
    assert segment.text == text.ljust(10)


@pytest.mark.parametrize("width", [40, 59, 60, 79, 80, 99, 100, 120])
def test_no_width_cuts_the_table(width):
    manager, lanes = simulate(30, seed=1)
    console = Console(file=io.StringIO(), width=width)
    console.print(demo_table(manager, MODELS, total(lanes), width=width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert len(text.splitlines()) == 1 + 4 * len(MODELS) - 1
    assert max(map(len, text.splitlines())) <= width
    shown = ["requests", *(["limit"] if width >= 60 else []), *(["used"] if width >= 80 else [])]
    assert [heading for heading in ("requests", "limit", "used") if heading in text.splitlines()[0]] == shown


def test_where_there_is_no_room_words_are_cut_and_not_figures():
    manager, _ = simulate(1, seed=1)
    tallies = {model_id: Tally(denied=123_456, waiting=7_890) for model_id in MODEL_IDS}
    console = Console(file=io.StringIO(), width=60)
    console.print(demo_table(manager, MODELS, tallies, width=60))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("123,456 denied, 7,890 waiting") == 2
    assert "chat…" in text


@pytest.mark.parametrize(
    ("admitted", "waiting", "says"),
    [
        (0, 2, "0 were admitted, 2 still wait"),
        (1, 1, "1 was admitted after 120 ms in the median, 1 still waits"),
        (2, 0, "2 were admitted after 120 ms in the median, 0 still wait"),
    ],
)
def test_one_waits_and_two_wait(admitted, waiting, says):
    tally = Tally(
        waiting=waiting,
        denials=Counter({Limit.TOKENS_PER_SECOND: 9}),
        first_violation_ns=NS_PER_SECOND,
        waits_ms=[120.0] * admitted,
    )
    assert _seen(MODELS[0].quota, tally, 0) == f"throttled what exceeded its tokens per second: {says}"


def read_all(fd: int) -> Iterator[bytes]:
    # A pseudo-terminal whose other side is closed reads as an error.
    with contextlib.suppress(OSError):
        while data := os.read(fd, 65_536):
            yield data


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "modelquota", "demo", *arguments]


@contextlib.contextmanager
def on_a_terminal(*arguments: str, columns: int, lines: int = 40) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        demo(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=env, preexec_fn=heed_interrupts
    ) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def heed_interrupts() -> None:
    """Undo what a background job of a shell inherits: that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def plain(screen: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen.decode())


@pytest.mark.parametrize("columns", [80, 120])
def test_screen_is_redrawn_in_place_and_fits(columns):
    with on_a_terminal("--seconds", "2", "--seed", "1", columns=columns) as (process, terminal):
        screen = b"".join(read_all(terminal))
        assert process.wait(60) == 0
    # Four times a second for two seconds, and some leeway for a busy machine.
    frames = plain(screen).split("modelquota demo")[1:]
    assert len(frames) >= 4
    assert screen.count(b"\x1b[1A") > 20, "a frame is drawn over the last one"
    assert b"\x1b[?25l" in screen
    assert screen.rfind(b"\x1b[?25h") > screen.rfind(b"\x1b[?25l"), "the cursor comes back"
    assert re.search(r"\d\.\d of 2 s   \d+ checks   Ctrl-C ends early", frames[0])
    last = frames[-1]
    assert max(map(len, last.splitlines())) <= columns
    table, closing = last.split("What you saw.")
    for model_id, action in zip(MODEL_IDS, ("throttle", "queue", "reject", "warn"), strict=True):
        assert model_id in table
        assert action in table
        assert model_id in closing
    assert table.count("requests/s") == table.count("tokens/hour") == 4
    assert "Ctrl-C" not in table
    assert ("waits" in table.splitlines()[1]) is (columns >= 100)
    assert re.search(r"How fast\. \d+ ns a check", closing)
    assert "modelquota replay TRACE.csv" in " ".join(closing.split())


@pytest.mark.parametrize(("columns", "lines", "models"), [(60, 20, 4), (60, 16, 4), (80, 12, 3), (40, 5, 0)])
def test_a_small_screen_has_its_headline_whole_models_and_the_time(columns, lines, models):
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    with on_a_terminal("--seconds", "20", columns=columns, lines=lines) as (_, terminal):
        frames = 0
        for data in read_all(terminal):
            stream.feed(data)
            rows = [line.rstrip() for line in screen.display if line.strip()]
            frames += bool(rows) and " checks   Ctrl-C ends" in rows[-1]
            if frames > 2:
                break
    assert rows[0].startswith("modelquota demo  4 models")
    assert rows[1].startswith("model ")
    assert len(rows) == 3 + 3 * models
    assert [row.split()[0] for row in rows[2:-1:3]] == MODEL_IDS[:models]
    assert "…" not in "".join(rows[1:-1])
    assert re.match(r"\d\.\d of 20 s   \d+ checks   Ctrl-C ends", rows[-1])


def test_ctrl_c_ends_with_the_report():
    with on_a_terminal("--seconds", "600", "--threads", "2", columns=80) as (process, terminal):
        screen = b""
        for data in read_all(terminal):
            if b"Ctrl-C" not in screen and b"Ctrl-C" in screen + data:
                process.send_signal(signal.SIGINT)
            screen += data
        assert process.wait(60) == 0
    text = plain(screen)
    assert "What you saw." in text
    assert "Next." in text
    assert "Traceback" not in text


def test_without_a_terminal_it_prints_plain_text():
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        demo("--seconds", "0.5", "--threads", "1"), capture_output=True, text=True, timeout=120, env=env, check=True
    )
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert done.stdout.count("modelquota demo") == 1
    assert all(done.stdout.count(model_id) == 2 for model_id in MODEL_IDS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_without_a_terminal_and_without_utf_8():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(demo("--seconds", "0.5"), capture_output=True, text=True, timeout=120, env=env, check=True)
    assert done.stdout.isascii()
    assert "#" in done.stdout
