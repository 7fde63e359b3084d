"""A file is the old one or the new one, and nothing else is left beside it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saesub.files import write_atomically

WRITER = """
import os, signal, sys
from pathlib import Path
from saesub import files
files.write_atomically(Path(sys.argv[1]), sys.argv[2])
"""


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


def test_a_live_writer_keeps_its_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writer stops half-way; the second, in another process, writes the same file."""
    path, seen = tmp_path / "a", []
    write_bytes = Path.write_bytes

    def half_way(self: Path, data: bytes) -> int:
        write_bytes(self, data[:1])
        subprocess.run([sys.executable, "-c", WRITER, str(path), "other"], check=True)
        assert path.read_text() == "other"
        seen.append(self.read_bytes() if self.exists() else None)
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", half_way)
    write_atomically(path, "whole")
    assert seen == [b"w"]
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_writers_half_written_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    kill = "Path.write_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = WRITER.replace("files.write", kill + "files.write")
    subprocess.run([sys.executable, "-c", killed, str(path), "lost"], check=False)
    assert len(names(tmp_path)) == 1
    write_atomically(path, "whole")
    assert names(tmp_path) == ["a"]


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
