"""A full file system is an error that can be caught, never a death by SIGBUS, and what was there before goes on."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import os, sys
    from modelquota import QuotaExceededError, ResourceQuotaManager, StateFileError

    directory = sys.argv[1]
    manager = ResourceQuotaManager(path=f"{directory}/quota.state")
    manager.set_quota("first", max_requests_per_day=5, burst_requests=10)
    count = 0
    try:
        while True:
            manager.set_quota(f"model-{count}")
            count += 1
    except StateFileError as error:
        assert "No space left on device" in str(error), error
    assert count > 20
    assert sum(bool(manager.check_quota("first", 1)) for _ in range(9)) == 5
    assert all(manager.check_quota(f"model-{i}", 1) for i in range(count))
    try:
        grants = [manager.reserve(f"model-{i % count}", 1) for i in range(100_000)]
    except (StateFileError, QuotaExceededError) as error:
        assert isinstance(error, StateFileError), error
    assert ResourceQuotaManager(path=manager.path).get_usage("first").requests_this_day == 5
    with open(f"{directory}/rest", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    try:
        ResourceQuotaManager(path=f"{directory}/another.state")
    except OSError as error:
        assert "No space left on device" in str(error), error
    else:
        raise AssertionError
    assert sorted(os.listdir(directory)) in (["quota.state", "rest"], ["another.state", "quota.state", "rest"])
    print(count)
"""


def test_no_space_for_another_model(tmp_path):
    mounted = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m none "$0" && "$@"',
    ]
    try:
        possible = subprocess.run([*mounted, tmp_path, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs unshare and a kernel that lets users mount")
    command = [*mounted, tmp_path, sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr)
