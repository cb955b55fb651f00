"""`modelquota docs`: the topics, on a terminal of any width and in a pipe."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from rich.cells import cell_len
from rich.text import Text
from typer.testing import CliRunner

from modelquota.cli.app import app
from modelquota.cli.docs import read_topic, topics


def run(*arguments, columns=None):
    """Run the command: in a pipe, or on a terminal with this many columns."""
    terminal = {} if columns is None else {"FORCE_COLOR": "1", "COLUMNS": str(columns), "TERM": "xterm-256color"}
    return CliRunner().invoke(app, ["docs", *arguments], env=terminal)


def test_in_a_pipe_each_topic_has_a_line():
    outcome = run()
    lines = [line.split(maxsplit=1) for line in outcome.stdout.splitlines()]
    assert outcome.exit_code == 0
    assert dict(lines) == topics()
    assert [topic for topic, _ in lines] == sorted(topics())


@pytest.mark.parametrize("topic", topics())
def test_in_a_pipe_a_topic_is_as_it_was_written(topic):
    outcome = run(topic)
    assert (outcome.exit_code, outcome.stdout) == (0, read_topic(topic))


def words_of(markdown):
    """The letters and digits that a reader must find, and nothing of the markup."""
    text = re.sub(r"\[(\w+)\]\(\1\.md\)", r"modelquota docs \1", markdown)
    text = re.sub(r"^```\w*$", "", text, flags=re.MULTILINE)
    return Counter(filter(str.isalnum, text))


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("topic", topics())
def test_on_a_terminal_no_line_is_too_wide_and_no_letter_is_lost(topic, columns):
    outcome = run(topic, columns=columns)
    assert outcome.exit_code == 0
    assert "\x1b[" in outcome.stdout
    shown = Text.from_ansi(outcome.stdout).plain
    assert max(map(cell_len, shown.splitlines())) <= min(columns, 120)
    assert words_of(read_topic(topic)) - Counter(filter(str.isalnum, shown)) == Counter()
    assert ".md" not in shown


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_on_a_terminal_the_list_fits(columns):
    outcome = run(columns=columns)
    shown = Text.from_ansi(outcome.stdout).plain
    assert outcome.exit_code == 0
    assert max(map(cell_len, shown.splitlines())) <= columns
    assert set(topics()) <= set(shown.split())


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("limit", "perhaps limits"),
        ("Grants", "perhaps grants"),
        ("g", "perhaps grants or guarantees"),
        ("prozesses", "perhaps processes"),
        ("../errors", "perhaps errors"),
        ("zzz", f"one of {', '.join(topics())}"),
        ("", f"one of {', '.join(topics())}"),
    ],
)
def test_an_unknown_topic_is_one_message_with_the_nearest_names(topic, hint):
    outcome = run(topic)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr == f"modelquota: error: there is no topic {topic!r}; expected {hint}\n"


def test_the_shell_completes_topics():
    env = {**os.environ, "_MODELQUOTA_COMPLETE": "complete_bash", "COMP_WORDS": "modelquota docs g", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "modelquota"], capture_output=True, text=True, timeout=60, env=env, check=True
    )
    assert done.stdout.split() == ["grants", "guarantees"]
