"""A quota file that the environment names, for entry points that are configured by it."""

import pytest

import modelquota.asgi.quota as quota_module

MODEL = '[models.m]\nmax_requests_per_second = "unlimited"\nmax_tokens_per_second = "unlimited"\n'


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Write the quota file that the environment names; returns its path."""
    path = tmp_path / "quotas.toml"

    def write(text=MODEL):
        path.write_text(text)
        monkeypatch.setenv("MODELQUOTA_QUOTAS", str(path))
        monkeypatch.setenv("MODELQUOTA_STATE", str(tmp_path / "quota.state"))
        return path

    monkeypatch.delenv("MODELQUOTA_QUOTAS", raising=False)
    assert quota_module._guards == {}
    yield write
    for guard in quota_module._guards.values():
        guard.manager.close()
    quota_module._guards.clear()
