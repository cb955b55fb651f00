"""Which entry of a table a path belongs to: exact paths, patterns with ``{model}``, and applications mounted below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Generic, NoReturn, TypeVar

_T = TypeVar("_T")

_BRACES: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NEVER_IN_PATHS: Final = re.compile(r"[?#\s\x00-\x1f\x7f]")
# Routers whose patterns end with `$`, such as Starlette's, match before a line feed as well.
_IGNORED_AT_THE_END: Final = ("/", "\n")
_NOTHING: Final[Mapping[str, str]] = {}


class PathTable(Generic[_T]):
    """Finds the entry of a path.

    Parameters
    ----------
    entries : mapping of str to entry
        By path below the mount point. ``{name}`` in a path matches one segment, or a part of one, up to what follows;
        slashes and line feeds at the end do not matter.
    anywhere : iterable of str
        Those of them that also match further down, for applications mounted below: ``/llm/v1/chat/completions`` is
        ``/v1/chat/completions`` of an application at ``/llm``. Paths of a single segment never do.

    Raises
    ------
    ValueError
        A key can never match: it does not begin with a slash, has an empty segment, a query, a fragment, white space,
        or braces that do not enclose a name; or another key matches the same paths.

    Examples
    --------
    >>> table = PathTable({"/v1/models/{model}:predict": 1, "/v1/chat": 2}, anywhere=["/v1/chat"])
    >>> table.find("/v1/models/m:predict/"), table.find("/app/v1/chat"), table.find("/v1/models/a/b:predict")
    ((1, {'model': 'm'}), (2, {}), None)
    """

    def __init__(self, entries: Mapping[str, _T], *, anywhere: Iterable[str] = ()) -> None:
        self._exact: dict[str, _T] = {}
        self._below: dict[str, _T] = {}  # by path, for applications mounted below
        self._patterns: list[tuple[re.Pattern[str], _T]] = []
        self._patterns_below: list[tuple[re.Pattern[str], _T]] = []
        below = set(anywhere)
        seen: dict[str, str] = {}
        for given, entry in entries.items():
            path = _normal(given)
            shape = _BRACES.sub("{}", path)
            if shape in seen:
                _refuse(given, f"it matches what {seen[shape]!r} matches")
            seen[shape] = given
            further = given in below and path.count("/") > 1
            if shape == path:
                self._exact[path] = entry
                if further:
                    self._below[path] = entry
            else:
                pattern = re.compile(_expression(given, path))
                self._patterns.append((pattern, entry))
                if further:
                    self._patterns_below.append((re.compile(f"(?:/[^/]+)+?{pattern.pattern}"), entry))

    def find(self, path: str) -> tuple[_T, Mapping[str, str]] | None:
        """Return the entry of a path and what its pattern matched; None if it has none."""
        entry = self._exact.get(path)
        if entry is not None:
            return entry, _NOTHING
        if path.endswith(_IGNORED_AT_THE_END):
            path = path.rstrip("/\n")
            entry = self._exact.get(path)
            if entry is not None:
                return entry, _NOTHING
        for pattern, found in self._patterns:
            match = pattern.fullmatch(path)
            if match is not None:
                return found, match.groupdict()
        return self._find_below(path)

    def _find_below(self, path: str) -> tuple[_T, Mapping[str, str]] | None:
        for pattern, found in self._patterns_below:
            match = pattern.fullmatch(path)
            if match is not None:
                return found, match.groupdict()
        at = path.find("/", 1)
        while at > 0 and self._below:  # the longest path first
            entry = self._below.get(path[at:])
            if entry is not None:
                return entry, _NOTHING
            at = path.find("/", at + 1)
        return None


def below_root(path: str, root: str) -> str:
    """Return the path below the mount point, as ASGI's ``root_path`` gives it.

    Examples
    --------
    >>> below_root("/api/v1/chat", "/api"), below_root("/v1/chat", "/api"), below_root("/apiv1", "/api")
    ('/v1/chat', '/v1/chat', '/apiv1')
    """
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def _normal(given: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"routes has the key {given!r}; give a path, such as '/v1/chat/completions'")
    if not given.startswith("/"):
        _refuse(given, "it does not begin with a slash")
    path = given[:-1] if len(given) > 1 and given.endswith("/") else given
    if "//" in path or _NEVER_IN_PATHS.search(path):
        _refuse(given, "it has an empty segment, a query, a fragment or white space")
    if re.search(r"[{}]", _BRACES.sub("", path)) or "}{" in path:
        _refuse(given, "its braces do not enclose a name each, with something between them")
    names = _BRACES.findall(path)
    if len(set(names)) < len(names):
        _refuse(given, "it names the same part twice")
    return path


def _refuse(given: str, why: str) -> NoReturn:
    raise ValueError(f"routes has the key {given!r}, which can never match: {why}; give a path, such as '/generate'")


def _expression(given: str, path: str) -> str:
    parts = _BRACES.split(path)  # text and names take turns
    return "".join(f"(?P<{part}>[^/]+?)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
