"""Quotas in front of a model server: ASGI middleware for the HTTP APIs of OpenAI, Anthropic, Gemini, vLLM and others.

`QuotaMiddleware` needs only the standard library; `modelquota.demo.server` needs the extra ``modelquota[asgi]``.
"""

from modelquota.asgi.admin import QuotaAdmin
from modelquota.asgi.endpoints import denial_answer, read_demand
from modelquota.asgi.middleware import QuotaMiddleware
from modelquota.asgi.page import QuotaPage
from modelquota.asgi.quota import Quota
from modelquota.asgi.request import Demand, IncomingRequest
from modelquota.asgi.routes import openai_routes, route_for
from modelquota.protocols.content import event_tokens
from modelquota.protocols.estimate import estimate_prompt
from modelquota.protocols.refusal import Answer
from modelquota.protocols.request import Reading, RequestRefusedError
from modelquota.protocols.tables import operations

__all__ = [
    "Answer",
    "Demand",
    "IncomingRequest",
    "Quota",
    "QuotaAdmin",
    "QuotaMiddleware",
    "QuotaPage",
    "Reading",
    "RequestRefusedError",
    "denial_answer",
    "estimate_prompt",
    "event_tokens",
    "openai_routes",
    "operations",
    "read_demand",
    "route_for",
]
