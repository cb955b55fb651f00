"""The error raised when an optional extra is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str, *packages: str) -> Iterator[None]:
    """Import the packages of the extra `name`; if one is missing, raise an error that names what to install.

    Parameters
    ----------
    name : str
        The extra, as in ``modelquota[name]``.
    *packages : str
        Top-level names of the packages that the extra installs. If any other module is missing, its error is passed on.

    Raises
    ------
    ImportError
        One of the packages is not installed; the message names the extra.

    Examples
    --------
    >>> with extra("prometheus", "a_package_that_is_not_here"):
    ...     import a_package_that_is_not_here
    Traceback (most recent call last):
        ...
    ImportError: this needs the extra 'prometheus': pip install 'modelquota[prometheus]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in packages:
            raise
        raise ImportError(
            f"this needs the extra {name!r}: pip install 'modelquota[{name}]'", name=error.name
        ) from error
