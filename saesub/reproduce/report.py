"""The report of a run: the scorecard, what ran where, and each notebook without its code."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment

from saesub.reproduce.claims_table import ClaimsTable

_PACKAGES = ("saesub", "torch", "transformer-lens", "sae-lens", "transformers", "datasets")
_TEMPLATE = Path(__file__).with_name("report.html")
_WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """How one notebook's run ended.

    Attributes:
        key: a hash of what was run.
        error: empty for success.
        facts: `run_facts()` at the end.
        peak_memory: the most bytes that the kernel held, of the machine's memory ("cpu") and, if it
            used one, of the GPU's ("gpu"), where that is known.
    """

    name: str
    key: str
    seconds: float
    error: str = ""
    facts: tuple[str, ...] = ()
    peak_memory: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises TypeError where a record holds what no run writes."""
        texts = (self.name, self.key, self.error, *self.facts)
        numbers = (self.seconds, *dict(self.peak_memory).values())
        real = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if not (real and all(isinstance(text, str) for text in texts)):
            raise TypeError("not the outcome of a run")


def caveat(profile: str) -> str:
    """What a reader has to know about a small run's verdicts; empty for other profiles."""
    texts = {
        "smoke": "A smoke run shows that every cell runs. It sees too few tokens to measure "
        "anything: its verdicts speak neither for a claim nor against it. Rows with a record are "
        "read from studies that were run before, and are the same at every profile.",
        "quick": "A quick run shows every claim on few tokens and in small dictionaries. The "
        "verdicts that the notebooks show are those of a full run.",
    }
    return texts.get(profile, "")


def report_page(notebooks: Path, profile: str, table: ClaimsTable, runs: Sequence[Outcome]) -> str:
    """The report, one self-contained HTML page."""
    bodies = [
        (run.name, _body(notebooks / f"{run.name}.ipynb"))
        for run in runs
        if (notebooks / f"{run.name}.ipynb").is_file()
    ]
    page = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    facts = {"profile": profile, "caveat": caveat(profile), "facts": run_facts()}
    return page.render(table=table, runs=runs, memory_text=memory_text, bodies=bodies, **facts)


def run_facts() -> list[str]:
    """Date, versions and hardware of this machine, one line each."""
    import torch

    threads = torch.get_num_threads()
    return [
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}",
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(a checkout, not installed)"


def processor() -> str:
    """This processor's name, with its family and model, as a cloud's name may not identify it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    pairs = (re.split(r"\s*:\s*", line, maxsplit=1) for line in reversed(lines) if ":" in line)
    about = dict(pairs)  # the first core's come last
    name = about.get("model name") or platform.processor() or "unknown processor"
    if not {"cpu family", "model"} <= about.keys():
        return name
    return f"{name} (family {about['cpu family']}, model {about['model']})"


def memory_text(peak: dict[str, int]) -> str:
    """An `Outcome`'s peak memory in words; empty if it is not known."""
    words = {"cpu": "{:.1f} GB", "gpu": "{:.1f} GB of GPU memory"}
    return ", ".join(words[where].format(held / 1e9) for where, held in peak.items())


def is_progress(output: Mapping[str, Any]) -> bool:
    """Whether a cell's output is a progress bar or other standard error."""
    return output.get("name") == "stderr" or _WIDGET in output.get("data", {})


def _body(path: Path) -> str:
    """A notebook without its code, its links, its progress bars and other standard error."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if not is_progress(out)]
        else:  # a badge is fetched from elsewhere, and the page must stand by itself
            cell.source = re.sub(r"(?s)<!-- links -->.*<!-- /links -->\n*", "", cell.source)
    exporter = HTMLExporter(template_name="basic", exclude_input=True)
    body, _ = exporter.from_notebook_node(notebook)
    return body
