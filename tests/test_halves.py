"""`make test-all`: both halves run, side by side where there are cores, and a failure is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import halves
import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = """import os, pytest
def test_quick():
    {quick}
@pytest.mark.slow
def test_slow():
    {slow}
def test_threads(): assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def _run(folder: Path, capfd, monkeypatch, quick: str, slow: str) -> tuple[int, str]:
    """Both halves of a file of their own; the status and what is shown."""
    (folder / "test_it.py").write_text(FILE.format(quick=quick, slow=slow))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    monkeypatch.setattr(halves, "ROOT", folder)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than the tests
    status = halves.main(["-q", "-p", "no:cacheprovider", str(folder)])
    return status, capfd.readouterr().out


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("quick", "slow", "status", "told"),
    [
        ("pass", "pass", 0, "not slow: passed\nslow: passed"),
        ("assert 0", "pass", 1, "not slow: FAILED (status 1)\nslow: passed"),
        ("pass", "assert 0", 1, "not slow: passed\nslow: FAILED (status 1)"),
        ("pass", "os._exit(9)", 9, "not slow: passed\nslow: FAILED (status 9)"),
    ],
)
def test_the_status_and_the_output_are_those_of_both(
    tmp_path, capfd, monkeypatch, cores, quick, slow, status, told
):
    monkeypatch.setattr(halves, "cores", lambda: cores)
    found, shown = _run(tmp_path, capfd, monkeypatch, quick, slow)
    assert found == status
    assert shown.endswith(f"{told}\n")
    assert len(re.findall(r"\d (?:passed|failed).* in ", shown)) == (1 if status == 9 else 2)
    if quick == "pass":
        assert "2 passed, 1 deselected" in shown
    if slow == "assert 0":
        assert "FAILED" in shown.split("===== slow =====")[-1] or cores == 1


def test_halves_are_at_work_at_the_same_time(tmp_path, capfd, monkeypatch):
    """Each waits for the other's file, which would not come if they ran one after the other."""
    monkeypatch.setattr(halves, "cores", lambda: 2)
    meet = (
        "import time; open({mine!r}, 'w').close(); end = time.time() + 60\n"
        "    while not os.path.exists({other!r}): assert time.time() < end"
    )
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    given = meet.format(mine=first, other=second), meet.format(mine=second, other=first)
    assert _run(tmp_path, capfd, monkeypatch, *given)[0] == 0


def test_a_half_without_tests_is_no_failure(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_quick(): pass")
    command = [sys.executable, str(ROOT / "tests" / "halves.py"), "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("not slow: passed\nslow: no tests\n")
