"""Builds the extension modules; everything else about the project is in pyproject.toml.

MODELQUOTA_SANITIZE=1 builds with the address and undefined-behaviour sanitizers, MODELQUOTA_ANNOTATE=1 writes Cython's
annotated HTML beside each source, MODELQUOTA_DEBUG=1 keeps debug information for gdb and perf.
"""

import gc
import multiprocessing
import os
import platform
import sys
from glob import glob
from importlib import import_module
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
    sys.exit(f"modelquota runs on 64-bit Linux; this is {platform.system()} ({platform.machine()}).")

ANNOTATE = os.environ.get("MODELQUOTA_ANNOTATE") == "1"
DEBUG = os.environ.get("MODELQUOTA_DEBUG") == "1"
SANITIZE = os.environ.get("MODELQUOTA_SANITIZE") == "1"

PACKAGE = "src/modelquota"
# gcc takes more than half of a build. -O3 is for what a check runs through. -O1 takes half of its time, and is for what
# shows in a count of a grant's or a batch's instructions; -Og takes a third, and is for what shows in none.
LEVELS = dict.fromkeys(["arrays", "intern", "pools", "shares", "snapshot"], "-O1") | dict.fromkeys(
    ["packing", "queue", "records", "state", "view"], "-Og"
)
DIRECTIVES = {
    "language_level": 3,
    "binding": False,  # a method descriptor is called some 10 ns faster than a bound Cython function
    "embedsignature": True,
    "embedsignature.format": "clinic",  # in which `inspect.signature` reads them
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "autotestdict": False,
    "auto_pickle": False,  # nothing in the core can be pickled; object.__reduce__ says so
    "emit_code_comments": ANNOTATE or DEBUG,
}

# CPython's own flags ask for debug information and for all warnings, which take a tenth of gcc's time.
compile_args = ["-std=c11", "-fno-math-errno", "-D_GNU_SOURCE", *(["-g"] if DEBUG else ["-g0", "-Wno-all"])]
# Errors from gcc 14 on, so they are errors everywhere.
compile_args += [
    f"-Werror={name}" for name in ("incompatible-pointer-types", "int-conversion", "implicit-function-declaration")
]
link_args = []
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    # CPython's own flags carry -fwrapv, which would hide every signed overflow
    compile_args = [*compile_args, *sanitizers, "-fno-wrapv", "-g1"]
    link_args = sanitizers


class SourceDistribution(sdist):
    """The sources with everything that the tests and benchmarks need."""

    def make_distribution(self):
        sources = (
            f"{PACKAGE}/**/*.pyx",
            "tests/**/*.py",
            "tests/**/*.c",
            "tests/**/*.pyx",
            "tests/**/*.json",
            "tests/**/*.gz",
            "benchmarks/**/*.py",
            "benchmarks/**/*.pyx",
            "benchmarks/**/*.zig",
            "benchmarks/**/*.svg",
        )
        for pattern in sources:
            self.filelist.extend(glob(pattern, recursive=True))
        super().make_distribution()


class TranslatingBuild(build_ext):
    """Runs Cython when the extensions are built, and not when a build tool only asks for names and requirements."""

    def run(self):
        # Collections take a third of Cython's time: its trees are large, and in use until their module is written.
        gc.disable()
        multiprocessing.set_start_method("fork", force=True)  # so that Cython's processes have it disabled as well,
        for module in ("FlowControl", "MemoryView", "Optimize", "ParseTreeTransforms", "Pipeline"):
            import_module(f"Cython.Compiler.{module}")  # and find these imported
        translated = cythonize(
            self.extensions,
            include_path=["src"],
            build_dir="build/cython",
            nthreads=os.cpu_count(),
            annotate=ANNOTATE,
            compiler_directives=DIRECTIVES,
        )
        for extension, by_cython in zip(self.extensions, translated, strict=True):
            extension.sources = by_cython.sources
        super().run()


def extension_module(source):
    path = Path(source)
    return Extension(
        ".".join(path.relative_to("src").with_suffix("").parts),
        [source],
        depends=glob(f"{PACKAGE}/**/*.pxd", recursive=True),
        include_dirs=[np.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=[*compile_args, "-O1" if SANITIZE else LEVELS.get(path.stem, "-O3")],
        extra_link_args=link_args,
    )


setup(
    cmdclass={"build_ext": TranslatingBuild, "sdist": SourceDistribution},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=[extension_module(source) for source in sorted(glob(f"{PACKAGE}/**/*.pyx", recursive=True))],
)
