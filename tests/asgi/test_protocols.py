"""The table of the documentation: each path of each protocol is counted, settled, streamed and refused in its shape."""

import asyncio
import gc
import json

import pytest
from asgi_client import OPEN, Call, Model, body_of, reply, used
from protocol_samples import EVERY_PATH, FREE, SAMPLES

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware
from modelquota.protocols import TABLES

REJECT = OPEN | {"on_violation": "reject"}
streams = [sample for sample in SAMPLES if sample.stream]
# With all tables, and with each path's own table alone: several tables have the same path.
CELLS = [pytest.param(sample, {}, id=sample.id) for sample in SAMPLES] + [
    pytest.param(sample, {"routes": sample.protocol}, id=f"{sample.id} alone") for sample in EVERY_PATH
]
STREAM_CELLS = [cell for cell in CELLS if cell.values[0].stream]


def by_id(sample):
    return sample.id


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **REJECT)
    return manager


def call(app, sample, **changes):
    kind, body = sample.sent(**changes)
    one = Call(app, sample.path, body)
    one.scope["headers"] = [(b"content-type", kind)]
    response = asyncio.run(one.run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    return response


class Streaming:
    """Sends a stream, piece by piece, until it is told that the client has left."""

    def __init__(self, kind, pieces):
        self.kind, self.pieces = kind, pieces
        self.sent = 0

    async def __call__(self, scope, receive, send):
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.kind)]})
        gone = asyncio.ensure_future(receive())
        for piece in self.pieces:
            if gone.done():
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.sent += 1
            await asyncio.sleep(0)
        gone.cancel()
        await send({"type": "http.response.body", "body": b""})


def test_every_path_of_every_table_has_a_sample():
    """So that each cell of the table is tested: path, protocol, and what is done with it."""
    seen = {name: {one.path for one in EVERY_PATH if one.protocol == name} for name in TABLES}
    for name, protocol in TABLES.items():
        for path, operation in protocol.operations().items():
            shown = path.replace("{model}", "m").replace("{project}", "p").replace("{location}", "l")
            if operation.free:
                assert shown in FREE or ":countTokens" in shown
            else:
                assert shown in seen[name]
    assert {one.protocol for one in EVERY_PATH if one.stream} == set(TABLES)


@pytest.mark.parametrize(("sample", "options"), CELLS)
def test_counted_by_its_estimate(manager, sample, options):
    seen = []

    async def model(scope, receive, send):
        seen.append(used(manager)[0])
        await reply(send, sample.answer)

    call(QuotaMiddleware(model, manager, default_output_tokens=90, **options), sample)
    guess = 1000 if "images" in sample.path else 90 * sample.outputs
    assert seen == [sample.prompt + guess]


@pytest.mark.parametrize(("sample", "options"), CELLS)
def test_settled_by_its_report(manager, sample, options):
    call(QuotaMiddleware(Model(answer=sample.answer), manager, **options), sample)
    assert used(manager) == (sum(sample.tokens), 0, 0)


@pytest.mark.parametrize(("sample", "options"), STREAM_CELLS)
def test_streamed_and_settled(manager, sample, options):
    app = QuotaMiddleware(Streaming(sample.stream_type, sample.stream), manager, **options)
    response = call(app, sample, stream=True)
    assert response.chunks == [*sample.stream, b""]
    assert used(manager) == (sum(sample.tokens), 0, 0)


SHAPES = {
    "openai": lambda body: body["error"].keys() == {"message", "type", "param", "code"},
    "anthropic": lambda body: body["type"] == "error" and body["error"].keys() == {"type", "message"},
    "gemini": lambda body: body["error"].keys() >= {"code", "message", "status"},
    "ollama": lambda body: isinstance(body["error"], str),
}


@pytest.mark.parametrize(("sample", "options"), CELLS)
def test_refused_in_its_own_shape(manager, sample, options):
    manager.update_quota("m", max_requests_per_hour=1)
    app = QuotaMiddleware(Model(answer=sample.answer), manager, retry_spread=0, **options)
    assert call(app, sample).status == 200
    response = call(app, sample)
    assert response.status == 429
    words = sample.words or sample.protocol
    assert SHAPES.get(words, SHAPES["openai"])(response.json)
    assert "requests per hour: 1 of 1 used" in json.dumps(response.json)
    assert response.headers["retry-after"] == "3620"
    own = "anthropic-ratelimit-requests-remaining" if words == "anthropic" else "x-ratelimit-remaining-requests"
    assert response.headers[own] == "0"


@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.in_path], ids=by_id)
def test_a_model_that_nobody_can_have_is_refused_in_its_own_shape(manager, sample):
    response = call(QuotaMiddleware(Model(), manager), sample, model=5)
    assert response.status == 400
    assert SHAPES.get(sample.protocol, SHAPES["openai"])(response.json)
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("path", FREE)
def test_what_runs_no_model_is_free_and_not_unmetered(manager, path):
    app = QuotaMiddleware(Model(answer={"input_tokens": 5}), manager)
    response = asyncio.run(Call(app, path, b"not even JSON").run())
    assert response.status == 200
    assert manager.get_stats().total_checks == 0
    assert app.unmetered == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/messages", {"model": "m"}, 529, "overloaded_error"),
        ("/v1/messages", {"model": 5}, 400, "invalid_request_error"),
        ("/v1/messages", {"model": "gone"}, 404, "not_found_error"),
        ("/v1/messages", {"model": "m", "system": "x" * 5000}, 413, "request_too_large"),
        ("/v1beta/models/m:generateContent", {}, 503, "UNAVAILABLE"),
        ("/v1beta/models/gone:generateContent", {}, 404, "NOT_FOUND"),
        ("/v1beta/models/m:generateContent", {"generationConfig": 5}, 400, "INVALID_ARGUMENT"),
        ("/api/chat", {"model": "m"}, 503, None),
        ("/v1/chat/completions", {"model": "m"}, 503, "server_error"),
    ],
)
def test_errors_have_the_words_of_their_protocol(manager, path, body, status, kind):
    manager.update_quota("m", max_concurrent_requests=0)
    manager.update_quota("m", max_concurrent_requests=1)
    with manager.reserve("m", 0):
        app = QuotaMiddleware(Model(), manager, unknown_model="refuse", max_body_bytes=2000)
        response = asyncio.run(Call(app, path, body).run())
    error = response.json["error"]
    assert response.status == status
    assert kind in ((error.get("type"), error.get("status")) if isinstance(error, dict) else (None,))
    if status in (503, 529):
        assert response.headers["retry-after"] in ("2", "3")


def test_gemini_is_told_the_delay(manager):
    manager.update_quota("m", max_requests_per_second=1, burst_requests=0)
    app = QuotaMiddleware(Model(answer={}), manager, retry_spread=0)
    path = "/v1beta/models/m:generateContent"
    asyncio.run(Call(app, path, {}).run())
    (details,) = asyncio.run(Call(app, path, {}).run()).error["details"]
    assert details == {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.017s"}


def test_a_priority_of_vllm_goes_ahead_in_the_queue(manager):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        model = Model(tokens=5)
        app = QuotaMiddleware(model, manager, routes="vllm")
        held = manager.reserve("m", 0)
        calls = []
        for number, priority in enumerate([0, 5, -5]):
            body = {"model": "m", "messages": [], "max_tokens": number, "priority": priority}
            calls.append(Call(app, "/v1/chat/completions", body).start())
            while manager.get_usage("m").queued_requests <= number:
                await asyncio.sleep(0)
        held.release()
        await asyncio.gather(*[one.task for one in calls])
        return [json.loads(body)["priority"] for body in model.calls]

    assert asyncio.run(main()) == [-5, 0, 5], "the lower is the sooner, as in vLLM"


ENDS = {
    "/v1/chat/completions": lambda events: (
        events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        and events[-2]["object"] == "chat.completion.chunk" and events[-2]["model"] == "m"
    ),
    "/v1/completions": lambda events: events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length",
    "/v1/responses": lambda events: (
        events[-1]["type"] == "response.incomplete" and events[-1]["response"]["id"] == "r"
        and events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    ),
    "/v1/messages": lambda events: (
        [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
        and events[-2]["delta"]["stop_reason"] == "max_tokens" and events[-2]["usage"]["output_tokens"] > 0
    ),
    "/v1beta/models/m:streamGenerateContent": lambda events: (
        events[-1]["candidates"][0]["finishReason"] == "MAX_TOKENS"
    ),
    "/generate": lambda events: events[-2]["meta_info"]["finish_reason"]["type"] == "length" and events[-1] == "[DONE]",
    "/api/chat": lambda events: events[-1]["done"] and events[-1]["done_reason"] == "length",
    "/api/generate": lambda events: events[-1]["done"] and events[-1]["done_reason"] == "length",
}  # fmt: skip
ENDED = [sample for sample in streams if sample.path in ENDS]


def events_of(body):
    found = []
    for line in body.decode().splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") or line.startswith("{"):
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def test_every_ending_is_tested():
    assert {sample.path for sample in ENDED} == set(ENDS)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("cut", [1, 3, 0.3])
@pytest.mark.parametrize("sample", ENDED, ids=by_id)
def test_a_stream_at_its_limit_ends_as_its_protocol_does(manager, sample, cut, spec_version):
    """The limit is reached in the middle; pieces may end within an event, but nothing is cut in two."""
    manager.update_quota("m", max_tokens_per_hour=12)
    long = [piece for piece in sample.stream[:-4] for _ in range(60 if b"word" in piece else 1)]
    whole = b"".join(long)
    size = max(int(len(whole) / (len(long) * cut)), 1)
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)] if cut != 1 else long
    model = Streaming(sample.stream_type, pieces)
    if sample.path == "/generate":
        events = [{"text": "word " * n, "meta_info": {}} for n in range(1, 90)]
        model = Streaming(sample.stream_type, [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events])
    app = QuotaMiddleware(model, manager, at_limit="stop", default_output_tokens=2)
    asgi = {"version": "3.0", "spec_version": spec_version}
    response = asyncio.run(Call(app, sample.path, {**sample.body, "stream": True}, asgi=asgi).run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    assert response.complete
    assert ENDS[sample.path](events_of(response.body))
    assert model.sent < len(model.pieces), "the model is not to go on for nothing"
    assert used(manager)[1:] == (0, 0)
    assert 12 <= used(manager)[0] < 80


@pytest.mark.parametrize("sample", ENDED, ids=by_id)
def test_by_default_a_stream_at_its_limit_goes_on(manager, sample):
    manager.update_quota("m", max_tokens_per_hour=12)
    app = QuotaMiddleware(Streaming(sample.stream_type, sample.stream), manager, default_output_tokens=2)
    response = call(app, sample, stream=True)
    assert response.chunks == [*sample.stream, b""]
    assert used(manager)[0] == 15
