"""vLLM: an endpoint plugin, whose middleware is inside of vLLM's check of API keys.

Switched on by ``MODELQUOTA_QUOTAS=quotas.toml VLLM_PLUGINS=modelquota vllm serve MODEL``. Versions of vLLM without
endpoint plugins take the middleware by its name, outside of the check of keys: ``--middleware modelquota.asgi.Quota``.
Both need vLLM's server in Python; in front of the one in Rust, run ``modelquota proxy``.
"""

from __future__ import annotations

import os
from typing import Any

from modelquota.asgi.quota import Quota, guard_of
from modelquota.asgi.settings import Settings

__all__ = ["EndpointPlugin"]


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
