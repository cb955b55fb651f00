"""What the documentation shows is true: the code, files and commands of README and of the topics, and every docstring
example, run; README and topics know each other, and are in the package.
"""

import asyncio
import doctest
import fnmatch
import importlib
import importlib.util
import inspect
import itertools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from http import HTTPStatus
from pathlib import Path

import pytest
import typer
from asgi_client import Call

import modelquota
from modelquota import ResourceQuotaManager, load_quotas
from modelquota.cli import main
from modelquota.cli.app import app
from modelquota.cli.docs import read_topic, topics
from modelquota.demo.quotas import demo_manager
from modelquota.demo.server import create_app
from modelquota.demo.traffic import MODELS
from modelquota.quota.http import key_digits

ROOT = Path(__file__).parents[2]
PACKAGE = Path(modelquota.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {"README": README, **{topic: read_topic(topic) for topic in topics()}}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# These end by themselves, and soon, and change nothing but the files that they are given.
RUN = {"docs", "inspect", "remove", "replay", "reset-burst", "set", "status", "tune", "usage", "verify"}
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:00.0000000,30,10\n"


def blocks(language, names=TEXTS):
    """Every block of a language, after the name of its text and its number there."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name in names
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], re.MULTILINE | re.DOTALL))
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that the documentation speaks of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quotas.toml").write_text(blocks("toml", ["README"])[0].values[0])
    (tmp_path / "tuned.toml").write_text("[models.llama-70b]\n")
    (tmp_path / "TRACE.csv").write_text(TRACE)
    (tmp_path / "requests.csv").write_text("when,asked,made\n0.5,30,10\n1.25,7,3\n")
    (tmp_path / "bench.json").write_text('{"request_throughput": 5, "p99_ttft_ms": 900, "p99_tpot_ms": 30}')
    (tmp_path / "usage.jsonl").write_text('{"time_us": 5, "ids": ["acme", "llama"], "estimated": 7, "settled": 6}\n')
    return tmp_path


def test_every_language_is_one_that_is_checked():
    fences = re.findall(r"^```(.*)$", "\n".join(TEXTS.values()), re.MULTILINE)
    assert set(fences[::2]) == {"python", "toml", "sh", "yaml", "text"}
    assert set(fences[1::2]) == {""}


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code, capsys, folder, monkeypatch):
    for package in re.findall(r"^from (langchain_core)\b", code, re.MULTILINE):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[real]'")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # an example may set variables
    if '"__main__"' in code:  # a program that starts processes, which import it again
        (folder / "program.py").write_text(code)
        subprocess.run([sys.executable, "-W", "error", "program.py"], check=True, timeout=120)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", blocks("toml"))
def test_quota_files_load(text, tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    quotas = load_quotas(path)
    if "llama-70b" not in quotas:  # an example of something else
        assert quotas
        return
    assert quotas["llama-70b"].max_tokens_per_second == 2000
    if quotas.http:
        assert quotas.key_names == {key_digits("secret"): "acme"}
        return
    assert quotas["llama-70b"].max_requests_per_hour is None
    assert quotas.patterns["user:*"].max_tokens_per_hour == 50_000


def commands(block):
    """The words of each command of a block."""
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        for joined, group in itertools.groupby(words, lambda word: word == "&&"):
            if not joined:
                yield list(group)


def parse(words, **how):
    """Parse the words of a `modelquota` command as the command line does: what does not exist raises."""
    group = typer.main.get_command(app)
    name, command, arguments = group.resolve_command(group.make_context("modelquota", ["docs"]), words[1:])
    return command.make_context(name, list(arguments), **how)


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist_and_so_do_their_options(block, folder, pytestconfig):
    ResourceQuotaManager(path="quota.state").set_quota("llama")
    for words in commands(block):
        match words:
            case ["pip", "install", *options, what]:
                assert options in ([], ["-e"])
                extras = re.fullmatch(r"(\.|modelquota)\[([\w,]+)\]", what)[2].split(",")
                assert set(extras) <= PYPROJECT["project"]["optional-dependencies"].keys()
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module)
            case ["pytest", *rest]:
                assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
                for word in rest:
                    if word.startswith("-"):
                        pytestconfig.getoption(word.partition("=")[0])  # raises if there is no such option
            case [assigned, *_] if re.match(r"[A-Z_]+=", assigned):
                check_engine(words)
            case ["modelquota", name, *arguments]:
                parse(words)
                if name in RUN:
                    assert main([name, *arguments]) == 0
            case _:
                pytest.fail(f"nothing checks {words}")


def check_engine(words):
    """The start of an engine: our names in it exist, and it is one that we have an entry point for."""
    settings = dict(word.split("=", 1) for word in itertools.takewhile(lambda word: "=" in word, words))
    assert settings.pop("MODELQUOTA_QUOTAS") == "quotas.toml"
    groups = PYPROJECT["project"]["entry-points"]
    match words[len(settings) + 1 :]:
        case ["vllm", "serve", "MODEL", *options]:
            named = settings.pop("VLLM_PLUGINS", None)
            assert named is None or named in groups["vllm.endpoint_plugins"]
            assert named or inspect.isclass(pkgutil.resolve_name(options[options.index("--middleware") + 1]))
        case ["python", "-m", "sglang.launch_server", *_]:
            assert groups["sglang.srt.plugins"]
        case _:
            pytest.fail(f"nothing checks {words}")
    assert not settings
    for group in groups.values():
        for value in group.values():
            assert pkgutil.resolve_name(value)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_what_configurations_name_is_in_the_package(block):
    for name in re.findall(r"\b(modelquota\.[\w.]+)\.\w+", block):
        assert importlib.util.find_spec(name)


def test_commands_that_the_text_names_exist():
    named = set()
    for text in TEXTS.values():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        named |= {" ".join(words.split()) for words in re.findall(r"`(modelquota(?: [^`]+))`", prose)}
    assert "modelquota docs TOPIC" in named
    for words in named:
        parse(shlex.split(words), resilient_parsing=True)


def test_the_answer_that_readme_shows_is_the_one_that_the_example_server_gives():
    (shown,) = [block.values[0] for block in blocks("text", ["README"]) if "HTTP/1.1" in block.values[0]]
    ask = {"model": "batch-13b", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}

    async def refused():
        server = create_app(demo_manager(), tokens_per_second=1e5)
        while (answer := await Call(server, body=ask)).status != 429:
            pass
        return answer

    answer = asyncio.run(refused())
    numbers = lambda text: re.sub(r"\d+([.,]\d+)*( m?s\b)?", "N", text)  # noqa: E731
    status, *headers, _, body = shown.splitlines()
    assert status == f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"
    assert [numbers(header) for header in headers] == [
        numbers(f"{name}: {value}")
        for name, value in answer.headers.items()
        if name in {header.partition(":")[0] for header in headers}
    ]
    assert numbers(answer.body.decode()).startswith(numbers(body.removesuffix("...").rstrip()))


def test_the_report_that_readme_shows_is_about_the_models_of_the_demo():
    (shown,) = [block.values[0] for block in blocks("text", ["README"]) if "What you saw." in block.values[0]]
    assert re.findall(r"^  (\S+)", shown, re.MULTILINE) == [traffic.quota.model_id for traffic in MODELS]


@pytest.mark.parametrize("name", ["README", "limits"])
def test_the_defaults_are_the_defaults(name):
    quota = {**modelquota.ResourceQuotaConfig("m").to_dict(), "shadow_limits": "()", "token_weights": "(1, 1, 1)"}
    quota["cluster_concurrency"] = str(quota["cluster_concurrency"])
    del quota["model_id"]
    table = TEXTS[name].split("| field | unit | default |")[1].split("\n\n")[0]
    told = {}
    for row in table.splitlines()[2:]:
        names, _, values = (cell.strip() for cell in row.strip("|").split("|"))
        told |= dict(zip(re.findall(r"`(\w+)`", names), re.findall(r"\([^)]*\)|[^ ]+?(?=, |$)", values), strict=True))
    plain = {name: re.sub(r"(?<=\d),(?=\d)", "", value.strip("`")) for name, value in told.items()}
    told = {name: None if value == "None" else value for name, value in plain.items()}
    assert {
        name: value if value is None or not value.isdigit() else int(value) for name, value in told.items()
    } == quota


def test_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 220
    assert "\npip install -e '.[test]' && pytest\n" in README  # .ci/run runs the line that it finds here
    shown = [" ".join(words) for block in blocks("sh", ["README"]) for words in commands(block.values[0])]
    assert {"modelquota demo", "modelquota serve-demo"} <= set(shown)


def anchor(heading):
    """The fragment of a link to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_readme_lists_every_topic_and_the_topics_link_to_topics():
    assert set(re.findall(r"\]\(src/modelquota/docs/(\w+)\.md\)", README)) == set(topics())
    for name, text in TEXTS.items():
        for words, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text):
            if name == "README":
                assert (ROOT / target).exists() or target.startswith("src/modelquota/docs/"), target
            elif not target.startswith("https://"):
                topic, _, heading = target.partition("#")
                assert topic == (f"{words}.md" if not heading else topic)
                assert topic.removesuffix(".md") in topics()
                assert not heading or heading in map(anchor, re.findall(r"^#+ (.*)$", TEXTS[topic[:-3]], re.M))


def test_a_topic_says_in_its_first_line_what_it_is_about():
    for topic, about in topics().items():
        assert re.match(r"# \w+: \S", TEXTS[topic]), topic
        assert about
        assert len(re.findall(r"^# ", re.sub(r"^```.*?^```", "", TEXTS[topic], flags=re.M | re.S), re.M)) == 1


def test_readme_lists_every_folder_of_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)) == folders


def test_every_file_of_the_package_that_is_not_code_is_package_data():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    patterns = [
        "/".join([*package.split(".")[1:], pattern]) for package, patterns in data.items() for pattern in patterns
    ]
    built = {".py", ".pyc", ".so", ".pyx", ".c"}
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in built]
    assert {Path("docs/limits.md"), Path("py.typed")} <= set(files)
    for file in files:
        assert any(
            fnmatch.fnmatch(str(file), pattern) and str(file).count("/") == pattern.count("/") for pattern in patterns
        ), file


def table_of(topic, headings):
    rows = read_topic(topic).split(headings)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_modules_that_were_moved_are_where_the_changes_say():
    rows = table_of("changes", "| before | now |")
    assert rows
    for before, now in rows:
        assert importlib.util.find_spec(now.strip("`")), now
        parent, _, name = before.strip("`").rpartition(".")
        assert not (PACKAGE.joinpath(*parent.split(".")[1:]) / f"{name}.py").exists(), before


def test_dotted_names_in_the_text_exist():
    text = "\n".join(text for name, text in TEXTS.items() if name != "changes")
    named = set(re.findall(r"`(modelquota(?:\.\w+)+)\b", text))
    assert named
    for name in named:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("topic", ["metrics", "control"])
def test_verbs_in_the_tables_are_those_of_a_manager(topic):
    verbs = [cells[0] for cells in table_of(topic, "| verb | what it ")]
    assert verbs
    for cell in verbs:
        for name in re.findall(r"`(?:manager\.)?(\w+)\b", cell):
            assert hasattr(ResourceQuotaManager, name), name


def test_fields_in_the_table_of_metrics_are_those_of_stats_and_usage():
    fields = {*modelquota.QuotaStats.__dataclass_fields__, *modelquota.ResourceUsage.__dataclass_fields__}
    named = {name for row in table_of("metrics", "| metric |") for name in re.findall(r"`(\w+)`", row[0])}
    assert named
    assert named <= fields


def test_the_errors_are_all_there_and_are_what_the_topic_says():
    import modelquota.asgi as asgi

    rows = table_of("errors", "| exception | also a | raised when |")
    known = {name: error for name, error in {**vars(modelquota), **vars(asgi)}.items() if is_error(error)}
    assert {name.strip("`") for name, _, _ in rows} == known.keys() - {"QuotaError"}
    for name, also, _ in rows:
        base = also.strip("`")
        error = known[name.strip("`")]
        assert issubclass(error, modelquota.QuotaError)
        if base:
            assert base in {parent.__name__ for parent in error.__mro__[1:]}
        else:
            assert error.__mro__[1] is modelquota.QuotaError


def is_error(value):
    return inspect.isclass(value) and issubclass(value, modelquota.QuotaError)


def modules():
    yield "modelquota"
    for module in pkgutil.walk_packages(modelquota.__path__, "modelquota."):
        if not module.name.endswith("__main__"):
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if name.startswith("modelquota.integrations.") and "needs the extra" in str(error):
            pytest.skip(str(error))
        raise
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
