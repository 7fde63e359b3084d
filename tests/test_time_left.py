"""The time left of a run of the notebooks: its arithmetic, its words, and when it is told."""

from __future__ import annotations

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from saesub import cli, paths
from saesub.reproduce import runner
from saesub.reproduce.report import Outcome
from saesub.reproduce.time_left import _EXPECTED_BEFORE, progress, recorded_seconds, seconds_left

EXPECTED = {"00": 300.0, "01": 600.0, "02": 1200.0}


def test_before_anything_ran_the_record_is_believed():
    assert seconds_left(EXPECTED, {}, ["00", "01", "02"]) == 2100
    assert seconds_left(EXPECTED, {}, ["02"]) == 1200
    assert seconds_left(EXPECTED, {}, []) == 0


def test_finished_notebooks_scale_the_rest_by_this_machines_speed():
    as_recorded = {"00": 300.0, "01": 600.0}
    twice = {name: 2 * seconds for name, seconds in as_recorded.items()}
    assert seconds_left(EXPECTED, as_recorded, ["02"]) == 1200
    slower = seconds_left(EXPECTED, twice, ["02"])
    assert slower == 1200 * (1800 + _EXPECTED_BEFORE) / (900 + _EXPECTED_BEFORE)
    assert 2100 < slower < 2400


def test_a_first_notebook_that_fetched_a_model_says_little():
    fetched = seconds_left({"00": 20.0, "01": 600.0}, {"00": 120.0}, ["01"])
    assert fetched is not None
    assert 600 < fetched < 1200


def test_without_a_record_of_each_notebook_to_run_no_time_is_told():
    assert seconds_left({}, {"00": 300.0}, ["01"]) is None
    assert seconds_left(EXPECTED, {}, ["02", "03"]) is None
    assert seconds_left(EXPECTED, {"03": 5.0}, ["02"]) == 1200  # one that ran need not be recorded


def test_progress_in_words():
    names, done = list(EXPECTED), Outcome("00", "", 300.0)
    assert progress(names, {}, EXPECTED) == "0 of 3 done, about 35 min left"
    assert progress(names, {"00": done}, EXPECTED) == "1 of 3 done, about 30 min left"
    ended = {"00": done, "01": Outcome("01", "", 600.0)}
    assert progress(names, ended, EXPECTED) == "2 of 3 done, about 20 min left"
    assert progress(names, ended | {"02": done}, EXPECTED) == "3 of 3 done"
    assert progress(names, {"00": done}, {}) == "1 of 3 done"
    assert progress(["00"], {}, {"00": 3.0}) == "0 of 1 done, about 1 min left"
    assert progress(["00"], {}, {"00": 10_740.0}) == "0 of 1 done, about 2 h 59 min left"


def test_a_failed_notebook_is_not_done_takes_no_more_time_and_scales_nothing():
    failed = Outcome("01", "", 1.0, error="failed in cell 4")
    ended = {"00": Outcome("00", "", 300.0), "01": failed}
    told = progress(list(EXPECTED), ended, EXPECTED)
    assert told == "1 of 3 done, 1 failed, about 20 min left"


def test_the_committed_records_know_every_notebook():
    names = {path.stem for path in runner.find_notebooks()}
    assert recorded_seconds("full").keys() == names
    assert recorded_seconds("smoke") == {}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Three empty notebooks, recorded at 5, 10 and 20 minutes; the names of those that were run."""
    for name in ("00_one", "11_two", "12_scorecard"):
        parameters = new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[parameters]), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(runner, "notebooks_dir", lambda: tmp_path)
    monkeypatch.setattr(runner, "recorded_seconds", lambda _: RECORDED)
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def execute(path, profile, folder, quiet):
        names.append(path.stem)
        (folder / "runs").mkdir(exist_ok=True)
        for stale in folder.glob("runs/12_*.json"):
            stale.unlink()
        return Outcome(path.stem, "", RECORDED[path.stem])

    monkeypatch.setattr(runner, "_execute", execute)
    return names


RECORDED = {"00_one": 300.0, "11_two": 1200.0, "12_scorecard": 600.0}


def _told(capsys, *arguments: str) -> list[str]:
    assert cli.main(["reproduce", "--profile", "smoke", *arguments]) == 0
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_the_command_tells_the_time_left_of_the_whole_run(ran, capsys, quiet):
    assert _told(capsys, *quiet) == [
        "00_one: running (0 of 3 done, about 35 min left)",
        "00_one: done (300 s; 1 of 3 done, about 30 min left)",
        "11_two: running (1 of 3 done, about 30 min left)",
        "11_two: done (1200 s; 2 of 3 done, about 10 min left)",
        "12_scorecard: running (2 of 3 done, about 10 min left)",
        "12_scorecard: done (600 s; 3 of 3 done)",
    ]
    assert all("already done" in line for line in _told(capsys))
    assert _told(capsys, "--again")[0] == "00_one: running (0 of 3 done, about 35 min left)"
    assert ran == ["00_one", "11_two", "12_scorecard"] * 2


def test_what_is_already_done_takes_no_more_time_but_the_scorecard_runs_again(ran, capsys):
    _told(capsys, "--notebook", "00", "12")
    assert _told(capsys)[:2] == [
        "00_one: already done (300 s); --again runs it again",
        "11_two: running (1 of 3 done, about 30 min left)",
    ]
    assert ran == ["00_one", "12_scorecard", "11_two", "12_scorecard"]


def test_of_some_notebooks_only_these_are_counted(ran, capsys):
    assert (
        _told(capsys, "--notebook", "11")[0] == "11_two: running (0 of 1 done, about 20 min left)"
    )


def test_a_run_without_a_record_tells_how_many_are_done(ran, capsys, monkeypatch):
    monkeypatch.setattr(runner, "recorded_seconds", lambda _: {})
    assert _told(capsys)[:2] == [
        "00_one: running (0 of 3 done)",
        "00_one: done (300 s; 1 of 3 done)",
    ]


def test_the_record_that_is_read_is_that_of_the_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_ROOT", tmp_path)
    file = tmp_path / "data" / "results" / "quick" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"00_one": {"seconds": 7, "claims": []}}))
    assert recorded_seconds("quick") == {"00_one": 7}
    assert recorded_seconds("full") == {}


def test_a_notebook_changed_while_it_ran_is_not_done(ran, capsys, monkeypatch, tmp_path):
    execute = runner._execute

    def changing(path, profile, folder, quiet):
        outcome = execute(path, profile, folder, quiet)
        path.write_text(path.read_text() + "\n")
        return outcome

    monkeypatch.setattr(runner, "_execute", changing)
    _told(capsys, "--notebook", "00")
    assert "running" in _told(capsys, "--notebook", "00")[0]
