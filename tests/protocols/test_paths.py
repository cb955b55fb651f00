"""Which path belongs to which operation."""

import pytest
from protocol_samples import SAMPLES

from modelquota.protocols import PathTable, operations

TABLE = PathTable(operations(), anywhere=operations())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
@pytest.mark.parametrize("end", ["", "/", "\n", "/\n"])
def test_a_slash_or_a_line_feed_at_the_end_does_not_matter(sample, end):
    assert TABLE.find(sample.path + end)[0].protocol.name == sample.protocol


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/llm/v1/chat/completions", "openai"),
        ("/a/b/v1/messages", "anthropic"),
        ("/proxy/openai/deployments/gpt/chat/completions", "azure"),
        ("/google/v1beta/models/gemini:generateContent", "gemini"),
        ("/ollama/api/chat", "ollama"),
    ],
)
def test_applications_mounted_below_are_found(path, name):
    assert TABLE.find(path)[0].protocol.name == name


@pytest.mark.parametrize(
    "path", ["/reports/generate", "/orders/score", "/v1/chat", "/", "", "/v1/models", "/x/responses"]
)
def test_paths_of_other_applications_are_not(path):
    assert TABLE.find(path) is None


def test_the_model_is_what_the_pattern_matched():
    assert TABLE.find("/openai/deployments/gpt-4.1 mini/chat/completions")[1] == {"model": "gpt-4.1 mini"}
    assert TABLE.find("/v1beta/models/gemini-2.5-pro:streamGenerateContent")[1] == {"model": "gemini-2.5-pro"}
    table = PathTable({"/deployments/{model}/chat": 1})
    assert table.find("/deployments//chat") is table.find("/deployments/a/b/chat") is None


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("generate", "it does not begin with a slash"),
        ("", "it does not begin with a slash"),
        ("/a//b", "empty segment"),
        ("/a?b", "a query"),
        ("/a#b", "a fragment"),
        ("/a b", "white space"),
        ("/a\nb", "white space"),
        ("/{}", "braces"),
        ("/{model", "braces"),
        ("/model}", "braces"),
        ("/{a b}", "white space"),
        ("/{model}{n}", "braces"),
        ("/{model}/{model}", "the same part twice"),
    ],
)
def test_a_key_that_can_never_match_is_refused(key, why):
    with pytest.raises(ValueError, match="can never match") as error:
        PathTable({key: 1})
    assert why in str(error.value)
    assert repr(key) in str(error.value)


def test_a_key_that_another_one_hides_is_refused():
    with pytest.raises(ValueError, match="'/a/', which can never match: it matches what '/a' matches"):
        PathTable({"/a": 1, "/a/": 2})
    with pytest.raises(ValueError, match="it matches what '/{x}/b' matches"):
        PathTable({"/{x}/b": 1, "/{y}/b": 2})
    with pytest.raises(TypeError, match="routes has the key 5"):
        PathTable({5: 1})


def test_an_exact_path_wins_over_a_pattern():
    table = PathTable({"/{model}/x": 1, "/a/x": 2})
    assert (table.find("/a/x")[0], table.find("/b/x")[0]) == (2, 1)
