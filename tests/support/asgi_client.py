"""A client that speaks ASGI to an application in the same event loop, and model servers to speak to."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import factories

PATIENCE = 20
OPEN = {**factories.OPEN, "max_tokens_per_hour": 1_000_000}


def used(manager, model_id="m"):
    usage = manager.get_usage(model_id)
    return usage.tokens_this_hour, usage.concurrent_requests, usage.queued_requests


@dataclass
class Response:
    """What has come so far."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class Call:
    """One request. ``await call`` runs it to its end; `start` lets it run, and `leave` closes the connection."""

    def __init__(self, app, path="/v1/chat/completions", body=None, *, method="POST", headers=(), parts=None, **scope):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.app = app
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode("utf-8", "surrogatepass"),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            **scope,
        }
        pieces = list(parts) if parts is not None else [body or b""]
        self._messages = [
            {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
            for index, piece in enumerate(pieces)
        ]
        self.response = Response()
        self.received = 0
        self.gone = asyncio.Event()
        self.moved = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def _receive(self):
        if self._messages and not self.gone.is_set():
            self.received += 1
            return self._messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self.gone.is_set() and not self.response.complete:
            return  # as uvicorn does
        assert not self.response.complete, "a message after the end of the response"
        response = self.response
        if message["type"] == "http.response.start":
            assert response.status is None
            response.status = message["status"]
            names = [name for name, _ in message["headers"]]
            assert all(name == name.lower() for name in names)
            response.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            assert message["type"] == "http.response.body"
            assert response.status is not None, "a body before the start"
            response.chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                response.complete = True
                self.gone.set()  # receive() says so once the response is complete
        self.moved.set()

    async def run(self):
        await self.app(self.scope, self._receive, self._send)
        return self.response

    def __await__(self):
        return asyncio.wait_for(self.run(), PATIENCE).__await__()

    def start(self):
        self.task = asyncio.create_task(self.run())
        return self

    async def until(self, condition):
        while not condition(self.response):
            assert not self.task.done(), self.task
            self.moved.clear()
            moved = asyncio.create_task(self.moved.wait())
            await asyncio.wait([moved, self.task], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            moved.cancel()

    async def leave(self):
        """Close the connection, and wait until the application has ended."""
        self.gone.set()
        await asyncio.wait_for(self.task, PATIENCE)


async def reply(send, body, *, status=200, headers=((b"content-type", b"application/json"),)):
    """Send a whole response."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def body_of(receive):
    message = await receive()
    assert message["type"] == "http.request"
    assert not message["more_body"]
    return message["body"]


class Model:
    """A model server: says what it is told to, and counts."""

    def __init__(self, tokens=None, *, status=200, answer=None, headers=((b"content-type", b"application/json"),)):
        self.tokens = tokens
        self.status = status
        self.answer = answer
        self.headers = headers
        self.calls = []
        self.running = 0
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.running += 1
        try:
            self.calls.append(await body_of(receive))
            await self.go.wait()
            answer = {"id": "x", "choices": []} if self.answer is None else self.answer
            if self.tokens is not None:
                answer = {**answer, "usage": {"prompt_tokens": 0, "completion_tokens": self.tokens}}
            await reply(send, answer, status=self.status, headers=self.headers)
        finally:
            self.running -= 1


def chat(model="m", max_tokens=100, **fields):
    return {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": "x" * 36}], **fields}


CHAT_PROMPT = 10  # what the prompt of chat() is estimated at
