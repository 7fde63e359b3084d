"""Fetching, against small wheels built on the spot and a pip that is given no index."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from saesub.errors import SaesubError
from saesub.loading.download import fetch
from saesub.loading.registry import Packaged, PackagedFile, Part, Registry, packaged, read_registry

FIRST, SECOND = b"one " * 5000, b"two " * 3000


def build_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    info = f"{name}-1.0.dist-info"
    described = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in described.items():
            archive.writestr(member, data)
    return path


def one_entry(data: bytes, *parts: Part, sha256: str | None = None) -> Registry:
    digest = sha256 or hashlib.sha256(data).hexdigest()
    file = PackagedFile("data.bin", len(data), digest, parts)
    return {"toy": Packaged("toy", "corpora", "a toy", "MIT", "here", (file,))}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    build_wheel(folder, "toy_part1", {"toy/data.1": FIRST, "../../escaped.txt": b"out"})
    build_wheel(folder, "toy_part2", {"toy/data.2": SECOND})
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def registry(wheels: Path) -> Registry:
    parts = Part("toy-part1==1.0", "toy/data.1"), Part("toy-part2==1.0", "toy/data.2")
    return one_entry(FIRST + SECOND, *parts)


def left_over(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache" / "packages" / "toy").iterdir()} - {".lock"}


def test_parts_are_joined_in_order_and_nothing_else_is_left(
    registry: Registry, tmp_path: Path
) -> None:
    folder = fetch("toy", progress=False, registry=registry)
    assert (folder / "data.bin").read_bytes() == FIRST + SECOND
    assert left_over(tmp_path) == {"data.bin", ".verified.json"}
    assert not list(tmp_path.rglob("escaped.txt"))


def test_second_fetch_starts_no_process(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("toy", progress=False, registry=registry)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    assert fetch("toy", progress=False, registry=registry) == first


def test_a_touched_file_is_hashed_again_not_fetched_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("toy", progress=False, registry=registry) / "data.bin"
    path.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    fetch("toy", progress=False, registry=registry)


@pytest.mark.parametrize("damaged", [b"", FIRST, b"x" * len(FIRST + SECOND)])
def test_a_damaged_file_is_repaired(registry: Registry, damaged: bytes) -> None:
    path = fetch("toy", progress=False, registry=registry) / "data.bin"
    path.write_bytes(damaged)
    fetch("toy", progress=False, registry=registry)
    assert path.read_bytes() == FIRST + SECOND


def test_a_whole_wheel_is_kept_as_it_is(wheels: Path) -> None:
    wheel = (wheels / "toy_part2-1.0-py3-none-any.whl").read_bytes()
    folder = fetch("toy", progress=False, registry=one_entry(wheel, Part("toy-part2==1.0")))
    assert (folder / "data.bin").read_bytes() == wheel


def test_hash_mismatch_leaves_no_file(wheels: Path, tmp_path: Path) -> None:
    wrong = one_entry(SECOND, Part("toy-part2==1.0", "toy/data.2"), sha256="ab" * 32)
    got = hashlib.sha256(SECOND).hexdigest()[:12]
    with pytest.raises(SaesubError, match=rf"expected SHA-256 abababababab…, got {got}…"):
        fetch("toy", progress=False, registry=wrong)
    assert left_over(tmp_path) == set()


def test_an_oversized_member_is_not_unpacked_to_the_end(wheels: Path, tmp_path: Path) -> None:
    small = one_entry(b"two ", Part("toy-part2==1.0", "toy/data.2"))
    with pytest.raises(SaesubError, match="not the file that was pinned"):
        fetch("toy", progress=False, registry=small)


@pytest.mark.parametrize("at", [10, 40, 100])
def test_a_member_that_does_not_unpack_is_named(wheels: Path, at: int) -> None:
    """Its compressed bytes damaged: zlib finds it before the archive's own checksum does."""
    path = build_wheel(wheels, "toy_squeezed", {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy/squeezed", bytes(range(256)) * 40)
        start = archive.getinfo("toy/squeezed").header_offset + 30 + len("toy/squeezed")
    damaged = bytearray(path.read_bytes())
    damaged[start + at] ^= 0xFF
    path.write_bytes(damaged)
    entry = one_entry(SECOND, Part("toy-squeezed==1.0", "toy/squeezed"))
    with pytest.raises(SaesubError, match=r"cannot be read for toy/squeezed|not the file that was"):
        fetch("toy", progress=False, registry=entry)


def test_a_missing_member_is_named(wheels: Path) -> None:
    lost = one_entry(SECOND, Part("toy-part2==1.0", "toy/other"))
    with pytest.raises(SaesubError, match=r"toy-part2==1\.0 cannot be read for toy/other"):
        fetch("toy", progress=False, registry=lost)


def test_offline_says_what_was_tried(wheels: Path) -> None:
    absent = one_entry(SECOND, Part("toy-part9==1.0", "toy/data"))
    with pytest.raises(SaesubError, match=r"pip download toy-part9==1\.0.*go online"):
        fetch("toy", progress=False, registry=absent)


def test_a_source_distribution_is_never_built(wheels: Path, tmp_path: Path) -> None:
    (wheels / "toy_part2-1.0-py3-none-any.whl").unlink()
    setup = wheels / "setup.py"
    setup.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with zipfile.ZipFile(wheels / "toy_part2-1.0.zip", "w") as archive:
        archive.write(setup, "toy_part2-1.0/setup.py")
    with pytest.raises(SaesubError, match="pip download"):
        fetch("toy", progress=False, registry=one_entry(SECOND, Part("toy-part2==1.0", "x")))
    assert not (tmp_path / "ran").exists()


def test_missing_pip_is_said(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: lacking)
    with pytest.raises(SaesubError, match="ensurepip"):
        fetch("toy", progress=False, registry=registry)


def test_full_disk_is_said_before_the_download(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(SaesubError, match="SAESUB_CACHE"):
        fetch("toy", progress=False, registry=registry)


def test_a_cache_that_cannot_be_made_is_said(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(SaesubError, match="SAESUB_CACHE"):
        fetch("toy", progress=False, registry=registry)


def test_two_processes_share_a_cache(wheels: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(FIRST).hexdigest()
    table = tmp_path / "registry.toml"
    table.write_text(
        '[corpora.toy]\ndescription=""\nlicence=""\nsource=""\n[[corpora.toy.files]]\n'
        f'name="data.bin"\nsize={len(FIRST)}\nsha256="{digest}"\n'
        'parts=[{package="toy-part1==1.0", member="toy/data.1"}]\n'
    )
    program = (
        "from pathlib import Path; from saesub.loading.download import fetch;"
        "from saesub.loading.registry import read_registry;"
        f"fetch('toy', progress=False, registry=read_registry(Path({str(table)!r})))"
    )
    root = str(Path(__file__).parents[1])
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=root) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert (tmp_path / "cache/packages/toy/data.bin").read_bytes() == FIRST
    assert list(read_registry(table)) == ["toy"]


def test_a_fetch_under_way_keeps_its_files(registry: Registry) -> None:
    """Of two versions of saesub that pin other files of one name, one finds its own verified."""
    folder = fetch("toy", progress=False, registry=registry)
    partial = folder / ".partial-other"
    partial.mkdir()
    with FileLock(folder / ".lock"):
        fetch("toy", progress=False, registry=registry)
        assert partial.is_dir()
    fetch("toy", progress=False, registry=registry)
    assert not partial.exists()


def test_a_registry_cannot_name_a_file_outside_the_cache() -> None:
    with pytest.raises(SaesubError, match="bare name"):
        PackagedFile("../data.bin", 1, "00" * 32, ())


def test_unknown_name_gets_a_near_one() -> None:
    with pytest.raises(SaesubError, match="did you mean 'wiki-en'"):
        fetch("wiki-eng")


def test_every_packaged_entry_is_pinned_and_licensed() -> None:
    for entry in packaged().values():
        assert entry.licence
        assert entry.source
        assert entry.description
        for file in entry.files:
            assert len(file.sha256) == 64
            assert file.size > 0
            assert all("==" in part.package for part in file.parts)
