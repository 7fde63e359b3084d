"""Runs the notebooks, each in a fresh kernel, and writes executed copies, claims and a report."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from saesub.errors import SaesubError, near_names, needs_extra
from saesub.files import write_atomically
from saesub.paths import data_digest, library_versions, notebooks_dir, source_digest
from saesub.progress import QUIET
from saesub.reproduce import claims
from saesub.reproduce.report import Outcome, caveat, report_page, run_facts
from saesub.reproduce.time_left import progress, recorded_seconds

with needs_extra("saesub reproduce"):
    import nbformat
    import papermill
    from ipykernel.kernelspec import make_ipkernel_cmd
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from papermill.exceptions import PapermillExecutionError

PROFILES = ("smoke", "quick", "full", "paper")
_SCORECARD = "12"


def find_notebooks(wanted: Sequence[str] = ()) -> list[Path]:
    """The notebooks in the order in which they run, or those whose number or name is `wanted`.

    The scorecard has the last number, since it reads what the others write.

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


def _is_scorecard(path: Path) -> bool:
    return path.stem.split("_")[0] == _SCORECARD


def reproduce(
    profile: str = "quick",
    notebooks: Sequence[str] = (),
    results: str | Path = "results",
    *,
    again: bool = False,
    quiet: bool = False,
) -> list[Outcome]:
    """Executes the notebooks and writes `results/<profile>/`; a failing one does not stop the rest.

    Tells how far it is as each one starts and ends, and how long the rest takes where a run of this
    profile is recorded.
    A notebook that already finished with this code, data, text, profile and these versions of the
    libraries runs only if `again`.
    Raises `SaesubError` for an unknown profile or notebook, and if the disk is full or cannot be
    written.
    """
    if profile not in PROFILES:
        raise SaesubError(f"no profile {profile!r}; {near_names(profile, PROFILES)}")
    paths = find_notebooks(notebooks)
    folder = Path(results).resolve() / profile
    try:
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        done = {} if again else _done(paths, profile, folder)
        _run_the_rest(paths, done, profile, folder, quiet)
        outcomes = _outcomes(folder)
        _summarise(folder, profile, outcomes)
    except OSError as error:
        raise SaesubError(
            f"{folder} cannot be written ({error.strerror or error}): make room there and run it "
            "again (it continues after the last finished notebook), or name another results folder"
        ) from error
    return [o for o in outcomes if o.name in {p.stem for p in paths}]


def _done(paths: Sequence[Path], profile: str, folder: Path) -> dict[str, Outcome]:
    """The outcomes of those that finished with this code, data, text, profile and libraries."""
    before = {outcome.name: outcome for outcome in _outcomes(folder) if not outcome.error}
    found = [(path, before[path.stem]) for path in paths if path.stem in before]
    done = {path.stem: o for path, o in found if o.key == _key(path, profile)}
    if any(path.stem not in done for path in paths):  # the scorecard is out of date once it has run
        done = {name: o for name, o in done.items() if not _is_scorecard(Path(name))}
    return done


def _run_the_rest(
    paths: Sequence[Path], done: dict[str, Outcome], profile: str, folder: Path, quiet: bool
) -> None:
    names, expected, ended = [path.stem for path in paths], recorded_seconds(profile), dict(done)
    for path in paths:
        name = path.stem
        if name in done:
            _say(f"{name}: already done ({done[name].seconds:.0f} s); --again runs it again")
            continue
        _say(f"{name}: running ({progress(names, ended, expected)})")
        key = _key(path, profile)  # of the text that runs, whatever is written meanwhile
        outcome = replace(_execute(path, profile, folder, quiet), key=key)
        text = json.dumps(asdict(outcome), indent=1, ensure_ascii=False)
        write_atomically(folder / "runs" / f"{name}.json", text)
        ended[name] = outcome
        told = f"{outcome.seconds:.0f} s; {progress(names, ended, expected)}"
        _say(f"{name}: {outcome.error or 'done'} ({told})")


def _key(path: Path, profile: str) -> str:
    """A hash of what a notebook's result depends on."""
    deciding = (source_digest(), data_digest(), library_versions(), profile, "")
    others = "\0".join(deciding).encode()
    return hashlib.sha256(others + path.read_bytes()).hexdigest()


def _execute(path: Path, profile: str, folder: Path, quiet: bool) -> Outcome:
    # The scorecard reads what the others write, so it is out of date once any of them runs.
    runs = folder / "runs"
    stale = [*folder.glob(f"claims_{path.stem[:2]}*.json"), *runs.glob(f"{_SCORECARD}_*.json")]
    figures = folder / "figures" / f"{path.stem}.jsonl"
    for file in (*stale, figures, runs / f"{path.stem}.json"):
        file.unlink(missing_ok=True)
    start, error, peak = time.monotonic(), "", {}
    with tempfile.TemporaryDirectory() as temporary:
        peak_file = Path(temporary) / "peak_memory.json"
        options = {
            "kernel_name": "python3",
            "language": "python",
            "kernel_manager_class": _kernel_manager(folder, peak_file, figures, quiet),
            "progress_bar": not quiet,
            "cwd": str(folder),
        }
        out = folder / "notebooks" / path.name
        try:
            papermill.execute_notebook(str(path), str(out), {"PROFILE": profile}, **options)
        except PapermillExecutionError as failure:
            place = _cell(path, failure.source)
            error = f"failed in cell {place}: {failure.ename}: {failure.evalue}"
        except RuntimeError as failure:
            error = f"the kernel died ({failure})"
        if peak_file.is_file():
            peak = json.loads(peak_file.read_text(encoding="utf-8"))
    return Outcome(path.stem, "", time.monotonic() - start, error, tuple(run_facts()), peak)


def _kernel_manager(
    folder: Path, peak_file: Path, figures: Path, quiet: bool
) -> type[AsyncKernelManager]:
    """Starts kernels of this very Python, whatever kernel specs the user has installed."""
    memory = Path(__file__).with_name("notebook_memory.py")
    arguments = [f"--IPKernelApp.exec_files={memory}"]
    arguments.append("--IPKernelApp.log_level=ERROR")  # it warns of its own socket on loopback
    environment = {
        "SAESUB_RESULTS": str(folder),
        "SAESUB_PEAK_MEMORY": str(peak_file),
        "SAESUB_FIGURES": str(figures),
        # A user's own MPLBACKEND (Agg, say) would leave the notebooks without their figures.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    } | (QUIET if quiet else {})
    command = make_ipkernel_cmd(extra_arguments=arguments)
    spec = KernelSpec(argv=command, language="python", env=environment)
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": spec})


def _cell(path: Path, source: str) -> int | str:
    """The failing cell's place in the notebook as given: papermill adds cells of its own."""
    cells = nbformat.read(path, as_version=4).cells
    return next((i for i, cell in enumerate(cells, 1) if cell.source == source), "of parameters")


def _outcomes(folder: Path) -> list[Outcome]:
    """Of the notebooks that were run; one with a damaged record counts as not run."""
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
    keys = {path.stem: _key(path, profile) for path in find_notebooks()}
    old = [o.name for o in outcomes if keys.get(o.name, o.key) != o.key]
    kept = f"Results of other code, data or text, to be run again: {', '.join(old)}" * bool(old)
    told = [str(table), caveat(profile), kept, f"report: {folder / 'report.html'}"]
    print("\n" + "\n\n".join(filter(None, told)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
