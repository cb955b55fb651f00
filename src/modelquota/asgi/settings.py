"""What the environment and ``[http]`` of a quota file say about a server."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from modelquota.cluster.redis import URL_VARIABLE
from modelquota.errors import QuotaConfigError
from modelquota.quota.file import load_quotas

_QUOTAS: Final = "MODELQUOTA_QUOTAS"
_OVERRIDES: Final = {
    "MODELQUOTA_STATE": "state",
    "MODELQUOTA_PAGE": "page",
    "MODELQUOTA_METRICS": "metrics",
    "MODELQUOTA_LEDGER": "ledger",
    "MODELQUOTA_ADMIN": "admin",
    "MODELQUOTA_ADMIN_TOKEN_FILE": "admin_token_file",
}
_FILES: Final = ("state", "ledger", "admin_token_file")
_TOKEN: Final = "MODELQUOTA_ADMIN_TOKEN"
_LARGEST_TOKEN_FILE: Final = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment and the quota file say about a server.

    Attributes
    ----------
    quotas : pathlib.Path
        The quota file.
    state : pathlib.Path
        The state file.
    http : dict
        The fields of ``[http]``, with those that the environment overrides.
    admin_token : str or None
        The token of the admin API, if there is one.
    cluster : dict or None
        What `modelquota.cluster.RedisStore` is given, if hosts share their limits: the fields of ``[cluster]``, with
        the URL of the environment before that of the file.
    """

    quotas: Path
    state: Path
    http: dict[str, Any] = field(default_factory=dict)
    admin_token: str | None = field(default=None, repr=False)
    cluster: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ, **overrides: str | None) -> Settings:
        """Read the settings, and with them the whole quota file.

        Parameters
        ----------
        environ : mapping
            The environment: ``MODELQUOTA_QUOTAS`` is required; ``MODELQUOTA_STATE``, ``MODELQUOTA_PAGE``,
            ``MODELQUOTA_METRICS``, ``MODELQUOTA_LEDGER``, ``MODELQUOTA_ADMIN`` and ``MODELQUOTA_ADMIN_TOKEN_FILE`` go
            before the fields of the file with these names. ``MODELQUOTA_ADMIN_TOKEN`` goes before the file with the
            token, and ``MODELQUOTA_REDIS_URL`` before the ``url`` of ``[cluster]``, which may have no password.
        **overrides
            ``quotas``, or one of these fields, which go before the environment unless they are None.

        Raises
        ------
        QuotaConfigError
            A variable, or something in the file, is not accepted; the error names it.
        OSError
            The file cannot be read.
        """
        given = overrides.get("quotas") or environ.get(_QUOTAS)
        if not given:
            raise QuotaConfigError(_QUOTAS, given, "the path of a quota file (TOML)")
        path = Path(given).absolute()
        quotas = load_quotas(path)
        # A path in the environment is relative to the working directory, one in the file to the file's folder.
        http = {name: str(path.parent / value) if name in _FILES else value for name, value in quotas.http.items()}
        for variable, name in _OVERRIDES.items():
            value = overrides.get(name) or environ.get(variable)
            if value:
                _require(variable if overrides.get(name) is None else _option(name), name, value)
                http[name] = os.path.abspath(value) if name in _FILES else value
        state = Path(http["state"]) if "state" in http else default_state(path)
        # What is on a command line can be seen by all users of a machine, so that a token has no option there.
        token = environ.get(_TOKEN) if overrides.get("admin_token_file") is None else None
        if token:
            token = _token(_TOKEN, token)
        elif "admin_token_file" in http:
            token = _read_token(Path(http["admin_token_file"]))
        url = environ.get(URL_VARIABLE)
        cluster = {**(quotas.cluster or {}), "url": url} if url else quotas.cluster
        return cls(path, state, http, token or None, cluster)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_token(path: Path) -> str:
    with open(path, "rb") as file:
        text = file.read(_LARGEST_TOKEN_FILE)
    return _token(f"the text of {path}", text.decode("latin-1").rstrip("\r\n"))


def _token(name: str, token: str) -> str:
    from modelquota.asgi.admin import require_token

    return require_token(name, token)


def _require(variable: str, name: str, value: str) -> None:
    from modelquota.quota.http import HTTP_FIELDS

    if not HTTP_FIELDS[name].accepts(value):
        raise QuotaConfigError(variable, value, HTTP_FIELDS[name].accepted)


def default_state(quotas: Path) -> Path:
    """Return the state file for a quota file: in the user's run directory, and named after the quota file.

    Servers with the same quota file share it, and with it their limits. A run directory is empty after a reboot.
    """
    name = f"{quotas.stem}-{hashlib.sha256(os.fsencode(quotas.resolve())).hexdigest()[:8]}.state"
    return _run_directory() / name


def _run_directory() -> Path:
    """Return the folder of this user's state files, created if it does not exist, with access for nobody else."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base):
        folder = Path(base, "modelquota")
    elif os.geteuid() == 0 and os.access("/run", os.W_OK):
        folder = Path("/run/modelquota")
    else:
        folder = Path(tempfile.gettempdir(), f"modelquota-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # Anyone can create a folder in /tmp first, and would then decide which state file is used.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise QuotaConfigError(
            "MODELQUOTA_STATE", None, f"the path of a state file, since {folder} can be changed by other users"
        )
    return folder
