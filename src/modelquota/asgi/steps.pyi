from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")

def first_step(awaitable: Awaitable[_T]) -> tuple[_T, None] | tuple[None, Awaitable[_T]]: ...
