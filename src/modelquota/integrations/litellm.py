"""LiteLLM: a callback of its proxy.

Switched on in the proxy's configuration, together with ``MODELQUOTA_QUOTAS`` in its environment::

    litellm_settings:
      callbacks: modelquota.integrations.litellm.handler

A request is admitted, or waits, before it is routed; its id is the name of the model that the client asks for, and the
identity that ``[http]`` of the quota file names: ``"bearer"`` is LiteLLM's virtual key. It is settled once, whatever
retries and fallbacks it took. Needs `litellm`.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from modelquota._extras import extra
from modelquota.client.call import most_at_once
from modelquota.errors import CapacityError, GrantClosedError, QuotaExceededError
from modelquota.protocols import RequestRefusedError, estimate_of
from modelquota.protocols.protocol import Protocol
from modelquota.protocols.tables import protocol
from modelquota.protocols.usage import Report
from modelquota.quota.http import KEY_DIGITS

with extra("litellm", "litellm", "fastapi"):
    from fastapi import HTTPException
    from litellm.integrations.custom_logger import CustomLogger

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant
    from modelquota.asgi.quota import Guard
    from modelquota.asgi.settings import Settings

__all__ = ["QuotaHandler", "handler"]

logger = logging.getLogger("modelquota")

_KEY = "modelquota_grant"
_PLACES = ("metadata", "litellm_metadata")
_NAMESPACE = "tenant/"
_OPENAI: Protocol = protocol("openai")


class _Ticket(str):
    """Rides in the metadata of a request, through every copy of it; its grant is released with the last of them.

    A str, so that metadata can be written as JSON; clients cannot make one.
    """

    __slots__ = ("_failed", "_grant")
    _grant: Grant
    _failed: bool

    @classmethod
    def of(cls, grant: Grant) -> _Ticket:
        ticket = cls("/".join(grant.model_ids))
        ticket._grant = grant
        ticket._failed = False
        return ticket

    def __copy__(self) -> _Ticket:
        return self

    def __deepcopy__(self, memo: Any) -> _Ticket:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)

    def failed(self) -> None:
        """An attempt has failed; another may follow."""
        self._failed = True

    def end(self, tokens: Any = None, *, cancel: bool = False) -> None:
        """Settle the grant and release it, once."""
        grant = self._grant
        if grant.released:
            return
        try:
            if cancel:
                grant.cancel()
            elif tokens is not None:
                grant.settle(tokens)
            elif self._failed:
                grant.settle(0)
        except GrantClosedError:
            pass
        finally:
            grant.release()

    def __del__(self) -> None:
        self.end()


class QuotaHandler(CustomLogger):
    """The callback: reserves before a request is routed, settles when it has been served.

    Parameters
    ----------
    settings : Settings, optional
        Instead of what the environment says.
    default_output_tokens : int
        Tokens of an output if the request sets no bound.
    """

    def __init__(self, settings: Settings | None = None, *, default_output_tokens: int = 256) -> None:
        super().__init__()
        self._settings = settings
        self._default_output_tokens = default_output_tokens
        self._opened: Guard | None = None
        self._http: dict[str, Any] = {}

    def open(self) -> Guard:
        """Open the quota file and the state file; raises what `modelquota.asgi.Quota` raises."""
        if self._opened is None:
            from modelquota.asgi.quota import guard_of
            from modelquota.asgi.settings import Settings

            settings = Settings.read(os.environ) if self._settings is None else self._settings
            self._opened = guard_of(settings)
            self._http = settings.http
        return self._opened

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        """Admit a request, or wait, or raise the answer that denies it. Called by the proxy."""
        guard = self.open()
        if guard.due():
            import asyncio

            await asyncio.to_thread(guard.reload)
        model = data.get("model")
        if not isinstance(model, str) or not model:
            return
        if model.startswith(self._namespace) or "#" in model:  # a tenant's quota, or a meter, is no model
            raise HTTPException(404, detail={"error": f"The model `{model}` does not exist"})
        path = "/embeddings" if "embedding" in call_type else "/chat/completions"
        try:
            reading = _OPENAI.operations()[path].read(data, {})
        except RequestRefusedError as error:
            raise HTTPException(error.status, detail={"error": error.message}) from None
        ids = tuple(dict.fromkeys([*self._identity(user_api_key_dict, data), model]))
        guess = int(self._http.get("default_output_tokens", self._default_output_tokens))
        tokens = reading.estimate(guess, most_at_once(guard.manager, ids) if reading.is_guess else None)
        try:
            grant = await guard.manager.acquire_async(
                ids, estimate_of(reading.prompt_tokens, tokens), priority=reading.priority
            )
        except QuotaExceededError as error:
            raise _denial(error) from None
        except CapacityError:
            raise HTTPException(503, detail={"error": "no further model can be accounted for"}) from None
        except ValueError as error:  # an id of the request cannot have a quota, or they have too many meters
            raise HTTPException(400, detail={"error": f"the request cannot be decided: {error}"}) from None
        ticket = _Ticket.of(grant)
        places = [place for place in _PLACES if isinstance(data.get(place), dict)] or [_PLACES[0]]
        for place in places:
            data.setdefault(place, {})[_KEY] = ticket

    def _identity(self, user_api_key_dict: Any, data: dict[str, Any]) -> list[str]:
        setting = self._http.get("identity")
        name: Any = None
        if setting == "bearer":
            digits = str(getattr(user_api_key_dict, "api_key", None) or "")[:KEY_DIGITS].lower()
            if digits:
                assert self._opened is not None
                name = self._opened.quotas.key_names.get(digits, f"key:{digits}")
        elif setting == "openai-user":
            name = data.get("user")
        elif setting is not None:
            headers = (data.get("proxy_server_request") or {}).get("headers") or {}
            wanted = setting.partition(":")[2].lower()
            name = next((value for key, value in headers.items() if key.lower() == wanted), None)
        if not isinstance(name, str) or not name:
            return []
        return [f"{self._namespace}{name}"]

    @property
    def _namespace(self) -> str:
        return str(self._http.get("identity_namespace", _NAMESPACE))

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """Settle by what the answer reports. Called by LiteLLM, for a stream at its end."""
        ticket = _ticket(kwargs.get("litellm_params") or {})
        if ticket is not None:
            if kwargs.get("cache_hit"):
                ticket.end(cancel=True)  # no model has run
            else:
                ticket.end(_reported(response_obj))

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """Note that an attempt has failed; LiteLLM may make others."""
        ticket = _ticket(kwargs.get("litellm_params") or {})
        if ticket is not None:
            ticket.failed()

    async def async_post_call_failure_hook(
        self, request_data: dict[str, Any], original_exception: Exception, user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:  # fmt: skip
        """Give the tokens back: the request has failed for good. Called by the proxy."""
        ticket = _ticket(request_data)
        if ticket is not None:
            ticket.failed()
            ticket.end()


def _ticket(holder: Any) -> _Ticket | None:
    for place in _PLACES:
        metadata = holder.get(place)
        if isinstance(metadata, dict) and isinstance(metadata.get(_KEY), _Ticket):
            found: _Ticket = metadata[_KEY]
            return found
    return None


def _reported(response: Any) -> Any:
    """Return what an answer reports; None if it reports nothing, so that the estimate stands."""
    if hasattr(response, "model_dump"):
        response = response.model_dump()
    report = Report()
    if not isinstance(response, dict) or not report.read(_OPENAI.usage_tree, response):
        return None
    return report.tokens(0, 0)


def _denial(error: QuotaExceededError) -> HTTPException:
    result = error.result
    if result.never_fits:
        return HTTPException(400, detail={"error": str(error)})
    wait_ms = result.retry_after_ms
    if wait_ms is None:
        return HTTPException(503, detail={"error": str(error)}, headers={"retry-after": "1"})
    headers = {"retry-after": str(max(-(-wait_ms // 1000), 1)), "retry-after-ms": str(wait_ms)}
    return HTTPException(429, detail={"error": str(error)}, headers=headers)


if TYPE_CHECKING:
    handler: QuotaHandler
    """The callback that the proxy's configuration names."""


def __getattr__(name: str) -> Any:
    """Make `handler` when the proxy asks for it: its start then fails if the quota file is not accepted."""
    if name != "handler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = QuotaHandler()
    found.open()
    globals()["handler"] = found
    return found
