"""What is shown of meters: below their model, and money as dollars."""

import io
import pickle

import pytest
from factories import make_manager, open_quota
from rich.console import Console

from modelquota import ModelReport, ResourceQuotaManager, Tokens
from modelquota.cli.status import print_status
from modelquota.cli.top import Top
from modelquota.quota.limits import dollars

USD = {"unit": "usd", "token_weights": (3, 0.3, 15), "max_tokens_per_month": 20_000}


@pytest.fixture
def manager():
    """A model between its meters, in whatever order they were registered."""
    manager = make_manager(
        open_quota("llama#usd", **USD), open_quota("other"), open_quota("llama", max_tokens_per_hour=10_000)
    )
    manager.set_quota(open_quota("llama#output", token_weights=(0, 0, 1), max_tokens_per_minute=20_000))
    manager.set_quota(open_quota("lone#usd", **USD))
    assert manager.check_quota("llama", Tokens(1_200, 800, 256))
    return manager


def test_a_report_has_those_of_its_meters(manager):
    report = manager.get_model_report("llama")
    assert [meter.model_id for meter in report.meters] == ["llama#output", "llama#usd"]
    assert [meter.usage.tokens_this_hour for meter in report.meters] == [256, 7_680]
    assert all(isinstance(meter, ModelReport) and meter.meters == () for meter in report.meters)
    assert manager.get_model_report("other").meters == ()
    assert manager.model("llama").get_model_report().meters == report.meters
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_view_of_a_file_has_them_too(path):
    make_manager(open_quota("m"), open_quota("m#x"), open_quota("m2#x"), path=path).close()
    with ResourceQuotaManager.open_readonly(path) as view:
        assert [meter.model_id for meter in view.get_model_report("m").meters] == ["m#x"]


def test_print_status(manager):
    file = io.StringIO()
    manager.print_status(file)
    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["llama", "#usd", "#output", "other", "lone#usd"]
    assert [line.startswith("  #") for line in lines[1:6]] == [False, True, True, False, False]
    assert "$0.00768 / $0.02" in lines[2]
    assert "$" not in lines[1] + lines[3]


@pytest.mark.parametrize("draw", [print_status, lambda manager, console: console.print(Top(manager, console).screen())])
def test_the_terminal(manager, draw):
    console = Console(file=io.StringIO(), width=100, height=40, color_system=None)
    draw(manager, console)
    lines = [
        line for line in console.file.getvalue().splitlines() if "#" in line or line.startswith(("llama", "other"))
    ]
    assert [line.split()[0] for line in lines] == ["llama", "#usd", "#output", "lone#usd", "other"] or [
        line.split()[0] for line in lines
    ] == ["llama", "#usd", "#output", "other", "lone#usd"]
    assert "$0.00768 of $0.02 / month" in lines[1]


def test_a_reason_in_dollars(manager):
    denied = manager.check_quota("llama", Tokens(output=1_000))
    assert denied.model_id == "llama#usd"
    assert denied.reason.startswith("dollars per month: $0.00768 of $0.02 used, $0.015 asked; retry in ")
    assert pickle.loads(pickle.dumps(denied)).reason == denied.reason
    assert pickle.loads(pickle.dumps(denied)) == denied
    manager.update_quota("llama#usd", max_tokens_per_month=None, max_requests_per_hour=1)
    assert manager.check_quota("llama", 1).reason.startswith("requests per hour: 1 of 1 used, 1 asked; ")


@pytest.mark.parametrize(
    ("millionths", "text"),
    [(0, "$0.00"), (1, "$0.000001"), (10_000, "$0.01"), (1_234_567_890_000, "$1,234,567.89"), (100_000, "$0.10")],
)
def test_dollars(millionths, text):
    assert dollars(millionths) == text
