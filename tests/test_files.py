"""A file is the old one or the new one, and nothing else is left beside it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from saesub.files import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_replaces_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    write_atomically(path, "é")
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert names(path.parent) == ["a"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    kept = [".a.tmp", ".ab.00000001.tmp", "a.00000001.tmp", ".[a].tmp", ".a.json.00000001.tmp"]
    for name in [".a.00000001.tmp", ".a.deadbeef.tmp", *kept]:
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a", "whole")
    assert names(tmp_path) == sorted(["a", *kept])


def test_a_full_disk_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomically(path, "old")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [letter * 100_000 for letter in "abcd"]
    seen: set[str] = set()

    def write(text: str) -> None:
        for _ in range(50):
            write_atomically(path, text)
            seen.add(path.read_text())

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(texts)
    assert names(tmp_path) == ["a"]
