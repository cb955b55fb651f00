"""Which ids decide on a request: that of its model, and those of the tenants for whom it is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from modelquota._core.table.left import read_left
from modelquota.asgi.ratelimit import most_tokens_at_once
from modelquota.asgi.request import IncomingRequest
from modelquota.protocols.request import RequestRefusedError, is_model_id
from modelquota.quota.config import MAX_MODEL_ID_BYTES, ResourceQuotaConfig
from modelquota.quota.patterns import QuotaTemplates

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

Identity: TypeAlias = Callable[[IncomingRequest], str | Sequence[str] | Awaitable[str | Sequence[str] | None] | None]

MOST_IDS: Final = 15
"""Most ids that decide together."""

_MOST_KEPT: Final = 4096
_UNKNOWN: Final = object()
METER: Final = "#"
"""What separates the name of a meter from its model's."""


class DecidingIds:
    """Finds the ids that decide on a request.

    Parameters
    ----------
    manager : ResourceQuotaManager
    identity : callable or None
        Returns the tenants of a request.
    namespace : str
        What is put in front of the tenants' ids, so that no model's name can be one of them.
    unknown_model : str
        What to do with a model that has no quota: ``"pass"``, ``"refuse"``, or an id that decides instead.
    default_model : str or None
        The model of requests that name none.
    """

    def __init__(
        self,
        manager: ResourceQuotaManager,
        identity: Identity | None,
        namespace: str,
        unknown_model: str,
        default_model: str | None,
    ) -> None:
        if not isinstance(namespace, str) or not is_model_id(namespace) or METER in namespace:
            raise ValueError(
                f"identity_namespace is {namespace!r}; give what the ids of all tenants, and of no model, begin with, "
                f"such as 'tenant/': 1 to {MAX_MODEL_ID_BYTES} bytes without NUL and {METER!r}"
            )
        for name, given in (("unknown_model", unknown_model), ("default_model", default_model)):
            if given is not None and not (isinstance(given, str) and is_model_id(given)):
                raise ValueError(f"{name} is {given!r}; give 1 to {MAX_MODEL_ID_BYTES} bytes of UTF-8 without NUL")
        self._manager = manager
        self.identity = identity
        self.namespace = namespace
        self._unknown_model = unknown_model
        self._default_model = default_model
        self._templates: QuotaTemplates | None = None
        self._most_by_limits: dict[bytes | None, Any] = {}

    def of_model(self, name: str | None) -> str | None:
        """Return the id that decides for a model; None if none does. RequestRefusedError if it is to be refused."""
        if name is None:
            name = self._default_model
            if name is None:
                raise RequestRefusedError(400, "model is missing: name the model", "invalid_value", "model")
        reserved = METER in name or (self.identity is not None and name.startswith(self.namespace))
        policy = self._unknown_model
        if policy == "pass":
            return None if reserved else name
        if not reserved and self._has_quota(name):
            return name
        if policy == "refuse":
            raise RequestRefusedError(404, f"The model '{name}' does not exist", "model_not_found", "model")
        return policy

    async def tenants(self, request: IncomingRequest) -> tuple[str, ...]:
        """Return the ids of the tenants; RequestRefusedError (400 or 401) if one is not valid."""
        if self.identity is None:
            return ()
        said = self.identity(request)
        if isinstance(said, str):
            given: tuple[object, ...] = (said,)
        else:
            found = await said if isinstance(said, Awaitable) else said
            if found is None:
                return ()
            given = (found,) if isinstance(found, str) else tuple(found)
        if len(given) >= MOST_IDS:
            raise RequestRefusedError(
                400, f"{len(given)} ids are to decide on this request; at most {MOST_IDS - 1} can", "invalid_identity"
            )
        namespace = self.namespace
        ids = []
        for one in given:
            if one == "":
                raise RequestRefusedError(401, "the request does not say who makes it", "invalid_identity")
            if not isinstance(one, str) or METER in one or not is_model_id(namespace + one):
                raise RequestRefusedError(400, "what says who makes the request is not an id", "invalid_identity")
            if namespace + one not in ids:
                ids.append(namespace + one)
        return tuple(ids)

    def most_tokens(self, ids: str | tuple[str, ...]) -> int | None:
        """Return the most tokens of one request that all of the ids ever admit; None if none of them has a limit."""
        most: int | None = None
        for one in (ids,) if isinstance(ids, str) else ids:
            read = read_left(self._manager, one)
            limits = None if read is None else read[0]
            bound = self._most_by_limits.get(limits, _UNKNOWN)
            if bound is _UNKNOWN:
                quota = self._template_of(one) if limits is None else self._manager.get_quota(one)
                bound = None if quota is None else most_tokens_at_once(quota)
                if limits is not None:
                    if len(self._most_by_limits) >= _MOST_KEPT:
                        self._most_by_limits.clear()
                    self._most_by_limits[limits] = bound
            if bound is not None and (most is None or bound < most):
                most = bound
        return most

    def _has_quota(self, name: str) -> bool:
        return read_left(self._manager, name) is not None or self._template_of(name) is not None

    def _template_of(self, name: str) -> ResourceQuotaConfig | None:
        """The quota that an id gets when it is first seen; None if it gets none."""
        source = self._manager.default_quota
        if source is None:
            return None
        if self._templates is None or self._templates.source is not source:
            self._templates = QuotaTemplates(source)
            self._templates.source = source
        return self._templates.template_of(name)
