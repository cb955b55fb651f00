"""SGLang: a plugin that adds the middleware to the HTTP server.

Switched on by ``MODELQUOTA_QUOTAS=quotas.toml python -m sglang.launch_server ...``: SGLang calls the plugins of every
package that is installed, in each of its processes. Without that variable this one does nothing.

SGLang logs what a plugin raises and serves without it. So a quota file that is not accepted ends the process, unless
``MODELQUOTA_STRICT=0`` says that a server without quotas is better than none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["attach"]

_WORKERS = "--tokenizer-worker-num"
_OTHER_PROCESSES = (
    "SGLang may not load plugins in the processes that serve; run modelquota proxy in front of the server"
)
_GRPC = "requests over gRPC are not counted; run modelquota proxy in front of the gateway that speaks HTTP"
_ELSEWHERE = {"--enable-http2": _OTHER_PROCESSES, "--grpc-mode": _GRPC, "--smg-grpc-mode": _GRPC}
_MODULE = "sglang.srt.entrypoints.http_server"


def attach() -> None:
    """What the entry point of the group ``sglang.srt.plugins`` names.

    Raises
    ------
    SystemExit
        The environment or the quota file is not accepted, and ``MODELQUOTA_STRICT`` is not ``0``.
    """
    if not os.environ.get("MODELQUOTA_QUOTAS"):
        return
    from modelquota.asgi.settings import Settings

    _or_exit(lambda: Settings.read(os.environ))
    _or_exit(_require_one_server)
    module = sys.modules.get(_MODULE)
    if module is not None:
        _protect(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # The processes that only run the model never import the server; importing it here would slow them down.
        sys.meta_path.insert(0, _Finder())


def _require_one_server() -> None:
    """Raise if the server that is given quotas does not serve all: others would, perhaps without any plugin."""
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in _ELSEWHERE:  # each in some versions
            raise RuntimeError(f"{name} is not accepted: {_ELSEWHERE[name]}")
        if name == _WORKERS:
            value = value if equals else next(arguments, "")
            if value.isdigit() and int(value) > 1:
                raise RuntimeError(f"{_WORKERS}={value} is not accepted; expected 1: {_OTHER_PROCESSES}")


def _protect(module: ModuleType) -> None:
    """Add the middleware to the server's application; with an API key, SGLang puts the check of it outside later."""
    from modelquota.asgi.quota import Quota, guard_of
    from modelquota.asgi.settings import Settings

    def add() -> None:
        settings = Settings.read(os.environ)
        guard_of(settings)
        app = getattr(module, "app", None)
        if app is None:
            raise RuntimeError(f"{_MODULE} has no app, so that this version of SGLang cannot be given quotas here")
        if not any(middleware.cls is Quota for middleware in app.user_middleware):
            app.add_middleware(Quota, settings=settings)

    _or_exit(add)


def _or_exit(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        message = f"modelquota: the quotas cannot be used: {error}"
        if os.environ.get("MODELQUOTA_STRICT", "1") != "0":
            raise SystemExit(message) from error
        logging.getLogger("modelquota").critical("%s; serving without quotas", message)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the server's module as usual, and protects it once it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _protect(module)
