from modelquota._core.state.pools import Pools
from modelquota._core.table.intern import Interned

class Admission:
    def __init__(self, pools: Pools, interned: Interned) -> None: ...
