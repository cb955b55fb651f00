"""Do the threads of a process race anywhere in the C-level core? Asked of ThreadSanitizer, by a harness of its own.

The harness (races.pyx) runs the functions between lock and unlock on plain memory, from threads without the GIL. A
data race between processes is the same one: they run the same code on the same words.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modelquota

SOURCES = Path(modelquota.__file__).parents[1]
SECONDS = 5
# Reads without a lock whose value does not matter, by the function at whatever depth of either stack
SUPPRESSED = {"batch_fetch": "a byte is read to have its cache line, or a guess costs a line too many or too few"}
REPORTED = 66  # the exit status of a program in which ThreadSanitizer has found something

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import races
done, left = races.race(float(sys.argv[2]))
print(*done, left)
"""


def sanitizer_runtime():
    """The runtime to be preloaded; skips with a word if there is none, or it does not start here."""
    try:
        found = subprocess.run(
            ["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("gcc is not here")
    if not os.path.isabs(found):
        pytest.skip("gcc has no libtsan here")
    tried = subprocess.run(
        [sys.executable, "-c", ""], env=environment(found), capture_output=True, text=True, timeout=60
    )
    if tried.returncode:
        pytest.skip(f"ThreadSanitizer does not start with this Python: {tried.stderr.strip()[:200]}")
    return found


def environment(runtime, suppressions=os.devnull):
    options = f"exitcode={REPORTED} history_size=5 suppressions={suppressions}"
    return {**os.environ, "LD_PRELOAD": runtime, "TSAN_OPTIONS": options}


def build(folder):
    """The harness as an extension module in `folder`, with every access to memory instrumented."""
    pytest.importorskip("Cython")
    if not (SOURCES / "modelquota/_core/layout.pxd").exists():
        pytest.skip("the core's sources are not beside the package")
    source = Path(__file__).parents[1] / "support" / "races.pyx"
    translated = folder / "races.c"
    subprocess.run(
        [sys.executable, "-m", "cython", "-3", "-I", str(SOURCES), "-X", "boundscheck=False,wraparound=False",
         "-X", "cdivision=True,initializedcheck=False", "-o", str(translated), str(source)],
        check=True, timeout=120,
    )  # fmt: skip
    include = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-g", "-std=c11", "-D_GNU_SOURCE", "-fwrapv", "-fsanitize=thread",
         "-fno-math-errno", f"-I{include}", str(translated), "-o", str(folder / "races.so")],
        check=True, timeout=120,
    )  # fmt: skip


def test_threads_do_not_race_between_lock_and_unlock(tmp_path):
    runtime = sanitizer_runtime()
    build(tmp_path)
    suppressions = tmp_path / "suppressions"
    suppressions.write_text("".join(f"race:{name}\n" for name in SUPPRESSED))
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), str(SECONDS)],
        env=environment(runtime, suppressions), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    races = sorted(set(re.findall(r"^SUMMARY: .*", ran.stderr, re.MULTILINE)))
    assert not races, "\n".join([*races, "", ran.stderr[:20_000]])
    assert ran.returncode == 0, ran.stderr[-5_000:]
    *done, left = map(int, ran.stdout.split())
    assert min(done) > 0, f"something was never done: {done}"
    assert left == 0
