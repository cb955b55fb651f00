"""Routes: which requests are counted, and how each is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from modelquota.asgi.request import Demand, IncomingRequest
from modelquota.protocols.estimate import estimate_prompt
from modelquota.protocols.openai import OpenAI
from modelquota.protocols.paths import PathTable
from modelquota.protocols.protocol import Operation, Protocol, Reader
from modelquota.protocols.request import RequestRefusedError
from modelquota.protocols.tables import TABLES, operations, protocol

if TYPE_CHECKING:
    from modelquota.protocols.openai import PromptTokens

ReadDemand: TypeAlias = Callable[[IncomingRequest], Demand | Awaitable[Demand | None] | None]
Route: TypeAlias = Operation | ReadDemand
"""How a request is read: an operation of a protocol, or a function of one's own."""

Routes: TypeAlias = str | Mapping[str, Route] | Sequence[str | Mapping[str, Route]]
"""Names of tables, mappings from paths to routes, or several of both, in which a later one replaces an earlier one."""


DEFAULT_OUTPUT_TOKENS: Final = 256
"""Tokens of an output if the request sets no bound."""


class TableRoute(Operation):
    """A route of a table. It can be called by a route of one's own, which then changes what it returns.

    Examples
    --------
    >>> import dataclasses
    >>> chat = openai_routes()["/v1/chat/completions"]
    >>> def with_memory(request):
    ...     return dataclasses.replace(chat(request), ram_needed_mb=500)
    """

    __slots__ = ()

    def __call__(self, request: IncomingRequest) -> Demand:
        """Return what a request asks for; raises RequestRefusedError if it is not valid, or names no model."""
        reading = self.read(request.json(), request.params)
        if reading.model is None:
            raise RequestRefusedError(400, "model is missing: name the model", "invalid_value", "model")
        default = self.default_output_tokens
        tokens = reading.estimate(DEFAULT_OUTPUT_TOKENS if default is None else default)
        guess = tokens - reading.prompt_tokens if reading.is_guess else 0
        return Demand(reading.model, tokens, reading.prompt_tokens, priority=reading.priority, guessed_tokens=guess)


class RouteEntry:
    """A route, as the middleware uses it.

    Attributes
    ----------
    protocol : Protocol
        In which the client is answered.
    operation : Operation or None
        How the request is read; None if `read` does it.
    read : callable or None
    default_output_tokens : int or None
        Tokens of an output without a bound; None for what the middleware says.
    """

    __slots__ = ("default_output_tokens", "operation", "protocol", "read")

    def __init__(self, route: Route, spoken: Protocol) -> None:
        self.operation: Operation | None = None
        self.read: ReadDemand | None = None
        self.default_output_tokens: int | None = None
        self.protocol = spoken
        if isinstance(route, Operation):
            self.operation = route
            self.protocol = route.protocol
            self.default_output_tokens = route.default_output_tokens
        elif callable(route):
            self.read = route
        else:
            raise TypeError(f"a route is {route!r}; give an operation of a protocol, or a callable")


def route_table(routes: Routes | None) -> PathTable[RouteEntry]:
    """Return the table of all routes: by default, of all protocols.

    Raises ValueError for a table that is not known, and for a path that can never match.
    """
    if routes is None:
        routes = tuple(TABLES)
    given = (routes,) if isinstance(routes, str | Mapping) else routes
    known = operations()
    found: dict[str, Route] = {}
    anywhere: set[str] = set()
    by_name: set[str] = set()
    for part in given:
        if isinstance(part, str):
            for path, operation in protocol(part).operations().items():
                if path not in by_name:
                    found[path] = operation
                    by_name.add(path)
                    anywhere.add(path)
        else:
            for path, route in part.items():
                found[path] = route
                by_name.add(path)
                if isinstance(route, Operation):
                    anywhere.add(path)
    spoken = {path: operation.protocol for path, operation in known.items()}
    fallback = TABLES["openai"]
    entries = {path: RouteEntry(route, spoken.get(path, fallback)) for path, route in found.items()}
    return PathTable(entries, anywhere=anywhere)


def openai_routes(
    *, prompt_tokens: PromptTokens = estimate_prompt, default_output_tokens: int | None = None
) -> dict[str, TableRoute]:
    """Return the routes of OpenAI's API, with a counter of prompts or a default of one's own.

    The estimate is the prompt, and for every output (``n``, ``best_of``, each prompt of a list) the largest of
    ``max_tokens``, ``max_completion_tokens`` and ``max_output_tokens``. Embeddings have no output.

    Parameters
    ----------
    prompt_tokens : callable
        Given the parsed body, returns how many tokens its prompt has.
    default_output_tokens : int, optional
        Tokens of an output if the request sets no bound; by default what the middleware says.

    Examples
    --------
    >>> [path for path in sorted(openai_routes()) if path.startswith("/v1/c")]
    ['/v1/chat/completions', '/v1/completions']
    """
    found: dict[str, TableRoute] = {}
    for path, operation in OpenAI(prompt_tokens).operations().items():
        route = TableRoute(operation.protocol, operation.read, skim=operation.skim, free=operation.free)
        route.default_output_tokens = default_output_tokens
        found[path] = route
    return found


def route_for(name: str, read: Reader | None = None, **changes: Any) -> Operation:
    """Return an operation for a path of one's own, answered in the words of a protocol.

    Parameters
    ----------
    name : str
        The protocol, such as ``"anthropic"``.
    read : callable, optional
        Given the parsed body and what the path matched, returns a `Reading`. By default as a chat or completion.
    **changes
        ``free=True``: passed on without being counted.

    Examples
    --------
    >>> route_for("anthropic")
    <Operation of anthropic>
    """
    from modelquota.protocols.openai import generation

    if read is not None:
        return Operation(protocol(name), read, **changes)
    made = generation(protocol(name))
    return Operation(made.protocol, made.read, skim=made.skim, **changes)
