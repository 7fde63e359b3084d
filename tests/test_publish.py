"""What is committed of a run agrees with itself: record, README, pages, figure and notebooks."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from saesub.errors import SaesubError
from saesub.reproduce import claims, claims_table, paper_claims, studies

ROOT = Path(__file__).resolve().parent.parent
publish = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))
RECORDS = publish["read_records"]()
FULL = RECORDS["full"]
FINDINGS = publish["FINDING_PAGES"]
CURE_FILE = ROOT / "data" / "results" / "studies" / "cure.json"


@pytest.mark.parametrize("page", publish["pages"](), ids=lambda page: page.name)
def test_every_page_shows_the_committed_records(page):
    text = page.read_text()
    told = "run `python notebooks/publish.py --pages`"
    assert publish["with_tables"](text, RECORDS) == text, told


@pytest.mark.parametrize(
    ("page", "name"),
    [
        *[("README.md", name) for name in ("figure", "summary", "cost", "titles")],
        *[("docs/findings.md", n) for n in ("verdicts", "cure", "notebooks")],
        ("docs/faults.md", "faults"),
        ("docs/architectures.md", "architectures"),
    ],
)
def test_every_table_stands_on_its_page(page, name):
    text = (ROOT / page).read_text()
    block = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert len(block.splitlines()) > (name != "figure")


def test_the_readmes_figure_is_drawn_from_the_committed_record():
    with Image.open(publish["FIGURE_FILE"]) as figure:
        assert figure.info["Description"] == publish["digest"](CURE_FILE.read_bytes())


ROWS = [row for recorded in FULL.values() for row in recorded["claims"]]
BOUNDS = json.loads(publish["BOUNDS_FILE"].read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_every_recorded_claim_is_in_its_notebook(row):
    (path,) = (ROOT / "notebooks").glob(f"{row['notebook']}_*.ipynb")
    last = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"][-1]
    shown = "".join(out.get("data", {}).get("text/html", "") for out in last.outputs)
    assert claims_table.html_row(row) in shown


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_notebook_has_a_record(record):
    names = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert set(record) == names


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_recorded_run_has_every_claim(record):
    def claimed(of):
        return [(row["notebook"], row["id"]) for run in of.values() for row in run["claims"]]

    assert claimed(record) == claimed(FULL)


def test_the_wheel_has_every_record_that_the_time_left_is_told_from():
    built = publish["tomllib"].loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"][
        "build"
    ]
    folders = {f"data/results/{profile}" for profile in RECORDS}
    assert folders <= set(built["targets"]["wheel"]["force-include"])
    assert folders <= set(built["targets"]["sdist"]["include"])


def test_a_run_of_some_notebooks_is_given_the_recorded_claims_of_the_others(tmp_path):
    (tmp_path / "claims_05.json").write_text("[]")
    publish["seed"](tmp_path)
    assert (tmp_path / "claims_05.json").read_text() == "[]"
    given = claims.collect(tmp_path)
    assert given == [row for row in ROWS if row["notebook"] != "05"]


def test_cleaning_drops_what_papermill_added_and_progress_bars():
    given = [
        new_output("stream", name="stderr", text="50%"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
        new_output("execute_result", {"text/plain": "1"}, execution_count=7),
    ]
    injected = new_code_cell("PROFILE = 'full'", metadata={"tags": ["injected-parameters"]})
    cell = new_code_cell("1", outputs=given, execution_count=7)
    cleaned = publish["cleaned"](new_notebook(cells=[injected, cell], metadata={"papermill": {}}))
    assert [c.source for c in cleaned.cells] == ["1"]
    assert cleaned.cells[0].execution_count == 1
    assert cleaned.cells[0].outputs == [given[2]]
    assert "papermill" not in cleaned.metadata


def test_no_file_is_large():
    """Weights and activations do not belong here; git keeps for ever what it was given once."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert not [f for f in files if f.is_file() and f.stat().st_size > 1_500_000]


def test_figures_are_kept_in_few_colours():
    colours = np.random.default_rng(0).integers(0, 256, (300, 300, 2), dtype=np.uint8)
    image, png = np.dstack([colours, 0 * colours[..., :1]]), BytesIO()
    Image.fromarray(image).save(png, "PNG")
    cell = new_code_cell("1", outputs=[_figure(png.getvalue())])
    (output,) = publish["cleaned"](new_notebook(cells=[cell])).cells[0].outputs
    kept = b64decode(output.data["image/png"])
    assert len(kept) < len(png.getvalue())
    shown = np.asarray(Image.open(BytesIO(kept)).convert("RGB")).astype(int)
    assert abs(shown - image).max() <= 32  # of 255, where 256 colours share a plane of all
    again = publish["cleaned"](new_notebook(cells=[cell])).cells[0].outputs[0]
    assert again == output  # taken over twice, it is the same


def test_what_is_transparent_in_a_figure_is_white():
    png = BytesIO()
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(png, "PNG", compress_level=0)
    small = Image.open(BytesIO(publish["in_few_colours"](png.getvalue()))).convert("RGB")
    assert small.getpixel((5, 5)) == (255, 255, 255)


def _figure(png):
    return new_output("display_data", {"image/png": b64encode(png).decode()})


def test_the_committed_bounds_are_of_known_claims_and_of_every_recorded_run():
    assert set(BOUNDS["claims"]) <= set(paper_claims.load_claims())
    assert set(BOUNDS["older_records"]) == {of["commit"] for of in BOUNDS["claims"].values()}
    assert set(BOUNDS["runs"]) == set(FULL)


def test_the_committed_bounds_are_those_of_the_history():
    try:
        found = publish["BOUNDS"]["bounds"](ROOT)["claims"]
    except SaesubError as error:
        pytest.skip(str(error))
    given = {claim: BOUNDS["claims"].get(claim) for claim in found}
    assert given == found, "run `python notebooks/publish.py --pages`"


HEADER = "id,claim,unit,holds_low,holds_high,direction_low,direction_high\n"


def _git(root, *arguments, date="2026-01-01T00:00:00+00:00"):
    given = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in ("AUTHOR", "COMMITTER"):
        given |= {f"GIT_{role}_{part}": "a@b.c" for part in ("NAME", "EMAIL")}
        given[f"GIT_{role}_DATE"] = date
    command = ["git", "-C", str(root), *arguments]
    return subprocess.check_output(command, text=True, env=os.environ | given).strip()


def _commit(root, rows, date):
    (root / "data" / "paper_claims.csv").write_text(HEADER + rows)
    _git(root, "add", "data/paper_claims.csv")
    _git(root, "commit", "-q", "-m", "bounds", date=date)
    return _git(root, "rev-parse", "HEAD")


def test_bounds_are_dated_by_the_commit_that_set_them(tmp_path):
    studies = tmp_path / "data" / "results" / "studies"
    studies.mkdir(parents=True)
    _git(tmp_path, "init", "-q")
    dates = ["2026-01-01T10:00:00+00:00", "2026-01-02T10:00:00+00:00"]
    first = _commit(
        tmp_path,
        "kept,Old title: same,share,0.60,,,1\nmoved,Same,share,0,,,1\n"
        "other,Title: of all,share,0,,,1\nbeyond,Title: same,share,0,,,1\n",
        dates[0],
    )
    # Another title, quotes, digits and order are no change; a bound, the measure, and whether the
    # claim counts for the paper are.
    second = _commit(
        tmp_path,
        'moved,Same,share,0,,,2\nkept,"New title: same",share,0.6,,,1.0\n'
        "other,Title: of one,share,0,,,1\nbeyond,Beyond the paper: same,share,0,,,1\n",
        dates[1],
    )
    (studies / "s.json").write_text(json.dumps({"runs": [{"commit": first}], "rows": []}))
    full = tmp_path / "data" / "results" / "full"
    full.mkdir()
    run = {
        "01_before": {
            "run": ["2026-01-02 10:30 UTC"],
            "seconds": 3600,
            "claims": [{"id": "moved", "value": 1.0}, {"id": "kept", "value": None}],
        },
        "02_after": {
            "run": ["2026-01-02 10:30 UTC"],
            "seconds": 60,
            "claims": [{"id": "other", "value": 1.0, "record": second}],
        },
        "03_first": {
            "run": ["2026-01-01 10:30 UTC"],
            "seconds": 3600,
            "claims": [{"id": "beyond", "value": 1.0, "record": ""}],
        },
    }
    (full / "run.json").write_text(json.dumps(run))
    bounds = publish["BOUNDS"]["bounds"]
    found = bounds(tmp_path)
    first, second = first[:9], second[:9]
    assert found == {
        "claims": {
            "moved": {"commit": second, "date": dates[1]},
            "kept": {"commit": first, "date": dates[0]},
            "other": {"commit": second, "date": dates[1]},
            "beyond": {"commit": second, "date": dates[1]},
        },
        "older_records": {second: [first], first: []},
        "runs": {"01_before": first, "02_after": second},
        "first_runs": {"moved": first},
    }
    publish["BOUNDS"]["write_bounds"](tmp_path)
    assert json.loads((tmp_path / "data" / "results" / "bounds.json").read_text()) == found

    # A later run of the same claim does not move its first; its own file is committed by now.
    _git(tmp_path, "add", "data/results/full")
    _git(tmp_path, "commit", "-q", "-m", "run", date=dates[1])
    run["01_before"]["run"] = ["2026-01-03 10:30 UTC"]
    (full / "run.json").write_text(json.dumps(run))
    again = bounds(tmp_path)
    assert again["runs"]["01_before"] not in (first, second)
    assert again["first_runs"] == {"moved": first}

    (studies / "s.json").write_text(json.dumps({"commit": "0" * 40}))
    assert bounds(tmp_path)["older_records"][first] == ["0" * 9], "no history shows it later"
    with (tmp_path / "data" / "paper_claims.csv").open("a") as file:
        file.write("new,Not committed,share,,,,\n")
    assert set(bounds(tmp_path)["claims"]) == {"moved", "kept", "other", "beyond"}


def test_a_shortened_or_missing_history_is_refused(tmp_path):
    (tmp_path / "whole" / "data").mkdir(parents=True)
    _git(tmp_path, "init", "-q", "whole")
    for unit in ("a", "b"):
        _commit(tmp_path / "whole", f"F1.x,Text,{unit},,,,\n", "2026-01-01T00:00:00+00:00")
    _git(tmp_path, "clone", "-q", "--depth", "1", f"file://{tmp_path}/whole", "cut")
    with pytest.raises(SaesubError, match="unshallow"):
        publish["BOUNDS"]["bounds"](tmp_path / "cut")
    with pytest.raises(SaesubError, match="in a checkout"):
        publish["BOUNDS"]["bounds"](tmp_path / "none")


def _trained(condition, lr, seed, validation, dead, fvu, d_sae=8192):
    """A row of a study."""
    return {
        **{"model": "smollm2-135m", "hook_name": "blocks.12.hook_attn_out", "d_sae": d_sae},
        **{"condition": condition, "lr": lr, "seed": seed, "validation_fvu": validation},
        **{"dead_share": dead, "fvu": fvu, "k": 32, "n_train": 1_024_000, "n_judged": 256_000},
    }


CURE = pd.DataFrame(
    [
        _trained("ASI", 1e-3, 0, 0.180, 0.01, 0.170),
        _trained("ASI", 1e-3, 1, 0.190, 0.02, 0.172),
        _trained("ASI", 2e-3, 0, 0.181, 0.30, 0.160),  # fits as well, and better where not chosen
        _trained("ASI", 2e-3, 1, 0.190, 0.32, 0.160),
        _trained("ASI", 5e-4, 0, 0.200, 0.00, 0.191),
        _trained("random", 2e-3, 0, 0.18, 0.40, 0.180),
        _trained("random", 2e-3, 1, 0.17, 0.50, 0.182),
        _trained("random", 1e-3, 0, 0.20, 0.10, 0.184),
        _trained("whitened start", 1e-3, 0, 0.10, 0.00, 0.150),
        _trained("random", 1e-3, 0, 0.20, 0.05, 0.190, d_sae=4096),
    ]
)


@pytest.fixture
def cure(monkeypatch):
    """The study of the cure, made up."""
    study = studies.Study("cure", CURE, [])
    monkeypatch.setattr(studies, "recorded", lambda name: study)


def test_the_readmes_figure_shows_every_rate_and_names_those_that_fit_as_well(cure):
    rows = publish["readme_rows"]()
    shown = rows[["condition", "lr", "seed", "best", "as_good"]].to_numpy().tolist()
    assert shown == [
        ["random", 1e-3, 0, False, False],
        ["random", 2e-3, 0, True, True],
        ["random", 2e-3, 1, True, True],
        ["ASI", 5e-4, 0, False, False],
        ["ASI", 1e-3, 0, True, True],
        ["ASI", 1e-3, 1, True, True],
        ["ASI", 2e-3, 0, False, True],
        ["ASI", 2e-3, 1, False, True],
    ]
    caption = publish["figure_caption"](rows)
    assert "TopK SAEs of 8,192 features (k 32)" in caption
    assert "random 45 % (0.002); ASI 1.5 % (0.001), 31 % (0.002). At the FVU" in caption
    assert "of random's best rate, ASI loses 0.75 %" in caption  # half of 1.5, at 0.181
    assert "0.75 % (between 0.0005 and 0.001; we added" in caption
    assert "256,000 held-out tokens, 1,000 firings a feature." in caption


def test_a_page_shows_the_rates_that_fit_best_or_as_well_by_width(cure):
    assert publish["cure_table"](publish["cure_rows"]()).splitlines()[2:] == [
        "| `blocks.12.hook_attn_out` | 4,096 | random | 0.001, best | 5.00 % [5.00, 5.00] | 0.1900 "
        "[0.1900, 0.1900] | 1 |",
        "| `blocks.12.hook_attn_out` | 8,192 | ASI | 0.001, best | 1.50 % [1.00, 2.00] | 0.1710 "
        "[0.1700, 0.1720] | 2 |",
        "| `blocks.12.hook_attn_out` | 8,192 | ASI | 0.002 | 31.00 % [30.00, 32.00] | 0.1600 "
        "[0.1600, 0.1600] | 2 |",
        "| `blocks.12.hook_attn_out` | 8,192 | random | 0.002, best | 45.00 % [40.00, 50.00] | "
        "0.1810 [0.1800, 0.1820] | 2 |",
        "| `blocks.12.hook_attn_out` | 8,192 | whitened start | 0.001, best | 0.00 % [0.00, 0.00] "
        "| 0.1500 [0.1500, 0.1500] | 1 |",
    ]


def test_a_sweep_has_a_column_for_each_share_of_the_width():
    rows = [
        {"model": "smollm2-135m", "hook_name": "h", "start": start, "d_init": d_init}
        | {"dead_share": dead, "d_init_share": share}
        for start, d_init, share, dead in [
            ("random", "auto", 1.0, 0.5),
            ("subspace", "auto", 0.28, 0.1),
            ("subspace", 58, 58 / 576, 0.2),
            ("subspace", 58, 58 / 576, 0.4),
            ("subspace", 576, 1.0, 0.25),
        ]
    ]
    assert publish["sizes_table"](pd.DataFrame(rows)).splitlines() == [
        '| Model | Hook point | 0.1 | 1 | "auto" |',
        "|---|---|---:|---:|---:|",
        "| smollm2-135m | `h` | 30.00 % | 25.00 % | 10.00 % |",
    ]


def test_the_cost_is_summed_over_the_recorded_runs():
    registry = {kind: {name: {} for name in names} for kind, names in publish["FETCHED"].items()}
    registry["models"]["gemma3-270m"] = {"files": [{"size": 10**9}, {"size": 2 * 10**9}]}
    cores = "EPYC (family 25, model 17), 2 cores, 1 thread"
    record = {
        "00": {"seconds": 3000, "peak_memory": {"cpu": 10**9}, "run": ["Python", cores]},
        "01": {"seconds": 1260, "peak_memory": {"cpu": 3 * 10**9}, "run": ["EPYC, 2 cores"]},
    }
    registry["models"]["qwen2.5-coder-0.5b"] = {"files": [{"size": 10**9}]}
    quick = {"00": record["00"] | {"seconds": 2000}}
    head, _, small, whole = publish["cost_table"](
        {"quick": quick, "full": record}, registry
    ).splitlines()
    assert "| Time without a GPU (EPYC, 2 cores) |" in head
    assert small == "| `make reproduce` | 33 min | 1.0 GB | 3.0 GB |"
    assert whole == "| `PROFILE=full make reproduce` | 1 h 11 min | 3.0 GB | 4.0 GB |"


def test_processors_share_the_name_of_their_cores_only_if_they_have_as_many():
    of = publish["_machines"]
    assert of(["A, 2 cores", "B, C, 2 cores"]) == "A or B, C, 2 cores"
    assert of(["A, 2 cores", "B, 16 cores"]) == "A, 2 cores; B, 16 cores"
    assert of([]) == ""


def test_the_readme_says_how_much_worse_a_subspace_start_fits_at_most():
    def row(architecture, condition, fvu):
        return {
            "architecture": architecture,
            "condition": condition,
            "lr": 1e-3,
            "seed": 0,
            "dead_share": 0.1,
            "fvu": fvu,
        }

    conditions = ["random, kept", "random, fitted", "subspace, kept", "subspace, fitted"]
    fvus = {"topk, k 32": (0.2, 0.2, 0.2, 0.19), "gated": (0.1, 0.2, 0.105, 0.22)}
    rows = [
        row(name, *one) for name, of in fvus.items() for one in zip(conditions, of, strict=True)
    ]
    settings = {"d_sae": 8, "batch": 2, "steps": 3}
    told = publish["norm_sentence"]({"settings": settings, "rows": rows})
    assert "fits worse, by up to 10 %." in told


def test_the_download_counts_every_packaged_file_that_a_notebook_names():
    registry = publish["tomllib"].loads(publish["REGISTRY"].read_text())
    sources = [
        cell.source
        for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]
    named = {
        (kind, name)
        for kind, entries in registry.items()
        for name, entry in entries.items()
        if entry.get("files") and f'"{name}"' in "\n".join(sources)
    }
    counted = {(kind, name) for kind, names in publish["FETCHED"].items() for name in names}
    assert named - counted == {("corpora", "legal")}  # at `paper` only
    assert counted <= named
    assert {name for _, name in counted} >= set(publish["NOT_AT_QUICK"])


RECORDED = {"run": ["a processor, 8 cores, 2 threads"], "seconds": 720}
NOTEBOOK_MARKS = "<!-- notebooks -->\n<!-- /notebooks -->"
MEASURED = RECORDED | {"peak_memory": {"cpu": 3_140_000_000}}


def test_the_first_cell_tells_what_the_recorded_run_took():
    end = "; a GPU is used if there is one. More."
    head = "# T\n\n{}Run time at `full`, whose outputs are shown: "
    before = head.format("") + f"9 s on 2 CPU cores, 4 GB of memory{end}"
    assert f"12 min on 2 CPU threads, 4 GB of memory{end}" in publish["with_run_time"](
        before, RECORDED
    )
    told = publish["with_run_time"](before, MEASURED)
    assert (
        "shown: 12 min on 2 CPU threads, peak memory 3.1 GB "
        f"(on a T4 of 16 GB, by estimate, no more of either){end}"
    ) in told
    assert publish["with_run_time"](told, MEASURED) == told
    assert publish["with_run_time"](told, RECORDED) == told

    on_gpu = MEASURED | {"peak_memory": {"cpu": 10**9, "gpu": 2 * 10**9}}
    told = publish["with_run_time"](told, on_gpu)
    assert f"peak memory 1.0 GB, 2.0 GB of GPU memory{end}" in told
    assert publish["with_run_time"](told, on_gpu) == told

    small = publish["with_run_time"](told, on_gpu, {"seconds": 120})
    assert small.startswith(head.format("Run time at `quick`: 2 min. ") + "12 min")
    assert publish["with_run_time"](small, on_gpu, {"seconds": 45}).startswith(
        head.format("Run time at `quick`: 45 s. ") + "12 min"
    )
    assert publish["with_run_time"](small, on_gpu) == told


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem
)
def test_every_first_cell_takes_a_measured_run(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.count("Run time at `full`, whose outputs are shown: ") == 1
    quick = RECORDS.get("quick", {}).get(path.stem)
    assert publish["with_run_time"](first, FULL[path.stem], quick) == first
    told = publish["with_run_time"](first, MEASURED)
    assert told.count("GB") == 2 + first.count("GB of disk") + first.count("with 80 GB")
    assert publish["with_run_time"](told, MEASURED) == told


def test_the_table_of_notebooks_has_peak_memory_once_a_run_recorded_it():
    bare = {name: r | {"peak_memory": {}, "seconds": 60} for name, r in FULL.items()}
    assert "Peak memory" not in publish["with_tables"](NOTEBOOK_MARKS, {"full": bare})
    bare["00_tour"]["peak_memory"] = {"cpu": 3_140_000_000}
    records = {"quick": {"00_tour": bare["00_tour"] | {"seconds": 20}}, "full": bare}
    head, _, first, second, *_ = publish["with_tables"](NOTEBOOK_MARKS, records).splitlines()[1:]
    assert head.endswith("| Time at `quick` | Time at `full` | Peak memory at `full` |")
    assert first.endswith("| 20 s | 60 s | 3.1 GB |")
    assert second.endswith("| – | 60 s | – |")


def test_a_run_with_another_install_cell_is_taken_and_one_with_other_code_is_not(tmp_path):
    def written(name, *cells):
        nbformat.write(new_notebook(cells=[*cells]), tmp_path / name)
        return tmp_path / name

    def code(*sources):
        return map(new_code_cell, sources)

    injected = new_code_cell('PROFILE = "full"', metadata={"tags": ["injected-parameters"]})
    ran = written("ran.ipynb", injected, *code("%pip install old", "1 + 1"))
    kept = written("kept.ipynb", *code("%pip install new", "1 + 1"))
    taken = publish["_executed"](ran, kept, "full")
    assert [c.source for c in taken.cells] == ["%pip install new", "1 + 1"]
    with pytest.raises(SaesubError, match="did not run at the quick profile"):
        publish["_executed"](ran, kept, "quick")
    kept = written("kept.ipynb", *code("%pip install new", "1 + 2"))
    with pytest.raises(SaesubError, match="other code"):
        publish["_executed"](ran, kept, "full")


def test_a_quick_run_leaves_its_record_and_the_outputs_as_they_are(tmp_path, monkeypatch):
    head = "# T\n\nRun time at `full`, whose outputs are shown: 12 min on 2 CPU threads."
    shown = new_code_cell("1 + 1", outputs=[new_output("stream", text="of full")])
    cells = [new_markdown_cell(head), new_code_cell("%pip install it"), shown]
    for folder in ("notebooks", "quick/notebooks", "quick/runs", "data/results/quick"):
        (tmp_path / folder).mkdir(parents=True)
    source = tmp_path / "notebooks" / "00_tour.ipynb"
    nbformat.write(new_notebook(cells=cells), source)
    injected = new_code_cell('PROFILE = "quick"', metadata={"tags": ["injected-parameters"]})
    ran = [injected, cells[1], new_code_cell("1 + 1")]
    nbformat.write(new_notebook(cells=ran), tmp_path / "quick" / "notebooks" / "00_tour.ipynb")
    stamp = {"error": "", "facts": RECORDED["run"], "seconds": 119.6, "peak_memory": {"cpu": 10**9}}
    (tmp_path / "quick" / "runs" / "00_tour.json").write_text(json.dumps(stamp))
    written = {"ROOT": tmp_path, "RESULTS": tmp_path / "data" / "results"}
    written |= {"write_pages": list, "read_records": lambda: {"full": {"00_tour": RECORDED}}}
    for name, value in written.items():
        monkeypatch.setitem(publish["publish"].__globals__, name, value)

    publish["publish"](tmp_path / "quick")
    record = json.loads((tmp_path / "data" / "results" / "quick" / "run.json").read_text())
    assert record["00_tour"] == {
        "run": RECORDED["run"],
        "seconds": 120,
        "peak_memory": {"cpu": 10**9},
        "claims": [],
    }
    kept = nbformat.read(source, as_version=4).cells
    assert kept[0].source.startswith("# T\n\nRun time at `quick`: 2 min. Run time at `full`, whose")
    assert kept[2].outputs[0].text == "of full"
    with pytest.raises(SaesubError, match="no published profile"):
        publish["publish"](tmp_path / "smoke")
