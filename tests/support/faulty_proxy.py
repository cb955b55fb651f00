"""A TCP proxy between clients and a server: it drops, delays and cuts, loses replies of what was executed, ends TLS."""

import contextlib
import random
import select
import socket
import ssl
import subprocess
import threading
import time

NONE = {}
ROUGH = {"lose_request": 0.05, "lose_reply": 0.05, "hang": 0.02, "late": 0.02, "slow": 0.2}
"""How likely each fault is, of one message."""


class Proxy:
    """Forwards from a free port to `port`, which may be set to another one: connections that exist stay.

    Parameters
    ----------
    port : int
        Where the server listens.
    tls : ssl.SSLContext, optional
        Clients speak TLS, and the server does not.
    """

    def __init__(self, port, *, tls=None, seed=1):
        self.port = port
        self.faults = NONE
        self.seen = dict.fromkeys(ROUGH, 0)
        self.listens = True
        self._tls = tls
        self._chance = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = []
        self._connections = set()
        self._ended = False

    @property
    def url(self):
        scheme = "rediss" if self._tls else "redis"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def cut(self):
        """Close all connections."""
        for each in list(self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(20)

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.listens:
                self._start(self._serve, client)
            else:
                client.close()

    def _serve(self, client):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            if self._tls is not None:
                client.settimeout(5)
                client = stack.enter_context(self._tls.wrap_socket(client, server_side=True))
            client.settimeout(5)
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), 5))
            for each in (client, server):
                self._connections.add(each)
                stack.callback(self._connections.discard, each)
            # One thread for both directions: a client waits for its reply before it asks again.
            while not self._ended:
                ready = [client] if isinstance(client, ssl.SSLSocket) and client.pending() else None
                ready = ready or select.select([client, server], [], [], 0.5)[0]
                if server in ready and not self._forward(server, client, "lose_reply"):
                    return
                if client in ready and not self._forward(client, server, "lose_request"):
                    return

    def _forward(self, source, sink, loss):
        data = source.recv(65_536)
        if not data or self._happens(loss):
            return False
        if self._happens("slow"):
            time.sleep(self._chance.uniform(0, 0.1))
        if self._happens("hang"):
            time.sleep(1.5)  # longer than a client waits, which has gone when the connection is closed
            return False
        if self._happens("late"):
            time.sleep(1.5)  # it arrives after the client has given it up, and maybe after the next
        sink.sendall(data)
        return True

    def _happens(self, fault):
        happens = self._chance.random() < self.faults.get(fault, 0)
        self.seen[fault] += happens
        return happens


def certificate(folder):
    """Make a certificate of 127.0.0.1; the paths of it and of its key. Needs the program openssl."""
    own, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", own],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return own, key
