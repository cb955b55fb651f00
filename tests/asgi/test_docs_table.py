"""The table of paths in the documentation names the paths of the tables, and no others."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from protocol_samples import SAMPLES

from modelquota.protocols import TABLES, PathTable, operations

TOPIC = files("modelquota").joinpath("docs", "http.md").read_text(encoding="utf-8")
_ROW = r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$"
ROWS = {row[0]: row for row in re.findall(_ROW, TOPIC, re.MULTILINE)}
ERRORS = {"openai": "OpenAI", "azure": "OpenAI", "sglang": "OpenAI", "anthropic": "Anthropic", "gemini": "Google",
          "ollama": "Ollama", "vllm": "OpenAI, Anthropic"}  # fmt: skip


def named(row):
    """The paths of a row; those that begin with a colon belong to the path before."""
    found = []
    for path in re.findall(r"`([/:][^`]*)`", row):
        found.append(found[-1].rpartition(":")[0] + path if path.startswith(":") else path)
    return [path for path in found if path != "/v1"]


def test_every_table_has_a_row():
    assert set(ROWS) == set(TABLES)


@pytest.mark.parametrize("name", list(TABLES))
def test_its_paths_are_in_the_table(name):
    table = PathTable(operations([name]))
    for part in ROWS[name][1].split("; "):
        for path in named(part) if part[0] == "`" and part[1] == "/" else named(ROWS[name][1]):
            rest = ("chat/completions", "speech", "generations")
            found = [table.find(path.replace("{model}", "m").replace("*", end)) for end in rest]
            assert any(found), path
            if part.endswith(("is free", "are free")) and path in part:
                assert found[0][0].free, path


@pytest.mark.parametrize("name", list(TABLES))
def test_every_path_is_named_there(name):
    patterns = [re.escape(path).replace(r"\*", ".+").replace(r"\{model\}", "[^/]+") for path in named(ROWS[name][1])]
    for path in operations([name]):
        shown = path.replace("{model}", "m")
        if name in ("openai", "vllm") and path in operations(["openai"]):
            continue  # "also without /v1", "as openai"
        if "projects" in path or path.startswith(("/v1alpha/", "/v1/models/")) or path.endswith("render"):
            continue  # "of Vertex AI too", older versions, and "what only renders"
        if name == "vllm" and path == "/v1/messages/count_tokens":
            continue
        assert any(re.fullmatch(pattern, shown) for pattern in patterns), path


@pytest.mark.parametrize("name", list(TABLES))
def test_its_cells_are_what_the_samples_show(name):
    _, _, bound, settled, streams, errors = ROWS[name]
    assert errors == ERRORS[name]
    for sample in [sample for sample in SAMPLES if sample.protocol == name and sample.bound]:
        field = next(iter(sample.bound))
        inner = sample.bound[field]
        shown = f"{field}.{next(iter(inner))}" if isinstance(inner, dict) else field
        assert f"`{shown}`" in bound or "as `openai`" in bound
    for sample in [sample for sample in SAMPLES if sample.protocol == name and isinstance(sample.answer, dict)]:
        assert any(f"`{field}`" in settled for field in sample.answer) or "as `openai`" in settled
    for sample in [sample for sample in SAMPLES if sample.protocol == name and sample.stream]:
        assert streams.startswith("lines" if b"ndjson" in sample.stream_type else "events")


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_ROWS = re.findall(r"^\| ([\w, ]+) \| (`/.*?) \| yes \| (.*?) \| (.*?) \| (\w+) \|$", README, re.MULTILINE)


def test_readme_has_a_row_for_every_table():
    named_there = [name for formats, *_ in README_ROWS for name in formats.lower().split(", ")]
    assert sorted(named_there) == sorted(TABLES)


@pytest.mark.parametrize("row", README_ROWS, ids=[row[0] for row in README_ROWS])
def test_a_row_of_readme_says_what_the_samples_show(row):
    """Each path is counted, settled, streamed and refused as the row says, in the tests of its sample."""
    formats, paths, settled, streams, errors = row
    names = formats.lower().split(", ")
    for path in named(paths):
        samples = [one for one in SAMPLES if one.protocol in names and one.path == path.replace("{model}", "m")]
        assert samples, path
        answers = [sample.answer for sample in samples if isinstance(sample.answer, dict)]
        assert all(any(f"`{field}`" in settled for field in answer) for answer in answers), path
        assert all(errors in ERRORS[sample.protocol] for sample in samples)
        for sample in [sample for sample in samples if sample.stream]:
            assert streams.startswith("lines" if b"ndjson" in sample.stream_type else "events")


def test_what_goes_outside_and_what_inside_is_said():
    rows = dict(re.findall(r"^\| (CORS|compression of|authentication)[\w ]* \| (.+) \|$", TOPIC, re.MULTILINE))
    assert len(rows) == 3
    assert "read a 429" in rows["CORS"]
    assert "estimate is charged" in rows["compression of"]
    assert "charged nothing" in rows["authentication"]
