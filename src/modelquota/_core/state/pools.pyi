from typing import Self

from typing_extensions import disjoint_base

from modelquota._core.state.state import State

@disjoint_base
class Pools:
    def __new__(cls, state: State) -> Self: ...
