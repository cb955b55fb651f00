"""Hot reload: limits follow a quota file while requests are being checked.

Needs the extra ``modelquota[reload]`` to watch the file; `QuotaReloader.reload` alone needs nothing.
"""

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from modelquota._extras import extra
from modelquota._periodic import Background
from modelquota.errors import CapacityError, QuotaError, QuotaFileError
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas, load_quotas
from modelquota.quota.patterns import DefaultQuota, overlaid

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

__all__ = ["QuotaReloader", "Reloaded"]

logger = logging.getLogger("modelquota")


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The outcome of a reload.

    Attributes
    ----------
    changed : tuple of str
        Models that are new or whose limits differ, in the order of the file.
    missing : tuple of str
        Models that are no longer in the file.
    error : Exception or None
        Why the file was refused, in which case nothing has been changed; None if it was not.
    changed_patterns, missing_patterns : tuple of str
        The same for the file's patterns.
    """

    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: Exception | None = None
    changed_patterns: tuple[str, ...] = ()
    missing_patterns: tuple[str, ...] = ()


class QuotaReloader(Background):
    r"""Sets a manager's limits from a quota file, immediately and whenever the file changes.

    A file with an error is refused as a whole: the error is logged with line and field, and all limits stay as they
    are. What models have used is kept. Limits that were set in another way stay until the file's limits for that model
    change. A file that names no model and no pattern is refused too, since it is most likely half written. The writer
    must make sure that a longer file is not read half written: write a new file beside it and rename it into place, as
    most editors do.

    A model that is no longer in the file keeps its last limits, with a warning in the log: removing it because of an
    editing mistake would forget what it has used and admit it without any limit. With `remove_missing` it is removed.

    The file's patterns, such as ``[defaults."user:*"]``, become the manager's `default_quota`. The previous
    `default_quota` still applies to ids that no pattern of the file matches. If several patterns match, the longest
    wins, and of two equal ones the file's. Ids that were given a quota by a pattern keep it when the pattern changes. A
    pattern that is no longer in the file is treated like a model that is no longer in it.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager whose limits are set.
    path : str or os.PathLike
        The file, as for `load_quotas`. Editors may rewrite it in place or replace it with a new file.
    remove_missing : bool
        Remove models and patterns that an earlier version of the file had; others are never removed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> manager = ResourceQuotaManager()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "quotas.toml")
    ...     _ = file.write_text("[models.llama]\nmax_ram_mb = 512")
    ...     reloader = QuotaReloader(manager, file)
    ...     reloader.reload().changed, manager.get_quota("llama").max_ram_mb
    ...     _ = file.write_text("[models.llama]\nmax_ram_mb = -1")
    ...     type(reloader.reload().error).__name__, manager.get_quota("llama").max_ram_mb
    (('llama',), 512)
    ('QuotaFileError', 512)
    """

    def __init__(
        self, manager: "ResourceQuotaManager", path: str | os.PathLike[str], *, remove_missing: bool = False
    ) -> None:
        self._manager = manager
        self._path = Path(path)
        self._remove_missing = remove_missing
        self._lock = threading.Lock()
        self._quotas = Quotas({}, {})
        self._patterns: dict[str, ResourceQuotaConfig] = {}
        self._named: tuple[str, ...] = ()
        self._base: DefaultQuota | None = None
        self._given: DefaultQuota | None = None

    @property
    def quotas(self) -> Quotas:
        """What the file said when it was last accepted; empty before."""
        return self._quotas

    def reload(self) -> Reloaded:
        """Read the file and set the limits that have changed in it; an error is returned and logged, never raised."""
        with self._lock:
            try:
                return self._apply(load_quotas(self._path))
            except (QuotaError, OSError) as error:
                logger.error("quotas are not reloaded, the limits stay as they are: %s", error)
                return Reloaded(error=error)

    def start(self) -> Self:
        """Load the file now, and then in a daemon thread whenever it changes.

        Raises
        ------
        QuotaError, OSError
            The file cannot be used. Raised only here: a later reload keeps the old limits instead.
        ImportError
            `watchfiles` is not installed.
        RuntimeError
            It is already running.
        """
        with extra("reload", "watchfiles"):
            import watchfiles
        self._require_stopped()
        name = self._path.absolute().name

        def watch(stop: threading.Event) -> None:
            # watch the folder: if an editor replaces the file, a watch on the file would stay with the old one
            changes = watchfiles.watch(
                self._path.absolute().parent,
                watch_filter=lambda change, path: os.path.basename(path) == name,
                recursive=False,
                stop_event=stop,
                yield_on_timeout=True,
                rust_timeout=500,
                debounce=200,
                raise_interrupt=False,
            )
            seen = None
            # also at the first timeout: the file may have changed before the watch was set up
            for _ in changes:
                stamp = self._stamp()
                if stamp != seen:
                    seen = stamp
                    self.reload()

        with self._lock:
            self._apply(load_quotas(self._path))
        self._launch(watch)
        return self

    def _stamp(self) -> tuple[int, int, int] | None:
        """Time, size and inode, to distinguish versions of the file; None if the file does not exist."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _apply(self, quotas: Quotas) -> Reloaded:
        if not quotas and not quotas.patterns:
            raise QuotaFileError(self._path, "models", "", {}, 'at least one table [models."<id>"]')
        known = set(self._manager.list_models())
        if len(known | quotas.keys()) > self._manager.max_models:
            raise CapacityError(self._manager.max_models)
        changed = tuple(
            model_id
            for model_id, quota in quotas.items()
            if quota != self._quotas.get(model_id) or model_id not in known
        )
        for model_id in changed:
            self._manager.set_quota(quotas[model_id])
        missing = tuple(model_id for model_id in self._quotas if model_id not in quotas)
        for model_id in missing:
            if self._remove_missing:
                self._manager.remove_quota(model_id)
            else:
                logger.warning("model %r is no longer in %s: it keeps its limits", model_id, self._path)
        self._quotas = quotas
        changed_patterns, missing_patterns = self._apply_patterns(quotas.patterns)
        if changed or missing:
            logger.info(
                "quotas reloaded from %s: %d models changed, %d missing", self._path, len(changed), len(missing)
            )
        if changed_patterns or missing_patterns:
            counts = len(changed_patterns), len(missing_patterns)
            logger.info("patterns reloaded from %s: %d changed, %d missing", self._path, *counts)
        return Reloaded(changed, missing, None, changed_patterns, missing_patterns)

    def _apply_patterns(self, patterns: dict[str, ResourceQuotaConfig]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Add the file's patterns to the manager's `default_quota`; return the changed ones and the missing ones."""
        before = self._patterns
        changed = tuple(pattern for pattern, quota in patterns.items() if quota != before.get(pattern))
        missing = tuple(pattern for pattern in self._named if pattern not in patterns)
        self._named = tuple(patterns)
        self._patterns = patterns if self._remove_missing else {**before, **patterns}
        if not self._remove_missing:
            for pattern in missing:
                logger.warning("pattern %r is no longer in %s: it keeps its limits", pattern, self._path)
        if self._patterns != before:
            found = self._manager.default_quota
            if found is not self._given:  # set by someone else, before or after the last reload
                self._base = found
            self._manager.default_quota = overlaid(self._base, self._patterns) if self._patterns else self._base
            self._given = self._manager.default_quota
        return changed, missing
