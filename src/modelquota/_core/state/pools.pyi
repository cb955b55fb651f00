from modelquota._core.state.state import State

class Pools:
    def __init__(self, state: State) -> None: ...
