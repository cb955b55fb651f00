"""How hard Hypothesis searches, and what the promises are checked of.

``HYPOTHESIS_PROFILE=thorough pytest`` searches for many minutes instead of seconds, ``brief`` for less.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import NOW_NS, make_manager
from hypothesis import HealthCheck, settings
from oracle import Oracle

from modelquota import ManualClock, ResourceQuotaManager

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
# The first example of a large strategy takes longer, on a busy machine, than Hypothesis thinks healthy.
SLOW_START = (HealthCheck.too_slow, HealthCheck.data_too_large)

# CI sees the same examples each time, so more of them find less than the different ones of everyone else.
settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    derandomize=IN_CI,
    max_examples=50 if IN_CI else 100,
    suppress_health_check=SLOW_START,
)
settings.register_profile("brief", settings.get_profile("default"), max_examples=30)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=[ResourceQuotaManager, Oracle], ids=["core", "oracle"], scope="session")
def kind(request: pytest.FixtureRequest) -> Any:
    """A class with the verbs of a manager, whose promises are checked: the core, and the model that judges it."""
    return request.param


@pytest.fixture
def clock() -> ManualClock:
    """The clock of `manager`; a module to which the time matters has its own."""
    return ManualClock(NOW_NS)


@pytest.fixture
def manager(request: pytest.FixtureRequest, clock: ManualClock) -> ResourceQuotaManager:
    """A manager in memory with the quotas that the test's module lists as ``QUOTAS``, or none."""
    return make_manager(*getattr(request.module, "QUOTAS", ()), clock=clock)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a state file can be made."""
    return tmp_path / "quota.state"


@pytest.fixture
def switch_threads_often() -> Iterator[None]:
    """Threads take turns after microseconds, so that what depends on their order shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
