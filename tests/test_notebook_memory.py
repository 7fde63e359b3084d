"""A notebook's run records the most memory that its own kernel held."""

from __future__ import annotations

import json
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from saesub.reproduce import report, runner


def _write(path, *cells):
    parameters = new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]})
    body = [new_markdown_cell("# a notebook"), parameters, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=body), path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak is read from Linux's /proc")
def test_a_run_records_its_own_kernels_peak_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "notebooks_dir", lambda: tmp_path)
    # Freed again at once: it is the peak that counts. The second notebook must not inherit it.
    _write(tmp_path / "00_large.ipynb", "held = bytearray(b'x' * 400_000_000)", "del held", "1 / 0")
    _write(tmp_path / "01_small.ipynb", "assert not {'_watch', 'note', 'peak'} & set(globals())")
    large, small = runner.reproduce("smoke", results=tmp_path, quiet=True)
    assert "ZeroDivisionError" in large.error
    assert not small.error
    assert large.peak_memory["cpu"] > 400e6
    assert 0 < small.peak_memory["cpu"] < large.peak_memory["cpu"] - 300e6
    assert "gpu" not in small.peak_memory
    stamp = json.loads((tmp_path / "smoke" / "runs" / "01_small.json").read_text())
    assert stamp["peak_memory"] == small.peak_memory
    shown = report.memory_text(large.peak_memory)
    assert f"<td>{shown}</td>" in (tmp_path / "smoke" / "report.html").read_text("utf-8")


def test_peak_memory_in_words():
    assert report.memory_text({}) == ""
    assert report.memory_text({"cpu": 3_140_000_000, "gpu": 2_000_000_000}) == (
        "3.1 GB, 2.0 GB of GPU memory"
    )
