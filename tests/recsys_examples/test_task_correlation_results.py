"""Results are written at once; a file of other settings is not resumed."""

import json
from dataclasses import replace

import pytest

from recsys_examples.errors import InputError
from recsys_examples.task_correlation.results import Result, ResultsFile

DEPENDS_ON = {"steps": 10, "learning_rates": (0.1, 0.2), "versions": {"keras": "3"}}
FIRST = Result("MMoE", 0.5, 0, 0.01, False, (0.1, 0.3), 1.5)
SECOND = replace(FIRST, model="PLE", tuning=True, losses=(1 / 3, 2e-7))
THIRD = replace(FIRST, run=1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    ResultsFile(path, DEPENDS_ON, resume=False).add([FIRST, SECOND])
    return path


def resumed(path, depends_on=DEPENDS_ON):
    return ResultsFile(path, depends_on, resume=True)


def test_the_loss_is_the_mean_of_the_tasks():
    assert FIRST.loss == pytest.approx(0.2)


def test_round_trip(path):
    file = resumed(path)
    assert file.results == [FIRST, SECOND]
    file.add([THIRD])
    assert file.results == [FIRST, SECOND, THIRD]
    del file
    assert resumed(path).results == [FIRST, SECOND, THIRD]
    lines = path.read_text().splitlines()
    assert [len(lines), json.loads(lines[0])["steps"]] == [4, 10]


def test_nothing_is_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(InputError, match="add --resume") as error:
        ResultsFile(path, DEPENDS_ON, resume=False)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 50])
def test_an_incomplete_last_line_is_dropped(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    file = resumed(path)
    assert file.results == [FIRST]
    # The next record is not appended to the incomplete line.
    file.add([THIRD])
    del file
    assert resumed(path).results == [FIRST, THIRD]


def test_an_incomplete_first_line(path):
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="no complete line"):
        resumed(path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="no study to resume") as error:
        resumed(tmp_path / "results.jsonl")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"model": "MMoE", "correl',
        "[1, 2]",
        "17",
        "",
        json.dumps({**vars(FIRST), "losses": [0.1, float("nan")]}),
        json.dumps({**vars(FIRST), "losses": [0.1, float("inf")]}),
        json.dumps({**vars(FIRST), "losses": [0.1, "0.3"]}),
        json.dumps({**vars(FIRST), "losses": []}),
        json.dumps({**vars(FIRST), "run": "0"}),
        json.dumps({**vars(FIRST), "run": True}),
        json.dumps({**vars(FIRST), "more": 0}),
        json.dumps({k: v for k, v in vars(FIRST).items() if k != "tuning"}),
    ],
)
def test_a_damaged_line_is_reported_by_number(path, line):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="line 3: ") as error:
        resumed(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 11), ("learning_rates", (0.1,)), ("versions", {"keras": "4"})],
)
def test_other_settings_are_reported_by_name(path, name, value):
    with pytest.raises(InputError, match=f"made with {name} = ") as error:
        resumed(path, {**DEPENDS_ON, name: value})
    assert "\n" not in str(error.value)


def test_an_additional_setting_raises(path):
    with pytest.raises(InputError, match="made with noise = None, this study has 1"):
        resumed(path, {**DEPENDS_ON, "noise": 1})


def test_a_loss_of_nan_is_not_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        resumed(path).add([replace(FIRST, losses=(float("nan"), 0.1))])
    assert path.read_bytes() == before


def test_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="cannot write to the output folder"):
        ResultsFile(tmp_path / "file" / "results.jsonl", DEPENDS_ON, resume=False)


def test_file_is_a_folder(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        resumed(tmp_path / "results.jsonl")
