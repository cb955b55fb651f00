"""The protocols of inference servers, one file each: read a request, read an answer, say no, end a stream early.

Pure: bytes and parsed JSON in, values and bytes out. Nothing here knows a server, a client or a manager, so that the
middleware, the proxy and the client transport read with the same code.

The map: `protocol` is the interface; `request` what a request says; `body` from bytes to JSON; `skim` what matters of
most bodies, without parsing them, in Cython; `estimate` how long a prompt is; `usage` what an answer reports; `content`
what passed; `answer` reads an answer as it passes; `refusal` what a client is told; `paths` finds the operation of a
path; `tables` names all protocols.
"""

from modelquota.protocols.answer import AnswerReader
from modelquota.protocols.body import parse_body
from modelquota.protocols.content import event_tokens
from modelquota.protocols.estimate import estimate_prompt
from modelquota.protocols.paths import PathTable
from modelquota.protocols.protocol import Operation, Protocol
from modelquota.protocols.refusal import Answer, Refusal, RefusalKind
from modelquota.protocols.request import Reading, RequestRefusedError, estimate_of
from modelquota.protocols.tables import TABLES, operations, protocol

__all__ = [
    "TABLES",
    "Answer",
    "AnswerReader",
    "Operation",
    "PathTable",
    "Protocol",
    "Reading",
    "Refusal",
    "RefusalKind",
    "RequestRefusedError",
    "estimate_of",
    "estimate_prompt",
    "event_tokens",
    "operations",
    "parse_body",
    "protocol",
]
