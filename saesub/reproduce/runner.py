"""Runs the notebooks, one fresh kernel each; leaves executed copies, claims and a report."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from saesub.errors import SaesubError, near_names
from saesub.files import write_atomically
from saesub.paths import notebooks_dir, source_digest
from saesub.progress import QUIET
from saesub.reproduce import claims
from saesub.reproduce.report import Outcome, caveat, report_page, run_facts

PROFILES = ("smoke", "quick", "paper")


def find_notebooks(wanted: Sequence[str] = ()) -> list[Path]:
    """The notebooks in order, or those whose number or name is `wanted`.

    Raises `SaesubError` for a name that no notebook has, and when there are none at all.
    """
    known = {path.stem: path for path in sorted(notebooks_dir().glob("[0-9]*.ipynb"))}
    if not known:
        raise SaesubError(f"no notebooks in {notebooks_dir()}; reinstall saesub")
    chosen = set()
    for name in wanted:
        stem = Path(name).stem
        matches = [s for s in known if stem in (s, s.split("_")[0])]
        if not matches:
            raise SaesubError(f"no notebook {name!r}; {near_names(stem, known)}")
        chosen.update(matches)
    return [path for stem, path in known.items() if stem in chosen or not wanted]


def reproduce(
    profile: str = "quick",
    notebooks: Sequence[str] = (),
    results: str | Path = "results",
    *,
    again: bool = False,
    quiet: bool = False,
) -> list[Outcome]:
    """Executes the notebooks and writes `results/<profile>/`; a failing one stops no other.

    A notebook already finished with this saesub, text and profile is not run `again`.
    Raises `SaesubError` for an unknown profile or notebook, and where the disk is full or cannot be
    written.
    """
    if profile not in PROFILES:
        raise SaesubError(f"no profile {profile!r}; {near_names(profile, PROFILES)}")
    paths = find_notebooks(notebooks)
    folder = Path(results).resolve() / profile
    try:
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        with _kernel(folder, quiet) as peak_file:
            for path in paths:
                _run_unless_done(path, profile, folder, peak_file, again=again, quiet=quiet)
        outcomes = _outcomes(folder)
        _summarise(folder, profile, outcomes)
    except OSError as error:
        raise SaesubError(
            f"{folder} cannot be written ({error.strerror or error}): make room there and run it "
            "again, which goes on after the last finished notebook, or name another results folder"
        ) from error
    return [o for o in outcomes if o.name in {p.stem for p in paths}]


def _run_unless_done(
    path: Path, profile: str, folder: Path, peak_file: Path, *, again: bool, quiet: bool
) -> None:
    key = _key(path, profile)
    before = next((o for o in _outcomes(folder) if o.name == path.stem), None)
    if before and before.key == key and not before.error and not again:
        _say(f"{path.stem}: already done ({before.seconds:.0f} s); --again runs it again")
        return
    _say(f"{path.stem}: running")
    outcome = _execute(path, profile, folder, key, quiet)
    if peak_file.is_file():
        outcome = replace(outcome, peak_memory=json.loads(peak_file.read_text(encoding="utf-8")))
        peak_file.unlink()
    text = json.dumps(asdict(outcome), indent=1, ensure_ascii=False)
    write_atomically(_stamp(folder, path.stem), text)
    _say(f"{path.stem}: {outcome.error or 'done'} ({outcome.seconds:.0f} s)")


def _execute(path: Path, profile: str, folder: Path, key: str, quiet: bool) -> Outcome:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # The scorecard reads what the others leave, so it is out of date once any of them runs.
    stale = [*folder.glob(f"claims_{path.stem[:2]}*.json"), *(folder / "runs").glob("10_*.json")]
    for file in (*stale, _stamp(folder, path.stem)):
        file.unlink(missing_ok=True)
    start, error = time.monotonic(), ""
    out = folder / "notebooks" / path.name
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": not quiet,
        "cwd": str(folder),
    }
    try:
        papermill.execute_notebook(str(path), str(out), {"PROFILE": profile}, **options)
    except PapermillExecutionError as failure:
        error = f"failed in cell {_cell(path, failure.source)}: {failure.ename}: {failure.evalue}"
    except RuntimeError as failure:
        error = f"the kernel died ({failure})"
    return Outcome(path.stem, key, time.monotonic() - start, error, tuple(run_facts()))


def _cell(path: Path, source: str) -> int | str:
    """The failing cell's place in the notebook as given: papermill adds cells of its own."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return next((i for i, cell in enumerate(cells, 1) if cell.source == source), "of parameters")


@contextmanager
def _kernel(folder: Path, quiet: bool) -> Iterator[Path]:
    """A kernel spec for this very Python, found before any other; figures and results in place.

    Yields the file in which a kernel notes its peak memory.
    """
    with tempfile.TemporaryDirectory() as temporary:
        spec = Path(temporary) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        argv.append(f"--IPKernelApp.exec_files={Path(__file__).with_name('notebook_memory.py')}")
        argv.append("--IPKernelApp.log_level=ERROR")  # it warns of its own socket on loopback
        peak_file = Path(temporary) / "peak_memory.json"
        text = {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}
        (spec / "kernel.json").write_text(json.dumps(text), encoding="utf-8")
        search = os.pathsep.join(filter(None, [temporary, os.environ.get("JUPYTER_PATH")]))
        # A user's own MPLBACKEND (Agg, say) would leave the notebooks without their figures.
        inline = "module://matplotlib_inline.backend_inline"
        places = {"SAESUB_RESULTS": str(folder), "SAESUB_PEAK_MEMORY": str(peak_file)}
        bars = QUIET if quiet else {}
        with _environment(JUPYTER_PATH=search, MPLBACKEND=inline, **places, **bars):
            yield peak_file


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _key(path: Path, profile: str) -> str:
    parts = (source_digest().encode(), profile.encode(), path.read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _stamp(folder: Path, stem: str) -> Path:
    return folder / "runs" / f"{stem}.json"


def _outcomes(folder: Path) -> list[Outcome]:
    """Of the notebooks that were run; a damaged record is that of one that was not."""
    found = []
    for path in sorted((folder / "runs").glob("*.json")):
        with suppress(ValueError, TypeError):
            found.append(Outcome(**json.loads(path.read_bytes())))
    return found


def _summarise(folder: Path, profile: str, outcomes: list[Outcome]) -> None:
    rows = claims.collect(folder)
    write_atomically(folder / "claims.json", json.dumps(rows, indent=1, ensure_ascii=False))
    finished = {o.name for o in outcomes if not o.error}
    table = claims.scorecard(rows, whole=all(p.stem in finished for p in find_notebooks()))
    write_atomically(
        folder / "report.html", report_page(folder / "notebooks", profile, table, outcomes)
    )
    told = [str(table), caveat(profile), f"report: {folder / 'report.html'}"]
    print("\n" + "\n\n".join(filter(None, told)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
