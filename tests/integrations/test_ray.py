"""Ray Serve, the real one, with our middlewares in its proxy. ``pip install 'ray[serve]' httpx`` before."""

import json
import os
import subprocess
import sys

import pytest
from launched import free_port

from modelquota import ResourceQuotaManager

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")
pytest.importorskip("ray.serve", reason="ray's serve is not installed: pip install 'ray[serve]'")

PROGRAM = """
import json, sys, httpx, ray
from fastapi import FastAPI
from ray import serve

app = FastAPI()

@serve.deployment
@serve.ingress(app)
class Model:
    @app.post("/v1/chat/completions")
    def chat(self):
        return {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Model.bind(), name="model", route_prefix="/")
body = {"model": "m", "max_tokens": 5, "messages": []}
address = f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions"
with open("found.json", "w") as file:
    json.dump([httpx.post(address, json=body, timeout=20).status_code for _ in range(3)], file)
serve.shutdown()
ray.shutdown()
"""


def test_its_proxy_counts_and_denies(tmp_path):
    (tmp_path / "quotas.toml").write_text('[models.m]\nmax_requests_per_hour = 2\non_violation = "reject"\n')
    state = tmp_path / "quota.state"
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "modelquota.integrations.ray:middlewares",
        "MODELQUOTA_QUOTAS": str(tmp_path / "quotas.toml"), "MODELQUOTA_STATE": str(state),
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, str(free_port())]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text()) == [200, 200, 429]
    with ResourceQuotaManager(path=state) as manager:
        assert manager.get_usage("m").tokens_this_hour == 14
