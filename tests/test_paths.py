"""A kept result belongs to the code that made it, wherever in the package that code is."""

from __future__ import annotations

from pathlib import Path

import pytest

from saesub import paths


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.py", "room/b.py", "room/inner/c.cpp", "room/note.txt", "_data/studies/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path)
    monkeypatch.setattr(paths, "_IN_WHEEL", tmp_path / "_data")
    return tmp_path


def digest() -> str:
    return paths.source_digest.__wrapped__()


@pytest.mark.parametrize("name", ["a.py", "room/b.py", "room/inner/c.cpp"])
def test_changed_code_of_any_room_is_other_code(package: Path, name: str) -> None:
    before = digest()
    (package / name).write_text("changed")
    assert digest() != before


def test_moved_code_is_other_code(package: Path) -> None:
    before = digest()
    (package / "a.py").rename(package / "room" / "a.py")
    assert digest() != before


@pytest.mark.parametrize("name", ["room/note.txt", "_data/studies/d.py"])
def test_what_is_no_code_of_the_package_does_not_count(package: Path, name: str) -> None:
    before = digest()
    (package / name).write_text("changed")
    assert digest() == before
