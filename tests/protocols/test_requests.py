"""What a request is estimated at, in every protocol."""

import base64
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_samples import FREE, SAMPLES, TEXT

from modelquota.protocols import TABLES, PathTable, RequestRefusedError, estimate_prompt, operations, protocol
from modelquota.protocols.estimate import MEDIA
from modelquota.protocols.request import Reading, output_bound, whole_number

TABLE = PathTable(operations(), anywhere=operations())
CHAT = operations(["openai"])["/v1/chat/completions"]
generating = [sample for sample in SAMPLES if sample.bound]


def read(sample, **changes):
    operation, params = TABLE.find(sample.path)
    assert not operation.free
    return operation.read({**sample.body, **changes}, params)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_model_and_prompt_are_read(sample):
    reading = read(sample)
    assert (reading.model, reading.prompt_tokens) == ("m", 10)
    assert reading.outputs == sample.outputs
    assert TABLE.find(sample.path)[0].protocol.name == sample.protocol


@pytest.mark.parametrize("sample", generating, ids=lambda sample: sample.id)
def test_the_bound_of_an_output_is_read(sample):
    assert read(sample).is_guess
    bounded = read(sample, **sample.bound)
    assert (bounded.output_bound, bounded.estimate(7)) == (50, 60)


@pytest.mark.parametrize("path", FREE)
def test_counting_is_free(path):
    assert TABLE.find(path)[0].free


@pytest.mark.parametrize("name", list(TABLES))
def test_every_protocol_is_found_by_name(name):
    assert protocol(name).name == name
    assert operations([name])


def test_an_unknown_protocol_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="there is no protocol 'grpc'; accepted are openai, anthropic, azure"):
        protocol("grpc")


@pytest.mark.parametrize(
    ("value", "bound"),
    [(100, 100), (100.0, 100), ("100", 100), ("100.0", 100), (-1, None), (-1.0, None), ("-1", None), (None, None),
     (0, 0), (2**62, 2**62)],
)  # fmt: skip
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_bound_is_read_as_servers_read_it(field, value, bound):
    assert CHAT.read({"model": "m", field: value}, {}).output_bound == bound


@pytest.mark.parametrize("value", [-2, 1.5, "many", "1" * 5000, True, [], {}, 2**62 + 1, float("inf"), float("nan")])
def test_what_is_no_bound_names_the_field_and_the_range(value):
    with pytest.raises(RequestRefusedError, match=r"max_tokens is not an integer from 0 to 2\*\*62") as error:
        CHAT.read({"model": "m", "max_tokens": value}, {})
    assert (error.value.status, error.value.code, error.value.param) == (400, "invalid_value", "max_tokens")


def test_the_largest_of_several_bounds_counts():
    assert output_bound({"a": 1, "b": 9, "c": -1}, "a", "b", "c") == 9


def test_ollama_fills_the_context_with_minus_two():
    chat = operations(["ollama"])["/api/chat"]
    assert chat.read({"model": "m", "options": {"num_predict": -2}}, {}).output_bound is None
    with pytest.raises(RequestRefusedError, match="options is not an object"):
        chat.read({"model": "m", "options": 5}, {})


def test_ollama_reads_names_in_any_case_and_the_last_one():
    """As Go's encoding/json does: https://pkg.go.dev/encoding/json#Unmarshal."""
    chat = operations(["ollama"])["/api/chat"]
    body = {"model": "m", "Model": "big", "OPTIONS": {"Num_Predict": 9}, "\u017ftream": False, "Prompt": "x" * 36}
    reading = chat.read(body, {})
    assert (reading.model, reading.output_bound, reading.stream) == ("big", 9, False)
    assert reading.prompt_tokens == chat.read({"model": "m", "prompt": "x" * 36}, {}).prompt_tokens > 0


def test_ollama_streams_unless_told_not_to():
    chat = operations(["ollama"])["/api/chat"]
    assert chat.read({"model": "m"}, {}).stream
    assert not chat.read({"model": "m", "stream": False}, {}).stream


@pytest.mark.parametrize(
    ("path", "body", "outputs"),
    [
        ("/v1/chat/completions", {"n": 3}, 3),
        ("/v1/chat/completions", {"n": 1.0}, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "best_of": 4}, 8),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/images/generations", {"n": 4}, 4),
        ("/v1beta/models/m:generateContent", {"generationConfig": {"candidateCount": 2}}, 2),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"n": 3}}, 6),
        ("/generate", {"input_ids": [[1], [2]]}, 2),
        ("/vertex_generate", {"instances": [{"text": "a"}] * 3, "parameters": {"sampling_params": {"n": 2}}}, 6),
        ("/vertex_generate", {"instances": [{"input_ids": [1, 2]}] * 2}, 2),
        ("/vertex_generate", {"instances": 5, "parameters": [7]}, 1),
        ("/v1/chat/completions/batch", {"messages": [[{}], [{}], [{}]]}, 3),
    ],
)
def test_every_output_is_counted(path, body, outputs):
    operation, params = TABLE.find(path)
    assert operation.read({"model": "m", **body}, params).outputs == outputs


@pytest.mark.parametrize("n", [0, -1, "x", 1.5])
def test_a_number_of_outputs_below_one_is_refused(n):
    with pytest.raises(RequestRefusedError, match="n is not an integer from 1"):
        CHAT.read({"model": "m", "n": n}, {})
    with pytest.raises(RequestRefusedError):
        whole_number({"n": n}, "n", least=1)


def test_priorities_of_vllm_are_turned_round_on_its_own_routes_only():
    body = {"model": "m", "priority": 5, "messages": []}
    vllm = operations(["vllm"])
    assert vllm["/v1/chat/completions"].read(body, {}).priority == -5
    assert vllm["/pooling"].read(body | {"priority": -7}, {}).priority == 7
    assert vllm["/v1/messages"].read(body, {}).priority == -5
    assert vllm["/v1/chat/completions"].read(body | {"priority": 2**80}, {}).priority == -(2**31 - 1)
    assert vllm["/v1/chat/completions"].read(body | {"priority": "5"}, {}).priority == 0
    assert CHAT.read(body, {}).priority == 0, "a client of any server does not get ahead of the others"


@given(outputs=st.integers(0, 2**62), prompt=st.integers(0, 2**62), most=st.none() | st.integers(0, 2**62),
       default=st.integers(0, 2**62))  # fmt: skip
def test_a_guess_never_makes_a_request_impossible(outputs, prompt, most, default):
    tokens = Reading("m", prompt, outputs).estimate(default, most)
    assert prompt <= tokens <= 2**62
    assert most is None or tokens <= max(prompt, most)
    if most is None:
        assert tokens == min(prompt + outputs * default, 2**62)


IMAGE = base64.b64encode(os.urandom(60_000)).decode()
DATA_URL = f"data:image/png;base64,{IMAGE}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "input_image", "image_url": DATA_URL},
        {"type": "input_audio", "input_audio": {"data": IMAGE, "format": "wav"}},
        {"type": "file", "file": {"file_data": DATA_URL, "filename": "a.pdf"}},
        {"type": "video_url", "video_url": {"url": DATA_URL}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}},
        {"inline_data": {"mime_type": "image/png", "data": IMAGE}},
        {"inlineData": {"mimeType": "image/png", "data": "aGk="}},
        {"type": "image_generation_call", "result": IMAGE},
        {"type": "image", "data": IMAGE, "mimeType": "image/png"},
        DATA_URL,
        "data:image/png;base64,aGk=",
    ],
    ids=lambda part: part.get("type", next(iter(part))) if isinstance(part, dict) else part[:10],
)
def test_media_count_the_same_whatever_their_size(part):
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert 1000 <= estimate_prompt(body) < 1030


def test_results_of_image_tools_are_media_too():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image, image]}
    assert 2000 <= estimate_prompt({"messages": [{"role": "user", "content": [result]}]}) < 2050
    assert operations(["ollama"])["/api/generate"].read({"model": "m", "images": [IMAGE, IMAGE]}, {})[1] == 2000


@pytest.mark.parametrize(
    ("images", "tokens"),
    [
        ({"image": MEDIA}, 1010),
        ({"image": MEDIA, "mask": MEDIA}, 2010),
        ({"image[]": [MEDIA] * 3}, 3010),
        ({"images": [{"image_url": IMAGE}] * 2}, 2010),
        ({"image": IMAGE}, 1010),
        ({}, 10),
    ],
)
def test_images_that_are_to_be_changed_count_as_media(images, tokens):
    for path in ("/v1/images/edits", "/v1/images/variations", "/v1/images/generations"):
        reading = operations()[path].read({"model": "m", "prompt": TEXT, "n": "2", **images}, {})
        assert (reading.prompt_tokens, reading.outputs, reading.output_bound) == (tokens, 2, 1000)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Words, and 12 numbers. " * 1000}]},
        {"prompt": "x" * 23_000},
        {
            "tools": [
                {"function": {"parameters": {"properties": {"image": {"type": "string"}, "source": {"x": "y" * 9000}}}}}
            ]
        },
    ],
    ids=["prose", "one letter", "a tool with an image"],
)
def test_what_is_to_be_read_is_not_media(body):
    length = len(json.dumps(body))
    assert length // 6 < estimate_prompt(body) < length // 3 + 10
    assert estimate_prompt(body) % 1000 != 0


@pytest.mark.parametrize("field", ["system", "suffix", "instructions", "tools", "response_format", "functions", "text"])
def test_everything_that_a_model_reads_counts(field):
    value = TEXT if field in ("system", "suffix", "instructions") else {"schema": TEXT}
    assert estimate_prompt({field: value}) == 10


def test_schemas_of_gemini_and_ollama_count():
    gemini, params = TABLE.find("/v1beta/models/m:generateContent")
    body = {"systemInstruction": {"parts": [{"text": TEXT}]}, "generationConfig": {"responseSchema": {"type": TEXT}}}
    assert gemini.read(body, params).prompt_tokens == 20
    ollama = operations(["ollama"])["/api/chat"]
    assert ollama.read({"model": "m", "system": TEXT, "format": {"type": TEXT}}, {}).prompt_tokens == 20
