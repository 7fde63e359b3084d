"""Activations of the real model: the right values at the right positions, streamed and stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge
from waiting import no_waiting

from saesub.activations import forward_pass
from saesub.activations import store as store_module
from saesub.activations.collect import (
    harvest,
    measure_spectra,
    measure_spectrum,
    stream_activations,
)
from saesub.activations.forward_pass import ReadSoFar
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import StoreWriter, held
from saesub.activations.tokens import ContextStream, kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.loading import models

pytestmark = pytest.mark.model

SITES = [
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.0.hook_resid_post",
]
SMALL = {"context_size": 32, "batch_size": 4, "progress": False}
ATTN = "blocks.0.hook_attn_out"


@pytest.fixture(scope="module")
def model(two_layers: TransformerBridge) -> TransformerBridge:
    return two_layers


def _poison(model: TransformerBridge, value: float) -> None:
    def hook(tensor: torch.Tensor, hook) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[1, 20, 3] = value
        return tensor

    model.hook_dict[ATTN].add_hook(hook, level=77)


@pytest.fixture
def poisoned(model: TransformerBridge):
    yield lambda value: _poison(model, value)
    model.hook_dict[ATTN].remove_hooks("fwd", level=77)


def test_contexts_are_the_documents_joined(model: TransformerBridge, corpus: Dataset) -> None:
    specials = models.context_tokens(model)
    tokens = pack_contexts(model, corpus, n_contexts=9, context_size=40)
    assert tokens.shape == (9, 40)
    bos = specials.bos_id is not None
    assert not bos or (tokens[:, 0] == specials.bos_id).all()
    expected: list[int] = []
    for text in corpus[:20]["text"]:
        expected += model.tokenizer(text, add_special_tokens=False).input_ids
        expected += [specials.separator_id]
    body = tokens[:, int(bos) :].flatten()
    assert len(expected) > len(body)
    assert body.tolist() == expected[: len(body)]


def test_contexts_do_not_depend_on_how_they_are_taken(
    model: TransformerBridge, corpus: Dataset
) -> None:
    few = corpus.select(range(12))
    stream = ContextStream(model, few, 16)
    with pytest.warns(UserWarning, match="tokens and is read again"):
        pieces = torch.cat([stream.take(n) for n in (1, 5, 300, 2)])
    assert stream.epochs > 1
    with pytest.warns(UserWarning, match="tokens and is read again"):
        assert torch.equal(pieces, ContextStream(model, few, 16).take(308))


def test_bos_starts_each_context_and_is_left_out(
    model: TransformerBridge, corpus: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    specials = models.ContextTokens(bos_id=1, separator_id=0, special_ids=(0, 1, 2))
    monkeypatch.setattr("saesub.activations.tokens.context_tokens", lambda _: specials)
    tokens = ContextStream(model, corpus, 16).take(3)
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:, 1:] != 1).all()
    kept = kept_positions(model, torch.tensor([[1, 5, 6, 0, 7, 2, 8]]), skip_first=1)
    assert kept.tolist() == [[False, False, True, False, True, False, True]]


def test_values_equal_a_plain_run(model: TransformerBridge, corpus: Dataset) -> None:
    tokens = pack_contexts(model, corpus, n_contexts=8, context_size=32)
    kept = kept_positions(model, tokens, skip_first=2)
    _, cache = model.run_with_cache(tokens, names_filter=SITES)
    n = int(kept.sum()) - 5
    got = list(stream_activations(model, corpus, SITES, n_tokens=n, skip_first=2, **SMALL))
    for name in SITES:
        rows = torch.cat([batch[name] for batch in got])
        expected = cache[name].flatten(2)[kept][:n]
        assert rows.shape == (n, 576)
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_model_stops_at_the_last_hook_point(model: TransformerBridge, corpus: Dataset) -> None:
    later: list[str] = []
    names = ["blocks.0.mlp.hook_out", "blocks.1.hook_in", "unembed.hook_out"]
    for name in names:
        model.hook_dict[name].add_hook(lambda _, hook, name=name: later.append(name), level=77)
    try:
        measure_spectrum(model, corpus, ATTN, n_tokens=50, **SMALL)
    finally:
        for name in names:
            model.hook_dict[name].remove_hooks("fwd", level=77)
    assert later == []


def test_the_model_runs_on_no_context_beyond_the_rows_asked_for(
    model: TransformerBridge, corpus: Dataset
) -> None:
    sizes: list[int] = []
    model.hook_dict[ATTN].add_hook(lambda x, hook: sizes.append(len(x)), level=77)
    try:
        stream = stream_activations(model, corpus, [ATTN], n_tokens=10, **SMALL)
        assert len(next(stream)[ATTN]) == 10
    finally:
        model.hook_dict[ATTN].remove_hooks("fwd", level=77)
    assert sizes == [1]


def test_spectra_equal_those_of_the_stream(model: TransformerBridge, corpus: Dataset) -> None:
    spectra = measure_spectra(model, corpus, SITES, n_tokens=700, **SMALL)
    batches = list(stream_activations(model, corpus, SITES, n_tokens=700, **SMALL))
    for name, spectrum in spectra.items():
        x = torch.cat([b[name] for b in batches]).double()
        expected = torch.cov(x.T, correction=0)
        assert spectrum.n_tokens == len(x) == 700
        assert (spectrum.covariance - expected).norm() < 1e-5 * expected.norm()
        assert spectrum.metadata["hook_name"] == name
        assert {"model", "corpus", "context_size", "skip_first", "epochs"} <= set(spectrum.metadata)


def test_store_holds_the_stream(model: TransformerBridge, corpus: Dataset, tmp_path: Path) -> None:
    stores = harvest(model, corpus, SITES, tmp_path, n_tokens=300, dtype=torch.float32, **SMALL)
    batches = list(stream_activations(model, corpus, SITES, n_tokens=300, **SMALL))
    for name, store in stores.items():
        assert (store.n_tokens, store.d_in) == (300, 576)
        torch.testing.assert_close(store.rows(0, 300), torch.cat([b[name] for b in batches]))
    assert len(list(tmp_path.iterdir())) == 2 * len(SITES) + 1  # and the lock


def test_a_finished_store_is_reused_and_a_damaged_one_redone(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(**changes) -> ActivationStore:
        settings = {"n_tokens": 200, **SMALL, **changes}
        return harvest(model, corpus, [ATTN], tmp_path, **settings)[ATTN]

    first = again().rows(0, 200)
    data, marker = tmp_path / f"{ATTN}.bin", tmp_path / f"{ATTN}.json"
    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "capture", lambda *_: pytest.fail("ran the model"))
        torch.testing.assert_close(again(batch_size=2).rows(0, 200), first)
        torch.testing.assert_close(again(n_tokens=100).rows(0, 100), first[:100])
        with pytest.raises(SaesubError, match="differs in text"):
            harvest(model, corpus.select(range(99)), [ATTN], tmp_path, n_tokens=200, **SMALL)
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(SaesubError, match="truncated"):
        ActivationStore.open(tmp_path, ATTN)
    torch.testing.assert_close(again().rows(0, 200), first)
    marker.write_text("{")
    with pytest.raises(SaesubError, match="damaged"):
        ActivationStore.open(tmp_path, ATTN)
    marker.unlink()
    with pytest.raises(SaesubError, match="no finished store"):
        ActivationStore.open(tmp_path, ATTN)
    torch.testing.assert_close(again().rows(0, 200), first)


class _StopError(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """A harvest under it stops before its n-th batch, and what was written until then is kept."""
    monkeypatch.setattr(forward_pass, "KEEP_EVERY", 0.0)
    forward = forward_pass.capture

    @contextmanager
    def stop_after(n_batches: int) -> Iterator[None]:
        left = iter(range(n_batches))

        def capture(*args) -> None:
            if next(left, None) is None:
                raise _StopError
            forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(forward_pass, "capture", capture)
            yield

    return stop_after


def _kept_rows(folder: Path, name: str) -> int:
    return json.loads((folder / f"{name}.json").read_bytes())["n_rows"]


def test_an_interrupted_store_goes_on_beside_others(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, stopped, monkeypatch
) -> None:
    """Each goes on where it was kept: the one of the first call, then both, then a third."""
    run, other, third = {"n_tokens": 1000, **SMALL}, SITES[2], SITES[3]
    whole = harvest(model, corpus, [ATTN, other, third], tmp_path / "whole", **run)
    place = tmp_path / "parts"
    with pytest.raises(_StopError), stopped(5):
        harvest(model, corpus, [ATTN], place, **run)
    kept = _kept_rows(place, ATTN)
    with pytest.raises(_StopError), stopped(3):
        harvest(model, corpus, [other, ATTN], place, **run)
    assert _kept_rows(place, ATTN) == kept > _kept_rows(place, other) > 0
    written: dict[str, int] = {}
    write = StoreWriter.write

    def counted(self: StoreWriter, x: torch.Tensor) -> None:
        written[self._data.stem] = written.get(self._data.stem, 0) + len(x)
        write(self, x)

    monkeypatch.setattr(StoreWriter, "write", counted)
    kept = {ATTN: kept, other: _kept_rows(place, other), third: 0}
    stores = harvest(model, corpus, [ATTN, third, other], place, **run)
    # Each is written to the end of the context that holds the last token.
    assert written == {name: _kept_rows(place, name) - kept[name] for name in kept}
    for name, store in stores.items():
        assert torch.equal(store.rows(0, 1000), whole[name].rows(0, 1000))


def test_a_bad_hook_point_costs_no_other_its_rows(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, stopped, monkeypatch
) -> None:
    run, other, capture = {"n_tokens": 1000, **SMALL}, SITES[0], forward_pass.capture

    def poisoned(model, tokens, points, receive) -> None:
        def spoil(name: str, x: torch.Tensor) -> None:
            receive(name, x * float("nan") if name == ATTN else x)

        capture(model, tokens, points, spoil)

    with pytest.raises(_StopError), stopped(3):
        harvest(model, corpus, [other], tmp_path, **run)
    kept = _kept_rows(tmp_path, other)
    monkeypatch.setattr(forward_pass, "capture", poisoned)
    with pytest.raises(SaesubError, match="NaN"):
        harvest(model, corpus, [ATTN, other], tmp_path, **run)
    assert _kept_rows(tmp_path, other) == kept
    assert not list(tmp_path.glob(f"{ATTN}.*"))


def _store(folder: Path, n: int = 103, d: int = 4) -> ActivationStore:
    """A store whose rows are their own index."""
    with StoreWriter(folder, "h", torch.float32, {}) as writer:
        writer.write(torch.arange(n).unsqueeze(1).expand(n, d))
        writer.finish(n, ReadSoFar(1, {}, 1.0))
    return ActivationStore.open(folder, "h")


def test_batches_are_shuffled_and_restart_exactly(tmp_path: Path) -> None:
    store = _store(tmp_path)
    run = list(store.batches(10, seed=3, stop=25))
    for start in (0, 1, 9, 10, 24):
        rest = list(store.batches(10, seed=3, start_step=start, stop=25))
        assert len(rest) == 25 - start
        assert all(torch.equal(a, b) for a, b in zip(run[start:], rest, strict=True))
    epoch = torch.cat(run[:10])[:, 0].tolist()
    assert len(set(epoch)) == 100
    assert set(run[0][:, 0].tolist()) != set(run[10][:, 0].tolist())
    other = next(store.batches(10, seed=4))
    assert not torch.equal(other, run[0])
    assert run[0].dtype == torch.float32


def _same(a: ActivationStore, b: ActivationStore) -> None:
    """The same numbers in the same order, under the same identity."""
    assert (a.n_tokens, a.d_in, a.hook_name) == (b.n_tokens, b.d_in, b.hook_name)
    assert a.identity == b.identity
    assert torch.equal(a.rows(3, 11), b.rows(3, 11))
    given = {"seed": 3, "start_step": 4, "stop": 31}
    batches = zip(a.batches(10, **given), b.batches(10, **given), strict=True)
    for one, other in batches:
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_store_in_memory_equals_the_file_batch_for_batch(tmp_path: Path, dtype) -> None:
    numbers = torch.randn(103, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with StoreWriter(tmp_path, "h", dtype, {"text": "t"}) as writer:
        writer.write(numbers)
        writer.finish(103, ReadSoFar(1, {}, 1.0))
    file = ActivationStore.open(tmp_path, "h")
    given, moved = ActivationStore.of(numbers, "h"), file.on("cpu")
    assert repr(given) == repr(moved) == "ActivationStore(h, 103 tokens, d_in 4, on cpu)"
    assert repr(file) == "ActivationStore(h, 103 tokens, d_in 4)"
    assert (moved.settings, moved.epochs) == ({"text": "t", "n_tokens": "103"}, 1.0)
    assert given._rows.dtype == moved._rows.dtype == dtype
    for one in (given, moved, given.on("cpu"), moved.on("cpu")):
        _same(one, file)
        for part, of_file in zip(one.split(20), file.split(20), strict=True):
            _same(part, of_file)
    _same(file.split(20)[1].on("cpu"), file.split(20)[1])
    _same(given.split(20)[0].split(30)[1], file.split(20)[0].split(30)[1])


def test_no_batch_from_memory_is_waited_for() -> None:
    batches = ActivationStore.of(torch.randn(40, 4), "h").batches(10, seed=0)
    next(batches)  # draws the order of the epoch
    with no_waiting():
        assert next(batches).shape == (10, 4)


def test_rows_from_memory_are_a_copy() -> None:
    given = torch.ones(5, 4)
    ActivationStore.of(given, "h").rows(0, 5).zero_()
    assert given.sum() == 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(5), "are no store: give activations"),
        (torch.zeros(0, 4), "are no store: give activations"),
        (torch.zeros(5, 4, dtype=torch.bfloat16), r"holds torch.float16 or torch.float32, not"),
        (torch.zeros(5, 4, dtype=torch.int64), "must hold floating-point numbers"),
        (torch.full((5, 4), torch.nan), "hold NaN or infinite values"),
        ([1.0, 2.0], "must be a tensor"),
    ],
)
def test_what_is_no_store_in_memory_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        ActivationStore.of(rows, "h")


def test_a_device_without_room_or_that_is_not_here_is_refused(tmp_path: Path, monkeypatch) -> None:
    store = _store(tmp_path)
    for device in ("cuda:7", "nowhere", "meta"):
        with pytest.raises(SaesubError, match="give 'cpu' or a device you have"):
            store.on(device)
    free = store_module._free_memory(torch.device("cpu"))
    assert free is None or free > 2**20
    monkeypatch.setattr(store_module, "_free_memory", lambda device: 10**7)
    store.on("cpu")
    monkeypatch.setattr(store_module, "_free_memory", lambda device: 1000)
    with pytest.raises(
        SaesubError, match=r"of h need 0\.00 GB, and 0\.00 GB are free on cpu: move"
    ):
        store.on("cpu")


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "h", torch.float32, {}) as writer:
        writer.write(torch.ones(10, 4))
        writer.keep(ReadSoFar(1, {}, 1.0))
    with pytest.raises(SaesubError, match=r"of h .* is unfinished: harvest it again"):
        ActivationStore.open(tmp_path, "h")
    with StoreWriter(tmp_path, "h", torch.float32, {}, held(tmp_path, "h")) as writer:
        writer.write(torch.zeros(10, 4))
        writer.finish(20, ReadSoFar(2, {}, 1.0))
    assert ActivationStore.open(tmp_path, "h").rows(0, 20).sum() == 40


def test_split_holds_the_last_rows_out(tmp_path: Path) -> None:
    train, held_out = _store(tmp_path).split(20)
    assert (train.n_tokens, held_out.n_tokens) == (83, 20)
    assert held_out.rows(0, 20)[:, 0].tolist() == list(range(83, 103))
    seen = torch.cat(list(train.batches(8, seed=0, stop=40)))
    assert seen.max() < 83
    for n in (0, 103):
        with pytest.raises(SaesubError, match="n_held_out"):
            _store(tmp_path).split(n)
    with pytest.raises(SaesubError, match="batch_size"):
        next(train.batches(84, seed=0))
    for wrong in ({"seed": -1}, {"seed": 0, "start_step": -1}):
        with pytest.raises(SaesubError, match="at least 0"):
            next(train.batches(8, **wrong))
    with pytest.raises(SaesubError, match="are not among the stored"):
        train.rows(80, 84)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, poisoned, bad: float
) -> None:
    poisoned(bad)
    run = {"n_tokens": 100, **SMALL}
    where = rf"{ATTN}, batch 0: .*NaN .* first {bad} in row \d+, column 3"
    with pytest.raises(SaesubError, match=where):
        measure_spectrum(model, corpus, ATTN, **run)
    with pytest.raises(SaesubError, match=where):
        list(stream_activations(model, corpus, [ATTN], **run))
    with pytest.raises(SaesubError, match=where):
        harvest(model, corpus, [ATTN], tmp_path, **run)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_refuses_what_float16_cannot_hold(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, poisoned
) -> None:
    poisoned(1e5)
    with pytest.raises(SaesubError, match=r"pass dtype=torch\.float32"):
        harvest(model, corpus, [ATTN], tmp_path, n_tokens=100, **SMALL)
    harvest(model, corpus, [ATTN], tmp_path, n_tokens=100, dtype=torch.float32, **SMALL)


def test_errors_say_what_to_do(model: TransformerBridge, corpus: Dataset) -> None:
    def spectrum(hook: str = ATTN, text: Dataset = corpus, **changes) -> None:
        measure_spectrum(model, text, hook, **{"n_tokens": 10, **SMALL, **changes})

    with pytest.raises(SaesubError, match=r"did you mean 'blocks\.0\.hook_attn_out'"):
        spectrum("blocks.0.hook_atn_out")
    with pytest.raises(SaesubError, match=r"model\.hook_dict has all \d+\)$"):
        spectrum("")
    with pytest.raises(SaesubError, match=r"hook point 'blocks\.0\.attn\.o\.hook_out'$"):
        spectrum("model.layers.0.self_attn.o_proj")
    with pytest.raises(SaesubError, match=r"'blocks\.1\.hook_out' or 'blocks\.1\.hook_resid_post'"):
        spectrum("model.layers.1")
    with pytest.raises(SaesubError, match="not one vector"):
        spectrum("blocks.0.attn.hook_pattern")
    with pytest.raises(SaesubError, match=r"context_size must lie in 2\.\.8192"):
        spectrum(context_size=8193)
    with pytest.raises(SaesubError, match="fewer than one context"):
        spectrum(text=Dataset.from_dict({"text": ["Too short."]}))
    with pytest.raises(SaesubError, match="leaves nothing"):
        spectrum(skip_first=32)
    with pytest.raises(SaesubError, match="at least"):
        spectrum(n_tokens=0)
    with pytest.raises(SaesubError, match="no hook point"):
        measure_spectra(model, corpus, [], n_tokens=10)
    with pytest.raises(SaesubError, match=r"0 <= i < n, not \(2, 2\)"):
        measure_spectra(model, corpus, [ATTN], n_tokens=10, share=(2, 2))
    with pytest.raises(SaesubError, match="n_contexts must be a whole number of at least 1"):
        pack_contexts(model, corpus, n_contexts=0, context_size=16)
    with pytest.raises(TypeError, match="contxt_size"):
        spectrum(contxt_size=16)


def test_values_that_vanish_in_float16_are_refused(tmp_path: Path) -> None:
    small = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 1e-7
    told = pytest.raises(SaesubError, match=r"too small for torch\.float16: pass dtype=")
    with told, StoreWriter(tmp_path, "h", torch.float16, {}) as writer:
        writer.write(small)
    assert not list(tmp_path.iterdir())
    with StoreWriter(tmp_path, "h", torch.float16, {}) as writer:
        writer.write(small * 1e3)


def test_the_files_of_another_hook_point_are_refused(tmp_path: Path) -> None:
    _store(tmp_path)
    for suffix in (".bin", ".json"):
        (tmp_path / f"h{suffix}").rename(tmp_path / f"other{suffix}")
    with pytest.raises(SaesubError, match="of another hook point"):
        ActivationStore.open(tmp_path, "other")


def test_rows_held_out_of_text_that_was_read_twice_are_warned_of(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "h", torch.float32, {}) as writer:
        writer.write(torch.randn(20, 4))
        writer.finish(20, ReadSoFar(1, {}, 2.0))
    with pytest.warns(UserWarning, match=r"read 2 times, so held-out rows are not new"):
        ActivationStore.open(tmp_path, "h").split(5)
