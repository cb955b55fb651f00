"""Compiles ``floor.pyx`` on first use, once per source, compiler and Python, into the user's cache directory."""

import hashlib
import importlib.machinery
import importlib.util
import shutil
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

from benchmarks.harness.build_cache import cache_directory
from benchmarks.harness.subprocesses import PACKAGE_PARENT, run_python

SOURCE = Path(__file__).with_name("floor.pyx")
#: What `floor.pyx` takes from the package.
SHARED = ("layout.pxd", "state/clock.pxd", "state/lock.pxd")
#: Flags and directives of the package's own extensions: a floor is built as what stands on it.
COMPILE_ARGS = ("-O3", "-std=c11", "-fno-math-errno", "-D_GNU_SOURCE")
DIRECTIVES = {
    "language_level": 3,
    "binding": False,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}


class FloorUnavailableError(RuntimeError):
    """The floors cannot be compiled here; the message says why and what to do."""


def load_floor() -> ModuleType:
    """Import the floors, compiling them where the cache does not hold them.

    Raises
    ------
    FloorUnavailableError
        Where Cython, setuptools or a C compiler is missing.
    """
    name = "benchmarks.floor.floor"
    if name not in sys.modules:
        path = _compiled()
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _compiled() -> Path:
    directory = cache_directory()
    path = directory / f"floor-{_fingerprint()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as work:
            try:
                run_python("-m", "benchmarks.floor.build", work)
            except RuntimeError as error:
                raise FloorUnavailableError(str(error)) from None
            # Moved into place when it is whole: two runs at once, or one cut short, leave no half a module.
            (built,) = Path(work).glob("lib/floor*")
            built.replace(path)
    return path


def _fingerprint() -> str:
    try:
        versions = [metadata.version(name) for name in ("cython", "setuptools")]
    except metadata.PackageNotFoundError as error:
        raise FloorUnavailableError(
            f"the floors are compiled on first use and {error.name} is missing: pip install 'modelquota[bench]'"
        ) from None
    parts = [*versions, sys.version, *COMPILE_ARGS, repr(DIRECTIVES)]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in (SOURCE, *(PACKAGE_PARENT / "modelquota" / "_core" / name for name in SHARED)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Compile into the directory given on the command line: a process of its own, as setuptools expects to be."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    work = Path(sys.argv[1])
    source = Path(shutil.copy(SOURCE, work))
    extension = Extension("floor", [str(source)], extra_compile_args=list(COMPILE_ARGS))
    modules = cythonize([extension], include_path=[str(PACKAGE_PARENT)], compiler_directives=DIRECTIVES, quiet=True)
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(work / "lib"), str(work / "temp")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()
