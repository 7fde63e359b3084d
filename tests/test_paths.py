"""A kept result belongs to the code that made it, wherever in the package that code is."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from saesub import paths
from saesub.training import comparison
from saesub.training.trainer import SubspaceSAETrainer

PACKAGE = Path(paths.__file__).parent

CODE = {
    "a.py": 'def f(x):\n    return {"1": x, "y": 2}\n',
    "room/inner/c.cpp": 'int f() {\n  return 1;  // one\n}\nchar* s = "// 1";\n',
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.py", "room/b.py", "room/inner/c.cpp", "room/note.txt", "_data/studies/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CODE.get(name, name))
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path)
    monkeypatch.setattr(paths, "_IN_WHEEL", tmp_path / "_data")
    return tmp_path


def digest(*parts: str) -> str:
    return paths.source_digest.__wrapped__(*parts)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.py",
            '"""Words."""\n# more\ndef f(x):\n    """Of f."""\n    return {\'1\': x,  # x\n "y":2}',
        ),
        ("a.py", 'def f(x):\n    return {"1": x, "y": 2}\n"""Says what is above it."""\n'),
        ("room/inner/c.cpp", "// f\n\n" + CODE["room/inner/c.cpp"].replace("return", " return")),
    ],
)
def test_comments_docstrings_and_formatting_are_no_code(
    package: Path, name: str, text: str
) -> None:
    before = digest()
    (package / name).write_text(text)
    assert digest() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", CODE["a.py"].replace("2", "3")),
        ("a.py", CODE["a.py"].replace('"y"', '"z"')),
        ("a.py", CODE["a.py"].replace("    return", "    f(x)\n    return")),
        ("room/inner/c.cpp", CODE["room/inner/c.cpp"].replace("return 1", "return 2")),
        ("room/inner/c.cpp", CODE["room/inner/c.cpp"].replace('"// 1"', '"// 2"')),
    ],
)
def test_a_small_change_is_other_code(package: Path, name: str, text: str) -> None:
    before = digest()
    (package / name).write_text(text)
    assert digest() != before


def test_parts_leave_the_rest_out(package: Path) -> None:
    whole, room = digest(), digest("room/")
    assert whole != room != digest("a.py")
    (package / "a.py").write_text("changed")
    assert digest("room/") == room
    assert digest() != whole
    (package / "room" / "b.py").write_text("changed")
    assert digest("room/") != room


@pytest.mark.parametrize(
    "name",
    ["registry.toml", "paper_claims.csv", "results/studies/a.json", "results/studies/b.json"],
)
def test_data_that_notebooks_read_count_and_what_is_made_of_them_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(paths, "_ROOT", tmp_path)
    data = tmp_path / "data"
    (data / "results" / "studies").mkdir(parents=True)
    for known in ("registry.toml", "paper_claims.csv", "results/studies/a.json"):
        (data / known).write_text("before")
    before = paths.data_digest()
    (data / "results" / "run.json").write_text("what publish makes")
    assert paths.data_digest() == before
    (data / name).write_text("after")
    assert paths.data_digest() != before


def fingerprint(package: Path, file: str, old: str = "", new: str = "") -> str:
    """Of a small training, by a copy of saesub in which `old` was replaced in one file."""
    shutil.copytree(PACKAGE, package, dirs_exist_ok=True)
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    paths.source_digest.cache_clear()
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=4, d_sae=8, k=2))
    cfg = SAETrainerConfig(total_training_samples=4, train_batch_size_samples=2)
    trainer = SubspaceSAETrainer(cfg, sae, iter(()))

    def batches(_: int) -> Iterator[dict[str, torch.Tensor]]:
        return iter([{"site": torch.ones(2, 4)}] * 2)

    return comparison._fingerprint({"a": trainer}, {"a": "site"}, batches)


def test_kept_training_is_of_one_version_of_the_libraries(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(copied, "topk/optim.py")
    monkeypatch.setattr(paths, "version", lambda name: "0.0")
    assert fingerprint(copied, "topk/optim.py") != before


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path)
    yield tmp_path
    paths.source_digest.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training/trainer.py", "\nclass ", "\n# Words.\n\nclass "),
        ("topk/cpu.cpp", "\nnamespace", "\n// Words.\nnamespace"),
        ("reproduce/claims.py", "claims_", "claimed_"),
        ("training/distributed/checkpoint.py", "2.9", "2.8"),
    ],
)
def test_kept_training_outlasts_words_and_code_that_does_not_train(
    copied: Path, file: str, old: str, new: str
) -> None:
    assert fingerprint(copied, file, old, new) == fingerprint(copied, file)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training/trainer.py", "self", "this"),
        ("training/mitigations/resampling.py", "0", "1"),
        ("extras/transcoders.py", "self", "this"),
        ("topk/cpu_search.h", "kMassive = 16", "kMassive = 32"),
        ("topk/cpu.cpp", "1 - s.beta1", "2 - s.beta1"),
        ("topk/optim.py", "weight_decay=0.0", "weight_decay=0.1"),
        ("activations/store.py", "default_rng([seed, epoch])", "default_rng([epoch, seed])"),
    ],
)
def test_kept_training_goes_with_the_code_that_trains(
    copied: Path, file: str, old: str, new: str
) -> None:
    assert fingerprint(copied, file, old, new) != fingerprint(copied, file)


def test_all_that_training_imports_decides_it_or_is_known_not_to() -> None:
    """Or a new module of the trainer would be left out of what identifies its results."""
    harmless = ("errors.py", "files.py", "paths.py", "progress.py", "loading/", "evaluation/")
    found, waiting = set(), ["training/comparison.py", "extras/transcoders.py"]
    while waiting:
        file = waiting.pop()
        if file in found or file.startswith(harmless):
            continue
        found.add(file)
        waiting += imported(PACKAGE / file)
    assert {file for file in found if not file.startswith(comparison._DECIDING)} == set()
    assert "topk/ops.py" in found


def imported(file: Path) -> list[str]:
    """Files of saesub that a file of it imports from."""
    files = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saesub":
            place = PACKAGE.joinpath(*str(node.module).split(".")[1:])
            modules = [place, *(place / name.name for name in node.names)]
            files += [path for module in modules if (path := module.with_suffix(".py")).is_file()]
    return [path.relative_to(PACKAGE).as_posix() for path in files]
