"""Nothing runs that should not: no code, pickle or markup from a file, a package or a text."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import torch
from datasets import Dataset
from faults import Faults, count_faults  # noqa: F401
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from test_download import build_wheel, one_entry
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM

from saesub.errors import SaesubError
from saesub.evaluation.top_activations import FeatureSnippets, Snippet, TopActivations
from saesub.extras import encoders
from saesub.loading.corpora import load_corpus
from saesub.loading.download import fetch
from saesub.loading.models import load_model
from saesub.loading.registry import Packaged, PackagedFile, Part, packaged, read_registry
from saesub.reproduce import claims, claims_table
from saesub.reproduce.report import Outcome, report_page
from saesub.training.checkpoint import save_state
from saesub.training.trainer import SubspaceSAETrainer

SOURCES = sorted((Path(__file__).parents[1] / "saesub").rglob("*.py"))
SCRIPT = "'\"><script>alert(1)</script><img src=x onerror=alert(1)>"


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


def checkpoint(folder: Path) -> SubspaceSAETrainer:
    """A trainer, whose state is saved there."""
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    trainer = SubspaceSAETrainer(cfg, sae, iter(()))
    trainer.save_trainer_state(folder)
    return trainer


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, faults: Faults) -> None:
    """Even one whose checksum was made to fit, as a stranger's checkpoint may be."""
    trainer = checkpoint(tmp_path)
    file = tmp_path / "trainer_state.pt"
    for save in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        save(Bomb(tmp_path / "trace"), file)
        with pytest.raises(SaesubError, match=r"trainer_state\.pt is not the file"):
            trainer.load_trainer_state(tmp_path)
        save_state(trainer, tmp_path, lambda folder: None)
        with pytest.raises(SaesubError, match="damaged or incomplete"):
            trainer.load_trainer_state(tmp_path)
        assert not (tmp_path / "trace").exists()
        faults.survived("code in the pickle of a checkpoint")


@pytest.mark.model
def test_a_pickle_in_a_model_folder_is_not_run(
    tmp_path: Path, model: TransformerBridge, faults: Faults
) -> None:
    tiny_folder(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SaesubError, match="does not load"):
        load_model(tmp_path)
    assert not (tmp_path / "trace").exists()
    faults.survived("code in the pickle of a model folder")


@pytest.mark.model
def test_a_model_folders_own_code_is_not_run(
    tmp_path: Path, model: TransformerBridge, faults: Faults
) -> None:
    tiny_folder(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "code.StrangeConfig",
        "AutoModelForCausalLM": "code.StrangeModel",
    }
    config["model_type"] = "strange"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trace')!r})\n")
    with pytest.raises(SaesubError, match=r"brings code of its own.*give the live model"):
        load_model(tmp_path)
    assert not (tmp_path / "trace").exists()
    faults.survived("code that a model folder brings with it")


def tiny_folder(folder: Path, model: TransformerBridge) -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    assert load_model(folder).cfg.d_model == 8


def test_no_source_reads_pickles_or_runs_text() -> None:
    """Two pickles are read, both by weights-only loads: SAELens' own trainer state, by SAELens, and
    a packaged encoder whose checksum is pinned. `pickle` itself is imported for the name of its
    error alone."""
    pinned = 'torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)'
    words = ("torch.load(", "pickle.load", "trust_remote_code=True", "eval(", "exec(", "joblib",
             "allow_pickle=True", "weights_only=False", "shell=True", "extractall")  # fmt: skip
    for path in SOURCES:
        text = path.read_text().replace("eval()", "").replace("run_eval(", "")
        if path.name == "encoders.py":
            text = text.replace(pinned, "")
        assert [word for word in words if word in text] == [], path.name


def test_fetched_packages_are_neither_installed_nor_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    trace = tmp_path / "trace"
    bad = f"import os; os.mkdir({str(trace)!r})\n".encode()
    members = {
        "toy_code/__init__.py": bad,
        "toy_code/data.bin": b"data",
        "sitecustomize.py": bad,
        "toy_code.pth": bad,
        "setup.py": bad,
    }
    build_wheel(tmp_path, "toy_code", members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    registry = one_entry(b"data", Part("toy-code==1.0", "toy_code/data.bin"))
    folder = fetch("toy", progress=False, registry=registry)
    assert (folder / "data.bin").read_bytes() == b"data"
    assert not trace.exists()
    assert "toy_code" not in sys.modules
    with pytest.raises(ImportError):
        importlib.import_module("toy_code")
    faults.survived("code in a fetched package")


@pytest.mark.parametrize("name", ["../../out", "/out", "a/b", "..", ".", "", "a\\b", "a\0b", "-o"])
def test_a_registry_cannot_name_a_place_outside_its_folder(name: str, faults: Faults) -> None:
    with pytest.raises(SaesubError, match="bare name"):
        PackagedFile(name, 1, "00" * 32, ())
    with pytest.raises(SaesubError, match="bare name"):
        Packaged(name, "corpora", "", "", "")
    faults.survived("a file name that leads out of the cache", 2)


@pytest.mark.parametrize("package", ["--index-url=x", "x", "./x==1", "x @ file:///x", "x==1 y", ""])
def test_a_registry_cannot_give_pip_anything_but_a_pin(package: str, faults: Faults) -> None:
    with pytest.raises(SaesubError, match="NAME==VERSION"):
        Part(package)
    faults.survived("a package name that is an option or a place for pip")


def test_members_of_an_archive_cannot_escape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    """Members are opened by name and written under a name of ours, whatever theirs is."""
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoders, "fetch", lambda _: tmp_path)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for member in encoders._MEMBERS:
            archive.writestr(f"../../{member}", member)
        archive.writestr("../../escaped", "out")
    file = PackagedFile("model.zip", 1, "00" * 32, ())
    details = {"format": "archive", "inside": "../../"}
    folder = encoders._unpacked(Packaged("toy", "encoders", "", "", "", (file,), details=details))
    assert {p.name for p in folder.iterdir()} == set(encoders._MEMBERS)
    inside = {p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder}
    assert {p.name for p in inside} <= {"model.zip", f"{folder.name}.lock"}
    faults.survived("an archive member named ../../")


def test_hashes_are_checked_before_a_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    build_wheel(tmp_path, "toy_data", {"toy_data/data.bin": b"other"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    wanted = hashlib.sha256(b"datas").hexdigest()
    registry = one_entry(b"datas", Part("toy-data==1.0", "toy_data/data.bin"), sha256=wanted)
    names: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), replace(a, b)))
    with pytest.raises(SaesubError, match="not the file that was pinned"):
        fetch("toy", progress=False, registry=registry)
    assert "data.bin" not in names
    faults.survived("another file than the pinned one")


class Tags(HTMLParser):
    """The tags, attributes and text of a page, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_shown_as_text(page: str) -> None:
    found = Tags(page)
    assert not {"script", "img"} & set(found.tags)
    assert found.handlers == []
    assert SCRIPT in found.text


def test_text_of_contexts_is_escaped(faults: Faults) -> None:
    snippet = Snippet((SCRIPT, "'>", '">'), (1.0, 0.0, 0.5))
    page = TopActivations([FeatureSnippets(3, 0.1, (snippet,))])
    assert_shown_as_text(page._repr_html_())
    faults.survived("markup in a text, shown as text")


def test_texts_of_claims_are_escaped(faults: Faults) -> None:
    rows = claims.compare([claims.Measurement("F6.fvu", 0.0, n=SCRIPT, note=SCRIPT)], "05").rows
    assert_shown_as_text(claims_table.ClaimsTable(rows)._repr_html_())
    for column in ("id", "claim", "paper", "verdict"):
        bad = [rows[0] | {column: SCRIPT}]
        if column == "verdict":
            with pytest.raises(SaesubError, match="verdict"):
                claims_table.ClaimsTable(bad)
        else:
            assert_shown_as_text(claims_table.ClaimsTable(bad)._repr_html_())
    faults.survived("markup in a text, shown as text", 5)


def test_the_reports_own_texts_are_escaped(tmp_path: Path, faults: Faults) -> None:
    """Outputs of a notebook that are text are escaped; HTML that its own code made is not."""
    output = nbformat.v4.new_output("stream", name="stdout", text=SCRIPT)
    shown = nbformat.v4.new_output("execute_result", {"text/plain": SCRIPT})
    cell = nbformat.v4.new_code_cell("x", outputs=[output, shown])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "00_x.ipynb")
    runs = [Outcome("00_x", "", 1.0, SCRIPT), Outcome(SCRIPT, "", 1.0)]
    page = report_page(tmp_path, "smoke", claims_table.ClaimsTable([]), runs)
    assert_shown_as_text(page)
    assert Tags(page).text.count(SCRIPT) == 4
    faults.survived("markup in a text, shown as text", 4)


def test_a_registry_that_ships_is_read_as_pins_alone() -> None:
    path = Path(__file__).parents[1] / "data" / "registry.toml"
    assert read_registry(path) == packaged()


def test_a_folder_of_texts_is_not_searched_for_code(tmp_path: Path, faults: Faults) -> None:
    """A dataset's loading script of old, beside the texts."""
    (tmp_path / "a.txt").write_text("A text.")
    (tmp_path / f"{tmp_path.name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'x')!r})")
    assert list(load_corpus(tmp_path)["text"]) == ["A text."]
    saved = tmp_path / "saved"
    Dataset.from_dict({"text": ["A text."]}).save_to_disk(saved)
    shutil.copy(tmp_path / f"{tmp_path.name}.py", saved / "saved.py")
    assert list(load_corpus(saved)["text"]) == ["A text."]
    assert not (tmp_path / "x").exists()
    faults.survived("code beside a corpus")
