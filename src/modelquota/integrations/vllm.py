"""vLLM: an endpoint plugin, whose middleware is inside of vLLM's check of API keys.

Switched on by ``MODELQUOTA_QUOTAS=quotas.toml VLLM_PLUGINS=modelquota vllm serve MODEL``. Versions of vLLM without
endpoint plugins take the middleware by its name, outside of the check of keys: ``--middleware modelquota.asgi.Quota``.
Both need vLLM's server in Python; in front of the one in Rust, run ``modelquota proxy``.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

from modelquota.asgi.quota import Quota, guard_of
from modelquota.asgi.settings import Settings

__all__ = ["EndpointPlugin", "engine_load"]

_WAITING: Final = re.compile(r"^vllm:num_requests_waiting(?:\{.*\})? (\S+)$", re.MULTILINE)
_CACHE_USE: Final = re.compile(r"^vllm:(?:kv|gpu)_cache_usage_perc(?:\{.*\})? (\S+)$", re.MULTILINE)
_NO_ANSWER: Final = float("nan")


class EndpointPlugin:
    """What the entry point of the group ``vllm.endpoint_plugins`` names.

    vLLM logs an error in a plugin's constructor and goes on without it, so that everything that can fail is done in
    `attach_router`, whose errors end the server.
    """

    name = "modelquota"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware; raises what `modelquota.asgi.Quota` raises if its configuration is not accepted."""
        settings = Settings.read(os.environ)
        guard_of(settings)  # now, since the application creates its middleware only when it starts
        self._parameters: dict[str, Any] = {} if "routes" in settings.http else {"routes": "vllm"}
        self._needs_model = "default_model" not in settings.http
        app.add_middleware(Quota, settings=settings, parameters=self._parameters)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Let requests that name no model be those of the model that is served, as vLLM does."""
        served = getattr(args, "served_model_name", None) or getattr(args, "model", None)
        name = served if isinstance(served, str) or not served else served[0]
        if name and self._needs_model:
            self._parameters["default_model"] = name


def engine_load(metrics_url: str, *, most_waiting: int = 16, timeout: float = 2.0) -> Callable[[], float]:
    """Return a function that returns the load of a vLLM server, for `modelquota.control.load.LoadAdjuster`.

    The load is the larger of two: the use of the KV cache, 0.0 .. 1.0, and the requests that wait in the engine, in
    parts of `most_waiting`. Latency would tell too late, since vLLM takes in hundreds of requests before it grows.

    Parameters
    ----------
    metrics_url : str
        Where the server shows its metrics: ``http://127.0.0.1:8000/metrics``.
    most_waiting : int
        So many waiting requests are a load of 1.
    timeout : float
        Seconds to wait for an answer. A server that does not answer has a load that is not a number, which changes no
        limits.

    Raises
    ------
    ValueError
        `most_waiting` is less than 1.
    """
    if most_waiting < 1:
        raise ValueError(f"most_waiting={most_waiting!r} is not accepted; expected an integer from 1")

    def load() -> float:
        try:
            with urllib.request.urlopen(metrics_url, timeout=timeout) as answer:
                text = answer.read().decode("utf-8", "replace")
        except (OSError, urllib.error.URLError):
            return _NO_ANSWER
        return load_of(text, most_waiting)

    return load


def load_of(metrics: str, most_waiting: int) -> float:
    r"""Return the load that a server's metrics say; not a number if they say none.

    Examples
    --------
    >>> load_of("vllm:num_requests_waiting 4.0\nvllm:kv_cache_usage_perc 0.2\n", 16)
    0.25
    """
    waiting = [float(number) for number in _WAITING.findall(metrics)]
    used = [float(number) for number in _CACHE_USE.findall(metrics)]
    if not waiting and not used:
        return _NO_ANSWER
    return max([sum(waiting) / most_waiting, *used])
