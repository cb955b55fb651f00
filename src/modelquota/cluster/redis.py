"""`RedisStore`: the shares of many hosts in Redis or Valkey, exchanged by one script."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import time
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from modelquota._extras import extra
from modelquota.cluster.store import Reply, Request, parse_reply
from modelquota.errors import QuotaConfigError, StoreError
from modelquota.quota.cluster import HIDDEN, LEASE_SEC, RENEW_SEC, check_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

URL_VARIABLE: Final = "MODELQUOTA_REDIS_URL"

_OLDEST_CLIENT: Final = (7, 4)  # earlier ones show the password in a repr
_OPTIONS: Final = ("namespace", "lease_sec", "renew_sec", "on_store_down", "wait_replicas")
_OLDEST_SERVER: Final = (6, 2)
_CHECKED_SEC: Final = 60.0  # how long what a server says of itself is believed
_WAIT_MS: Final = 500

# Of each kind of error: how the server's message begins, or what the client's class is called; and what to do.
_KINDS: Final = (
    ("timeout", ("TimeoutError",), "no answer in time"),
    ("credentials", ("NOAUTH", "WRONGPASS", "NOPERM", "AuthenticationError", "NoPermissionError"),
     "it does not accept the user, the password or what the user may do; the user needs EVALSHA, SCRIPT LOAD, INFO, "
     "TIME, WAIT, and hashes and sorted sets below mq:"),
    ("read_only", ("READONLY", "ReadOnlyError"), "it is a replica; give the address of the primary"),
    ("out_of_memory", ("OOM", "OutOfMemoryError"), "its maxmemory is reached; raise it, or free memory"),
    ("loading", ("LOADING", "BusyLoadingError"), "it is reading its data, and answers when it has"),
    ("replicas", ("NOREPLICAS",), "it has fewer replicas than it requires for a write"),
    ("refused", ("MISCONF", "MASTERDOWN", "CLUSTERDOWN", "BUSY ", "ClusterDownError"), "it does not take writes now"),
    ("unreachable", ("ConnectionError", "ClosingError", "OSError"), "no connection"),
)  # fmt: skip


@functools.cache
def _script() -> tuple[str, str]:
    """Return the script, and the hash by which a server knows it."""
    import hashlib

    text = files("modelquota.cluster").joinpath("exchange.lua").read_text(encoding="utf-8")
    return text, hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()


class RedisStore:
    """A ledger of shares in Redis 6.2 or newer, or Valkey, for all hosts that use the same namespace.

    Parameters
    ----------
    url : str, optional
        Such as ``rediss://user:password@host:6379/0``; by default that in the environment variable
        ``MODELQUOTA_REDIS_URL``, which keeps the password out of the program and its arguments.
    client : object, optional
        A client to use instead of a URL: of redis-py, valkey-py, or valkey-glide (sync). Its own retries should be
        off: a node repeats its requests itself.
    namespace : str
        1 to 64 letters, digits, ``.``, ``_`` and ``-``: nodes with the same one share their limits. All keys of the
        ledger begin with ``mq:{namespace:0}:``.
    lease_sec : float
        How long a node goes on with its shares if the store does not answer, 2 .. 3600; the same on all nodes. It is
        also how long nothing is granted after the store may have lost its memory, and at the first start.
    renew_sec : float
        How often a node exchanges its shares, 0.1 .. `lease_sec` / 2.
    on_store_down : str
        What a node does when the store cannot be reached: ``"lease_only"`` goes on until its lease ends, and then
        admits nothing; ``"deny"`` admits nothing from the third renewal that was missed; ``"share"`` admits, after the
        lease, the limits divided by the last known number of nodes; ``"allow"`` the whole limits. The latter two are
        outside of the guarantee.
    wait_replicas : int
        How many replicas must have a reply's data before the reply counts, 0 .. 16. With 1, a split or a failover
        grants nothing twice.

    Raises
    ------
    QuotaConfigError
        A parameter is not accepted. The URL is not shown.
    ImportError
        No client was given, and the extra ``redis`` is not installed, or redis-py is older than 7.4.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: Any = None,
        namespace: str = "default",
        lease_sec: float = LEASE_SEC,
        renew_sec: float = RENEW_SEC,
        on_store_down: str = "lease_only",
        wait_replicas: int = 0,
    ) -> None:
        values = (namespace, lease_sec, renew_sec, on_store_down, wait_replicas)
        check_cluster(dict(zip(_OPTIONS, values, strict=True)))
        self.namespace: Final = namespace
        self.lease_sec: Final = float(lease_sec)
        self.renew_sec: Final = float(renew_sec)
        self.on_store_down: Final = on_store_down
        self.wait_replicas: Final = wait_replicas
        self.base: Final = f"mq:{{{namespace}:0}}:"
        self._given = client is not None
        self._url = url  # None if it is that of the environment
        self._client = _connect(url) if client is None else client
        self._checked_until = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a store as its parameters: what unpickles it makes connections of its own."""
        if self._given:
            raise TypeError("a RedisStore with client= cannot be pickled; make it with a URL")
        options = {name: getattr(self, name) for name in _OPTIONS}
        return functools.partial(type(self), self._url, **options), ()

    def __repr__(self) -> str:
        return f"RedisStore(namespace={self.namespace!r})"

    def exchange(self, request: Request) -> Reply:
        """Execute a request, or return the reply that it had.

        Raises
        ------
        StoreError
            Its `kind` says why; whether the request was executed is not known.
        """
        return parse_reply(self.run(request.keys(self.base), request.arguments()))

    def run(self, keys: Sequence[str], arguments: Sequence[str]) -> str:
        """Run the script, and return its answer. Raises StoreError."""
        with self._errors():
            if time.monotonic() >= self._checked_until:
                self._check_server()
            return text_of(self._run(keys, arguments))

    def command(self, *parts: str) -> Any:
        """Execute a command that reads, and return what the client does. Raises StoreError."""
        with self._errors():
            return self._command(parts)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            self._checked_until = -math.inf
            raise
        except Exception as error:
            self._checked_until = -math.inf
            raise _store_error(error) from None

    def close(self) -> None:
        """Close the client's connections."""
        close = getattr(self._client, "close", None)
        if close is not None:
            close()

    def _run(self, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        script, digest = _script()
        command = ["EVALSHA", digest, str(len(keys)), *keys, *arguments]
        try:
            return self._execute(command)
        except StoreError:
            raise
        except Exception as error:
            if "NOSCRIPT" not in str(error) and type(error).__name__ != "NoScriptError":
                raise
        # A server that does not know the script may be another one. The script finds that out, and relearns.
        self._check_server()
        self._command(["SCRIPT", "LOAD", script])
        return self._execute(command)

    def _execute(self, command: Sequence[str]) -> Any:
        if not self.wait_replicas:
            return self._command(command)
        wait = ["WAIT", str(self.wait_replicas), str(_WAIT_MS)]
        pipeline = getattr(self._client, "pipeline", None)
        if pipeline is None:  # one connection for everything
            reply, reached = self._command(command), self._command(wait)
        else:
            with pipeline(transaction=False) as both:
                both.execute_command(*command)
                both.execute_command(*wait)
                reply, reached = both.execute()
        if int(reached) < self.wait_replicas:
            raise StoreError("replicas", f"{reached} of {self.wait_replicas} replicas have what was written")
        return reply

    def _command(self, command: Sequence[str]) -> Any:
        execute = getattr(self._client, "execute_command", None)
        return self._client.custom_command(list(command)) if execute is None else execute(*command)

    def _check_server(self) -> None:
        """Refuse a server that is too old, or that would drop parts of the ledger when its memory is full."""
        about = {**self._info("server"), **self._info("memory")}
        version = tuple(int(part) for part in re.findall(r"\d+", about.get("redis_version", "0"))[:2])
        if version < _OLDEST_SERVER:
            raise StoreError("version", f"it is of version {about.get('redis_version')}; at least 6.2 is needed")
        policy = about.get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys"):
            raise StoreError(
                "eviction", f"its maxmemory-policy is {policy}, which drops shares; set noeviction or a volatile one"
            )
        self._checked_until = time.monotonic() + _CHECKED_SEC

    def _info(self, section: str) -> dict[str, str]:
        answer = self._command(["INFO", section])
        if isinstance(answer, dict):
            return {str(name): str(value) for name, value in answer.items()}
        pairs = (line.partition(":") for line in text_of(answer).splitlines() if ":" in line)
        return {name: value for name, _, value in pairs}


def text_of(answer: Any) -> str:
    """Return a server's answer as text, whether the client decodes or not."""
    return answer.decode("utf-8") if isinstance(answer, bytes) else str(answer)


def _connect(url: str | None) -> Any:
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise QuotaConfigError("url", None, f"a URL, here or in the environment variable {URL_VARIABLE}; or a client")
    with extra("redis", "redis"):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    version = tuple(int(part) for part in re.findall(r"\d+", redis.__version__)[:2])
    if version < _OLDEST_CLIENT:
        raise ImportError(
            f"redis-py is {redis.__version__}, and at least 7.4 is needed: pip install 'modelquota[redis]'"
        )
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # a node repeats a request itself, under the same number
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            max_connections=4,
        )
    except (ValueError, TypeError):
        pass  # its text may have parts of the URL
    raise QuotaConfigError("url", HIDDEN, "such as redis://user:password@host:6379/0")


def _store_error(error: Exception) -> StoreError:
    """Say what a client's error means, without its text: that may have what no log should."""
    text = str(error)
    names = [base.__name__ for base in type(error).__mro__]
    for kind, marks, advice in _KINDS:
        if any(mark in names or mark in text for mark in marks):
            return StoreError(kind, f"{advice} ({names[0]})")
    return StoreError("refused", f"it answered with an error ({names[0]})")
