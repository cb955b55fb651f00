"""Default quotas for ids without a quota of their own: one for all ids, by pattern, or from a callable."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from modelquota.errors import QuotaConfigError
from modelquota.quota.config import MAX_MODEL_ID_BYTES, ResourceQuotaConfig

__all__ = ["DefaultQuota", "QuotaTemplates", "overlaid", "pattern_of"]

DefaultQuota: TypeAlias = (
    ResourceQuotaConfig | Mapping[str, ResourceQuotaConfig] | Callable[[str], ResourceQuotaConfig | None]
)
"""The types that `default_quota` accepts."""

PATTERN_ACCEPTED = (
    "an id, or a pattern with * at its end or before the # of a meter, and nowhere else, 1 to "
    f"{MAX_MODEL_ID_BYTES} bytes of UTF-8"
)


class QuotaTemplates:
    """Finds the default quota of an id: an exact id first, then the longest pattern that matches.

    Finding one takes one look-up for each different length of pattern, however many patterns there are.

    Parameters
    ----------
    source : ResourceQuotaConfig, mapping of str to ResourceQuotaConfig, or callable
        One config for all ids; or a mapping of ids and patterns, such as ``"user:*"``, to configs, which is copied; or
        a callable from an id to its config, or to None if it has none. The configs' own ``model_id`` is ignored.

    Raises
    ------
    QuotaConfigError
        A pattern is empty, too long, or has a ``*`` before its end.
    TypeError
        The source, a key or a value has another type.

    Attributes
    ----------
    source : ResourceQuotaConfig, mapping or callable
        The source that was given; for a mapping, a read-only copy.

    Examples
    --------
    >>> free = ResourceQuotaConfig.unlimited("free", max_requests_per_day=10)
    >>> user = ResourceQuotaConfig.unlimited("user", max_requests_per_day=1_000)
    >>> templates = QuotaTemplates({"user:*": user, "user:free:*": free, "user:root": user})
    >>> [templates.resolve(model_id).max_requests_per_day for model_id in ("user:bob", "user:free:eve")]
    [1000, 10]
    >>> templates.resolve("user:bob").model_id, templates.resolve("gpt-4o")
    ('user:bob', None)
    """

    def __init__(self, source: DefaultQuota) -> None:
        self._ask: Callable[[str], Any] | None = None
        self._exact: dict[str, ResourceQuotaConfig] = {}
        self._by_length: list[tuple[int, dict[str, ResourceQuotaConfig]]] = []
        self._meters: dict[str, dict[str, ResourceQuotaConfig]] = {}  # by the pattern of their models, then by name
        self.source: DefaultQuota = source
        if isinstance(source, ResourceQuotaConfig):
            self._by_length = [(0, {"": source})]
        elif isinstance(source, Mapping):
            copy = dict(source)  # read once, so that what is validated is what is used
            self.source = MappingProxyType(copy)
            self._index(copy)
        elif callable(source):
            self._ask = source
        else:
            raise TypeError(
                f"default_quota is {source!r}; give a ResourceQuotaConfig, a mapping of ids and patterns to them, "
                "a callable from an id to one, or None"
            )

    def _index(self, patterns: Mapping[Any, Any]) -> None:
        prefixes: dict[int, dict[str, ResourceQuotaConfig]] = {}
        for given, config in patterns.items():
            pattern = pattern_of(given)
            if not isinstance(config, ResourceQuotaConfig):
                raise TypeError(f"default_quota[{given!r}] is {config!r}; give a ResourceQuotaConfig")
            of, _, meter = pattern.partition("#")
            if meter:
                self._meters.setdefault(of, {})[meter] = config
            elif pattern.endswith("*"):
                prefixes.setdefault(len(pattern) - 1, {})[pattern[:-1]] = config
            else:
                self._exact[pattern] = config
        self._by_length = sorted(prefixes.items(), reverse=True)

    def template_of(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the config for an id, under the template's own ``model_id``; None if there is none.

        A config or mapping returns the same object every time, so that callers can cache what they make of it.

        Raises
        ------
        TypeError
            The callable returned something else. What the callable raises is passed on, with a note that names the id.
        """
        if self._ask is not None:
            return self._asked(self._ask, model_id)
        if "#" in model_id:  # a meter comes with its model, and not by itself
            return None
        return self._found(model_id)[1]

    def _found(self, model_id: str) -> tuple[str, ResourceQuotaConfig | None]:
        """Return the pattern that wins for an id, and its config."""
        found = self._exact.get(model_id)
        if found is not None:
            return model_id, found
        for length, prefixes in self._by_length:
            found = prefixes.get(model_id[:length])
            if found is not None:
                return f"{model_id[:length]}*", found
        return "", None

    def meters_of(self, model_id: str) -> list[tuple[str, ResourceQuotaConfig]]:
        """Return the meters of an id that `template_of` has a config for: the name and the config of each.

        A meter belongs to the ids that its pattern makes: ``"user:*#usd"`` to those of ``"user:*"``, and to no others.
        """
        if not self._meters:
            return []
        return list(self._meters.get(self._found(model_id)[0], {}).items())

    def resolve(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the config for an id, under that id; None if there is none. Raises what `template_of` raises."""
        template = self.template_of(model_id)
        return None if template is None else template.replace(model_id=model_id)

    @staticmethod
    def _asked(ask: Callable[[str], Any], model_id: str) -> ResourceQuotaConfig | None:
        try:
            config = ask(model_id)
        except Exception as error:
            error.add_note(f"raised by default_quota({model_id!r}); nothing has been counted")
            raise
        if config is None or isinstance(config, ResourceQuotaConfig):
            return config
        if isinstance(config, Coroutine):
            config.close()  # otherwise Python would warn that it was never awaited
        raise TypeError(f"default_quota({model_id!r}) returned {config!r}; return a ResourceQuotaConfig or None")


def pattern_of(given: Any) -> str:
    """Return a key of `default_quota` as a plain str; raises TypeError or QuotaConfigError."""
    if not isinstance(given, str):
        raise TypeError(f"default_quota has the key {given!r}; give a str, such as 'user:*'")
    pattern = str.__str__(given)
    of, mark, meter = pattern.partition("#")
    star_fits = "*" not in of[:-1] + meter and (not mark or (of != "" and meter != ""))
    try:
        if 0 < len(pattern.encode()) <= MAX_MODEL_ID_BYTES and "\0" not in pattern and star_fits:
            return pattern
    except UnicodeEncodeError:  # half of a surrogate pair
        pass
    raise QuotaConfigError("default_quota", given, PATTERN_ACCEPTED)


def overlaid(base: DefaultQuota | None, patterns: Mapping[str, ResourceQuotaConfig]) -> DefaultQuota:
    """Return a `default_quota` that uses the patterns first, and `base` for ids that no pattern matches.

    A config as `base` is the pattern ``"*"``; if `base` is a mapping, its patterns compete with the others: the longest
    one that matches wins.

    Examples
    --------
    >>> one, other = ResourceQuotaConfig("one"), ResourceQuotaConfig("other")
    >>> overlaid(one, {"user:*": other}) == {"*": one, "user:*": other}
    True
    """
    if base is None:
        return patterns
    if isinstance(base, ResourceQuotaConfig):
        return {"*": base, **patterns}
    if isinstance(base, Mapping):
        return {**base, **patterns}
    first = QuotaTemplates(patterns)

    def quota(model_id: str) -> ResourceQuotaConfig | None:
        found = first.template_of(model_id)
        return base(model_id) if found is None else found

    return quota
