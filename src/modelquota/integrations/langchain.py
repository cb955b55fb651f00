"""LangChain: a rate limiter for chat models, which settles what it has acquired.

    limiter = RateLimiter(manager, "gpt-4o")
    model = ChatOpenAI(model="gpt-4o", rate_limiter=limiter, callbacks=[limiter])

As a callback it learns how long the prompt is and what the answer used. Without that, each call is charged its
estimate, and nothing is held while it runs. Needs `langchain_core`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import UUID

from modelquota._extras import extra
from modelquota.client.call import most_at_once
from modelquota.protocols.estimate import estimate_values
from modelquota.protocols.request import Reading, estimate_of, output_bound
from modelquota.quota.tokens import Tokens

with extra("langchain", "langchain_core"):
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.rate_limiters import BaseRateLimiter

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant
    from modelquota.manager import ResourceQuotaManager

__all__ = ["RateLimiter"]

_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample", "num_predict")


class _Run:
    """One call of a model: begun by a callback, given a grant by `acquire`, ended by a callback."""

    __slots__ = ("__weakref__", "ended", "estimate", "grant", "passed")

    def __init__(self, prompt_tokens: int, tokens: int) -> None:
        self.estimate = estimate_of(prompt_tokens, tokens)
        self.grant: Grant | None = None
        self.passed = 0
        self.ended = False


class RateLimiter(BaseRateLimiter, BaseCallbackHandler):
    """Acquires a grant for each call of a chat model; as a callback of that model, also settles it.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager that decides.
    model_id : str or sequence of str
        The id, or several ids that must all admit.
    default_output_tokens : int
        Tokens of an output if the call sets no bound.
    timeout : float, optional
        The longest wait in seconds; never longer than ``grace_period_sec``.
    priority : int
        Higher is served first.
    """

    # Before the call goes on, and in its context: `acquire` is called next.
    run_inline = True

    def __init__(
        self,
        manager: ResourceQuotaManager,
        model_id: str | Sequence[str],
        *,
        default_output_tokens: int = 256,
        timeout: float | None = None,
        priority: int = 0,
    ) -> None:
        self._manager = manager
        self._model_id = model_id
        self._default_output_tokens = default_output_tokens
        self._timeout = timeout
        self._priority = priority
        # The runs that have begun in this thread or task. A tuple, since contexts are copied into tasks and threads.
        self._begun: ContextVar[tuple[_Run, ...]] = ContextVar("modelquota_runs", default=())
        self._runs: weakref.WeakValueDictionary[UUID, _Run] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    # -- as a rate limiter

    def acquire(self, *, blocking: bool = True) -> bool:
        """Wait for admission; called by the model.

        Returns False only if `blocking` is False and the call is denied. Raises QuotaExceededError if it is denied
        after the wait that the quota allows.
        """
        run = self._next_run()
        tokens = self._default_output_tokens if run is None else run.estimate
        if blocking:
            grant = self._manager.acquire(self._model_id, tokens, timeout=self._timeout, priority=self._priority)
        else:
            found = self._try(tokens)
            if found is None:
                return False
            grant = found
        self._hold(run, grant)
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """`acquire` for asyncio."""
        if not blocking:
            return self.acquire(blocking=False)
        run = self._next_run()
        tokens = self._default_output_tokens if run is None else run.estimate
        grant = await self._manager.acquire_async(
            self._model_id, tokens, timeout=self._timeout, priority=self._priority
        )
        self._hold(run, grant)
        return True

    def _try(self, tokens: int | Tokens) -> Grant | None:
        from modelquota.errors import QuotaExceededError

        try:
            return self._manager.reserve(self._model_id, tokens)
        except QuotaExceededError:
            return None

    def _next_run(self) -> _Run | None:
        """The first run that has begun here and has no grant; None if this is not a callback of the model."""
        with self._lock:
            for run in self._begun.get():
                if run.grant is None and not run.ended:
                    return run
        return None

    def _hold(self, run: _Run | None, grant: Grant) -> None:
        with self._lock:
            if run is not None and run.grant is None and not run.ended:
                run.grant = grant
                return
        grant.release()  # its estimate is kept: nobody will say what it really used

    # -- as a callback

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[Any]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Note how long the prompt is."""
        contents = [message.content for batch in messages for message in batch]
        prompt = estimate_values(contents)
        bound = output_bound(kwargs.get("invocation_params") or {}, *_BOUNDS)
        ids = (self._model_id,) if isinstance(self._model_id, str) else tuple(self._model_id)
        most = most_at_once(self._manager, ids) if bound is None else None
        run = _Run(prompt, Reading("", prompt, 1, bound).estimate(self._default_output_tokens, most))
        with self._lock:
            self._runs[run_id] = run
            self._begun.set((*[begun for begun in self._begun.get() if not begun.ended], run))

    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Count what passes of a stream, in case that its end is never seen."""
        run = self._runs.get(run_id)
        if run is not None and run.grant is not None and token:
            run.passed += 1
            run.grant.add(1)

    def on_llm_end(self, response: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Settle by what the answer reports; without a report, what passed stands, or else the estimate."""
        self._end(run_id, _reported(response), failed=False)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Settle by what passed: nothing, if nothing did."""
        self._end(run_id, None, failed=True)

    def _end(self, run_id: UUID, tokens: Tokens | None, *, failed: bool) -> None:
        with self._lock:
            run = self._runs.pop(run_id, None)
            if run is None:
                return
            run.ended = True
            grant = run.grant
        if grant is not None:
            if tokens is not None:
                grant.settle(tokens)
            elif failed and not run.passed:
                grant.settle(0)
            grant.release()


def _reported(response: Any) -> Tokens | None:
    """Return what the generations of an answer report together; None if none of them does."""
    read = cached = output = 0
    found = False
    for generations in response.generations:
        for generation in generations:
            usage = getattr(getattr(generation, "message", None), "usage_metadata", None)
            if usage:
                found = True
                from_cache = (usage.get("input_token_details") or {}).get("cache_read") or 0
                read += max(usage.get("input_tokens", 0) - from_cache, 0)
                cached += from_cache
                output += usage.get("output_tokens", 0)
    return Tokens(read, cached, output) if found else None
