"""A person at a browser: Chromium, JupyterLab on loopback, and what a page really shows.

Playwright drives the system's own Chromium, so that nothing is downloaded; both may be missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

_ARGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_SECOND = 1000  # Playwright's waits are in milliseconds
_TRACKER = "@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
_NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
_SETTINGS = {
    _TRACKER: {"windowingMode": "none"},  # all cells in the page at once, also those out of sight
    _NEWS: {"fetchNews": "false", "checkForUpdates": False},
}
# What is under an element of the page: outputs of a notebook, or the whole report.
_SHOWN = """root => ({
    errors: [...root.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')]
        .map(e => e.textContent).filter(text => text.includes('Traceback (most recent call')),
    figures: [...root.querySelectorAll('img[src^="data:image/png"], .jp-RenderedImage img')]
        .map(e => e.complete ? e.naturalWidth : 0),
    bars: [...root.querySelectorAll('.jupyter-widgets .progress')]
        .map(e => e.checkVisibility() ? e.getBoundingClientRect().width : 0),
    claims: [...root.querySelectorAll('table.saesub-claims')]
        .map(e => e.checkVisibility() && e.getBoundingClientRect().width > 0
            ? e.querySelectorAll('tbody tr').length : 0),
    text: root.innerText,
})"""


def chromium() -> str | None:
    """The path of the system's Chromium, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, Playwright's `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(_ARGS))
        try:
            yield started
        finally:
            started.close()


def shown(page: Any, selector: str = "body") -> dict[str, Any]:
    """What a page shows under `selector`.

    `errors` (texts), `figures` (widths of the images in pixels, 0 if broken), `bars` (widths of the
    progress bars), `claims` (rows of each visible table of claims) and the visible `text`.
    """
    return page.locator(selector).first.evaluate(_SHOWN)


def with_profile(source: Path, target: Path, profile: str) -> None:
    """Copies a notebook as a person would: outputs cleared, another profile in its third cell."""
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert '"quick"' in parameters.source
    parameters.source = parameters.source.replace('"quick"', f'"{profile}"', 1)
    nbformat.write(notebook, target)


@contextmanager
def jupyter_lab(folder: Path, home: Path, **environment: str) -> Iterator[str]:
    """JupyterLab on a free port of loopback, serving `folder`; yields its address with its token.

    Its settings, runtime files and IPython profile are in `home`, so that no user's own come in.
    """
    for name, settings in _SETTINGS.items():
        path = home / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    places = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {name: str(place) for name, place in places.items()} | environment
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
    with (home / "lab.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield _address(server, home)
        finally:
            server.terminate()  # shuts its kernels down too
            server.wait(30)


def _address(server: subprocess.Popen, home: Path) -> str:
    """What the server notes of itself once it listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        for note in (home / "runtime").glob("jpserver-*.json"):
            told = json.loads(note.read_text(encoding="utf-8") or "{}")
            if told:
                return f"http://127.0.0.1:{told['port']}/lab/tree/{{}}?reset&token={told['token']}"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")


def run_all(page: Any, address: str, name: str, seconds: float) -> None:
    """Opens a notebook in JupyterLab and runs all of its cells by the menu, to their end."""
    page.goto(address.format(name))
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60 * _SECOND)
    idle = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$"))
    idle.wait_for(timeout=60 * _SECOND)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
            const texts = prompts.map(e => e.textContent);
            return texts.some(t => /\\d/.test(t)) && !texts.some(t => t.includes('*'));
        }""",
        timeout=seconds * _SECOND,
    )
    idle.wait_for(timeout=60 * _SECOND)


def save(page: Any) -> None:
    """Saves the notebook that is open, and waits until it is on the disk."""
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").wait_for(state="detached", timeout=60 * _SECOND)


def picture(page: Any, path: Path) -> None:
    """A picture of the page, or of the whole notebook in it, which scrolls by itself."""
    inside = page.locator(".jp-WindowedPanel-outer")
    if inside.count():
        width, height = page.viewport_size["width"], inside.evaluate("e => e.scrollHeight")
        page.set_viewport_size({"width": width, "height": height + 150})
        inside.evaluate("e => { e.scrollTop = 0 }")
    page.screenshot(path=path, full_page=True)
