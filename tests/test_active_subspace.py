"""The search in the active subspace, compiled and by torch operators, against the whole product."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

from saesub.topk import cpu, cpu_library, int8_search, subspace_search
from saesub.topk.active_subspace import (
    ActiveSubspace,
    Prices,
    active_subspace,
    left_out,
    second_moment,
)
from saesub.topk.ops import dense_search
from saesub.topk.packed_encoder import Basis, PackedEncoder, search_all
from saesub.topk.sae import use_sparse_step
from saesub.topk.subspace_watch import Found, SubspaceWatch, search_watched
from saesub.training.trainer import SubspaceSAETrainer

needs_native = pytest.mark.skipif(not cpu_library.instructions(), reason="no 8-bit products here")
FREE = Prices(product=1.0, rotated=0.0, candidate=0.1, whole=2.0)  # a subspace always pays
SEARCHES = pytest.mark.parametrize(
    "search",
    [
        pytest.param(search_all, marks=needs_native, id="native"),
        pytest.param(subspace_search.search, id="torch"),
    ],
)


def _low_rank(n: int, d: int, d_sae: int, rank: int, seed: int, tail: float = 0.05):
    """Tokens with nearly all variance in a few directions, and features that lie mostly there."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    directions = torch.linalg.qr(make(d, d)).Q
    spread = torch.full((d,), tail)
    spread[:rank] = torch.linspace(3, 1, rank)
    x = (make(n, d) * spread) @ directions.T
    rows = (make(d_sae, d) * spread) @ directions.T
    return x, torch.nn.functional.normalize(rows, dim=1).T, make(d_sae) / 10, directions


def _scores(x, W_enc, b_enc, scale, features):
    """Float64 ranks of the features found, sorted: what a lost feature would change."""
    pre = x.double() @ W_enc.double() + b_enc.double()
    pre = pre if scale is None else pre * scale.double()
    return pre.gather(1, features).sort(1).values


@SEARCHES
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 150),
    d=st.integers(2, 90),
    d_sae=st.integers(64, 900),
    k=st.integers(1, 8),
    rank=st.integers(1, 90),
    scaled=st.booleans(),
    odd=st.sampled_from(["none", "zero rows", "massive coordinate", "ties", "zero tokens"]),
    seed=st.integers(0, 1000),
)
def test_no_feature_is_lost(search, n, d, d_sae, k, rank, scaled, odd, seed):
    """Of any rank, of full-rank data, of odd data."""
    rank = min(rank, d)
    x, W_enc, b_enc, directions = _low_rank(n, d, d_sae, max(1, rank // 2), seed, tail=0.3)
    if odd == "zero rows":
        W_enc[:, ::3] = 0
    elif odd == "massive coordinate":
        x[:, 0] *= 300
    elif odd == "ties":
        W_enc[:, 10:50] = W_enc[:, 9:10]
        b_enc[10:50] = b_enc[9]
    elif odd == "zero tokens":
        x[::2] = 0
    scale = torch.linspace(0.1, 3, d_sae) if scaled else None
    subspace = ActiveSubspace(directions[:, :rank].contiguous(), 4 * k, 4 * k)
    found = search(x, W_enc, b_enc, k, scale, subspace)
    expected = dense_search(x, W_enc, b_enc, k, scale)
    a, b = (_scores(x, W_enc, b_enc, scale, f) for f in (found.features, expected[0]))
    atol = 2e-6 * float(x.norm(dim=1).max() + 1) * (1 if scale is None else 3)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
    exact = torch.gather(x @ W_enc + b_enc, 1, found.features)
    torch.testing.assert_close(found.pre, exact, rtol=1e-5, atol=atol)
    assert all(len(set(row)) == len(row) for row in found.features.tolist())


def _measured(x, W_enc, b_enc, k, scale=None, prices=FREE) -> ActiveSubspace | None:
    half = len(x) // 2
    given = (W_enc, b_enc, k, scale, prices)
    ranking = 1.5 * k * prices.candidate
    return active_subspace(second_moment(x[:half]), x[half:], *given, moved=0, ranking=ranking)


@SEARCHES
@pytest.mark.parametrize("scaled", [False, True])
def test_a_measured_subspace_finds_the_top_k_of_low_rank_tokens(search, scaled):
    x, W_enc, b_enc, _ = _low_rank(4000, 192, 4096, 40, 0)
    scale = torch.linspace(0.5, 2, 4096) if scaled else None
    subspace = _measured(x, W_enc, b_enc, 16, scale)
    assert subspace is not None
    assert 32 <= subspace.rank <= 96
    fresh, *_ = _low_rank(1000, 192, 4096, 40, 0)  # the same directions, drawn again
    found = search(fresh, W_enc, b_enc, 16, scale, subspace)
    expected, _ = dense_search(fresh, W_enc, b_enc, 16, scale)
    scores = (_scores(fresh, W_enc, b_enc, scale, f) for f in (found.features, expected))
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)  # or a tie
    assert 16 <= found.ranked < 4096 / 8
    assert found.by_the_whole < 0.1


@SEARCHES
@pytest.mark.parametrize("share", [0.002, 0.5])
def test_tokens_of_a_kind_that_was_not_measured_lose_nothing(search, share):
    """Of a direction that the measured tokens lack, and that a feature lies along."""
    x, W_enc, b_enc, directions = _low_rank(2000, 192, 4096, 40, 0, tail=0.003)
    W_enc[:, 7] = directions[:, -1]
    subspace = _measured(x, W_enc, b_enc, 16)
    assert subspace is not None
    odd = torch.arange(2000) % round(1 / share) == 0
    x[odd] += 20 * directions[:, -1]
    found = search(x, W_enc, b_enc, 16, None, subspace)
    expected, _ = dense_search(x, W_enc, b_enc, 16, None)
    assert (expected[odd] == 7).any(1).float().mean() > 0.5  # else nothing is tested
    assert torch.equal(found.features.sort(1).values, expected.sort(1).values)


def test_full_rank_tokens_are_searched_by_all_coordinates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 192, generator=generator)
    W_enc = torch.nn.functional.normalize(torch.randn(4096, 192, generator=generator), dim=1).T
    prices = Prices(product=0.3, rotated=0.6, candidate=50.0, whole=2.0)
    assert _measured(x, W_enc, torch.zeros(4096), 16, prices=prices) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_measured_on_tokens_that_are_not_finite(value):
    x, W_enc, b_enc, _ = _low_rank(800, 192, 4096, 40, 0)
    x[3, 5] = value
    assert _measured(x, W_enc, b_enc, 16) is None


@needs_native
def test_what_is_not_finite_shows():
    x, W_enc, b_enc, directions = _low_rank(200, 64, 1024, 20, 0)
    subspace = ActiveSubspace(directions[:, :32].contiguous(), 32, 32)
    for where in (W_enc, b_enc, x):
        kept = where.clone()
        where[(0,) * where.ndim] = torch.nan
        for search in (search_all, subspace_search.search):
            found = search(x, W_enc, b_enc, 8, None, subspace)
            expected = dense_search(x, W_enc, b_enc, 8, None)
            assert torch.equal(found.pre.isfinite().sum(1), expected[1].isfinite().sum(1))
        where.copy_(kept)


def _watched(n_searches: int, times: float) -> list[ActiveSubspace | None]:
    """The subspace of every search, where ranking costs so many times what is expected of it."""
    x, W_enc, b_enc, _ = _low_rank(4000, 192, 4096, 40, 0)
    watch, subspaces, nothing = SubspaceWatch(FREE, 0), [], torch.zeros(1, 1)

    def search_in(subspace):
        subspaces.append(subspace)
        ranking = 0.0 if subspace is None else times * subspace.ranking
        return Found(nothing.long(), nothing, ranking / FREE.candidate, 0.0)

    for i in range(n_searches):
        start = 800 * (i % 5)
        search_watched(watch, search_in, x[start : start + 800], W_enc, b_enc, 16, None)
    return subspaces


def _changes(subspaces) -> list[int]:
    """The searches that are the first in a new subspace."""
    return [i for i, (a, b) in enumerate(pairwise([None, *subspaces]), 1) if a is not b]


def test_it_is_measured_once_there_are_tokens_enough_and_then_ever_more_rarely():
    """3,072 tokens are 16 for each coordinate: four searches, and one on which it is counted."""
    assert _changes(_watched(420, 1.9)) == [5, 24, 100, 404]


def test_it_is_measured_again_where_ranking_costs_much_more_than_expected():
    assert _changes(_watched(280, 2.1)) == [5, 24, 92, 160, 228]


def test_what_a_subspace_is_expected_to_cost_is_what_it_costs_on_other_tokens():
    """The directions of few tokens fit these alone; a count on the same tokens does not see it."""
    spread = 0.99 ** torch.arange(192)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9000, 192, generator=generator) * spread
    rows = torch.randn(4096, 192, generator=generator) * spread
    W_enc, b_enc = torch.nn.functional.normalize(rows, dim=1).T, torch.zeros(4096)
    watch = SubspaceWatch(Prices(product=1.0, rotated=0.0, candidate=5.0, whole=2.0), 0)
    for part in x[:8000].split(800):
        watch.before_search(part, W_enc, b_enc, 16, None)
    subspace = watch.found
    assert subspace is not None
    read, rest = left_out(x[8000:], subspace.basis)
    rows, row_rest = left_out(W_enc.T, subspace.basis)
    least = (x[8000:] @ W_enc).topk(16).values[:, -1:]
    counts = (read @ rows.T + rest[:, None] * row_rest >= least).sum(1)
    assert float(counts.float().mean()) * 5 < 1.1 * subspace.ranking


def test_a_batchs_second_search_is_no_occasion_to_measure():
    watch = SubspaceWatch(FREE, 0)
    assert not watch.is_repeated(400, 16)
    assert watch.is_repeated(100, 32)  # for some tokens, as BatchTopK's
    assert not watch.is_repeated(400, 16)


def _sae(kind, d_sae: int = 2048, d_in: int = 128, k: int = 4, **settings):
    torch.manual_seed(0)
    make, config = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[kind]
    return make(config(d_in=d_in, d_sae=d_sae, k=k, aux_loss_coefficient=0.0, **settings))


def _trainer(sae, batches, optimizer="sparse_adam", **settings):
    cfg = SAETrainerConfig(
        total_training_samples=40 * 600, train_batch_size_samples=600, lr=1e-3, device="cpu"
    )
    return SubspaceSAETrainer(cfg, sae, iter(batches), optimizer=optimizer, **settings)


@pytest.fixture
def batches():
    x, *_ = _low_rank(40 * 600, 128, 64, 24, 0)
    return list(x.split(600))


@pytest.fixture
def cheap(monkeypatch):
    """Prices by which a subspace pays in small dictionaries too."""
    monkeypatch.setattr("saesub.topk.cpu.native_prices", lambda: FREE)
    monkeypatch.setattr("saesub.topk.sae_search.native_prices", lambda: FREE)
    monkeypatch.setattr("saesub.topk.sae_search.TORCH_PRICES", FREE)
    monkeypatch.setattr(int8_search, "available", lambda: False)


def _subspaces(monkeypatch) -> list:
    """The subspace of every compiled search."""
    kept, find = [], PackedEncoder.search

    def search(self, *given):
        kept.append(self.subspace)
        return find(self, *given)

    monkeypatch.setattr(PackedEncoder, "search", search)
    return kept


@needs_native
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_the_copy_follows_the_rows_that_move(batches, cheap, kind, optimizer):
    """After steps in a subspace it is, to the bit, what a copy of all rows is."""
    trainer = _trainer(_sae(kind), batches, optimizer)
    for x in batches[:12]:
        trainer.step(x)
    shadow = trainer.native_step._shadow
    encoder = shadow._encoder
    assert encoder.subspace is not None
    table, weights = encoder.table.clone(), encoder.weights.clone()
    norms = None if shadow.norms is None else shadow.norms.clone()
    sae = trainer.sae
    encoder.pack(sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach())
    assert torch.equal(encoder.table, table)
    assert torch.equal(encoder.weights, weights)
    assert norms is None or torch.equal(shadow.norms, norms)


@needs_native
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("path", ["auto", "torch"])
def test_steps_in_a_subspace_learn_what_exact_steps_learn(batches, cheap, monkeypatch, kind, path):
    monkeypatch.setattr(subspace_search, "_LEAST_FEATURES_PER_K", 8)
    searched, ranks = [], []
    find = subspace_search.search
    monkeypatch.setattr(subspace_search, "search", lambda *g: ranks.append(g[5]) or find(*g))
    searched = _subspaces(monkeypatch)
    losses = []
    for in_subspace in (True, False):
        sae = use_sparse_step(_sae(kind), in_subspace=in_subspace)
        trainer = _trainer(sae, batches, backend=path)
        losses.append(torch.stack([trainer.step(x).losses["mse_loss"] for x in batches]))
        used = any(s is not None for s in searched) or bool(ranks)
        assert used == in_subspace
        searched.clear(), ranks.clear()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


@needs_native
@pytest.mark.parametrize("change", ["data", "in place", "one row of .data", "norms"])
def test_weights_that_others_change_are_copied_before_the_next_search(batches, cheap, change):
    trainer = _trainer(_sae("topk"), batches)
    for x in batches[:8]:
        trainer.step(x)
    sae, shadow = trainer.sae, trainer.native_step._shadow
    if change == "data":
        sae.W_enc.data.mul_(-1)
    elif change == "in place":
        with torch.no_grad():
            sae.W_enc.mul_(-1)
    elif change == "one row of .data":
        sae.W_enc.data[:, 77] = 5 * batches[8][0] / batches[8][0].norm()
    else:
        sae.W_dec.data[77] *= 9
    shadow = cpu.BACKEND.shadow(sae, shadow)
    weights = (sae.W_enc.detach(), sae.b_enc.detach())
    x = batches[8] - sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else batches[8]
    found, _ = shadow.search(x, *weights, 4, shadow.norms)
    scale = sae.W_dec.detach().norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else None
    expected, _ = dense_search(x, *weights, 4, scale)
    hit = (found[:, :, None] == expected[:, None, :]).any(1)
    assert hit.float().mean() > 0.999


@needs_native
@pytest.mark.parametrize("in_subspace", [True, False])
def test_a_change_that_no_probe_sees_is_copied_within_some_steps(batches, cheap, in_subspace):
    trainer = _trainer(_sae("topk"), batches)
    trainer.sae.in_subspace = in_subspace
    for x in batches[:8]:
        trainer.step(x)
    sae, shadow = trainer.sae, trainer.native_step._shadow
    row = torch.arange(128) != 77  # the number of row 77 that is probed stays
    sae.W_enc.data[row, 77] = 5.0
    before = shadow._encoder.table.clone()
    for _ in range(64):
        shadow.keep_up(*(p.detach() for p in (sae.W_enc, sae.W_dec, sae.b_enc)))
    assert not torch.equal(shadow._encoder.table, before)
    kept = shadow._encoder.table.clone(), shadow._encoder.weights.clone()
    shadow._encoder.pack(sae.W_enc.detach(), sae.b_enc.detach())
    assert torch.equal(shadow._encoder.table, kept[0])
    assert torch.equal(shadow._encoder.weights, kept[1])


@needs_native
def test_a_change_that_torch_counts_is_copied_at_once(batches, cheap):
    """Though the one number of each row that is probed stays."""
    trainer = _trainer(_sae("topk"), batches)
    for x in batches[:8]:
        trainer.step(x)
    sae, shadow = trainer.sae, trainer.native_step._shadow
    rows = torch.arange(2048)
    with torch.no_grad():
        probed = sae.W_enc[rows % 128, rows].clone()
        sae.W_enc.mul_(-1)
        sae.W_enc[rows % 128, rows] = probed
    shadow = cpu.BACKEND.shadow(sae, shadow)
    table = shadow._encoder.table.clone()
    shadow._encoder.pack(sae.W_enc.detach(), sae.b_enc.detach())
    assert torch.equal(shadow._encoder.table, table)


@needs_native
def test_how_many_rows_move_is_what_the_rotation_is_priced_by(batches, cheap):
    trainer = _trainer(_sae("topk"), batches)
    for x in batches[:3]:
        before = trainer.sae.W_dec.detach().clone()
        trainer.step(x)
    moved = (trainer.sae.W_dec != before).any(1).sum()
    assert trainer.native_step._shadow._watch.moved == moved < 2048


@needs_native
@pytest.mark.parametrize("rank", [16, 90])
def test_what_is_read_and_left_out_is_of_the_rounded_directions(rank):
    """In 8 bits they are hardly orthogonal."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(96, 96)).Q[:, :rank] * torch.linspace(1, 3, rank)
    directions = torch.linalg.qr(directions + 0.02 * torch.randn(96, rank)).Q
    scale = directions.abs().amax(0) / cpu_library.n_steps()
    rounded = ((directions / scale).round() * scale).double()
    x = torch.randn(50, 96)
    read, rest = Basis(directions).read(x)
    span = torch.linalg.qr(rounded).Q
    outside = x.double() - x.double() @ span @ span.T
    torch.testing.assert_close(rest.double(), outside.norm(dim=1), rtol=1e-3, atol=1e-2)
    inside = x.double() @ span @ span.T
    torch.testing.assert_close(read.double() @ rounded.T, inside, rtol=1e-4, atol=1e-4)


def test_a_watch_is_for_weights_of_one_width_and_device():
    x, W_enc, b_enc, _ = _low_rank(4800, 192, 4096, 40, 0)
    watch = SubspaceWatch(FREE, 0)
    assert watch.is_on(W_enc)
    for part in x.split(800):
        watch.before_search(part, W_enc, b_enc, 16, None)
    assert watch.found is not None
    assert watch.is_on(W_enc)
    assert not watch.is_on(W_enc[:100])
    assert not watch.is_on(W_enc.to("meta"))


@needs_native
def test_other_biases_than_those_of_the_copy_are_not_searched_by_it(batches, cheap):
    trainer = _trainer(_sae("topk"), batches)
    for x in batches[:8]:
        trainer.step(x)
    shadow, W_enc = trainer.native_step._shadow, trainer.sae.W_enc.detach()
    b_enc = torch.linspace(-3, 3, 2048)
    found, _ = shadow.search(batches[9], W_enc, b_enc, 4, None)
    expected, _ = dense_search(batches[9], W_enc, b_enc, 4, None)
    assert torch.equal(found.sort(1).values, expected.sort(1).values)


@needs_native
def test_other_weights_than_those_of_the_copy_are_not_searched_by_it(batches, cheap):
    trainer = _trainer(_sae("topk"), batches)
    for x in batches[:8]:
        trainer.step(x)
    shadow = trainer.native_step._shadow
    _, W_enc, b_enc, _ = _low_rank(1, 128, 2048, 24, 3)
    found, _ = shadow.search(batches[9], W_enc, b_enc, 4, None)
    expected, _ = dense_search(batches[9], W_enc, b_enc, 4, None)
    assert torch.equal(found.sort(1).values, expected.sort(1).values)


@needs_native
def test_a_run_resumed_searches_in_the_subspace_of_the_run_before(
    batches, cheap, monkeypatch, tmp_path
):
    def trainer():
        return _trainer(_sae("topk"), [])

    whole = trainer()
    for x in batches:
        whole.step(x)
    first = trainer()
    for x in batches[:17]:
        first.step(x)
    first.save_checkpoint("half", base_path=tmp_path)
    resumed = trainer()
    sought = _subspaces(monkeypatch)
    resumed.sae.load_weights_from_checkpoint(tmp_path / "half")
    resumed.load_trainer_state(tmp_path / "half")
    for x in batches[17:]:
        resumed.step(x)
    before = first.native_step._shadow._encoder.subspace
    assert torch.equal(sought[0].basis, before.basis)
    assert (sought[0].ranking, sought[0].candidates) == (before.ranking, before.candidates)
    for a, b in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_native
def test_the_users_default_dtype_does_not_matter(batches, cheap):
    weights = []
    for dtype in (torch.float32, torch.float64):
        trainer = _trainer(_sae("topk"), batches)
        torch.set_default_dtype(dtype)
        try:
            for x in batches[:6]:
                trainer.step(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert trainer.native_step._shadow._encoder.subspace is not None
        weights.append(trainer.sae.W_enc.detach())
    assert torch.equal(*weights)


@needs_native
def test_a_trainer_is_copied_with_its_search(batches, cheap):
    trainer = _trainer(_sae("topk"), [])
    for x in batches[:6]:
        trainer.step(x)
    twin = copy.deepcopy(trainer)
    for x in batches[6:9]:
        trainer.step(x)
        twin.step(x)
    torch.testing.assert_close(twin.sae.W_enc, trainer.sae.W_enc, rtol=1e-4, atol=1e-6)


@needs_native
def test_what_the_compiled_search_would_misread_is_refused():
    x, W_enc, b_enc, directions = _low_rank(20, 64, 1024, 20, 0)
    subspace = ActiveSubspace(directions[:, :32].contiguous(), 32, 32)
    with pytest.raises(TypeError, match="strides"):
        search_all(x, W_enc.contiguous(), b_enc, 8, None, subspace)
    with pytest.raises(TypeError, match="float64"):
        search_all(x, W_enc, b_enc.double(), 8, None, subspace)
