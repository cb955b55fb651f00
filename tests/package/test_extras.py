"""Extras: what the code says to install can be installed, and none of it is imported by the library itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import modelquota
from modelquota._extras import extra

PACKAGE = Path(modelquota.__file__).parent
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OPTIONAL = ("prometheus_client", "opentelemetry", "psutil", "watchfiles", "rich", "typer", "redis")


def test_every_extra_that_a_message_names_is_one():
    named = {name for path in PACKAGE.rglob("*.py") for name in re.findall(r'with extra\("(\w+)"', path.read_text())}
    assert named == {"prometheus", "otel", "adjust", "reload", "asgi", "proxy", "langchain", "litellm", "redis"}
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert named <= extras.keys()
    found = set()
    for extra_of_tests in ("test", "real"):  # the second is not needed for the suite
        (own,) = (entry for entry in extras[extra_of_tests] if entry.startswith("modelquota["))
        found |= set(own.removeprefix("modelquota[").removesuffix("]").split(","))
    assert named <= found


def test_the_library_imports_none_of_them():
    code = f"import sys, modelquota; print([name for name in {OPTIONAL} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_what_needs_no_extra_imports_without_any():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import modelquota.control.caches, modelquota.control.load, modelquota.control.reload, modelquota.monitoring.alerts
import modelquota.quota.schema, modelquota.reading.utilization
import modelquota.monitoring.ledger, modelquota.tuning.plot, modelquota.tuning.usage, modelquota.tuning.write
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_another_package_that_is_missing_is_another_error():
    with (
        pytest.raises(ModuleNotFoundError, match="No module named 'not_of_this_extra'"),
        extra("otel", "opentelemetry"),
    ):
        import not_of_this_extra  # noqa: F401
