"""The example server in a process of its own, which tells on request what it holds: `python soak_server.py`."""

import asyncio
import dataclasses
import gc
import itertools
import json
import socket
from collections import Counter
from pathlib import Path

import uvicorn
from asgi_client import reply
from factories import OPEN

from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware, openai_routes
from modelquota.demo.server import create_app

RAM_MB = 10
PAGE_BYTES = 4096
TOKENS_PER_SECOND = 500


def new_manager():
    manager = ResourceQuotaManager()
    manager.set_quota("queue", **OPEN, max_concurrent_requests=6, on_violation="queue", max_queued_requests=10_000)
    manager.set_quota(
        "throttle", **OPEN | {"max_requests_per_second": 200, "burst_requests": 5}, on_violation="throttle"
    )
    manager.set_quota("reject", **OPEN, max_ram_mb=4 * RAM_MB, on_violation="reject")
    manager.set_quota("tenant/user", **OPEN, max_concurrent_requests=5000)
    return manager


class Soaked:
    """Notes how far each request has come when it ends, and answers ``/status``."""

    def __init__(self):
        self.manager = new_manager()
        self.ended = Counter()
        self.statuses = Counter()
        routes = dict.fromkeys(openai_routes(), self.demand)
        self.apps = itertools.cycle(
            QuotaMiddleware(
                self.serve, self.manager, routes=routes, identity=lambda request: "user", cancel_on_disconnect=cancel
            )
            for cancel in (False, True)
        )
        self.read = openai_routes()["/v1/chat/completions"]
        self.model = create_app(ResourceQuotaManager(), tokens_per_second=TOKENS_PER_SECOND)
        self.model.user_middleware.clear()  # the mock model by itself: this is the middleware that is looked at

    def demand(self, request):
        request.scope["came_to"] = "waiting for admission"
        return dataclasses.replace(self.read(request), ram_needed_mb=RAM_MB)

    async def serve(self, scope, receive, send):
        scope["came_to"] = "before the first byte"
        await self.model(scope, receive, send)

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/status":
            await reply(send, self.status())
            return
        scope["came_to"] = "in its body"

        async def noted(message):
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
                if message["status"] == 200:
                    scope["came_to"] = "in the middle of the response"
                elif message["status"] != 499:
                    scope["came_to"] = "refused"
            elif not message.get("more_body", False) and scope["came_to"] == "in the middle of the response":
                scope["came_to"] = "complete"
            await send(message)

        try:
            await next(self.apps)(scope, receive, noted)
        finally:
            self.ended[scope["came_to"]] += 1

    def status(self):
        gc.collect()
        snapshot = self.manager.snapshot()
        held = ("concurrent_requests", "queued_requests", "reserved_ram_mb", "reserved_ssd_mb")
        return {
            "held": {name: int(snapshot[name].sum()) for name in held},
            "requests": int(snapshot["requests_this_hour"].sum()),
            "tasks": len(asyncio.all_tasks()),
            "rss_mb": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20,
            "ended": self.ended,
            "statuses": self.statuses,
        }


def main():
    config = uvicorn.Config(Soaked(), log_level="error", ws="none", lifespan="off", backlog=4096, timeout_keep_alive=60)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
