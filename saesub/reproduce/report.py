"""The page that a run leaves: the scorecard, what ran where, and each notebook without its code."""

from __future__ import annotations

import html
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saesub.reproduce.claims_table import ClaimsTable

_PACKAGES = ("saesub", "torch", "transformer-lens", "sae-lens", "transformers", "datasets")
# On a phone a claim is a block of lines, and figures keep a size at which they can be read: they
# scroll inside their box, as wide tables do, and the page itself does not.
_CSS = """
body{font:16px/1.55 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:60rem;
margin:0 auto;padding:1rem;overflow-wrap:anywhere} a{color:#005f8f}
img,svg{max-width:100%;height:auto} pre{overflow-x:auto;font-size:.85rem}
.scroll,.output_subarea{overflow-x:auto} .output_area{margin:.6rem 0}
.prompt,.anchor-link{display:none} .error{color:#b33c00;font-weight:600}
section{border-top:3px solid #333;margin-top:3rem}
table{border:0;border-collapse:collapse;font-size:.92rem;overflow-wrap:normal}
th,td{padding:.35rem .6rem;border:0;border-bottom:1px solid #ddd;text-align:left}
.output_html table:not(.saesub-claims) :is(th,td){text-align:right;vertical-align:bottom}
.output_html td{white-space:nowrap;font-variant-numeric:tabular-nums}
.saesub-claims td:nth-child(3),.saesub-claims td:last-child b{white-space:nowrap!important}
.saesub-claims small{display:block;white-space:normal;max-width:14rem}
.saesub-claims br:has(+small),.saesub-claims td:last-child br:last-child{display:none}
@media (max-width:40rem){.output_png img{max-width:none;width:34rem}
.saesub-claims thead{display:none} .saesub-claims :is(tbody,tr,td){display:block}
.saesub-claims tr{border-bottom:1px solid #ddd;padding:.6rem 0}
.saesub-claims td{border:0;padding:.1rem 0} .saesub-claims small{max-width:none}
.saesub-claims td:nth-child(2)::before{content:"paper: "}
.saesub-claims td:nth-child(3)::before{content:"here: "}}
"""
_WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """How one notebook's run ended: `error` is empty for success, `key` says what was run.

    `facts` are `run_facts()` at its end; `peak_memory` is the most bytes that its kernel held, of
    the machine's memory ("cpu") and, if it used one, of the GPU's ("gpu"), where that is known.
    """

    name: str
    key: str
    seconds: float
    error: str = ""
    facts: tuple[str, ...] = ()
    peak_memory: dict[str, int] = field(default_factory=dict)


def caveat(profile: str) -> str:
    """What a run's verdicts are worth, where that has to be said; else empty."""
    if profile != "smoke":
        return ""
    return (
        "A smoke run shows that every cell runs. It sees too few tokens to measure anything: its "
        "verdicts speak neither for a claim nor against it."
    )


def report_page(notebooks: Path, profile: str, table: ClaimsTable, runs: Sequence[Outcome]) -> str:
    """The report, one self-contained HTML page."""
    bodies = [
        f"<section id='{html.escape(run.name)}'>{_body(notebooks / f'{run.name}.ipynb')}</section>"
        for run in runs
        if (notebooks / f"{run.name}.ipynb").is_file()
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>saesub: {profile} report</title><style>{_CSS}</style></head><body>"
        f"<h1>saesub: {profile} report</h1><h2>Scorecard</h2>{_marked(caveat(profile))}"
        f"{table._repr_html_()}<h2>This run</h2>{_run_info()}{_times(runs)}{''.join(bodies)}"
        "</body></html>"
    )


def _marked(text: str) -> str:
    return f"<p><b>{text}</b></p>" if text else ""


def run_facts() -> list[str]:
    """Date, versions and hardware of this machine, one line each."""
    import torch

    return [
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"{processor()}, {os.cpu_count()} cores, {_counted(torch.get_num_threads(), 'thread')}",
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    ]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(a checkout, not installed)"


def _run_info() -> str:
    return "<ul>" + "".join(f"<li>{html.escape(fact)}</li>" for fact in run_facts()) + "</ul>"


def processor() -> str:
    """This processor's name, with its family and model: a cloud's name may not tell which it is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    about = {key.strip(): value.strip() for key, value in pairs}  # the first core's come last
    name = about.get("model name") or platform.processor() or "unknown processor"
    if not {"cpu family", "model"} <= about.keys():
        return name
    return f"{name} (family {about['cpu family']}, model {about['model']})"


def _times(runs: Sequence[Outcome]) -> str:
    head = "<tr><th>Notebook</th><th>Time</th><th>Peak memory</th><th></th></tr>"
    rows = "".join(
        f"<tr><td><a href='#{html.escape(run.name)}'>{html.escape(run.name)}</a></td>"
        f"<td>{run.seconds:.0f} s</td><td>{html.escape(memory_text(run.peak_memory))}</td>"
        f"<td class='error'>{html.escape(run.error)}</td></tr>"
        for run in runs
    )
    return f"<div class='scroll'><table>{head}{rows}</table></div>"


def memory_text(peak: dict[str, int]) -> str:
    """An `Outcome`'s peak memory in words; empty if it is not known."""
    words = {"cpu": "{:.1f} GB", "gpu": "{:.1f} GB of GPU memory"}
    return ", ".join(words[where].format(held / 1e9) for where, held in peak.items())


def is_progress(output: Mapping[str, Any]) -> bool:
    """Whether a cell's output is a progress bar, or what else went to standard error."""
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
