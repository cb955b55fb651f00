"""`Member`: the background thread by which a process takes part in its host's exchanges with the store."""

from __future__ import annotations

import os
import time
import weakref
from typing import TYPE_CHECKING, Final

from modelquota._core.table import shares
from modelquota._core.table.exchange import OvertakenError
from modelquota._log import log
from modelquota._periodic import Background
from modelquota.cluster.host import ManagerHost, boot_id
from modelquota.cluster.node import Node
from modelquota.cluster.operating import published
from modelquota.cluster.pace import Pace
from modelquota.cluster.status import ClusterStatus
from modelquota.errors import ManagerClosedError, QuotaError, StateFileError, StoreError
from modelquota.quota.file import Quotas
from modelquota.quota.patterns import overlaid

if TYPE_CHECKING:
    import threading

    from modelquota._core.table.exchange import OnLeaseEnd
    from modelquota.cluster.redis import RedisStore
    from modelquota.cluster.status import Share
    from modelquota.manager import ResourceQuotaManager
    from modelquota.quota.patterns import DefaultQuota

_NS: Final = 1_000_000_000
_PATIENCE_SEC: Final = 6.0  # a leader that is silent for longer is overtaken; longer than an exchange can take
_NAP_SEC: Final = 0.05
_FORK_SEC: Final = 0.5
_WARNING: Final = 30

_members: weakref.WeakSet[Member] = weakref.WeakSet()


class Member(Background):
    """Exchanges the shares of a manager's state with a store, in a thread, from the manager's creation to its close.

    Of the processes that share a state one at a time does; the others wait to take over from it.
    """

    def __init__(self, manager: ResourceQuotaManager, store: RedisStore) -> None:
        self.store = store
        self._manager = weakref.ref(manager)
        rules: dict[str, OnLeaseEnd] = {"share": "share", "allow": "allow"}
        self._rule: Final = rules.get(store.on_store_down, "deny")
        self._boot: Final = boot_id()
        # A state without a file ends with its last process, and what it used is handed over.
        self._ends: Final = manager.path is None
        self._forked_sec = -_FORK_SEC
        self._version = 0
        self._published = Quotas({}, {})
        self._base: DefaultQuota | None = None
        self._given: DefaultQuota | None = None
        self._reset()
        shares.begin_sharing(manager, on_lease_end=self._rule)
        _members.add(self)
        self._launch(self._work)

    def _reset(self) -> None:
        self._node: Node | None = None
        self._term = 0
        self._pace = Pace(int(self.store.renew_sec * _NS))
        self._seen = 0
        self._renewals: dict[str, int] = {}
        self._error: StoreError | None = None
        self._learning_sec = 0.0
        self._took_sec = 0.0
        self._learning = False
        self._joined = False

    def status(self) -> ClusterStatus:
        """Return how this host takes part in the cluster. Raises ManagerClosedError after `close`."""
        manager = self._manager()
        if manager is None:
            raise ManagerClosedError
        end_ns = shares.read_lease(manager).end_ns
        lease_sec = max(0.0, (end_ns - shares.now_ns(manager)) / _NS)
        node = self._node
        if lease_sec > 0:
            state = "degraded" if not self._pace.reached else "learning" if self._learning else "ok"
        else:
            state = "expired" if end_ns or self._joined else "joining"
        return ClusterStatus(
            state, node is not None, lease_sec, 0 if node is None else node.nodes, self._learning_sec,
            dict(self._renewals), self._took_sec, 0 if node is None else node.starved, self._error,
        )  # fmt: skip

    def shares(self) -> list[Share]:
        """Return what this host holds of each limit; empty if another process exchanges its shares."""
        node = self._node
        return [] if node is None else list(node.shares())

    def close(self) -> None:
        """End the thread; the last process of a state without a file hands over what it has used."""
        self.stop()
        _members.discard(self)
        manager, node = self._manager(), self._node
        if manager is None or node is None or manager.closed:
            return
        if self._ends and not self._others(manager):
            self._leave(node)
        shares.resign(manager)

    def _others(self, manager: ResourceQuotaManager) -> bool:
        """Whether another process goes on with the state. A child needs a moment to be seen."""
        while not shares.is_used_by_others(manager):
            if time.monotonic() >= self._forked_sec + _FORK_SEC:
                return False
            time.sleep(_NAP_SEC)
        return True

    def _leave(self, node: Node) -> None:
        try:
            while not node.left:
                request = node.leave()
                node.adopt(request, self.store.exchange(request))
        except OvertakenError:  # another process has the state, and does not leave
            return
        except StoreError as error:
            log(
                _WARNING, "the store was not told that this node leaves: its shares are free after its lease: %s", error
            )

    # -- the thread

    def _work(self, stop: threading.Event) -> None:
        while not stop.is_set():
            manager = self._manager()
            if manager is None:
                return
            try:
                nap_sec = self._step(manager)
            except (ManagerClosedError, StateFileError):
                return
            except Exception as error:  # whatever it is, the lease ends by itself
                log(_WARNING, "an exchange of shares has failed, the next one is in 1 s: %r", error)
                nap_sec = 1.0
            del manager  # it can be collected while this thread sleeps
            if nap_sec:
                stop.wait(nap_sec)

    def _step(self, manager: ResourceQuotaManager) -> float:
        """Do what is due; returns for how many seconds to sleep afterwards."""
        term = shares.lead(manager, _PATIENCE_SEC)
        if not term:
            self._node = None
            self._follow(manager, Node.quotas_in(shares.read_node(manager)))
            return min(1.0, self.store.renew_sec)
        if self._node is None or term != self._term:  # what it knew is void once another one has led
            self._reset()
            self._term = term
            self._node = Node(ManagerHost(manager, self._boot, term), int(self.store.lease_sec * _NS))
        now_ns = shares.now_ns(manager)
        wait_sec = (self._pace.due_ns() - now_ns) / _NS
        if wait_sec > 0:
            urgent = shares.wait_urgent(manager, self._seen, min(wait_sec, _NAP_SEC))
            if urgent != self._seen:
                self._seen = urgent
                self._pace.urge()
            return 0.0
        try:
            self._exchange(manager, self._node)
        except OvertakenError:
            return 0.0
        self._follow(manager, self._node.quotas)
        return 0.0

    def _exchange(self, manager: ResourceQuotaManager, node: Node) -> None:
        request = node.prepare()
        began = time.monotonic()
        try:
            reply = self.store.exchange(request)
        except StoreError as error:
            self._count(error.kind)
            self._failed(manager, error)
            return
        if shares.lead(manager, _PATIENCE_SEC) != self._term:  # overtaken in the meantime: the reply is the other one's
            return
        self._took_sec = time.monotonic() - began
        self._count(reply.status)
        if reply.status in ("fenced", "stale"):
            log(_WARNING, "another node uses the id of this one, or an older copy of its state: it joins as a new node")
        nodes = node.nodes
        grew = node.adopt(request, reply)
        self._joined = self._joined or shares.read_lease(manager).end_ns > 0
        self._error, self._learning, self._learning_sec = None, reply.status == "learning", reply.learning_ms / 1000
        reached = self._pace.reached
        self._pace.answered(shares.now_ns(manager), grew, node.waits)
        if self._pace.reached and not reached:
            log(_WARNING, "the store is reached again")
        if node.nodes != nodes:
            self._set_rule(manager, node.nodes)

    def _follow(self, manager: ResourceQuotaManager, version: int) -> None:
        """Adopt published quotas that this process does not have yet: models, and patterns for ids that come later."""
        if not version or version == self._version:
            return
        try:
            found = published(self.store)
            if found is None:
                return
            self._version, quotas = found
            for quota in quotas.values():
                if manager.get_quota(quota.model_id) != quota:
                    manager.set_quota(quota)
            given = manager.default_quota
            if given is not self._given:  # set by someone else, before or after the last ones were adopted
                self._base = given
            manager.default_quota = overlaid(self._base, quotas.patterns) if quotas.patterns else self._base
            self._given = manager.default_quota
        except StoreError as error:  # the next exchange tries again
            log(_WARNING, "the published quotas cannot be read: %s", error)
            return
        except QuotaError as error:
            self._version = version
            log(_WARNING, "published quotas are not adopted, or not all of them: %s", error)
            return
        for model_id in self._published:
            if model_id not in quotas:
                log(_WARNING, "model %r is no longer in the published quotas: it keeps its limits", model_id)
        self._published = quotas

    def _set_rule(self, manager: ResourceQuotaManager, nodes: int) -> None:
        retry_ns = max(10_000_000, int(2 * self._took_sec * _NS))
        shares.set_lease_rule(manager, on_lease_end=self._rule, nodes=nodes, retry_ns=retry_ns)

    def _failed(self, manager: ResourceQuotaManager, error: StoreError) -> None:
        error = StoreError(error.kind, error.detail)  # without a traceback, which would keep the manager
        if self._error is None or self._error.kind != error.kind:
            log(_WARNING, "%s", error)
        self._error = error
        self._pace.failed(shares.now_ns(manager))
        if not self._pace.reached and self.store.on_store_down == "deny":
            shares.end_lease(manager)

    def _count(self, outcome: str) -> None:
        self._renewals[outcome] = self._renewals.get(outcome, 0) + 1

    def _after_fork(self) -> None:
        manager = self._manager()
        self._thread = None  # it is the parent's
        if manager is not None and not manager.closed:
            self._reset()
            self._launch(self._work)


def _after_fork_in_parent() -> None:
    for member in list(_members):
        member._forked_sec = time.monotonic()


def _after_fork_in_child() -> None:
    for member in list(_members):
        member._after_fork()


os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
