"""What the documentation shows is true: README's code and every docstring example run, README's files load."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modelquota
from modelquota import load_quotas

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_readme_code_runs(code, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (toml,) = blocks("toml")
    (tmp_path / "quotas.toml").write_text(toml)
    if '"__main__"' in code:  # a program that starts processes, which import it again
        (tmp_path / "program.py").write_text(code)
        subprocess.run([sys.executable, "-W", "error", "program.py"], check=True, timeout=120)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "Traceback" not in capsys.readouterr().err


def test_readme_quotas_file_loads(tmp_path):
    (text,) = blocks("toml")
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    quotas = load_quotas(path)
    assert quotas["llama-70b"].max_tokens_per_second == 2000
    assert quotas["llama-70b"].max_requests_per_hour is None


def test_readme_defaults_are_the_defaults():
    quota = {**modelquota.ResourceQuotaConfig("m").to_dict(), "shadow_limits": "()"}
    del quota["model_id"]
    table = README.split("| field | unit | default |")[1].split("\n\n")[0]
    told = {}
    for row in table.splitlines()[2:]:
        names, _, values = (cell.strip() for cell in row.strip("|").split("|"))
        told |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    told = {name: None if value == "None" else value.strip("`").replace(",", "") for name, value in told.items()}
    assert {
        name: value if value is None or not value.isdigit() else int(value) for name, value in told.items()
    } == quota


def modules():
    yield "modelquota"
    for module in pkgutil.walk_packages(modelquota.__path__, "modelquota."):
        if not module.name.endswith("__main__"):
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    scope = {**vars(modelquota), **vars(module)}
    found = [test for test in finder.find(module, name, globs=scope) if test.examples]
    if name.startswith("modelquota._core."):  # doctest does not look into extension classes by itself
        for member in vars(module).values():
            if inspect.isclass(member) and member.__module__ == name:
                found += [
                    test for test in finder.find(member, member.__name__, module=False, globs=scope) if test.examples
                ]
    for test in found:
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_everything_public_is_documented():
    for name in modelquota.__all__:
        member = getattr(modelquota, name)
        assert inspect.getdoc(member), name
        if inspect.isclass(member):
            for verb, value in vars(member).items():
                if not verb.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{verb}"


def test_every_extension_module_has_a_stub():
    core = Path(modelquota.__file__).parent / "_core"
    extensions = {path.name.split(".")[0] for path in core.rglob("*.so")}
    assert "table" in extensions
    assert extensions == {path.stem for path in core.rglob("*.pyi")}
