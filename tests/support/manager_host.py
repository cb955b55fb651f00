"""Real managers as hosts of the simulation, each with a clock that the simulation moves."""

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota._core.table import shares
from modelquota.cluster.host import ManagerHost


def config_of(model_id, limits):
    """The limits of `model_host.components` as a quota."""
    fields = {"cluster_concurrency": True}
    for name, limit in limits.items():
        if name.endswith("second"):
            kind = name.partition("_")[0]
            fields[f"max_{name}"], fields[f"burst_{kind}"] = limit
        else:
            fields[f"max_{name}"] = limit
    return ResourceQuotaConfig.unlimited(model_id, on_violation="reject", **fields)


class SimulatedHost(ManagerHost):
    """A manager whose clock follows `clock`, the time of its machine in ns, whenever it is used."""

    def __init__(self, clock, limits, boot):
        self.clock = ManualClock(clock())
        self.machine_ns = clock
        manager = ResourceQuotaManager(clock=self.clock, max_models=128)
        manager.set_quota(config_of("m", limits))
        shares.begin_sharing(manager)
        super().__init__(manager, boot)
        self.manager = manager
        self.starved = False
        self.grants = []

    @property
    def saved(self):
        return self.load()

    def now_ns(self):
        self.clock.advance_ns(max(0, self.machine_ns() - self.clock.now_ns))
        return super().now_ns()

    def begin(self, model_id, tokens):
        """Whether a request is admitted; then it is open until `end`."""
        self.now_ns()
        try:
            self.grants.append(self.table.reserve(model_id, tokens))
        except QuotaExceededError as error:
            self.starved = self.starved or error.result.starved
            return False
        return True

    def end(self, model_id):
        self.now_ns()
        self.grants.pop().release()

    def open(self, model_id):
        return self.table.get_usage(model_id).concurrent_requests

    def exchange(self, codes, asked, below_used=False):
        self.now_ns()
        return super().exchange(codes, asked, below_used)
