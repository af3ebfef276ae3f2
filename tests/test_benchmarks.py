"""The command of the benchmarks: workers, comparison of files, the page."""

import importlib.util

import pytest

from tests.benchmarks import census, environments
from tests.benchmarks.__main__ import main
from tests.benchmarks.cases import PROFILES, SUITES, Bar, Case, Group, load_suite
from tests.benchmarks.census_rows import auc
from tests.benchmarks.compare import falls
from tests.benchmarks.display import duration_text
from tests.benchmarks.page import bar_ratio, markdown, reaches
from tests.benchmarks.results import Results, Row, Spread, ratio, read, write
from tests.benchmarks.timing import measure

TINY = "tests.support.tiny_workload"
MACHINE = {"processor": "P", "cores": 2, "memory_gib": 8, "system": "S", "python": "3"}


def tiny(series, **arguments):
    return Case(series, "own", TINY, arguments)


def group(*cases, **arguments):
    return Group("tiny", {"e": 1}, cases, cases[0].series, **arguments)


def row(series, seconds, *, ours=False, e=8, **figures):
    return Row(
        suite="mixtures",
        point={"model": "MMoE", "step": "training", "e": e},
        series=series,
        environment="own",
        baseline="DeepCTR",
        ours=ours,
        rounds={"seconds": seconds, **figures},
    )


# Workers.


def test_cases_are_measured_in_processes_that_take_turns():
    rows = measure(
        group(tiny("slow", milliseconds=30), tiny("quick", milliseconds=10), steps=2),
        PROFILES["fast"],
    )
    slow, quick = rows
    assert [found.status for found in rows] == ["measured", "measured"]
    assert len(slow.rounds["seconds"]) == PROFILES["fast"].rounds
    # Sleeping takes at least the time that is asked for.
    assert min(slow.rounds["seconds"]) >= 0.03
    assert ratio(slow, quick).median > 1.2
    assert slow.facts == {"parameters": 7, "versions": {}, "flops": 8.0}
    assert slow.resident_mib is None or slow.resident_mib > 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("make", "ValueError: cannot be made"),
        ("step", "ValueError: cannot be run"),
        ("death", 'the worker ended: {"seconds": 0}'),
    ],
)
def test_a_case_that_fails_leaves_the_others(fault, reason):
    rows = measure(group(tiny("good"), tiny("bad", fault=fault)), PROFILES["fast"])
    assert [found.status for found in rows] == ["measured", "failed"]
    assert rows[1].reason == reason
    assert rows[1].spread() is None


def test_what_takes_too_much_is_left_out():
    slow = tiny("slow", milliseconds=50)
    (found,) = measure(group(slow, max_seconds=0.01), PROFILES["fast"])
    assert (found.status, found.reason) == ("too large", "a step takes 0 s")
    large = tiny("large", milliseconds=2000)
    (found,) = measure(group(large, max_gib=0.001), PROFILES["fast"])
    assert (found.status, found.reason) == ("too large", "more than 0.001 GiB")


def test_an_environment_that_was_not_made_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    cases = [
        Case("peer", "torch", TINY),
        Case("no data", "own", TINY, missing="no rows"),
    ]
    rows = measure(group(*cases), PROFILES["fast"])
    assert [found.status for found in rows] == ["absent", "absent"]
    assert "is not made; run python -m tests.benchmarks setup torch" in rows[0].reason
    assert rows[1].reason == "no rows"
    with pytest.raises(ValueError, match=r"environment must be one of own, .*'none'"):
        environments.python_of("none")


# Suites.


@pytest.fixture
def no_census(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_MOE_DATA", raising=False)
    monkeypatch.setattr(census, "FOLDER", tmp_path)


@pytest.mark.usefixtures("no_census")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SUITES)
def test_suites_name_modules_environments_and_series_that_exist(name, profile):
    groups = load_suite(name).groups(profile)
    known = {environments.OWN, *environments.ENVIRONMENTS}
    for one in groups:
        assert one.suite == name
        for case in one.cases:
            assert case.environment in known
            assert importlib.util.find_spec(case.module) is not None
    if profile == "regular":
        series = {str(x.point): {case.series for case in x.cases} for x in groups}
        for bar in load_suite(name).BARS:
            assert {bar.series, bar.against} <= series[str(bar.point)], bar


@pytest.mark.usefixtures("no_census")
def test_without_its_rows_the_census_is_absent():
    (found,) = census.groups("fast")
    assert all("no data folder" in case.missing for case in found.cases)


def test_groups_are_checked():
    with pytest.raises(ValueError, match=r"must differ; got \['a', 'a'\]"):
        group(tiny("a"), tiny("a"))
    with pytest.raises(ValueError, match=r"baseline must be one of \['a'\]; got 'b'"):
        Group("tiny", {}, (tiny("a"),), "b")


def test_auc_of_five_rows():
    # Pairs of a positive and a negative: (.8, .3) and (.8, .5) are right, (.5, .3) is
    # right, (.5, .5) is a tie, (.2, .3) and (.2, .5) are wrong: 3.5 of 6.
    found = auc(*map(_array, ([1, 1, 1, 0, 0], [0.8, 0.5, 0.2, 0.3, 0.5])))
    assert found == pytest.approx(3.5 / 6)


def _array(values):
    import numpy as np

    return np.array(values, "float32")


# Files.


def test_a_ratio_is_taken_in_each_round():
    # 4/2, 6/2 and 8/4: the median is 2, the quartiles are 2 and 2.5.
    found = ratio(row("DeepCTR", [4.0, 6.0, 8.0]), row("ours", [2.0, 2.0, 4.0]))
    assert found == Spread(2.0, 2.0, 2.5)
    assert ratio(None, row("ours", [1.0])) is None


def test_results_are_read_as_they_were_written(tmp_path):
    results = Results("fast", MACHINE, rows=[row("DeepCTR", [1.0, 2.0], ours=True)])
    write(results, tmp_path / "new.json")
    assert read(tmp_path / "new.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]
    (tmp_path / "bad.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=r"bad\.json: not a file of results: format"):
        read(tmp_path / "bad.json")


def _pair(seconds, **figures):
    rows = [
        row("DeepCTR", [1.0, 1.0, 1.0], AUC=[0.9, 0.9, 0.9]),
        row("keras_moe", seconds, ours=True, **figures),
    ]
    return Results("fast", MACHINE, rows=rows)


def test_a_fall_is_flagged_and_noise_is_not():
    old = _pair([0.50, 0.50, 0.51], AUC=[0.9, 0.9, 0.9])
    assert not list(falls(old, _pair([0.40, 0.55, 0.90])))  # Noise.
    assert not list(falls(old, _pair([0.51, 0.51, 0.52])))  # 2 %.
    (found,) = falls(old, _pair([0.62, 0.62, 0.63]))
    assert found.what == (
        "mixtures: model = MMoE, step = training, e = 8: keras_moe, seconds"
    )
    assert (found.before.median, found.against) == (2.0, "DeepCTR")
    (found,) = falls(old, _pair([0.5, 0.5, 0.5], AUC=[0.89, 0.89, 0.89]))
    assert found.what.endswith("AUC")
    lost = _pair([0.5])
    lost.rows[1].status, lost.rows[1].reason = "failed", "no memory"
    (found,) = falls(old, lost)
    assert (found.after, found.reason) == (None, "failed: no memory")


def test_the_command_compares(tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.json") for name in ("old", "new")]
    for path, seconds in zip(paths, (0.5, 0.7), strict=True):
        write(_pair([seconds] * 3), environments.Path(path))
    assert main(["compare", *paths]) == 1
    assert "falls: 1; cases: 1" in capsys.readouterr().out
    assert main(["compare", paths[0], paths[0]]) == 0
    write(Results("fast", MACHINE, "2026-01-01T00:00:00", []), tmp_path / "none.json")
    none = str(tmp_path / "none.json")
    assert main(["compare", paths[0], none]) == 2
    assert "no measured case" in capsys.readouterr().err
    assert main(["page", none, "--docs", str(tmp_path)]) == 2
    assert main(["--only", "mixtures", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert main(["--only", "mixtures:e = 7"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "none"], "suite must be one of"),
        (["compare", "none.json", "none.json"], "not a file of results"),
        (["setup", "none"], "environment must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


# The page.


def test_the_page_has_goals_tables_and_a_picture(tmp_path):
    rows = [
        row("DeepCTR", [0.2, 0.2, 0.2]),
        row("keras_moe, FusedAdam", [0.1, 0.1, 0.1], ours=True),
        row("DeepCTR", [0.4, 0.4, 0.4], e=16),
        row("keras_moe, FusedAdam", [0.4, 0.4, 0.4], e=16, ours=True),
    ]
    rows[0].facts = {"parameters": 1000, "versions": {"deepctr": "0.9.4"}, "flops": 2e9}
    results = Results("fast", MACHINE, "2026-01-01T00:00:00", rows)
    text = markdown(results)
    assert "on 2026-01-01:\n2 cores of P, 8 GiB, S; deepctr 0.9.4." in text
    assert (
        "| MMoE training (FusedAdam) against DeepCTR (Adam), e = 8 | ≥ 1.25 "
        "| 2.00 ± 0.00 | yes |" in text
    )
    assert (
        "| MMoE training (FusedAdam) against DeepCTR (Adam), e = 16 | ≥ 1.25 "
        "| 1.00 ± 0.00 | no |" in text
    )
    assert "| speed, time | e = 8 | e = 16 |" in text
    assert (
        "| keras_moe, FusedAdam | 2.00 ± 0.00, 100 ms | 1.00 ± 0.00, 400 ms |" in text
    )
    assert "| DeepCTR | 10 |  |" in text  # GFLOP/s: 2 in 0.2 s.
    write(results, tmp_path / "x.json")
    assert main(["page", str(tmp_path / "x.json"), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "performance.md").read_text() == text
    picture = (tmp_path / "figures" / "performance.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_bar_may_be_an_upper_bound():
    results = _pair([1.2, 1.2, 1.2])
    bar = Bar("", 1.3, results.rows[0].point, "keras_moe", "DeepCTR", at_most=True)
    value = bar_ratio(bar, "mixtures", results)
    assert value.median == pytest.approx(1.2)
    assert reaches(bar, value)
    assert not reaches(bar, Spread(1.4, 1.4, 1.4))


def test_times_have_a_unit():
    assert duration_text(Spread(0.25, 0.2, 0.3)) == "250 ms (200 to 300)"
    assert duration_text(Spread(12, 11, 13)) == "12.0 s (11.0 to 13.0)"
    assert duration_text(Spread(5e-5, 4e-5, 6e-5)) == "50.0 µs (40.0 to 60.0)"
