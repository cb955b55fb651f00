from typing import Self

from typing_extensions import disjoint_base

from modelquota._core.state.pools import Pools
from modelquota._core.table.intern import Interned

@disjoint_base
class Admission:
    def __new__(cls, pools: Pools, interned: Interned) -> Self: ...
