"""A real server on a free port of the loopback interface, in a thread."""

import contextlib
import socket
import threading
import time

import uvicorn


class _Server(uvicorn.Server):
    def install_signal_handlers(self):
        pass


@contextlib.contextmanager
def serving(app, *, lifespan="off", **options):
    """Serve an application, and yield its address."""
    config = uvicorn.Config(
        app, log_level="error", ws="none", lifespan=lifespan, timeout_graceful_shutdown=5, **options
    )
    server = _Server(config)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        give_up = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < give_up, "the server does not start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"
