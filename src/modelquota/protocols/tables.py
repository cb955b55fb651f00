"""All protocols by name, and the operations of several of them in one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from modelquota.protocols.anthropic import Anthropic
from modelquota.protocols.azure import Azure
from modelquota.protocols.gemini import Gemini
from modelquota.protocols.ollama import Ollama
from modelquota.protocols.openai import OpenAI
from modelquota.protocols.protocol import Operation, Protocol
from modelquota.protocols.sglang import SGLang
from modelquota.protocols.vllm import VLLM

TABLES: Final[dict[str, Protocol]] = {
    protocol.name: protocol for protocol in (OpenAI(), Anthropic(), Azure(), Gemini(), VLLM(), SGLang(), Ollama())
}
"""Every protocol. A path that several have belongs to the first."""


def protocol(name: str) -> Protocol:
    """Return a protocol by name; ValueError if there is none.

    Examples
    --------
    >>> protocol("ollama").name
    'ollama'
    """
    found = TABLES.get(name)
    if found is None:
        raise ValueError(f"there is no protocol {name!r}; accepted are {', '.join(TABLES)}")
    return found


def operations(names: Iterable[str] = tuple(TABLES)) -> dict[str, Operation]:
    """Return the operations of the named tables by their path; ValueError for a name that is not known.

    Examples
    --------
    >>> sorted(operations(["ollama"]))
    ['/api/chat', '/api/embed', '/api/embeddings', '/api/generate']
    """
    found: dict[str, Operation] = {}
    for name in names:
        for path, operation in protocol(name).operations().items():
            found.setdefault(path, operation)
    return found
