"""Every public verb tells its parameters, to `inspect.signature` and `help`, and they are those of the stubs."""

import ast
import importlib
import inspect
import io
import pydoc
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import modelquota
from modelquota import Grant, ManualClock, ModelQuota, ResourceQuotaManager

CORE = Path(modelquota.__file__).parent / "_core"
HOT = {
    ResourceQuotaManager.check_quota: "(model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0)",
    ResourceQuotaManager.reserve: "(model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0)",
    ResourceQuotaManager.check_many: "(codes, estimated_tokens, out=None, *, times_ns=None, retry_after_ms=None)",
    ResourceQuotaManager.charge_many: "(codes, tokens, *, over=None)",
    ResourceQuotaManager.settle_many: "(grants, actual_tokens)",
    ResourceQuotaManager.codes: "(model_ids)",
    ResourceQuotaManager.list_models: "()",
    ResourceQuotaManager.flush: "()",
    ModelQuota.check: "(estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0)",
    Grant.add: "(tokens=1)",
    Grant.settle: "(actual_tokens)",
    Grant.cancel: "()",
    Grant.release: "()",
    Grant.__enter__: "()",
    Grant.__exit__: "(kind, error, traceback)",
    ManualClock.advance: "(seconds)",
    ManualClock.advance_ns: "(ns)",
}


def without_self(signature):
    first, *others = signature.parameters.values()
    assert first.name == "self"
    return str(signature.replace(parameters=others))


@pytest.mark.parametrize(("verb", "shown"), HOT.items(), ids=[verb.__qualname__ for verb in HOT])
def test_a_hot_verb_tells_its_parameters(verb, shown):
    assert without_self(inspect.signature(verb)) == shown
    text = pydoc.plain(pydoc.render_doc(verb))
    assert joined(f"{verb.__name__}(self, /{', ' if shown != '()' else ''}{shown[1:]}") in joined(text)
    if not verb.__name__.startswith("__"):
        assert verb.__doc__[0].isupper(), "the text begins with what the verb does"


def joined(text):
    """Without white space and bars: pydoc of Python 3.13 and later gives each parameter a line."""
    return "".join(text.replace("|", "").split())


def verbs_of(scope):
    for name, verb in inspect.getmembers(scope, inspect.isroutine):
        if not name.startswith("_") or name in ("__enter__", "__exit__", "__aenter__", "__aexit__"):
            yield name, verb


# A str or an int says nothing of its own; an exception's verbs are those of BaseException.
CLASSES = [
    getattr(modelquota, name)
    for name in modelquota.__all__
    if inspect.isclass(getattr(modelquota, name)) and not issubclass(getattr(modelquota, name), (str, int, Exception))
]


@pytest.mark.parametrize("public", CLASSES, ids=lambda public: public.__name__)
def test_every_public_verb_tells_its_parameters(public):
    for name, verb in verbs_of(public):
        parameters = inspect.signature(verb).parameters
        bound = isinstance(inspect.getattr_static(public, name), classmethod)
        assert bound or next(iter(parameters)) == "self", name


def test_a_bound_verb_tells_its_parameters():
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=1)
    manager.set_quota("m")
    assert str(inspect.signature(manager.check_quota)) == HOT[ResourceQuotaManager.check_quota]
    assert str(inspect.signature(manager.model("m").check)) == HOT[ModelQuota.check]
    with manager.reserve("m", 1) as grant:
        assert str(inspect.signature(grant.add)) == "(tokens=1)"
    bound = inspect.signature(manager.check_quota).bind("m", estimated_tokens=5)
    assert bound.arguments == {"model_id": "m", "estimated_tokens": 5}
    assert str(inspect.signature(ManualClock)) == "(now_ns=0)"
    assert inspect.getdoc(ManualClock).startswith("A clock ")


def stubbed():
    for path in sorted(CORE.rglob("*.pyi")):
        module = importlib.import_module(".".join(path.relative_to(CORE.parents[1]).with_suffix("").parts))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                yield module, node
            elif isinstance(node, ast.ClassDef):
                owner = getattr(module, node.name)
                yield from (
                    (owner, verb)
                    for verb in node.body
                    if isinstance(verb, ast.FunctionDef)
                    and not verb.decorator_list
                    and verb.name not in ("__init__", "__new__", "__bool__")
                )


@pytest.mark.parametrize(
    ("owner", "stub"), [pytest.param(*pair, id=f"{pair[0].__name__}.{pair[1].name}") for pair in stubbed()]
)
def test_a_stub_has_the_parameters_of_the_verb(owner, stub):
    parameters = inspect.signature(getattr(owner, stub.name)).parameters.values()
    given = stub.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    keyword = [argument.arg for argument in given.kwonlyargs]
    assert [parameter.name for parameter in parameters] == [*positional, *keyword]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == keyword
    defaults = dict(zip(reversed(positional), reversed(given.defaults), strict=False))
    defaults |= {name: value for name, value in zip(keyword, given.kw_defaults, strict=True) if value is not None}
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert found == {name: ast.literal_eval(value) for name, value in defaults.items()}


def test_help_of_the_manager_has_the_verbs_with_their_parameters():
    with redirect_stdout(io.StringIO()) as shown:
        pydoc.doc(ResourceQuotaManager, output=shown)
    text = shown.getvalue()
    shown_verb = "check_quota(self, /, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0)"
    assert joined(shown_verb) in joined(text)
    assert "(...)" not in text
