"""Files of all kinds, opened as state files: refused and left as they were, or opened and usable; never a crash."""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import SharingManager
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelquota import QuotaExceededError, ResourceQuotaManager, StateFileError
from modelquota._core.state import validate
from modelquota._core.state.packing import dtypes, ring_dtypes
from modelquota._core.state.state import CONSTANTS, regions_for
from modelquota._core.table import shares
from modelquota.waiting.thread import ThreadWaiter

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
MODELS = 8
MODEL_IDS = ("model-0", "model-0#output", "model-0#usd", "model-2", "model-3", "trail")
REGIONS = regions_for(MODELS)
LAYOUT = dict(dtypes())
PARTS = {
    "header": (0, 1),
    "entry": (REGIONS.entries, 3),
    "grant": (REGIONS.grants, 70),
    "row": (REGIONS.rows, MODELS),
    "cold": (REGIONS.cold_rows, MODELS),
    **{f"ring {window}": (offset, 3) for window, offset in enumerate(REGIONS.rings)},
    "share": (REGIONS.shares, MODELS),
}
LAYOUT |= {f"ring {window}": dtype for window, dtype in enumerate(ring_dtypes())}
HOSTILE = (0, 1, 2, 59, 60, 61, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def leaves(dtype: np.dtype[Any], offset: int = 0, name: str = "") -> list[tuple[str, int, int]]:
    """Name, offset and size of every number in a struct."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        count = int(np.prod(shape))
        return [
            leaf for i in sorted({0, 1, count - 1}) for leaf in leaves(base, offset + i * base.itemsize, f"{name}[{i}]")
        ]
    if dtype.fields is None:
        return [(name, offset, dtype.itemsize)]
    return [
        leaf
        for field in dtype.names or ()
        for leaf in leaves(dtype.fields[field][0], offset + dtype.fields[field][1], f"{name}.{field}")
    ]


FIELDS = [
    (f"{part}[{i}]{name}", start + i * LAYOUT[part].itemsize + offset, size)
    for part, (start, count) in PARTS.items()
    for i in sorted({0, 1, count - 1} & set(range(count)))
    for name, offset, size in leaves(LAYOUT[part])
]
BYTES = st.one_of(
    *(st.integers(start, start + count * LAYOUT[part].itemsize - 1) for part, (start, count) in PARTS.items()),
    st.integers(REGIONS.seats, REGIONS.seats + 64),
    st.integers(REGIONS.changes, REGIONS.changes + 64),
    st.integers(REGIONS.entry_owners, REGIONS.entry_owners + 16),
    st.integers(REGIONS.grant_owners, REGIONS.grant_owners + 16),
    st.integers(REGIONS.names, REGIONS.names + 256),
    st.integers(0, REGIONS.size - 1),
)
FLIPS = st.lists(st.tuples(BYTES, st.integers(0, 7)), min_size=1, max_size=4)
VALUES = st.sampled_from(HOSTILE) | st.integers(0, 2**64 - 1)
OVERWRITTEN = st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3)


class Workshop:
    """A good state file, and damaged copies of it. With `sharing`, its models have shares, and most a lease to use."""

    def __init__(self, directory: Path, sharing: bool = False) -> None:
        good = directory / "good.state"
        self.path = directory / "damaged.state"
        manager = ResourceQuotaManager(path=good, max_models=MODELS)
        for number, action in enumerate(("reject", "throttle", "queue", "warn")):
            manager.set_quota(
                f"model-{number}",
                max_requests_per_second=3.7 * (1 + number),
                max_tokens_per_second=(None, 0.1, 10**6, 1e-3)[number],
                max_concurrent_requests=3,
                max_requests_per_minute=(None, None, 60, 1)[number],
                max_tokens_per_month=(10**6, None, None, 5)[number],
                token_weights=(1, 0.25, 4),
                unit=("tokens", "usd")[number % 2],
                on_violation=action,
                grace_period_sec=60.0 if action == "queue" else 0.0,
            )
            for _ in range(3):
                manager.check_quota(f"model-{number}", 1)
        manager.remove_quota("model-1")
        self.held = [manager.reserve("model-0", 2, 3, 4), *(manager.reserve("model-2", 0, 1) for _ in range(3))]
        waiters = [ThreadWaiter() for _ in range(2)]
        for waiter, ids in zip(waiters, ("model-2", ("model-0", "model-2")), strict=True):
            assert manager._admit_or_queue(waiter, ids, 1, 0, 0, None, 0, nowait=False) is waiter
        manager.set_quota("trail", max_tokens_per_minute=10**6, max_tokens_per_month=10**6)
        for meter in ("model-0#output", "model-0#usd"):
            manager.set_quota(meter, max_tokens_per_hour=10**6, token_weights=(0, 0, 1.5))
        manager.check_quota("model-0", 1)
        manager.check_quota("trail", 1)
        time.sleep(0.02)
        manager.get_usage("trail")  # one closed slot
        while manager._arrays()[1]["trail"][1] != CONSTANTS["trail"]:  # not across a minute's edge
            time.sleep(0.02)
            manager.check_many(manager.codes(["trail"]), 1)
        if sharing:
            shares.begin_sharing(manager, on_lease_end="share", nodes=3)
            shares.renew_lease(manager, shares.now_ns(manager) + 10**15)
            codes = shares.sharing_codes(manager)
            totals = shares.exchange_shares(manager, codes).limits
            shares.exchange_shares(manager, codes[:-1], np.where(totals == shares.UNLIMITED, 0, totals // 2)[:-1])
            shares.write_node(manager, b"a node of many")
            assert shares.lead(manager, 60.0)
        manager.flush()
        self.extents = []
        with open(good, "rb") as file:
            for start in range(0, REGIONS.size, 4096):
                page = file.read(4096)
                if page.strip(b"\0"):
                    self.extents.append((start, page))
        for waiter in waiters:
            waiter.leave()
        for grant in self.held:
            grant.release()

    def write(self, changes: list[tuple[int, bytes]], flips: list[tuple[int, int]], size: int = REGIONS.size) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        with open(self.path, "w+b") as file:
            for start, page in [*self.extents, *changes]:
                file.seek(start)
                file.write(page)
            for at, bit in flips:
                file.seek(at)
                byte = (file.read(1) or b"\0")[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << bit]))
            file.truncate(size)

    def data(self) -> list[tuple[int, bytes]]:
        """What is in the file: everything but pages of zeros."""
        found = []
        with open(self.path, "rb") as file:
            for start in range(0, os.fstat(file.fileno()).st_size, 1 << 20):
                block = file.read(1 << 20)
                if block.count(0) != len(block):
                    found.append((start, block))
        return found

    def is_refused(self) -> bool:
        """Open it; where it opens it can be used in every way."""
        before, size = self.data(), self.path.stat().st_size
        with contextlib.suppress(StateFileError):
            look(self.path)
        try:
            manager = SharingManager(path=self.path)
        except StateFileError:
            assert self.data() == before
            assert self.path.stat().st_size == size
            return True
        use(manager)
        return False


def look(path: Path) -> None:
    """Everything that one does with a view, which does not judge the rows that it reads."""
    with ResourceQuotaManager.open_readonly(path) as view:
        for read in (view.list_models, view.snapshot, view.get_stats, lambda: view.print_status(io.StringIO())):
            with contextlib.suppress(StateFileError):
                read()
        for model_id in ("model-0", "trail", "model-3"):
            with contextlib.suppress(StateFileError):
                view.get_model_report(model_id)


def exchange(manager: ResourceQuotaManager) -> None:
    """Everything that a node does with its host's shares."""
    codes = shares.sharing_codes(manager)
    shares.names_of(manager, codes)
    found = shares.exchange_shares(manager, codes)
    for asked in (found.limits // 2, np.full_like(found.limits, 2**62), found.used, np.zeros_like(found.used)):
        shares.exchange_shares(manager, codes, asked.clip(0, 2**62))
    shares.sharing_codes(manager, True)
    lease = shares.read_lease(manager)
    shares.wait_urgent(manager, lease.urgent, 0.0)
    shares.lead(manager, 1.0)
    shares.resign(manager)
    shares.write_node(manager, shares.read_node(manager))


def use(manager: ResourceQuotaManager) -> None:
    """Everything that one does with a manager."""
    exchange(manager)
    for model_id in [*manager.list_models(), "model-0", "another", "model-2"]:
        for _ in range(2):
            manager.check_quota(model_id, 1, 1, 1).reason  # noqa: B018
            manager.check_quota(model_id, 2**62)
            for act in ("release", "cancel"):
                with contextlib.suppress(QuotaExceededError):
                    getattr(manager.reserve((model_id,), 3, 1, 1), act)()
            with contextlib.suppress(QuotaExceededError):
                grant = manager.acquire(model_id, 3, 1, 1, timeout=0)
                grant.add(70)
                grant.settle(1)
                grant.release()
            manager.get_usage(model_id)
            manager.get_quota(model_id)
            manager.get_model_report(model_id)
            with contextlib.suppress(KeyError):
                manager.update_memory_usage(model_id, 1, 2)
                manager.reset_burst(model_id)
                codes = np.repeat(manager.codes([model_id]), 3)
                manager.check_many(codes, [0, 1, 2**62])
                manager.charge_many(codes, 5)
                manager.update_quota(model_id, max_requests_per_second=2.5, burst_tokens=1, max_ram_mb=5)
                manager.update_quota(model_id, max_tokens_per_minute=100, max_requests_per_month=1000)
        manager.set_quota(model_id, max_requests_per_second=7.25, max_tokens_per_second=None)
    exchange(manager)
    shares.end_sharing(manager)
    manager.enforcement_enabled = True
    manager.snapshot()
    manager.get_stats()
    manager.flush()
    for model_id in manager.list_models():
        assert manager.remove_quota(model_id)
    manager.set_quota("fresh", max_requests_per_day=2, max_requests_per_second=None, on_violation="reject")
    assert sum(bool(manager.check_quota("fresh", 1)) for _ in range(5)) == 2
    with pytest.raises(QuotaExceededError):
        manager.reserve("fresh", 1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(validate, "_LOOKS", 2)  # nobody else writes here
        yield Workshop(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def sharing_workshop(tmp_path_factory, workshop):
    return Workshop(tmp_path_factory.mktemp("sharing"), sharing=True)


@pytest.fixture(scope="module", params=["alone", "sharing"])
def any_workshop(request, workshop, sharing_workshop):
    return workshop if request.param == "alone" else sharing_workshop


def test_the_good_file_opens(any_workshop):
    any_workshop.write([], [])
    assert not any_workshop.is_refused()


@given(st.integers(0, REGIONS.size + 8192))
@example(0)
@example(4095)
@example(REGIONS.size - 1)
@example(REGIONS.size + 1)
def test_other_lengths_are_refused(workshop, size):
    workshop.write([], [], size)
    assert workshop.is_refused() or size == REGIONS.size


@given(FLIPS)
def test_flipped_bits(any_workshop, flips):
    any_workshop.write([], flips)
    any_workshop.is_refused()


def test_hostile_numbers_in_every_field(any_workshop):
    rng = random.Random()
    for name, at, size in FIELDS:
        for value in HOSTILE if THOROUGH else [rng.choice(HOSTILE)] if rng.random() < 0.5 else []:
            any_workshop.write([(at, value.to_bytes(8, "little")[:size])], [])
            try:
                any_workshop.is_refused()
            except Exception as error:
                raise AssertionError(f"{name} = {value}") from error


@given(OVERWRITTEN)
@example([(next(field for field in FIELDS if field[0] == "grant[1].tokens"), 2**62)])
@example([(next(field for field in FIELDS if field[0] == "header[0].enforcing"), 0)])
def test_several_hostile_numbers(any_workshop, overwritten):
    any_workshop.write([(at, value.to_bytes(8, "little")[:size]) for (_, at, size), value in overwritten], [])
    any_workshop.is_refused()


@given(st.binary(max_size=10_000))
@settings(max_examples=30)
def test_foreign_files_are_refused(workshop, content):
    workshop.path.unlink(missing_ok=True)
    workshop.path.write_bytes(content)
    assert workshop.is_refused()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 10**6, "newer"),
        ("version", 1, "another version"),
        ("fingerprint", 5, "another version"),
        ("magic", CONSTANTS["magic"] + 1, "not a state file"),
        ("max_models", 2**40, "max_models"),
        ("max_models", 9, "bytes long"),
    ],
)
def test_other_headers_are_refused(workshop, field, value, words):
    dtype, at = LAYOUT["header"].fields[field][:2]
    workshop.write([(at, int(value).to_bytes(8, "little")[: dtype.itemsize])], [])
    with pytest.raises(StateFileError, match=words):
        ResourceQuotaManager(path=workshop.path)
    assert workshop.is_refused()


@pytest.mark.parametrize("field", [*validate._COUNTS, *validate._TALLIES])
def test_a_counter_that_would_overflow_a_sum_is_refused(workshop, field):
    dtype, at = LAYOUT["cold"].fields[field][:2]
    for value in (2**63 - 1, 2**64 - 1):
        workshop.write([(REGIONS.cold_rows + at, value.to_bytes(8, "little"))], [])
        with pytest.raises(StateFileError, match=field):
            ResourceQuotaManager(path=workshop.path)
    assert dtype.base.itemsize == 8


@pytest.mark.parametrize("mask", [1, 1 << 14, 1 << 15, 0xFFFF])
def test_shadow_limits_that_do_not_exist_are_refused(workshop, mask):
    at = LAYOUT["row"].fields["shadow"][1]
    workshop.write([(REGIONS.rows + at, mask.to_bytes(2, "little"))], [])
    with pytest.raises(StateFileError, match="shadow limits"):
        ResourceQuotaManager(path=workshop.path)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_count_of_rows_below_one_that_was_used_is_refused(workshop, count):
    at = LAYOUT["header"].fields["row_count"][1]
    workshop.write([(at, count.to_bytes(8, "little"))], [])
    with pytest.raises(StateFileError, match="row_count"):
        ResourceQuotaManager(path=workshop.path)


@pytest.mark.parametrize("version", [0, 1, 3, 2**64 - 1])
def test_a_damaged_number_of_changes_hides_no_model(workshop, version):
    at = LAYOUT["header"].fields["registry_version"][1]
    workshop.write([(at, version.to_bytes(8, "little"))], [])
    with ResourceQuotaManager(path=workshop.path) as manager:
        assert sorted(manager.list_models()) == sorted(MODEL_IDS)
        for model_id in MODEL_IDS:
            manager.set_quota(model_id, max_requests_per_second=1.0)
        assert len(manager.list_models()) == len(MODEL_IDS)


@pytest.mark.parametrize("field", ["ram_mb", "ssd_mb", "tokens"])
def test_a_grant_that_holds_what_nobody_can_have_is_refused(workshop, field):
    at = LAYOUT["grant"].fields[field][1]
    workshop.write([(REGIONS.grants + at, (2**63).to_bytes(8, "little"))], [])
    with pytest.raises(StateFileError, match=f"{field} is not a count"):
        ResourceQuotaManager(path=workshop.path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("decider", 2**18 + 1, "its deadline or its deciding record is invalid"),
        ("unclaimed_until_ns", 2**63 - 1, "its deadline or its deciding record is invalid"),
        ("unclaimed_until_ns", 2**64 - 2, "its deadline or its deciding record is invalid"),
        ("charge.tokens", 2**63, "its charge is invalid"),
        ("charge.raised", 2**62 + 1, "its charge is invalid"),
        ("charge.raised_request", 2, "its charge is invalid"),
        ("charge.at_ns", 2**61 + 1, "its charge is invalid"),
    ],
)
def test_a_grant_that_nobody_could_take_or_refund_is_refused(workshop, field, value, words):
    at, dtype = REGIONS.grants, LAYOUT["grant"]
    for name in field.split("."):
        dtype, offset = dtype.fields[name][:2]
        at += offset
    workshop.write([(at, value.to_bytes(8, "little")[: dtype.itemsize])], [])
    with pytest.raises(StateFileError, match=words):
        ResourceQuotaManager(path=workshop.path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / "quota.state")
    with pytest.raises(OSError, match="quota.state"):
        ResourceQuotaManager(path=tmp_path / "quota.state")


@pytest.mark.parametrize(
    ("part", "field", "index", "value", "words"),
    [
        ("row", "trail", 0, 5, "its trail has too many slots"),
        ("row", "trail_slots", 1, 0, "the slots of its trail are not in order"),
        ("row", "trail_requests", 0, 999, "the requests of its trail do not add up"),
        ("row", "trail_tokens", 0, 999, "the tokens of its trail do not add up"),
        ("row", "trail_request_minimum", 0, 2**31, "its lowest request level is invalid"),
        ("row", "trail_token_minimum", 0, 2**32 - 1, "its lowest token level is invalid"),
        ("row", "trail_end_ns", 0, 10**18 + 1, "its trail_end_ns is not the end of its trail"),
        ("row", "slot_end_ns", 0, 0, "its slot_end_ns is before the first slot ends"),
        ("cold", "filled", 4, 61, "a window has too many slots"),
        ("cold", "counted", 0, 0b01111, "its limit of tokens in window 4 is invalid"),
        ("cold", "counted", 0, 0b11110, "the windows that it counts are unknown"),
        ("cold", "counted", 0, 0b111111, "the windows that it counts are unknown"),
        ("cold", "ring_offset", 1, 0, "its ring_offset is not where its rings are"),
        ("cold", "ring_offset", 4, 2**63, "its ring_offset is not where its rings are"),
        ("cold", "weights", 0, 2**63, "its weights of tokens or their unit are unknown"),
        ("cold", "weights", 2, 10**12 + 1, "its weights of tokens or their unit are unknown"),
        ("cold", "unit", 0, 4, "its weights of tokens or their unit are unknown"),
        ("cold", "meter_of", 0, MODELS + 1, "its meter_of is not another row"),
        ("cold", "meter_of", 0, 2, "its meter_of is not another row"),
        ("cold", "first_meter", 0, 2**32 - 1, "its first_meter is not another row"),
        ("cold", "next_meter", 0, MODELS + 1, "its next_meter is not another row"),
        ("cold", "stage", 0, CONSTANTS["last_stage"] + 1, "its stage is unknown"),
        ("cold", "tokens_base", 1, 5, "the tokens of window 1 are not the sum of its slots"),
        ("cold", "requests_start", 4, 5, "the requests of window 4 are not"),
        ("ring 0", "slots", 7, 2**32 - 1, "the requests of window 0 are not"),
    ],
)
def test_a_fault_of_a_row_is_named(workshop, part, field, index, value, words):
    """Of the row that has a trail, and limits of a minute and a month."""
    start, row = PARTS[part][0], 1
    if part == "ring 0":
        (page,) = [page for at, page in workshop.extents if at == REGIONS.rows]
        slot_end_ns = int(np.frombuffer(page, LAYOUT["row"], 2)["slot_end_ns"][1])
        index = 2 * ((slot_end_ns * 3 // 50_000_000 - 2) % 60)  # the slot before the one that the windows are in
    dtype, at = LAYOUT[part].fields[field]
    item = dtype.base.itemsize
    at += start + row * LAYOUT[part].itemsize + index * item
    workshop.write([(at, value.to_bytes(8, "little")[:item])], [])
    with pytest.raises(StateFileError, match=f"row {row}: {words}"):
        ResourceQuotaManager(path=workshop.path)
    assert workshop.is_refused()


@pytest.mark.parametrize("verb", ["decide", "remove"])
def test_links_that_are_damaged_while_the_file_is_used_end_in_the_row(workshop, verb):
    """A meter that is its own model's, and a list that leads to itself or to a row that has never had a model."""
    cold, row = LAYOUT["cold"], LAYOUT["row"]
    for field, value in (("meter_of", 1), ("first_meter", 1), ("first_meter", MODELS), ("next_meter", 1)):
        workshop.write([], [])
        manager = ResourceQuotaManager(path=workshop.path)
        with open(workshop.path, "r+b") as file:
            for at, number in (
                (REGIONS.cold_rows + cold.fields[field][1], value),
                (REGIONS.rows + (MODELS - 1) * row.itemsize + row.fields["generation"][1], 1),
            ):
                file.seek(at)
                file.write(number.to_bytes(4, "little"))
        if verb == "remove":
            assert manager.remove_quota("model-0")
        else:
            manager.check_quota("model-0", 1)
            manager.check_many(manager.codes(["model-0"]), 1)
        manager.close()


@pytest.mark.parametrize(
    ("part", "field", "index", "value", "words"),
    [
        ("row", "has_share", 0, 2, "row 1: whether it has a share is unknown"),
        ("row", "has_share", 0, 0, "row 1: its request rate disagrees with how it is encoded"),
        ("cold", "share_offset", 0, 8, "row 1: its share_offset is not where its share is"),
        ("cold", "request_limit", 2, 7, "row 1: its limits are not what its share leaves of them"),
        ("share", "lease_offset", 0, 8, "row 1: its lease_offset is not where the lease is"),
        ("share", "held", 3, 2**62 + 1, "row 1: its share is not a share"),
        ("share", "held", 4, 2**64 - 1, "row 1: its share is not a share"),
        ("share", "held", 6, 10**5, "row 1: its limits are not what its share leaves of them"),
        ("share", "token_limit", 1, 2**63, "row 1: its limits are not what its share leaves of them"),
        ("share", "request_drain", 0, 2**63, "row 1: the request rate of its share is none"),
        ("share", "token_cap", 1, 2**63, "row 1: the token rate of its share is none"),
        ("share", "phase", 0, 5, "row 1: its limits are not what its share leaves of them"),
        ("share", "needed_tokens", 0, 2**63, "row 1: its needed_tokens is not a count"),
        ("share", "peak_requests", 0, 2**63, "row 1: its peak_requests is not a count"),
        ("share", "starved", 0, 2**63, "row 1: starved is too large"),
        ("share", "request_finer", 0, 20, "row 1: its request_finer is too large"),
        ("header", "lease.rule", 0, 4, "its lease has the rule 4, which is unknown"),
        ("header", "lease.rule", 0, 3, "its lease has the rule 3, which is unknown"),
        ("header", "lease.end_ns", 0, 2**61 + 1, r"its lease ends beyond 2\*\*61 ns"),
        ("header", "lease.clock_offset_ns", 0, 2**63, r"its lease ends beyond 2\*\*61 ns, or its clock"),
        ("header", "lease.retry_ns", 0, 2**63, "the retry_ns of its lease is"),
        ("header", "lease.node_size", 1, 257, "what its node remembers is longer than it can be"),
    ],
)
def test_a_fault_of_a_share_is_named(sharing_workshop, part, field, index, value, words):
    """Of the row "trail", which has limits of tokens and, by default, of requests a day."""
    dtype, at = LAYOUT[part], PARTS[part][0] + (LAYOUT[part].itemsize if part != "header" else 0)
    for name in field.split("."):
        dtype, offset = dtype.fields[name][:2]
        at += offset
    item = 8 if dtype.base.names else dtype.base.itemsize
    sharing_workshop.write([(at + index * item, value.to_bytes(8, "little")[:item])], [])
    with pytest.raises(StateFileError, match=words):
        ResourceQuotaManager(path=sharing_workshop.path)
