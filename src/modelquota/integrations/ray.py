"""Ray Serve: middlewares for its HTTP proxy, which runs on each node.

Switched on by ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=modelquota.integrations.ray:middlewares`` in the environment
of the cluster, together with ``MODELQUOTA_QUOTAS``. The proxies of one node share their limits; those of several nodes
do not.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from modelquota._extras import extra

if TYPE_CHECKING:
    from starlette.middleware import Middleware

__all__ = ["middlewares"]


def middlewares() -> list[Middleware]:
    """What Ray Serve calls when a proxy starts: the list of middlewares to add.

    Raises what `modelquota.asgi.Quota` raises if the environment or the quota file is not accepted, so that the proxy
    does not start.
    """
    with extra("asgi", "starlette"):
        from starlette.middleware import Middleware
    from modelquota.asgi.quota import Quota, guard_of
    from modelquota.asgi.settings import Settings

    settings = Settings.read(os.environ)
    guard_of(settings)
    factory: Any = Quota  # starlette's protocol of a middleware is narrower than what it accepts
    return [Middleware(factory, settings=settings)]
