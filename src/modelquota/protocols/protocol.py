"""`Protocol`: what each protocol can do, and `Operation`: one kind of request in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

from modelquota.protocols.content import tokens_of_answer, tokens_of_event
from modelquota.protocols.refusal import Answer, Header, Refusal, RefusalKind, json_answer
from modelquota.protocols.request import Reading
from modelquota.protocols.usage import Places, Tree, tree_of

Params: TypeAlias = Mapping[str, str]
"""What the pattern of a path matched, such as the model."""

Reader: TypeAlias = Callable[[Mapping[str, Any], Params], Reading]
"""Reads a request: the parsed body and what its path says."""

Skimmer: TypeAlias = Callable[[bytes, Params], Reading | None]
"""The same from the bytes of the body, without parsing it; None if that cannot be told."""


class Protocol:
    """One protocol. A subclass in a file of its own says how requests and answers look; there is one instance.

    Attributes
    ----------
    name : str
        As in the names of route tables.
    usage : mapping
        Where an answer, or an event of a stream, reports which number.
    adds_lists : bool
        Whether the reports in a list are added up; otherwise the last one counts.
    header_style : str
        Names of the headers that report what is left: ``"openai"`` or ``"anthropic"``.
    """

    name: ClassVar[str]
    usage: ClassVar[Places]
    adds_lists: ClassVar[bool] = False
    header_style: ClassVar[str] = "openai"
    usage_tree: ClassVar[Tree]

    def __init_subclass__(cls) -> None:
        cls.usage_tree = tree_of(cls.usage)

    def operations(self) -> dict[str, Operation]:
        """Return the operation of each path, a pattern such as ``/v1/models/{model}:predict``; all are POSTs."""
        raise NotImplementedError

    def event_tokens(self, event: Any, seen: int) -> int:
        """Return the tokens of output that an event of a stream adds to the `seen` ones of those before."""
        return tokens_of_event(event)

    def answer_tokens(self, answer: Any) -> int:
        """Return the tokens of output of a whole answer, by its text."""
        return tokens_of_answer(answer)

    def answers_of(self, answer: Any) -> list[Any] | None:
        """Return the answers of a whole answer to several prompts, each with a report; None if it is a single one."""
        return None

    def usage_at_end(self, body: bytes) -> tuple[int, int, int] | None:
        """Return what a whole answer reports, if that can be told without parsing all of it; otherwise None.

        As input, cached and output tokens. Most answers end with their usage; this only saves time.
        """
        return None

    def refuse(self, refusal: Refusal, headers: list[Header]) -> Answer:
        """Return the response that says no, in the protocol's own shape: this one is OpenAI's."""
        kind = {
            RefusalKind.RATE_LIMIT: refusal.unit or "requests",
            RefusalKind.QUOTA_SPENT: "insufficient_quota",
            RefusalKind.OVERLOADED: "server_error",
        }.get(refusal.kind)
        if kind is None:
            kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
        return json_answer(refusal.status, {"error": error}, headers)

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """Return the events that end a stream which was cut at a limit, as if its longest output had been reached.

        Parameters
        ----------
        last : mapping
            Of each type of event (its field ``type``, or an empty string), the last one that passed; of those that
            have an index of a choice, under ``"#0"``, ``"#1"``, ... too.
        output_tokens : int
            The output that passed.
        """
        raise NotImplementedError


class Operation:
    """One kind of request.

    Attributes
    ----------
    protocol : Protocol
    read : callable
        Reads a request.
    skim : callable or None
        Does the same sooner, for most requests.
    free : bool
        Whether it runs no model, so that it is passed on without being counted.
    default_output_tokens : int or None
        Tokens of an output without a bound; None for what the server or client says.
    """

    __slots__ = ("default_output_tokens", "free", "protocol", "read", "skim")

    def __init__(self, protocol: Protocol, read: Reader, *, skim: Skimmer | None = None, free: bool = False) -> None:
        self.protocol = protocol
        self.read = read
        self.skim = skim
        self.free = free
        self.default_output_tokens: int | None = None

    def __repr__(self) -> str:
        return f"<Operation of {self.protocol.name}{', free' if self.free else ''}>"


def nothing(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request that runs no model."""
    return Reading(None, 0, 0)
