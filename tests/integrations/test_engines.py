"""vLLM, SGLang and Ray Serve by stand-ins: the lines of each that load a plugin or a middleware, in our words.

The real ones need a GPU or are too large to install here; what they do was read in their sources in late 2026.
"""

import asyncio
import importlib
import importlib.metadata
import inspect
import logging
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from asgi_client import Call, chat, reply, used
from fastapi import FastAPI
from http_server import serving
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from modelquota import QuotaConfigError, QuotaFileError, ResourceQuotaManager
from modelquota.asgi import Quota
from modelquota.asgi.quota import _guards
from modelquota.control.load import LoadAdjuster
from modelquota.integrations import sglang
from modelquota.integrations.ray import middlewares
from modelquota.integrations.vllm import EndpointPlugin, engine_load, load_of

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


def entry_point(group):
    """What the entry point of a group names, loaded as an engine does."""
    (value,) = PYPROJECT["project"]["entry-points"][group].values()
    return importlib.metadata.EntryPoint("modelquota", value, group).load()


def chat_app():
    app = FastAPI()
    app.post("/v1/chat/completions")(lambda: USAGE)
    return app


def ask(app, **headers):
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    return asyncio.run(Call(app, body=chat(), headers=fields).run())


def manager():
    (guard,) = _guards.values()
    return guard.manager


class CheckOfKeys:
    """What vLLM's check of API keys answers: an ASGI middleware that lets OPTIONS and paths not below /v1 pass."""

    def __init__(self, app, keys):
        self.app = app
        self.keys = keys

    async def __call__(self, scope, receive, send):
        checked = scope["type"] == "http" and scope["method"] != "OPTIONS" and scope["path"].startswith("/v1")
        if checked and dict(scope["headers"]).get(b"authorization") not in self.keys:
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class TestVLLM:
    """``--middleware NAME``, and the entry point group ``vllm.endpoint_plugins``."""

    @staticmethod
    def load_by_group(allowed):
        """What vLLM does with a group: what cannot be loaded is logged and left out."""
        factories = {}
        for name in PYPROJECT["project"]["entry-points"]["vllm.endpoint_plugins"]:
            if name in allowed:
                try:
                    factories[name] = entry_point("vllm.endpoint_plugins")
                except Exception:
                    logging.getLogger("vllm").exception("Failed to load plugin %s", name)
        return factories

    def load_endpoint_plugins(self, allowed, supported_tasks):
        """What vLLM does at the start: only plugins that are named are loaded, and one that fails is left out."""
        if allowed is None:
            return []
        plugins = []
        for name, factory in self.load_by_group(allowed).items():
            try:
                plugin = factory()
            except Exception:
                logging.getLogger("vllm").exception("Failed to instantiate endpoint plugin %s", name)
                continue
            tasks = plugin.required_tasks
            if tasks is None or set(tasks) & set(supported_tasks):
                plugins.append(plugin)
        return plugins

    @staticmethod
    def add_middlewares(app, keys, names):
        """What vLLM adds, in its order: CORS, the check of API keys, and each ``--middleware``, the outermost last."""
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
        if keys:
            app.add_middleware(CheckOfKeys, keys=[b"Bearer " + key for key in keys])
        for name in names:
            module_path, object_name = name.rsplit(".", 1)
            imported = getattr(importlib.import_module(module_path), object_name)
            if inspect.isclass(imported):
                app.add_middleware(imported)
            elif inspect.iscoroutinefunction(imported):
                app.middleware("http")(imported)
            else:
                raise ValueError(f"Invalid middleware {name}. Must be a function or a class.")

    def build_app(self, allowed=("modelquota",), keys=(b"secret",), middleware=()):
        """What vLLM does: routes, then endpoint plugins, then middlewares; the state when the engine is there."""
        app = chat_app()
        plugins = self.load_endpoint_plugins(allowed, ("generate",))
        for plugin in plugins:
            plugin.attach_router(app)
        app.state.endpoint_plugins = plugins
        self.add_middlewares(app, keys, middleware)

        async def init():
            for plugin in app.state.endpoint_plugins:
                await plugin.init_state(None, app.state, SimpleNamespace(served_model_name=["m"], model="/weights"))

        asyncio.run(init())
        return app

    def test_the_middleware_by_its_name(self, configure):
        configure()
        app = self.build_app(None, keys=(), middleware=["modelquota.asgi.Quota"])
        assert ask(app).status == 200
        assert used(manager()) == (7, 0, 0)

    def test_the_middleware_by_its_name_is_outside_of_the_check_of_keys(self, configure):
        """Strangers are decided too, but cost nothing."""
        configure()
        app = self.build_app(None, middleware=["modelquota.asgi.Quota"])
        assert ask(app, authorization="Bearer guessed").status == 401
        assert used(manager()) == (0, 0, 0)
        assert manager().get_usage("m").requests_this_hour == 0
        assert manager().get_stats().total_checks == 1
        assert ask(app, authorization="Bearer secret").status == 200
        assert used(manager()) == (7, 0, 0)

    def test_a_denial_of_the_plugin_can_be_read_by_a_browser(self, configure):
        """It passes through vLLM's CORS."""
        configure("[models.m]\nmax_requests_per_hour = 1\non_violation = 'reject'\n")
        app = self.build_app()
        answers = [ask(app, authorization="Bearer secret", origin="http://page") for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 429]
        assert [answer.headers["access-control-allow-origin"] for answer in answers] == ["*", "*"]

    def test_the_plugin_has_the_members_of_the_protocol(self):
        plugin = EndpointPlugin()
        assert (plugin.name, plugin.required_tasks) == ("modelquota", None)
        assert list(inspect.signature(plugin.attach_router).parameters) == ["app"]
        assert list(inspect.signature(plugin.init_state).parameters) == ["engine_client", "state", "args"]
        assert inspect.iscoroutinefunction(plugin.init_state)

    def test_the_plugin_is_inside_of_the_check_of_keys(self, configure):
        configure()
        app = self.build_app()
        assert isinstance(app.state.endpoint_plugins[0], EndpointPlugin)
        assert ask(app).status == 401
        assert used(manager()) == (0, 0, 0)
        assert manager().get_stats().total_checks == 0
        assert ask(app, authorization="Bearer secret").status == 200
        assert used(manager()) == (7, 0, 0)

    def test_requests_that_name_no_model_are_those_of_the_one_that_is_served(self, configure):
        configure()
        app = self.build_app()
        key = [(b"authorization", b"Bearer secret")]
        answer = asyncio.run(Call(app, body=chat(model=None), headers=key).run())
        assert (answer.status, used(manager())) == (200, (7, 0, 0))
        assert asyncio.run(Call(app, "/pooling", {"input": "x" * 40}, headers=key).run()).status == 404
        assert manager().get_usage("m").requests_this_hour == 1  # it came to the model, whose server knows no such path
        configure("[http]\ndefault_model = 'other'\n[models.other]\n[models.m]")
        self.build_app()

    def test_a_bad_file_ends_the_start(self, configure):
        configure("[models.m]\nmax_ram_mb = -1")
        with pytest.raises(QuotaFileError, match=r"line 2: \[models"):
            self.build_app()

    def test_to_be_named_without_a_quota_file_is_an_error_and_not_to_be_named_is_none(self, monkeypatch):
        monkeypatch.delenv("MODELQUOTA_QUOTAS", raising=False)
        with pytest.raises(QuotaConfigError, match="MODELQUOTA_QUOTAS"):
            self.build_app()
        for allowed in (None, [""], ["other"]):
            assert ask(self.build_app(allowed), authorization="Bearer secret").status == 200

    def test_a_bad_file_ends_the_start_in_a_running_loop_too(self, configure):
        configure("[http]\npage = '/quota'")

        async def build():
            EndpointPlugin().attach_router(chat_app())

        with pytest.raises(QuotaFileError, match="at least one table"):
            asyncio.run(build())


METRICS = """# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 5.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
"""


class TestTheLoadOfVLLM:
    """What its metrics say, for limits that follow the load."""

    def test_the_larger_of_waiting_requests_and_the_use_of_the_cache(self):
        async def metrics(scope, receive, send):
            await reply(send, METRICS.encode())

        with serving(metrics) as address:
            assert engine_load(f"{address}/metrics")() == 0.75
            assert engine_load(f"{address}/metrics", most_waiting=8)() == 1.0
        assert math.isnan(engine_load(f"{address}/metrics", timeout=0.5)())
        assert load_of("vllm:gpu_cache_usage_perc 0.5\n", 1) == 0.5
        assert math.isnan(load_of("other 1.0\n", 1))
        with pytest.raises(ValueError, match=r"^most_waiting=0 is not accepted; expected an integer from 1"):
            engine_load("http://x", most_waiting=0)

    def test_limits_follow_it(self):
        loads = iter([0.95, math.nan, 0.2])
        with ResourceQuotaManager() as manager:
            manager.set_quota("m", max_tokens_per_second=1000)
            with LoadAdjuster(manager, lambda: next(loads), fields=["max_tokens_per_second"]) as adjuster:
                adjuster.poll()
                tightened = manager.get_quota("m").max_tokens_per_second
                assert tightened < 1000
                adjuster.poll()
                assert manager.get_quota("m").max_tokens_per_second == tightened


SERVER = "sglang.srt.entrypoints.http_server"


class TestSGLang:
    """The entry point group ``sglang.srt.plugins``: called in every process, exceptions are only logged."""

    @pytest.fixture(autouse=True)
    def sglang_here(self, tmp_path, monkeypatch):
        """A package with the module that has the server's application."""
        folder = tmp_path / "packages" / "sglang" / "srt" / "entrypoints"
        folder.mkdir(parents=True)
        for parent in (folder, folder.parent, folder.parent.parent):
            (parent / "__init__.py").touch()
        (folder / "http_server.py").write_text(
            "from fastapi import FastAPI\napp = FastAPI()\n"
            f"@app.post('/v1/chat/completions')\ndef chat():\n    return {USAGE}\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        finders = list(sys.meta_path)
        yield
        sys.meta_path[:] = finders
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]

    @staticmethod
    def load_plugins():
        """What SGLang does early in each process; ``SGLANG_PLUGINS`` may name those that it loads."""
        named = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
        functions = {}
        for name in PYPROJECT["project"]["entry-points"]["sglang.srt.plugins"]:
            if named and name not in named:
                continue
            try:
                functions[name] = entry_point("sglang.srt.plugins")
            except Exception:
                logging.getLogger("sglang").exception("Failed to load plugin %s", name)
        for name, function in functions.items():
            try:
                function()
            except Exception:
                logging.getLogger("sglang").exception("Failed to execute general plugin: %s", name)

    def test_without_configuration_it_does_nothing(self, configure):
        before = list(sys.meta_path)
        self.load_plugins()
        assert sys.meta_path == before
        assert importlib.import_module(SERVER).app.user_middleware == []

    def test_without_configuration_it_costs_nothing(self):
        code = (
            "import sys, modelquota.integrations.sglang as plugin; plugin.attach(); "
            "print(any(name in sys.modules for name in ('asyncio', 'modelquota.asgi', 'starlette')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "False\n"

    @pytest.mark.parametrize("imported_before", [False, True])
    def test_the_server_is_protected_when_it_is_imported(self, configure, imported_before):
        configure()
        if imported_before:
            importlib.import_module(SERVER)
        self.load_plugins()
        self.load_plugins()  # as in a process that inherits both
        assert (SERVER in sys.modules) is imported_before  # a process that only runs the model does not import it
        module = importlib.import_module(SERVER)
        assert [middleware.cls for middleware in module.app.user_middleware] == [Quota]
        assert type(module.__loader__).__name__ == "SourceFileLoader"
        assert ask(module.app).status == 200
        assert used(manager()) == (7, 0, 0)

    @pytest.mark.parametrize(
        ("named", "counted"), [("modelquota", True), ("other, modelquota", True), ("other", False)]
    )
    def test_plugins_may_have_to_be_named(self, configure, monkeypatch, named, counted):
        configure()
        monkeypatch.setenv("SGLANG_PLUGINS", named)
        self.load_plugins()
        assert [one.cls for one in importlib.import_module(SERVER).app.user_middleware] == [Quota] * counted

    def test_a_bad_file_ends_the_process(self, configure):
        path = configure("[models.m]\nmax_ram_mb = -1")
        with pytest.raises(SystemExit, match=f"modelquota: the quotas cannot be used: {path}: line 2"):
            self.load_plugins()

    @pytest.mark.parametrize(
        "words", [["--tokenizer-worker-num", "2"], ["--tokenizer-worker-num=4"], ["--enable-http2"]]
    )
    def test_several_processes_that_may_serve_without_plugins_end_the_process(self, configure, monkeypatch, words):
        configure()
        monkeypatch.setattr(sys, "argv", ["launch_server", "--model-path", "m", *words, "--port", "1"])
        with pytest.raises(SystemExit, match=r"is not accepted(; expected 1)?: SGLang may not load plugins"):
            self.load_plugins()
        monkeypatch.setattr(sys, "argv", ["launch_server", "--tokenizer-worker-num", "1"])
        self.load_plugins()

    @pytest.mark.parametrize("word", ["--grpc-mode", "--smg-grpc-mode"])
    def test_a_server_without_http_ends_the_process(self, configure, monkeypatch, word):
        configure()
        monkeypatch.setattr(sys, "argv", ["launch_server", "--model-path", "m", word])
        with pytest.raises(SystemExit, match=f"{word} is not accepted: requests over gRPC are not counted"):
            self.load_plugins()
        monkeypatch.delenv("MODELQUOTA_QUOTAS")
        self.load_plugins()

    def test_a_server_that_has_changed_ends_the_process(self, configure, tmp_path):
        configure()
        (tmp_path / "packages" / "sglang" / "srt" / "entrypoints" / "http_server.py").write_text("application = None\n")
        self.load_plugins()
        with pytest.raises(SystemExit, match="has no app"):
            importlib.import_module(SERVER)

    def test_unless_a_server_without_quotas_is_better_than_none(self, configure, monkeypatch, caplog):
        path = configure("[models.m]\nmax_ram_mb = -1")
        monkeypatch.setenv("MODELQUOTA_STRICT", "0")
        self.load_plugins()
        assert f"modelquota: the quotas cannot be used: {path}: line 2" in caplog.text
        assert importlib.import_module(SERVER).app.user_middleware == []


class TestRay:
    """``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""

    @staticmethod
    def call_by_path(path):
        module, _, name = path.partition(":")
        found = getattr(importlib.import_module(module), name)()
        assert isinstance(found, list)
        assert all(isinstance(item, Middleware) for item in found)
        return found

    def test_its_middlewares_go_around_the_proxy(self, configure):
        configure()
        app = chat_app()
        for middleware in self.call_by_path("modelquota.integrations.ray:middlewares"):
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        assert ask(app).status == 200
        assert used(manager()) == (7, 0, 0)

    def test_a_bad_file_ends_the_start(self, configure):
        configure("[models.m]\nmax_ram_mb = -1")
        with pytest.raises(QuotaFileError, match="line 2"):
            middlewares()


def test_an_entry_point_that_nobody_asks_for_is_not_imported():
    code = "import sys, modelquota; print([name for name in sys.modules if name.startswith('modelquota.integrations')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    assert sglang.__all__ == ["attach"]
