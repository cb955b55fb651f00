"""`QuotaTransport` and `AsyncQuotaTransport`: transports for httpx, and httpx2, that wait and settle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from modelquota._core.table.grant import Grant
from modelquota.client.call import Counter, Ids, Need, Policy, Refused, denied, paused, readable_encodings
from modelquota.errors import QuotaExceededError

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

# Both libraries only call the methods of a transport, so that one class fits both; their types differ.
_Transport: Any = object

_making = threading.Lock()  # held while a default transport is made: each QuotaTransport makes one, in any thread

# Before these, nothing was sent.
_UNSENT = frozenset(("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"))


class _MeteredTransport(_Transport):  # type: ignore[misc]
    """What both transports are made of: how requests are counted, and what sends them."""

    def __init__(
        self,
        manager: ResourceQuotaManager,
        transport: Any = None,
        *,
        ids: Ids | None = None,
        default_model: str | None = None,
        default_output_tokens: int = 256,
        timeout: float | None = None,
        tables: Sequence[str] | None = None,
    ) -> None:
        self._policy = Policy(
            manager,
            ids=ids,
            default_model=default_model,
            default_output_tokens=default_output_tokens,
            timeout=timeout,
            tables=tables,
        )
        self._inner = transport


class QuotaTransport(_MeteredTransport):
    """Transport for ``httpx.Client`` that acquires a grant for each request to a model.

    A request waits as the action of its quota says, and is settled by the ``usage`` of the answer, also of a stream;
    one that is closed early, by what had passed. From the headers of answers two things are learned: if less is left
    than there should be, the difference is charged; and after a 429, all requests for the same id wait until
    ``retry-after``. Requests that use no model pass.

    A denial is not an exception: it is answered here, in the API's own format, with 429, 503 or 400. So clients raise
    what they raise for the API's own answers, and retry when it says.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager that decides. Its quotas say what the API allows.
    transport : transport of httpx or httpx2, optional
        What sends the requests. By default a new HTTP transport of the library that the client is of, with that
        library's defaults; give one to use HTTP/2, certificates or a proxy of your own.
    ids : callable, optional
        Given the model of a request, returns the id, or several ids that must all admit, or None to send the request
        without counting it. By default the model is the id. Of several, a 429 pauses the last one.
    default_model : str, optional
        The model of requests that name none.
    default_output_tokens : int
        Tokens of an output if the request sets no bound.
    timeout : float, optional
        The longest wait in seconds; never longer than ``grace_period_sec``. The client's timeouts begin after it.
    tables : sequence of str, optional
        The protocols to count, by name, such as ``["openai", "anthropic"]``. By default all that are known.

    Examples
    --------
    ``OpenAI(http_client=httpx.Client(transport=QuotaTransport(manager)))``
    """

    def handle_request(self, request: Any) -> Any:
        """Send a request, once the quotas admit it. Called by the client."""
        policy = self._policy
        inner = self._transport_for(request)
        found = policy.operation(request.method, request.url.path)
        if found is None:
            return inner.handle_request(request)
        need = policy.need(found, request.url.path, request.read(), request.headers)
        if need is None:
            return inner.handle_request(request)
        try:
            grant = self._acquire(need)
        except Refused as answer:
            return _local_answer(request, answer)
        with _released_on_error(grant):
            _ask_for_what_can_be_read(request)
            response = inner.handle_request(request)
            return _counted(policy, need, grant, request, response, "SyncByteStream", _Stream)

    def _acquire(self, need: Need) -> Grant:
        policy = self._policy
        deadline = time.monotonic() + policy.patience(need.ids)
        while True:
            wait = policy.pauses.left(need.line)
            if not wait:
                try:
                    left = None if policy.timeout is None else max(deadline - time.monotonic(), 0.0)
                    grant = policy.manager.acquire(need.model_id, need.estimate, timeout=left, priority=need.priority)
                except QuotaExceededError as error:
                    raise denied(policy, need, error) from None
                wait = policy.pauses.left(need.line)
                if not wait:
                    return grant
                grant.cancel()  # the line was paused while this request was in it
            if time.monotonic() + wait > deadline:
                raise paused(need, wait)
            time.sleep(wait)

    def _transport_for(self, request: Any) -> Any:
        if self._inner is None:
            with _making:
                if self._inner is None:
                    self._inner = _library(request).HTTPTransport()
        return self._inner

    def close(self) -> None:
        """Close the transport that sends the requests; the manager stays open."""
        if self._inner is not None:
            self._inner.close()

    def __enter__(self) -> Self:
        if self._inner is not None:
            self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:  # fmt: skip
        self.close()


class AsyncQuotaTransport(_MeteredTransport):
    """Transport for ``httpx.AsyncClient``: `QuotaTransport` for asyncio. It never blocks the event loop.

    Parameters are those of `QuotaTransport`.

    Examples
    --------
    ``AsyncOpenAI(http_client=httpx.AsyncClient(transport=AsyncQuotaTransport(manager)))``
    """

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request, once the quotas admit it. Called by the client."""
        policy = self._policy
        if self._inner is None:
            self._inner = _library(request).AsyncHTTPTransport()
        inner = self._inner
        found = policy.operation(request.method, request.url.path)
        if found is None:
            return await inner.handle_async_request(request)
        need = policy.need(found, request.url.path, await request.aread(), request.headers)
        if need is None:
            return await inner.handle_async_request(request)
        try:
            grant = await self._acquire(need)
        except Refused as answer:
            return _local_answer(request, answer)
        with _released_on_error(grant):
            _ask_for_what_can_be_read(request)
            response = await inner.handle_async_request(request)
            return _counted(policy, need, grant, request, response, "AsyncByteStream", _AsyncStream)

    async def _acquire(self, need: Need) -> Grant:
        policy = self._policy
        deadline = time.monotonic() + policy.patience(need.ids)
        while True:
            wait = policy.pauses.left(need.line)
            if not wait:
                try:
                    left = None if policy.timeout is None else max(deadline - time.monotonic(), 0.0)
                    grant = await policy.manager.acquire_async(
                        need.model_id, need.estimate, timeout=left, priority=need.priority
                    )
                except QuotaExceededError as error:
                    raise denied(policy, need, error) from None
                wait = policy.pauses.left(need.line)
                if not wait:
                    return grant
                grant.cancel()  # the line was paused while this request was in it
            if time.monotonic() + wait > deadline:
                raise paused(need, wait)
            await asyncio.sleep(wait)

    async def aclose(self) -> None:
        """Close the transport that sends the requests; the manager stays open."""
        if self._inner is not None:
            await self._inner.aclose()

    async def __aenter__(self) -> Self:
        if self._inner is not None:
            await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:  # fmt: skip
        await self.aclose()


class _Stream:
    """The body of an answer, counted as it passes."""

    def __init__(self, stream: Any, counter: Counter) -> None:
        self._stream = stream
        self._counter = counter

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._counter.feed(piece)
            yield piece
        self._counter.finish(complete=True)

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._counter.finish(complete=False)


class _AsyncStream:
    """The body of an answer, counted as it passes."""

    def __init__(self, stream: Any, counter: Counter) -> None:
        self._stream = stream
        self._counter = counter

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._counter.feed(piece)
            yield piece
        self._counter.finish(complete=True)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._counter.finish(complete=False)


def _library(request: Any) -> Any:
    """The library that a request is of: httpx, or httpx2, or another with the same classes."""
    return importlib.import_module(type(request).__module__.partition(".")[0])


@functools.cache
def _stream_class(library: Any, base: str, counted: type) -> type:
    """The class of a counted stream: clients require that it is derived from a class of their library."""
    return type(counted.__name__.lstrip("_"), (counted, getattr(library, base)), {})


def _counted(policy: Policy, need: Need, grant: Grant, request: Any, response: Any, base: str, counted: type) -> Any:
    policy.note_headers(need, response.status_code, response.headers)
    counter = Counter(grant, need, response.status_code, response.headers)
    if response.is_closed:  # it came whole, as from a cache or a mock: nobody will read the stream
        for piece in response.stream:
            counter.feed(piece)
        counter.finish(complete=True)
        return response
    response.stream = _stream_class(_library(request), base, counted)(response.stream, counter)
    return response


def _local_answer(request: Any, answer: Refused) -> Any:
    return _library(request).Response(answer.status, headers=answer.headers, content=answer.body, request=request)


def _ask_for_what_can_be_read(request: Any) -> None:
    accepted = request.headers.get("accept-encoding")
    if accepted is not None:
        readable = readable_encodings(accepted)
        if readable is not None:
            request.headers["accept-encoding"] = readable


@contextlib.contextmanager
def _released_on_error(grant: Grant) -> Iterator[None]:
    """Give the grant back if there is no answer: whole if nothing was sent; otherwise the server may have worked."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ in _UNSENT:
            grant.cancel()
        grant.release()
        raise
