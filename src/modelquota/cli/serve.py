"""The command `modelquota serve-demo`: runs the example server, and prints what to try. Needs the extra `asgi`."""

import contextlib
import json
import shlex
from collections.abc import Sequence

import uvicorn
from rich.console import Console

from modelquota.cli.format import printable
from modelquota.cli.processes import listening, run_in_processes
from modelquota.demo.server import create_app
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig

__all__ = ["serve_demo"]

SHUTDOWN_SECONDS = 5
_FREE_KEY = "-H 'Authorization: Bearer free'"


def serve_demo(
    console: Console,
    manager: ResourceQuotaManager,
    *,
    host: str,
    port: int,
    quotas: Sequence[ResourceQuotaConfig] | None,
    tokens_per_second: float,
    workers: int,
) -> None:
    """Serve the example until Ctrl-C. Raises OSError if it cannot listen at the address.

    `quotas` are those to explain; None for those of the example.
    """
    app = create_app(manager, tokens_per_second=tokens_per_second)
    config = uvicorn.Config(app, log_level="info", ws="none", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    with listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        _explain(console, f"http://{name}:{listener.getsockname()[1]}", quotas)

        def run() -> None:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
                uvicorn.Server(config).run(sockets=[listener])

        if workers == 1:
            run()
        else:
            run_in_processes(workers, run)


def _explain(console: Console, address: str, quotas: Sequence[ResourceQuotaConfig] | None) -> None:
    """Print what to try."""

    def say(text: str = "") -> None:
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def ask(model: str, *options: str, **fields: object) -> str:
        body = {"model": model, **fields, "messages": [{"role": "user", "content": "Hello"}]}
        return " ".join(["curl -si", *options, f"{address}/v1/chat/completions -d", shlex.quote(json.dumps(body))])

    say(f"A mock model server behind modelquota: {address}/v1   its quotas, live: {address}/quota")
    say()
    if quotas is not None:
        for quota in quotas[:1]:
            say(f"  {ask(quota.model_id)}")
    else:
        say("A stream, with headers that show what is left:")
        say(f"  {ask('chat-70b', stream=True)}")
        say("429 and when to come back, from the fourth within a second on:")
        say(f"  for i in 1 2 3 4; do {ask('batch-13b', max_tokens=1)}; echo; done")
        say("One at a time; the others wait in line:")
        say(f"  for i in 1 2 3; do {ask('code-34b')} & done; wait")
        say("A key with ten requests an hour, decided together with the model:")
        say(f"  {ask('dev-7b', _FREE_KEY)}")
    say()
    say(f'With the openai package: OpenAI(base_url="{address}/v1", api_key="none"); it retries after the given time.')
    say("Ctrl-C stops it.")
