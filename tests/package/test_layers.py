"""The folders are layers: imports go down, and in no circle. Read from the sources, with `cimport` and lazy imports."""

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import modelquota

PACKAGE = Path(modelquota.__file__).parent
# From the bottom to the top; what is in one line does not import one another.
LAYERS = (
    ("errors", "_extras", "_log", "_periodic"),
    ("quota",),
    ("_core.layout", "_core.atomics"),
    ("_core.row",),
    ("_core.state",),
    ("_core.table",),
    ("reading", "waiting", "protocols"),
    ("statefile", "cluster", "monitoring.ledger"),
    ("manager",),
    ("control", "monitoring", "tuning"),
    ("asgi",),
    ("client",),
    ("integrations",),
    ("demo",),
    ("", "docs"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module):
    """The layer's room of a module: a folder, a file at the top, or a folder within that has a layer of its own."""
    parts = module.split(".")[1:]
    inner = ".".join(parts[:2])
    return inner if inner in HEIGHT or parts[:1] == ["_core"] else "".join(parts[:1])


def is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def python_imports(tree, *, lazy):
    """Modules of the package that a file imports; those for type checkers apart."""
    pending = [*tree.body]
    while pending:
        node = pending.pop()
        if is_for_types(node):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "modelquota":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("modelquota"))
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


def imports(*, lazy):
    """Of each module of the package, the modules that it imports."""
    found = defaultdict(set)
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd")]
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sources}
    names = {name.removesuffix(".__init__") for name in modules}
    for path in sources:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            imported = python_imports(ast.parse(text), lazy=lazy)
        else:
            indent = r"\s*" if lazy else ""
            imported = re.findall(rf"^{indent}from (modelquota[\w.]*) c?import", text, re.MULTILINE)
        found[module] |= {name for name in imported if name in names} - {module}
    return found


@pytest.fixture(scope="module")
def cython_sources():
    if not list(PACKAGE.rglob("*.pxd")):
        pytest.skip("the core's sources are not beside the package")


def test_imports_go_down(cython_sources):
    upward = {
        (module, imported)
        for module, all_imported in imports(lazy=True).items()
        for imported in all_imported
        if room_of(module) != room_of(imported)
        # a package that is named on the way to one of its modules is not what is asked for
        and not any(other.startswith(f"{imported}.") for other in all_imported)
        and HEIGHT[room_of(imported)] >= HEIGHT[room_of(module)]
    }
    assert upward == set()


def test_no_module_imports_itself_in_a_circle():
    graph = {
        module: {imported for imported in all_imported if imported != "modelquota" and not module.startswith(imported)}
        for module, all_imported in imports(lazy=False).items()
        if module != "modelquota"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from None


def test_every_room_has_its_layer():
    assert {room_of(module) for module in imports(lazy=True)} - {"_core"} == set(HEIGHT)
