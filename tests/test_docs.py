"""README and pages: their links, the names that they use, their code, and the README's length."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_data import CORPORA
from test_kill import AT_ONCE, KILLS

import saesub
from saesub.training import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_BYTES = 10_240

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M)}


@each_page
def test_every_relative_link_leads_to_a_file_and_its_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= MOST_BYTES
    assert [p.name for p in PAGES[1:] if f"{p.relative_to(ROOT)})" not in readme] == []


def _resolve(name: str) -> object:
    """The module, or the attribute of one, that a dotted name means; an error if there is none."""
    parts, found = name.split(".")[1:], saesub
    for place, part in enumerate(parts, 1):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(["saesub", *parts[:place]]))
    return found


@each_page
def test_every_name_of_the_package_exists(page):
    text = page.read_text()
    names = re.findall(r"(?<![\w./-])saesub(?:\.[a-zA-Z_]\w*)+(?!\.md)", text)
    for module, imported in re.findall(r"from (saesub[\w.]*) import ([\w, ]+)", text):
        names += [f"{module}.{name.strip()}" for name in imported.split(",")]
    for name in dict.fromkeys(names):
        _resolve(name)


@each_page
def test_its_python_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, page.name, "exec")


def test_the_readmes_example_runs():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert first
    names: dict[str, Any] = {}
    exec(first[1].replace("50_000", "4_000"), names)
    sae, spectrum = names["sae"], names["spectrum"]
    active = spectrum.basis(sae.cfg.metadata.subspace_init["d_init"])
    assert active.shape[1] < spectrum.d
    assert saesub.overlap(sae.W_dec.detach(), active).min() > 0.999


def _random_stores(model: str, corpus: str, hooks: list[str], *, n_tokens: int) -> dict:
    """As `harvest` gives them, narrower than a model's."""
    torch.manual_seed(0)
    return {hook: saesub.ActivationStore.of(torch.randn(n_tokens, 16), hook) for hook in hooks}


def _run_example(page: str) -> dict[str, Any]:
    """The names that the first example of a page makes."""
    first = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert first
    names: dict[str, Any] = {}
    exec(first[1], names)
    return names


def test_the_examples_of_recipe_and_diagnosis_run(monkeypatch, tmp_path):
    monkeypatch.setattr(saesub, "harvest", _random_stores)
    monkeypatch.setitem(recipe.COVERED, "d_in", (16, 1792))  # narrower than the studies'
    monkeypatch.chdir(tmp_path)
    trained = _run_example("recipe.md")
    assert trained["cfg"].lr == trained["recipe"].lr
    assert trained["sae"].cfg.metadata.decoder_refit["n_tokens"] == 100_000
    report = _run_example("diagnosis.md")["report"]
    assert report.judgement.n_tokens == 100_000


def _tried(module: Path) -> list[str]:
    """Patterns of the kinds of faults that a test module says it survived."""
    calls = [
        call
        for call in ast.walk(ast.parse(module.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "survived"
    ]
    kinds = [call.args[0] for call in calls]  # an IndexError if it is given by name
    texts = [kind.values if isinstance(kind, ast.JoinedStr) else [kind] for kind in kinds]
    assert all(isinstance(p, (ast.Constant, ast.FormattedValue)) for of in texts for p in of)
    return [
        "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in of)
        for of in texts
    ]


def test_the_record_of_faults_has_every_kind_that_the_tests_try() -> None:
    """And no other: docs/faults.md is drawn from it, and must not lag behind the tests."""
    record = json.loads((ROOT / "data/results/faults.json").read_text())
    tried = {path.stem: _tried(path) for path in sorted((ROOT / "tests").glob("test_*.py"))}
    assert {module for module, kinds in tried.items() if kinds} == set(record)
    for module, recorded in record.items():
        assert min(recorded.values()) > 0
        for kind in recorded:
            assert any(re.fullmatch(pattern, kind) for pattern in tried[module]), kind
        for pattern in tried[module]:
            assert any(re.fullmatch(pattern, kind) for kind in recorded), pattern
    kinds = {f"killed (SIGKILL) during {job}, then run again" for job in KILLS}
    kinds |= {f"two processes at once in one folder: {job}" for job in AT_ONCE}
    assert kinds <= set(record["test_kill"])
    corpora = {f"corpus: {name} documents" for name in CORPORA}
    assert corpora <= set(record["test_bad_data"])
