"""The cache of activations and spectra: what is there grows; no token passes the model twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import HOOK, tiny_gpt2, tiny_texts, tiny_tokenizer

from saesub import SaesubError, harvest, load_model, measure_spectra, measure_spectrum
from saesub.activations import cache, forward_pass, growth, store_file
from saesub.activations.collect import stream_activations
from saesub.activations.store import ActivationStore
from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.cli import main
from saesub.training.comparison import joint_batches

EARLY, MLP = "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"
RUN: dict[str, Any] = {"context_size": 64, "batch_size": 4, "progress": False}
Passed = list[tuple[int, frozenset[str]]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model((tiny_gpt2(), tiny_tokenizer()))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return tiny_texts(200)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Passed:
    """The contexts that the model ran on, by a hash of each, and for which hook points."""
    seen: Passed = []
    capture = forward_pass.capture

    def counted(model: Any, tokens: torch.Tensor, points: Any, receive: Any) -> None:
        seen.extend((hash(tuple(row.tolist())), frozenset(points)) for row in tokens)
        capture(model, tokens, points, receive)

    monkeypatch.setattr(forward_pass, "capture", counted)
    return seen


def rows(store: ActivationStore) -> torch.Tensor:
    return store.rows(0, store.n_tokens)


def close(grown: ActivationStore, whole: ActivationStore) -> None:
    """The same but for rounding in batches of another size: one unit of float16's last place, of
    the largest number of a row."""
    a, b = rows(grown), rows(whole)
    apart = (a - b).abs() / b.abs().amax(dim=1, keepdim=True)
    assert apart.max() < 2**-10
    assert (a == b).float().mean() > 0.99
    assert grown.settings == whole.settings
    assert grown.epochs == whole.epochs


# --- stores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_grown_store_is_that_of_one_harvest(
    model: Any, texts: list[str], tmp_path: Path, passed: Passed, dtype: torch.dtype
) -> None:
    """In steps that end within a context and within a batch."""
    run = {**RUN, "dtype": dtype}
    for n in (100, 101, 500, 1234, 1250):
        grown = harvest(model, texts, [HOOK], n_tokens=n, **run)[HOOK]
        assert grown.n_tokens == n
    assert len(passed) == len({context for context, _ in passed})
    n_passed = len(passed)
    whole = harvest(model, texts, [HOOK], tmp_path / "whole", n_tokens=1250, **run)[HOOK]
    assert n_passed == len(passed) - n_passed
    close(grown, whole)
    if dtype == torch.float32:
        torch.testing.assert_close(rows(grown), rows(whole), rtol=1e-5, atol=1e-6)


def test_growth_in_whole_batches_gives_the_same_bits(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    whole = harvest(model, texts, [HOOK], tmp_path / "a", n_tokens=1000, **RUN)[HOOK]
    harvest(model, texts, [HOOK], tmp_path / "b", n_tokens=8 * 61, **RUN)
    grown = harvest(model, texts, [HOOK], tmp_path / "b", n_tokens=1000, **RUN)[HOOK]
    assert torch.equal(rows(grown), rows(whole))


def test_fewer_tokens_are_the_first_rows_and_say_so(
    model: Any, texts: list[str], tmp_path: Path, passed: Passed
) -> None:
    long = harvest(model, texts, [HOOK], n_tokens=1000, **RUN)[HOOK]
    n_passed = len(passed)
    part = harvest(model, texts, [HOOK], n_tokens=300, **RUN)[HOOK]
    again = harvest(model, texts, [HOOK], n_tokens=300, **RUN)[HOOK]
    assert len(passed) == n_passed
    alone = harvest(model, texts, [HOOK], tmp_path / "alone", n_tokens=300, **RUN)[HOOK]
    assert torch.equal(rows(part), long.rows(0, 300))
    close(part, alone)
    assert part.identity == again.identity == ActivationStore.of(rows(part).half(), HOOK).identity
    harvest(model, texts, [HOOK], n_tokens=2000, **RUN)  # leaves the part what it was
    later = harvest(model, texts, [HOOK], n_tokens=300, **RUN)[HOOK]
    assert later.identity == part.identity
    assert long.identity == harvest(model, texts, [HOOK], n_tokens=1000, **RUN)[HOOK].identity


def test_a_part_of_text_read_once_is_not_called_repeated(model: Any) -> None:
    few = tiny_texts(12)
    with pytest.warns(UserWarning, match="is read again"):
        harvest(model, few, [HOOK], n_tokens=4000, **RUN)
    part = harvest(model, few, [HOOK], n_tokens=300, **RUN)[HOOK]
    assert part.epochs <= 1


def test_more_hook_points_pass_only_where_they_are_missing(
    model: Any, texts: list[str], passed: Passed
) -> None:
    harvest(model, texts, [EARLY], n_tokens=1000, **RUN)
    passed.clear()
    stores = harvest(model, texts, [EARLY, HOOK], n_tokens=1500, **RUN)
    both = frozenset([EARLY, HOOK])
    points = [names for _, names in passed]
    assert set(points) == {frozenset([HOOK]), both}
    assert points.index(both) * 61 > 1000 - 4 * 61  # listened to from where it ends, but a batch
    assert len(passed) == len({context for context, _ in passed})
    assert next(joint_batches(stores, 8, seed=0)).keys() == stores.keys()
    for name, store in stores.items():
        x = torch.cat([*forward_rows(model, texts, name, 1500)])
        torch.testing.assert_close(rows(store), x, rtol=2e-3, atol=1e-4)


def test_text_that_is_read_for_a_part_is_not_read_on(model: Any, tmp_path: Path) -> None:
    """A pass for one hook point, then the text alone for a part of another: both from its start."""
    few = tiny_texts(12)
    harvest(model, few, [MLP], n_tokens=1400, **RUN)
    for hooks in ([MLP, HOOK], [HOOK, EARLY]):
        for name, store in harvest(model, few, hooks, n_tokens=1300, **RUN).items():
            alone = harvest(model, few, [name], tmp_path / name, n_tokens=1300, **RUN)[name]
            close(store, alone)
            assert store.epochs == 1
    assert store_file.held(tmp_path / HOOK, HOOK).parts.keys() == {"1300"}
    part = store_file.held(cache.kept()[0].folder, MLP).parts["1300"]
    assert (part["epochs"], part["text"]["documents"]) == (1, "12")


def forward_rows(model: Any, texts: list[str], name: str, n: int) -> Iterator[torch.Tensor]:
    for batch in stream_activations(model, texts, [name], n_tokens=n, **RUN):
        yield batch[name]


def _edited() -> Any:
    gpt2 = tiny_gpt2()
    with torch.no_grad():
        gpt2.transformer.ln_f.bias[-1] += 1e-3
    return gpt2, tiny_tokenizer()


OTHERS: dict[str, dict[str, Any]] = {
    "a changed weight": {"model": _edited},
    "another tokenizer": {"model": lambda: (tiny_gpt2(), tiny_tokenizer(eos="<|other|>"))},
    "a changed last document": {"corpus": [*tiny_texts(199), "other"]},
    "fewer documents": {"corpus": tiny_texts(199)},
    "dtype": {"dtype": torch.float32},
    "context_size": {"context_size": 32},
    "skip_first": {"skip_first": 2},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_decides_the_numbers_is_in_the_key(
    model: Any, texts: list[str], place: Path, change: dict[str, Any]
) -> None:
    harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    given = {"model": model, "corpus": texts, **RUN} | change
    given["model"] = given["model"]() if "model" in change else model
    harvest(hook_names=[HOOK], n_tokens=200, **given)
    assert len(list((place / "activations").iterdir())) == 2


def test_how_products_are_rounded_is_in_the_key(model: Any, texts: list[str], place: Path) -> None:
    harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    with torch.autocast("cpu", torch.bfloat16):
        harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    assert len(list((place / "activations").iterdir())) == 2


@pytest.mark.parametrize("deciding", ["source_digest", "library_versions"])
def test_code_and_libraries_are_in_the_key(
    model: Any, texts: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, deciding: str
) -> None:
    harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    monkeypatch.setattr(cache, deciding, lambda *_: "another")
    harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    assert len(list((place / "activations").iterdir())) == 2


def test_what_decides_nothing_is_not_in_the_key(
    model: Any, texts: list[str], place: Path, passed: Passed
) -> None:
    harvest(model, texts, [HOOK], n_tokens=200, **RUN)
    n_passed = len(passed)
    harvest((tiny_gpt2(), tiny_tokenizer()), texts, [HOOK], n_tokens=200, **RUN | {"batch_size": 7})
    assert len(passed) == n_passed
    assert len(list((place / "activations").iterdir())) == 1


def test_a_model_with_hooks_needs_a_folder(texts: list[str], tmp_path: Path, place: Path) -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    bridge.add_hook("blocks.0.hook_attn_out", lambda x, hook: x * 2)
    message = r"the model has hooks or code of your own, in blocks.*hook_out .*: remove them"
    with pytest.raises(SaesubError, match=message):
        harvest(bridge, texts, [HOOK], n_tokens=200, **RUN)
    with pytest.raises(SaesubError, match=message):
        measure_spectrum(bridge, texts, HOOK, n_tokens=200, cache=True, **RUN)
    assert not place.exists()
    harvest(bridge, texts, [HOOK], tmp_path / "own", n_tokens=200, **RUN)


def _file(place: Path, name: str) -> Path:
    (found,) = place.glob(f"*/*/{name}")
    return found


@pytest.mark.parametrize("when", ["before it is read", "before it grows"])
def test_a_damaged_store_is_written_again(
    model: Any, texts: list[str], place: Path, when: str
) -> None:
    first = rows(harvest(model, texts, [HOOK], n_tokens=700, **RUN)[HOOK])
    data = _file(place, f"{HOOK}.bin")
    time = data.stat().st_mtime_ns
    content = bytearray(data.read_bytes())
    content[1001] ^= 0x40  # an exponent
    data.write_bytes(content)
    n = 700
    if when == "before it grows":  # and its time does not tell
        os.utime(data, ns=(time, time))
        n = 900
    again = harvest(model, texts, [HOOK], n_tokens=n, **RUN)[HOOK]
    torch.testing.assert_close(again.rows(0, 700), first, rtol=2e-3, atol=1e-5)


def test_rows_that_a_killed_process_left_are_cut_off(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    whole = harvest(model, texts, [HOOK], tmp_path / "a", n_tokens=900, **RUN)[HOOK]
    harvest(model, texts, [HOOK], tmp_path / "b", n_tokens=8 * 61, **RUN)
    with (tmp_path / "b" / f"{HOOK}.bin").open("ab") as data:
        data.write(b"left" * 1001)
    grown = harvest(model, texts, [HOOK], tmp_path / "b", n_tokens=900, **RUN)[HOOK]
    assert torch.equal(rows(grown), rows(whole))


def test_what_another_process_wrote_meanwhile_is_not_passed_again(
    model: Any, texts: list[str], passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest(model, texts, [HOOK], n_tokens=500, **RUN)
    n_passed, look = len(passed), growth._stores
    looks: list[None] = [None]  # what is seen before the lock is held
    monkeypatch.setattr(growth, "_stores", lambda *a: looks.pop() if looks else look(*a))
    assert harvest(model, texts, [HOOK], n_tokens=500, **RUN)[HOOK].n_tokens == 500
    assert not looks
    assert len(passed) == n_passed


def test_a_reader_keeps_its_rows_while_the_store_grows(model: Any, texts: list[str]) -> None:
    store = harvest(model, texts, [HOOK], n_tokens=500, **RUN)[HOOK]
    before = rows(store)
    harvest(model, texts, [HOOK], n_tokens=1500, **RUN)
    cache.clear()
    assert torch.equal(rows(store), before)


def test_a_value_that_is_refused_costs_no_old_rows(
    model: Any, texts: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = rows(harvest(model, texts, [HOOK], n_tokens=500, **RUN)[HOOK])
    capture = forward_pass.capture

    def poisoned(model: Any, tokens: Any, points: Any, receive: Any) -> None:
        capture(model, tokens, points, lambda name, x: receive(name, x * 1e9))

    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "capture", poisoned)
        with pytest.raises(SaesubError, match="beyond"):
            harvest(model, texts, [HOOK], n_tokens=900, **RUN)
    monkeypatch.setattr(forward_pass, "capture", lambda *_: pytest.fail("ran the model"))
    assert torch.equal(rows(harvest(model, texts, [HOOK], n_tokens=500, **RUN)[HOOK]), kept)


def test_a_part_is_remembered_once_it_was_asked_for(
    model: Any, texts: list[str], place: Path
) -> None:
    harvest(model, texts, [HOOK], n_tokens=900, **RUN)
    harvest(model, texts, [HOOK], n_tokens=400, **RUN)
    assert {*json.loads(_file(place, f"{HOOK}.json").read_bytes())["parts"]} == {"400", "900"}
    assert ActivationStore.open(_file(place, f"{HOOK}.json").parent, HOOK).n_tokens == 900


def test_a_reader_writes_no_old_record_over_a_new_one(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    harvest(model, texts, [HOOK], tmp_path, n_tokens=300, **RUN)
    old = store_file.held(tmp_path, HOOK)
    harvest(model, texts, [HOOK], tmp_path, n_tokens=900, **RUN)
    store_file._amend(tmp_path / f"{HOOK}.json", old, mtime_ns=1)
    assert store_file.held(tmp_path, HOOK).n_rows >= 900


def test_room_is_asked_for_before_the_pass_goes_on(
    model: Any, texts: list[str], passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def require(folder: Path, n_bytes: int, what: str) -> None:
        asked.append(n_bytes)
        raise SaesubError("no room: make room")

    monkeypatch.setattr(growth, "require_disk", require)
    with pytest.raises(SaesubError, match="make room"):
        harvest(model, texts, [EARLY, HOOK], n_tokens=1000, **RUN)
    assert len(passed) == RUN["batch_size"]
    assert asked == [2 * 2 * 64 * (1000 - _n_rows(model, texts, 4))]


def _n_rows(model: Any, texts: list[str], n_contexts: int) -> int:
    tokens = pack_contexts(model, texts, n_contexts=n_contexts, context_size=64)
    return int(kept_positions(model, tokens, 1).sum())


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_model import HOOK, tiny_gpt2, tiny_texts, tiny_tokenizer
from saesub import harvest
from saesub.activations import forward_pass
forward_pass.KEEP_EVERY = 0.0
capture = forward_pass.capture
def counted(model, tokens, points, receive):
    with open({log!r}, "a") as log:
        log.write("x" * len(tokens))
    capture(model, tokens, points, receive)
forward_pass.capture = counted
model = tiny_gpt2(), tiny_tokenizer()
run = dict(context_size=64, batch_size=4, progress=False)
for n in {sizes}:
    store = harvest(model, tiny_texts(200), [HOOK], n_tokens=n, **run)[HOOK]
print(store.identity)
"""


@pytest.mark.slow
def test_two_processes_that_grow_a_store_pass_each_token_once(
    model: Any, texts: list[str], tmp_path: Path, passed: Passed
) -> None:
    log, tests = tmp_path / "log", str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(tests=tests, log=str(log), sizes=sizes)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for sizes in ([300, 700, 2000], [500, 900, 2000])
    ]
    told = [worker.communicate(timeout=300)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert told[0] == told[1]
    n_contexts = len(log.read_text())
    harvest(model, texts, [HOOK], tmp_path / "whole", n_tokens=2000, **RUN)
    assert n_contexts == len(passed)


# --- spectra -------------------------------------------------------------------------------------


def _same_spectra(a: Any, b: Any, rtol: float = 1e-6) -> None:
    assert (a.n_tokens, a.metadata) == (b.n_tokens, b.metadata)
    assert (a.covariance - b.covariance).norm() <= rtol * b.covariance.norm()
    assert (a.mean - b.mean).norm() <= rtol * b.mean.norm()
    assert a.mean_norm == pytest.approx(b.mean_norm, rel=rtol)


def test_cached_spectra_are_those_of_one_pass(model: Any, texts: list[str], passed: Passed) -> None:
    for n in (300, 310, 1000, 1900):
        grown = measure_spectra(model, texts, [EARLY, HOOK], n_tokens=n, cache=True, **RUN)
    assert len(passed) == len({context for context, _ in passed})
    n_passed = len(passed)
    again = measure_spectra(model, texts, [HOOK, EARLY], n_tokens=1000, cache=True, **RUN)
    measure_spectrum(model, texts, HOOK, n_tokens=300, cache=True, **RUN)
    assert len(passed) == n_passed
    for n, found in ((1900, grown), (1000, again)):
        whole = measure_spectra(model, texts, [EARLY, HOOK], n_tokens=n, **RUN)
        for name in whole:
            _same_spectra(found[name], whole[name])


def test_new_hook_points_of_spectra_pass_alone(
    model: Any, texts: list[str], passed: Passed
) -> None:
    measure_spectra(model, texts, [EARLY, MLP], n_tokens=600, cache=True, **RUN)
    passed.clear()
    found = measure_spectra(model, texts, [EARLY, HOOK], n_tokens=600, cache=True, **RUN)
    assert {names for _, names in passed} == {frozenset([HOOK])}
    whole = measure_spectra(model, texts, [EARLY, HOOK], n_tokens=600, **RUN)
    for name in whole:
        _same_spectra(found[name], whole[name])


def test_an_interrupted_measurement_goes_on(
    model: Any, texts: list[str], place: Path, passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_pass, "KEEP_EVERY", 0.0)
    counted = forward_pass.capture

    def stops(*given: Any) -> None:
        if len(passed) >= 20:
            raise KeyboardInterrupt
        counted(*given)

    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "capture", stops)
        with pytest.raises(KeyboardInterrupt):
            measure_spectrum(model, texts, HOOK, n_tokens=1900, cache=True, **RUN)
    assert [p.name for p in place.glob("spectra/*/*.part.safetensors")]
    found = measure_spectrum(model, texts, HOOK, n_tokens=1900, cache=True, **RUN)
    assert len(passed) == len({context for context, _ in passed})
    assert not list(place.glob("spectra/*/*.part.safetensors"))
    _same_spectra(found, measure_spectrum(model, texts, HOOK, n_tokens=1900, **RUN))


def test_a_damaged_cached_spectrum_is_measured_again(
    model: Any, texts: list[str], place: Path
) -> None:
    def measured(n: int) -> Any:
        return measure_spectrum(model, texts, HOOK, n_tokens=n, cache=True, **RUN)

    first = measured(600)
    path = _file(place, f"{HOOK}-600.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    _same_spectra(measured(600), first)
    _file(place, f"{HOOK}-600.safetensors").rename(path.with_name(f"{EARLY}-600.safetensors"))
    other = measure_spectrum(model, texts, EARLY, n_tokens=600, cache=True, **RUN)
    _same_spectra(other, measure_spectrum(model, texts, EARLY, n_tokens=600, **RUN))


def test_keep_massive_is_in_the_key(model: Any, texts: list[str], place: Path) -> None:
    for keep in (False, True):
        found = measure_spectrum(
            model, texts, HOOK, n_tokens=300, cache=True, keep_massive=keep, **RUN
        )
        assert found.keeps_massive == keep
    assert len(list((place / "spectra").iterdir())) == 2


def test_a_cache_is_no_checkpoint(model: Any, texts: list[str], tmp_path: Path) -> None:
    for other in ({"checkpoint": tmp_path / "state"}, {"share": (0, 2)}):
        with pytest.raises(SaesubError, match="leave out cache=True"):
            measure_spectra(model, texts, [HOOK], n_tokens=300, cache=True, **other, **RUN)


# --- what the notebooks do, and the command ------------------------------------------------------


def test_a_token_passes_the_model_once_for_all_notebooks(
    model: Any, texts: list[str], passed: Passed
) -> None:
    """As notebooks 04 to 09 and the studies ask: several sites, one of them, others, and more."""
    for hooks, n in (
        ([EARLY, HOOK], 900),
        ([EARLY, HOOK], 900),
        ([HOOK], 900),
        ([HOOK], 900),
        ([HOOK, MLP], 900),
        ([HOOK], 900),
        ([HOOK], 2000),
        ([EARLY, MLP, HOOK], 2000),
    ):
        harvest(model, texts, hooks, n_tokens=n, **RUN)
    for name in (EARLY, HOOK, MLP):
        contexts = [context for context, names in passed if name in names]
        assert len(contexts) - len({*contexts}) < RUN["batch_size"]
    n_contexts = len({context for context, _ in passed})
    for name in (EARLY, HOOK, MLP):
        assert len({context for context, names in passed if name in names}) == n_contexts


def test_the_command_lists_and_clears(
    model: Any, texts: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache"]) == 0
    assert "holds no activations" in capsys.readouterr().out
    harvest(model, texts, [HOOK], n_tokens=300, **RUN)
    measure_spectrum(model, texts, HOOK, n_tokens=300, cache=True, **RUN)
    (place / "packages").mkdir()
    (place / "packages" / "file").write_bytes(b"x")
    assert main(["cache"]) == 0
    told = capsys.readouterr().out
    size = sum(p.stat().st_size for k in cache.KINDS for p in place.glob(f"{k}/*/*"))
    assert f"{size / 1e6:,.1f} MB" in told
    about = "model live model, corpus 200 live documents, context_size 64"
    assert f"MB of activations: {about}" in told
    assert f"MB of spectra: {about}" in told
    (folder,) = (place / "spectra").iterdir()
    with store_file.FileLock(folder / ".lock"):
        assert main(["cache", "--clear"]) == 0
    told = capsys.readouterr().out
    assert "left" in told
    assert len(cache.kept()) == 1
    assert main(["cache", "--clear"]) == 0
    assert cache.kept() == []
    assert (place / "packages" / "file").exists()
    assert len(rows(harvest(model, texts, [HOOK], n_tokens=300, **RUN)[HOOK])) == 300


def test_a_store_of_another_version_is_not_written_over(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    """Its record is whole, but has other fields."""
    about = {"file": f"{HOOK}.bin", "settings": {"model": "x"}, "n_tokens": 3, "dtype": "<f2"}
    checksum = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    record, numbers = tmp_path / f"{HOOK}.json", tmp_path / f"{HOOK}.bin"
    record.write_text(json.dumps(about | {"checksum": checksum}))
    numbers.write_bytes(b"numbers")
    with pytest.raises(SaesubError, match="another version of saesub made: pass another folder"):
        harvest(model, texts, [HOOK], tmp_path, n_tokens=20, context_size=32)
    assert numbers.read_bytes() == b"numbers"


def test_torchs_newer_names_of_the_precision_are_read() -> None:
    """In a process of its own: torch keeps to the names that were used first."""
    code = (
        "import torch\nfrom saesub.activations.identity import _arithmetic\n"
        "before = _arithmetic('cpu')\n"
        "for place in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends):\n"
        "    place.fp32_precision = 'tf32'\n"
        "    assert _arithmetic('cpu') != before, before\n"
        "    place.fp32_precision = 'none'\n"
        "    assert _arithmetic('cpu') == before, before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
