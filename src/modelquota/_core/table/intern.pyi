from typing import Self, final

from typing_extensions import disjoint_base

from modelquota._core.state.state import State

@final
class RowRef: ...

@disjoint_base
class Interned:
    def __new__(cls, state: State) -> Self: ...
