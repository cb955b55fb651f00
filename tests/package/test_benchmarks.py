"""The benchmarks' own machinery: what it says of two runs, how it draws its table, and that it can be started."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.drawing import report
from benchmarks.harness import table
from benchmarks.harness.loops import UNROLLED, Loop, batch_round, least_of_rounds
from benchmarks.harness.results import FLOOR, Row, Target, at_least, at_most, ratio_at_most, render, rows_of

ROOT = Path(__file__).parents[2]


def row(figure=80.0, floor=40.0, case="a call", **fields):
    beside = {"beside": FLOOR, "beside_figure": floor, "judged": True} if floor else {}
    return Row("one check", case, figure, **{**beside, **fields})


@pytest.fixture
def saved(tmp_path):
    """Write a results file as pytest-benchmark would, and give its path."""

    def saved(name, *rows, **machine):
        path = tmp_path / name
        benchmarks = [{"name": "bench", "extra_info": {"rows": [each.to_dict() for each in rows]}}]
        path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
        return str(path)

    return saved


def test_rows_survive_the_json():
    rows = [row(targets=(at_most(90), ratio_at_most(1.4))), row(1.9, None, unit="×", targets=(at_least(1.8),))]
    results = {"benchmarks": [{"extra_info": {"rows": [each.to_dict() for each in rows]}}, {"extra_info": {}}]}
    assert rows_of(json.loads(json.dumps(results))) == rows


def test_json_spells_out_ratio_and_verdicts():
    values = row(targets=(at_most(90), ratio_at_most(1.4))).to_dict()
    assert values["ratio"] == 2
    assert [target["met"] for target in values["targets"]] == [True, False]


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (at_most(80), True),
        (at_most(79.9), False),
        (at_least(80), True),
        (at_least(80.1), False),
        (ratio_at_most(2), True),
        (ratio_at_most(1.99), False),
        (Target(2, "ratio", "at least"), True),
        (Target(2.01, "ratio", "at least"), False),
    ],
)
def test_target(target, met):
    assert row().meets(target) is met


def test_ratio_target_needs_something_to_compare_with():
    with pytest.raises(ValueError, match="one check, a call: a target for a ratio"):
        row(floor=None).meets(ratio_at_most(2))


# -- comparing two runs


@pytest.mark.parametrize(
    ("figure", "floor", "status", "verdict"),
    [
        (80.0, 40.0, 0, "as before"),
        (91.9, 40.0, 0, "as before"),  # + 14.9 %
        (92.1, 40.0, 1, "WORSE"),
        (100.0, 40.0, 1, "WORSE"),
        (160.0, 80.0, 0, "as before"),  # twice as slow a machine
        (80.0, 30.0, 1, "WORSE"),
        (60.0, 40.0, 0, "better"),
    ],
)
def test_compare_judges_ratios(saved, capsys, figure, floor, status, verdict):
    assert compare.main([saved("old.json", row()), saved("new.json", row(figure, floor))]) == status
    assert re.search(rf"a call .*{verdict}", capsys.readouterr().out)


def test_compare_judges_every_case(saved):
    old = saved("old.json", row(), row(case="another"))
    assert compare.main([old, saved("new.json", row(40), row(100, case="another"))]) == 1


def test_of_several_runs_the_best_ratio_of_each_case_counts(saved):
    old = saved("old.json", row(), row(case="another"))
    disturbed = [saved("1.json", row(100), row(case="another")), saved("2.json", row(), row(100, case="another"))]
    assert [compare.main([old, path]) for path in disturbed] == [1, 1]
    assert compare.main([old, *disturbed]) == 0
    assert compare.main([old, disturbed[0], saved("3.json", row(99), row(case="another"))]) == 1


@pytest.mark.parametrize(("threshold", "status"), [("0.1", 1), ("0.3", 0)])
def test_compare_threshold(saved, threshold, status):
    assert compare.main([saved("old.json", row()), saved("new.json", row(100)), "--threshold", threshold]) == status


@pytest.mark.parametrize("threshold", ["0", "-1", "nan", "much"])
def test_compare_refuses_a_threshold(saved, capsys, threshold):
    path = saved("run.json", row())
    with pytest.raises(SystemExit) as stopped:
        compare.main([path, path, "--threshold", threshold])
    assert stopped.value.code == 2
    assert "--threshold" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"floor": None}, {"judged": False}, {"beside": "one thread", "judged": False}])
def test_compare_shows_the_rest_and_does_not_judge_it(saved, capsys, fields):
    old, new = row(50, case="shown", **fields), row(500, case="shown", **fields)
    assert compare.main([saved("old.json", row(), old), saved("new.json", row(), new)]) == 0
    assert re.search(r"shown .*\+900\.0%", capsys.readouterr().out)


def test_compare_misses_a_case(saved, capsys):
    old, new = saved("old.json", row(), row(case="lost")), saved("new.json", row(), row(case="found"))
    assert compare.main([old, new]) == 2
    assert "one check, lost" in capsys.readouterr().err
    assert compare.main([old, new, "--partial"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"lost .*gone", out)
    assert re.search(r"found .*new", out)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"benchmarks": []}', '{"benchmarks": [{"name": "x"}]}'])
def test_compare_unusable_file(saved, tmp_path, capsys, content):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    assert compare.main([saved("good.json", row()), str(bad)]) == 2
    assert "bad.json" in capsys.readouterr().err


def test_compare_missing_file(saved, capsys):
    assert compare.main([saved("good.json", row()), "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_compare_runs_without_floors(saved, capsys):
    path = saved("run.json", row(floor=None))
    assert compare.main([path, path]) == 2
    assert "modelquota[bench]" in capsys.readouterr().err


def test_compare_tells_of_another_machine(saved, capsys):
    old, new = saved("old.json", row(), numpy="2.0", cpu={"brand_raw": "A"}), saved("new.json", row(), numpy="2.1")
    assert compare.main([old, new]) == 0
    out = capsys.readouterr().out
    assert "Another numpy: 2.0 before, 2.1 now" in out
    assert "Another processor: A before, None now" in out
    assert "python_version" not in out


# -- table and pictures


def test_table_shows_figures_and_verdicts():
    headings, lines = render(
        [
            row(targets=(at_most(90), ratio_at_most(1.4))),
            row(1.02, 1.01, "threads", unit="×", targets=(at_least(1.8),)),
            row(80, 4_000, "peers", beside="a library", targets=(ratio_at_most(1 / 40),)),
            row(2_688.4, None, "memory", unit="B"),
        ]
    )
    text = table.plain(headings, lines, title="Figures")
    assert text.startswith("Figures\n")
    assert re.search(r"a call +80 ns +40 ns floor +2\.00 +≤ 90 ns; ≤ 1\.40 × floor +yes; NO\n", text)
    assert re.search(r"threads +1\.02 × +1\.01 × floor +1\.01 +≥ 1\.80 × +NO \(nor the floor\)\n", text)
    assert re.search(r"peers +80 ns +4,000 ns a library +1/50 +≤ 1/40 × a library +yes\n", text)
    assert re.search(r"memory +2,688 B\n", text)
    assert len({line.index("a call") for line in text.splitlines() if "a call" in line}) == 1


def test_table_sets_figures_to_the_right():
    lines = table.plain(("what", "figure"), [("a", "1.5 ns"), ("b", "100 ns"), ("c", "")]).splitlines()
    assert lines == ["what  figure", "----  ------", "a     1.5 ns", "b     100 ns", "c"]


def test_table_by_rich_has_the_same_cells():
    pytest.importorskip("rich")
    text = table.draw(("what", "figure"), [("a", "1.5 ns"), ("b", "NO")], title="Figures")
    assert all(cell in text for cell in ("Figures", "what", "figure", "1.5 ns", "NO"))
    assert "\x1b" not in text
    assert "\x1b" in table.draw(("what", "figure"), [("b", "NO")], colour=True)


@pytest.fixture
def results():
    """Give what a whole run saves, as far as pictures are drawn from it."""
    cases = [
        ("one check", 'check_quota("llama", estimated_tokens=100)'),
        ("one check", "handle: quota.check(100)"),
        ("many models", "1,000 models"),
        ("batch", "check_many, 1,000 models, 10,000 at once, time runs"),
    ]
    rows = [Row(*case, 80.0, beside=FLOOR, beside_figure=40.0).to_dict() for case in cases]
    figures = {"checks": [{"models": 1, "threads": 1, "ns": 95.0, "median_ns": 96.0}]}
    peer = {"name": "limits", "version": "5", "one_limit_ns": 900.0, "six_limits_ns": 5_000.0}
    point = {"check_ns": 80.0, "check_floor_ns": 40.0, "batch_ns": 11.0, "batch_floor_ns": None}
    points = [{"models": 1, **point, "bytes_per_model": None}, {"models": 1_000, **point, "bytes_per_model": 2_700.0}]
    noted = {"rows": rows, "native": figures, "peers": [peer, {"name": "x", "unavailable": "no"}], "growth": points}
    return {"benchmarks": [{"extra_info": {}}, {"extra_info": noted}]}


def test_bars_are_drawn_from_one_run(results):
    kinds = [bar["kind"] for bar in report.bars(results)]
    assert kinds == ["ours"] * 4 + ["floor"] * 4 + ["native", "peer-one", "peer-six"]


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results))
    assert report.main(["--from", str(path), "--pictures", str(tmp_path / "made")]) == 0
    pictures = {each.name: each.read_bytes() for each in (tmp_path / "made").iterdir()}
    assert set(pictures) == {"comparison.svg", "growth.svg"}
    assert all(b"<svg" in picture for picture in pictures.values())


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmarks": []}'])
def test_nothing_to_draw_from(tmp_path, capsys, content):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(content)
    assert report.main(["--from", str(path), "--pictures", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


# -- timing


def test_loop_runs_its_statement_once_per_operation():
    seen = []
    loop = Loop("seen.append(each)", range(4 * UNROLLED), operations=2 * UNROLLED, seen=seen)
    assert loop.round_ns() > 0
    assert seen == [*range(2 * UNROLLED)]
    loop.round_ns()
    loop.round_ns()
    assert seen == [*range(4 * UNROLLED), *range(2 * UNROLLED)]


def test_loop_without_elements():
    seen = []
    Loop("seen.append(1)", operations=3 * UNROLLED, seen=seen).round_ns()
    assert len(seen) == 3 * UNROLLED


def test_empty_loop_does_nothing():
    seen = []
    assert Loop("seen.append(1)", operations=UNROLLED, seen=seen).empty_round_ns() > 0
    assert seen == []


def test_batch_round_divides_by_elements():
    seen = []
    assert batch_round([([1, 2], "a"), ([3], "b")], lambda *batch: seen.append(batch))() > 0
    assert seen == [([1, 2], "a"), ([3], "b")]


def test_least_of_rounds_takes_turns():
    calls = []

    def counting(name, values):
        figures = iter(values)
        return lambda: calls.append(name) or next(figures)

    least = least_of_rounds(3, ours=counting("ours", [3, 1, 2]), floor=counting("floor", [7, 8, 9]))
    assert least == {"ours": 1, "floor": 7}
    assert calls == ["ours", "floor"] * 3


# -- starting


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}


def test_every_benchmark_is_collected():
    assert collected("benchmarks") == {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("bench_*.py")}


def test_plain_pytest_runs_no_benchmark():
    files = collected()
    assert "tests/package/test_benchmarks.py" in files
    assert not [name for name in files if name.startswith("benchmarks")]
