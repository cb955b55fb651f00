"""Quotas in front of a model server: ASGI middleware for OpenAI-compatible HTTP.

`QuotaMiddleware` needs only the standard library; `modelquota.demo.server` needs the extra ``modelquota[asgi]``.
"""

from modelquota.asgi.middleware import QuotaMiddleware
from modelquota.asgi.page import QuotaPage
from modelquota.asgi.protocols.openai import estimate_prompt, openai_routes
from modelquota.asgi.request import Demand, IncomingRequest, RequestRefusedError
from modelquota.asgi.response import event_tokens

__all__ = [
    "Demand",
    "IncomingRequest",
    "QuotaMiddleware",
    "QuotaPage",
    "RequestRefusedError",
    "estimate_prompt",
    "event_tokens",
    "openai_routes",
]
