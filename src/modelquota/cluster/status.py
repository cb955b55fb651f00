"""How a host takes part in a cluster, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from modelquota.errors import StoreError

STATES: Final = ("joining", "learning", "ok", "degraded", "expired")
"""What `ClusterStatus.state` may be."""


class Share(NamedTuple):
    """What a host holds of one limit of a model, by the store's last answer about it; in requests or tokens.

    Attributes
    ----------
    model_id : str
    limit : str
        Such as ``"tokens_per_hour"``; ``"burst_requests"`` and ``"burst_tokens"`` are what is ahead of the rate.
    whole : float
        The limit of all hosts together.
    share : float
        This host's.
    used : float
        What this host uses of it.
    free : float
        What is in no host's share.
    ghosts : float
        What is in the shares of hosts that are gone, beyond what they had used when they last told.
    """

    model_id: str
    limit: str
    whole: float
    share: float
    used: float
    free: float
    ghosts: float


@dataclass(frozen=True)
class ClusterStatus:
    """How a host takes part in the cluster.

    Attributes
    ----------
    state : str
        ``joining`` before the first lease; ``learning`` while the store grants nothing, since it may have forgotten
        something; ``ok``; ``degraded`` if three renewals were missed and the lease goes on; ``expired`` if it does not.
    leads : bool
        Whether this process exchanges shares for its host. What follows is known to that process only.
    lease_seconds : float
        What is left of the lease; 0 if it has ended.
    nodes : int
        Live nodes that the store has, by its last reply.
    learning_seconds : float
        For how much longer the store grants nothing, by its last reply.
    renewals : dict of str to int
        Requests to the store by outcome: ``ok``, ``learning``, ``fenced``, ``stale``, or the `kind` of a StoreError.
    renewal_seconds : float
        How long the last request took that was answered.
    starved : int
        Requests that were denied for lack of share: not because the limit was used up, as far as this host knows.
    error : StoreError or None
        Why the last request failed; None after one that was answered.
    """

    state: str
    leads: bool = False
    lease_seconds: float = 0.0
    nodes: int = 0
    learning_seconds: float = 0.0
    renewals: dict[str, int] = field(default_factory=dict)
    renewal_seconds: float = 0.0
    starved: int = 0
    error: StoreError | None = None
