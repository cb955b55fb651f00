"""What an answer reports about its tokens: where each protocol puts it, and how reports that come in parts merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Union, cast

from modelquota.quota.config import MAX_COUNT
from modelquota.quota.tokens import Tokens

ANY: Final = "*"
"""In a place, every element of a list."""

# What a reported number means.
PROMPT: Final = "prompt"  # the whole prompt, what came from a cache included
MORE_INPUT: Final = "more_input"  # a part of the prompt that the number of the prompt does not include
CACHED: Final = "cached"  # a part of the prompt
MORE_CACHED: Final = "more_cached"  # tokens from a cache that the number of the prompt does not include
OUTPUT: Final = "output"
MORE_OUTPUT: Final = "more_output"  # a part of the output that the number of the output does not include
TOTAL: Final = "total"

Place = tuple[str, ...]
Places = Mapping[Place, str]
"""The full path of each number in the parsed answer or event, and what it means."""

Tree = Mapping[str, Union[str, "Tree"]]
"""The same as nested mappings, which are faster to look through."""

OPENAI_FIELDS: Final[Places] = {
    ("prompt_tokens",): PROMPT,
    ("prompt_tokens_details", "cached_tokens"): CACHED,
    ("prompt_cache_hit_tokens",): CACHED,
    ("completion_tokens",): OUTPUT,
    ("total_tokens",): TOTAL,
}
RESPONSES_FIELDS: Final[Places] = {
    ("input_tokens",): PROMPT,
    ("input_tokens_details", "cached_tokens"): CACHED,
    ("output_tokens",): OUTPUT,
    ("total_tokens",): TOTAL,
}
ANTHROPIC_FIELDS: Final[Places] = {
    ("input_tokens",): PROMPT,
    ("cache_read_input_tokens",): MORE_CACHED,
    ("cache_creation_input_tokens",): MORE_INPUT,
    ("output_tokens",): OUTPUT,
}


def under(place: Place, *fields: Places) -> dict[Place, str]:
    """Return the fields, each below `place`."""
    return {(*place, *path): kind for part in fields for path, kind in part.items()}


def tree_of(places: Places) -> Tree:
    """Return the places as nested mappings."""
    tree: dict[str, Any] = {}
    for place, kind in places.items():
        node = tree
        for step in place[:-1]:
            node = node.setdefault(step, {})
        node[place[-1]] = kind
    return tree


class Report:
    """The numbers that an answer, or the events of a stream, have reported so far: of each the last one.

    Attributes
    ----------
    output_since : int
        Tokens of output that passed after the last report of the output.
    """

    __slots__ = ("_numbers", "output_since")

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.output_since = 0

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def note(self, kind: str, number: Any) -> bool:
        """Take a number, if it is one: a count from 0 to 2**62."""
        if type(number) is not int or not 0 <= number <= MAX_COUNT:
            return False
        self._numbers[kind] = number
        if kind in (OUTPUT, TOTAL):
            self.output_since = 0
        return True

    @property
    def output(self) -> int | None:
        """The output that was reported; None if it was not."""
        return self._numbers.get(OUTPUT, self._numbers.get(TOTAL))

    def read(self, tree: Tree, value: Any) -> bool:
        """Take all numbers of a parsed answer or event; whether there were any."""
        if isinstance(value, list):
            below = tree.get(ANY)
            if below is None:
                return False
            return sum(self.read(cast("Tree", below), item) for item in value) > 0  # all of them, not only the first
        found = False
        if isinstance(value, dict):
            for step in value if len(value) < len(tree) else tree:
                below = tree.get(step)
                if below is None:
                    continue
                part = value.get(step)
                if part is None:
                    continue
                if type(below) is str:
                    found = self.note(below, part) or found
                elif isinstance(part, dict):
                    found = self.read(cast("Tree", below), part) or found
        return found

    def read_all(self, tree: Tree, answers: list[Any]) -> None:
        """Take the numbers of several answers in one; they are added up."""
        sums: dict[str, int] = {}
        for answer in answers:
            one = Report()
            one.read(tree, answer)
            for kind, number in one._numbers.items():
                sums[kind] = min(sums.get(kind, 0) + number, MAX_COUNT)
        for kind, number in sums.items():
            self.note(kind, number)

    def tokens(self, prompt_tokens: int, passed: int) -> Tokens | None:
        """Return what is to be charged; None if nothing was reported.

        Parameters
        ----------
        prompt_tokens : int
            The prompt as it was estimated, for reports that lack it.
        passed : int
            The output that passed, as far as it was seen.
        """
        if not self._numbers:
            return None
        get = self._numbers.get
        output, total, prompt = get(OUTPUT), get(TOTAL), get(PROMPT)
        within, more_cached, more_input = get(CACHED) or 0, get(MORE_CACHED) or 0, get(MORE_INPUT) or 0
        if output is not None:
            output += get(MORE_OUTPUT) or 0
            if prompt is None and total is not None:
                prompt = max(total - output - more_cached - more_input, 0)
        elif total is not None:
            if prompt is None:
                prompt = min(prompt_tokens, total)
            output = max(total - prompt - more_cached - more_input, 0)
        if not output and passed:  # a report of nothing does not make what passed free
            output = passed
            prompt = prompt or max(prompt_tokens - more_cached - more_input, 0)
        elif output is None:
            output = passed
        else:
            output += self.output_since
        if prompt is None:
            prompt = max(prompt_tokens - more_cached - more_input, 0)
        within = min(within, prompt)
        return capped(prompt - within + more_input, within + more_cached, output)


def capped(read: int, cached: int, output: int) -> Tokens:
    """Return `Tokens`, cut so that each and their sum are within what can be counted."""
    output = min(output, MAX_COUNT)
    read = min(read, MAX_COUNT - output)
    return Tokens(read, min(cached, MAX_COUNT - output - read), output)


# A string, which may be the key of a whole number; a flat list of numbers, as of an embedding; a bracket; a string that
# is not closed.
_TOKEN: Final = re.compile(
    rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"(?:(\s*:)\s*(\d+(?=[\s,}]))?)?|\[[\d\s.,eE+-]*+\]|([{}\[\]])|(")', re.DOTALL
)
_STRING_END: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_LONGEST_KEY: Final = 64
_NUMBER_BYTES: Final = 24  # a colon, some space and the digits of a count
_MOST_KEPT: Final = 256
_DEEPEST: Final = 8


class UsageScanner:
    """Finds the numbers of a JSON answer of any length as it passes, each only at its place; holds next to nothing.

    Parameters
    ----------
    places : mapping
        The places of the numbers.
    """

    __slots__ = ("_depth", "_found", "_in_string", "_path", "_places", "_rest")

    def __init__(self, places: Places) -> None:
        self._places = places
        self._rest = b""
        self._in_string = False
        self._depth = 0
        self._path: list[bytes | None] = []  # of each open bracket the last key, b"*" in a list, None if it is unknown
        self._found: dict[Place, list[int]] = {}

    def feed(self, piece: bytes) -> None:
        """Read a piece of the body."""
        data = self._rest + piece
        at = 0
        if self._in_string:
            end = _STRING_END.match(data)
            if end is None:
                self._rest = b"\\" if _odd_backslashes(data) else b""
                return
            self._in_string = False
            at = end.end()
        near_end = len(data) - _NUMBER_BYTES
        for match in _TOKEN.finditer(data, at):
            if match[5] is not None:
                break
            short = match.end() - match.start() <= _LONGEST_KEY + _NUMBER_BYTES
            if match.end() >= near_end and match[1] is not None and match[3] is None and short:
                break  # its number may follow in the next piece
            at = match.end()
            self._take(match)
        else:
            self._rest = b""
            return
        self._rest = data[match.start() :]
        if len(self._rest) > _MOST_KEPT:  # a long string: only that it is one
            self._in_string = True
            self._forget_key()
            self._rest = b"\\" if _odd_backslashes(self._rest) else b""

    def finish(self) -> None:
        """Read what was kept back."""
        if not self._in_string:
            for match in _TOKEN.finditer(self._rest):
                self._take(match)
        self._rest = b""

    def _take(self, match: re.Match[bytes]) -> None:
        bracket = match[4]
        if bracket is not None:
            if bracket in b"{[":
                self._depth += 1
                if self._depth <= _DEEPEST:
                    self._path.append(b"*" if bracket == b"[" else None)
            elif self._depth:
                if self._depth <= _DEEPEST:
                    self._path.pop()
                self._depth -= 1
        elif match[2] is None:
            self._forget_key()
        elif 0 < self._depth <= _DEEPEST and self._path[-1] != b"*":
            key = match[1]
            self._path[-1] = key if len(key) <= _LONGEST_KEY else None
            if match[3] is not None and len(match[3]) < 20 and None not in self._path:
                self._note(tuple([step.decode("utf-8", "replace") for step in self._path if step]), int(match[3]))

    def _forget_key(self) -> None:
        if 0 < self._depth <= _DEEPEST and self._path[-1] != b"*":
            self._path[-1] = None

    def _note(self, place: Place, number: int) -> None:
        if place in self._places and number <= MAX_COUNT:
            self._found.setdefault(place, []).append(number)

    def report(self, report: Report, *, add: bool) -> None:
        """Give what was found to a report: the last number of each place, or all of them added up."""
        for place, kind in self._places.items():
            numbers = self._found.get(place)
            if numbers:
                report.note(kind, min(sum(numbers), MAX_COUNT) if add and ANY in place else numbers[-1])


def _odd_backslashes(data: bytes) -> bool:
    return bool((len(data) - len(data.rstrip(b"\\"))) % 2)
