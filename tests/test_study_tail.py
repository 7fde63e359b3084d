"""The study of the tail: what a condition takes away, and what is said of kinds of token."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer

import saesub

D = 32


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "notebooks" / "studies"))
    import tail

    yield tail
    for cached in (tail.loaded, tail.spectra, tail.token_counts):
        cached.cache_clear()


def _activations(n: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    return torch.randn(n, D, generator=generator) * 0.8 ** torch.arange(D) @ turn + 3


@pytest.fixture
def spectrum():
    return saesub.Spectrum.from_activations(_activations())


def test_every_condition_takes_as_much_variance_as_the_tail_holds(study, spectrum):
    x, r = _activations(), spectrum.rank_at(0.99)
    assert 4 < r < D - 4
    tail = 1 - spectrum.variance_in(r)
    left = {name: made(x) for name, made in study.replacements(spectrum).items()}
    for name in ("tail", "shrunk", "active"):
        gone = ((left[name] - x) ** 2).sum() / ((x - spectrum.mean) ** 2).sum()
        assert gone.item() == pytest.approx(tail, rel=1e-3), name
    torch.testing.assert_close(left["mean"], spectrum.mean.float().expand_as(x))


def test_the_tail_and_the_random_part_are_in_their_own_subspaces(study, spectrum):
    x, axes = _activations(), spectrum.eigenvectors.float()
    r = spectrum.rank_at(0.99)
    left = study.replacements(spectrum)
    tail, active = (((left[name](x) - x) @ axes) ** 2 for name in ("tail", "active"))
    assert tail[:, :r].sum() < 1e-6 * tail.sum()
    assert active[:, r:].sum() < 1e-6 * active.sum()
    centred = (left["tail"](x) - spectrum.mean.float()) @ axes
    assert centred[:, r:].abs().max() < 1e-5


def test_deciles_have_equal_counts_in_one_class_and_the_rarest_first(study):
    counts = np.array([5] * 40 + [1] * 10 + [900] * 50)
    found = study.deciles(counts)
    assert set(found[counts == 1]) == {0}
    assert set(found[counts == 5]) == {3}
    assert set(found[counts == 900]) == {7}
    assert np.bincount(study.deciles(np.arange(100))).tolist() == [10] * 10


def test_a_next_token_is_repeated_if_the_context_has_had_it(study):
    tokens = torch.tensor([[7, 8, 7, 7, 9, 8, 5]])
    assert study.repeated(tokens).tolist() == [[False, True, True, False, True, False, False]]


def test_kinds_are_those_of_the_predictions_that_are_counted(study):
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 5], [6, 6, 6, 6, 6, 6, 6, 7]])
    at = torch.ones_like(tokens, dtype=torch.bool)
    at[:, 0], at[:, -1] = False, False
    counts = torch.tensor([0, 10, 20, 30, 1, 2, 99, 50])
    found = study.kinds(tokens, at, counts)
    of_first = [3, 1, 2, 3, 4, 5]  # the next tokens
    assert found["repeated"][:6].tolist() == [False, True, True, True, False, False]
    assert found["next 0"][:6].tolist() == [token == 4 for token in of_first]
    assert (found["new"] ^ found["repeated"]).all()
    for name, n in (("next", 10), ("own", 10), ("place", 4)):
        assert (sum(found[f"{name} {i}"].astype(int) for i in range(n)) == 1).all()
    assert found["place 3"][:6].tolist() == [False] * 5 + [True]


def test_means_and_intervals_are_those_of_whole_contexts(study):
    """Values that differ between contexts alone: many in a context tell no more than one."""
    context = np.repeat(np.arange(12), 100)
    values = np.random.default_rng(0).normal(size=12)[context]
    resampled = study.Resampled(context)
    value, low, high = study.interval(resampled.ratio(values, np.ones_like(values)))
    assert value == pytest.approx(values.mean(), abs=1e-6)
    error = values[::100].std() / 12**0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_an_effect_on_rare_tokens_alone_is_found_and_one_on_all_is_not(study):
    generator = np.random.default_rng(0)
    n, context = 3000, np.repeat(np.arange(30), 100)
    of = {"all": np.ones(n, dtype=bool)}
    decile = generator.integers(10, size=n)
    of |= {f"next {i}": decile == i for i in range(10)}
    flat = generator.uniform(0.5, 1.5, n)
    found = dict.fromkeys(study.CONDITIONS, flat) | {"tail": flat * np.where(decile < 3, 4, 1)}
    rows = study.by_kind(found, of, study.Resampled(context))
    assert rows["rare"][1] > 1.5
    assert rows["effects"]["tail"]["next 0"][0] == pytest.approx(4, rel=0.1)
    assert rows["by active"][0] == pytest.approx(0.3 * 4 + 0.7, rel=0.1)
    rows = study.by_kind(dict.fromkeys(study.CONDITIONS, flat), of, study.Resampled(context))
    assert rows["rare"] == [1, 1, 1]


def test_the_correlation_with_counts_is_spearmans_and_the_partial_one_leaves_size_out(study):
    generator = np.random.default_rng(0)
    context, counts = np.repeat(np.arange(20), 100), generator.permutation(2000)
    size = counts * np.exp(0.3 * generator.normal(size=2000)) + 1
    share = np.exp(0.1 * generator.normal(size=2000)) / size  # through the size alone
    found = study.tail_by_token(share, size, counts, study.Resampled(context))
    assert found["count"][0] == pytest.approx(spearmanr(counts, share).statistic, abs=1e-3)
    assert found["count"][2] < -0.7
    assert abs(found["count_at_equal_size"][0]) < 0.1
    assert sum(found["of_tail"]) == pytest.approx(1, abs=1e-4)
    assert sum(found["of_all"]) == pytest.approx(1, abs=1e-4)
    assert found["share"] == sorted(found["share"], reverse=True)


def test_the_share_in_the_tail_is_one_for_a_direction_in_it(study, spectrum):
    axes, r = spectrum.eigenvectors, spectrum.rank_at(0.99)
    directions = torch.stack([axes[:, 0], axes[:, r], axes[:, r - 1] + axes[:, r]])
    assert study.in_tail(7 * directions, spectrum).tolist() == pytest.approx([0, 1, 0.5], abs=1e-9)


def test_rare_features_are_found_among_the_living_alone(study):
    counts = torch.arange(200) - 50
    tail = torch.where(counts > 0, 1 / (counts + 1.0), torch.rand(200) * 9).double()
    cosine = torch.rand(200, generator=torch.Generator().manual_seed(0))
    found = study.rare_features(counts.clamp(min=0), tail, torch.zeros(200), cosine)
    assert found["living"] == 149
    assert found["rare"] == pytest.approx(-1)
    assert found["rare_at_start"] is None  # every direction began in the subspace
    assert found["tail"] == sorted(found["tail"], reverse=True)


@pytest.mark.filterwarnings("ignore:the corpus ends")
def test_a_row_of_a_small_model_agrees_with_the_package(study, monkeypatch):
    """The clean loss and mean ablation are those of subspace_loss_recovered; what is in the tail
    of a token is what the condition takes from it."""
    bridge = saesub.load_model((tiny_gpt2(), tiny_tokenizer()))
    texts = tiny_texts(200)
    hook = "blocks.1.hook_attn_out"
    monkeypatch.setattr(study, "N_CONTEXTS", 6)
    monkeypatch.setattr(study, "CONTEXT_SIZE", 64)
    monkeypatch.setattr(study, "N_SPECTRUM", 3000)
    monkeypatch.setattr(study, "SITES", ("attn_out",))
    monkeypatch.setattr(study.saesub, "load_model", lambda model: bridge)
    documents = saesub.load_corpus(texts)
    monkeypatch.setattr(study.saesub, "load_corpus", lambda corpus: documents)
    (part,) = (p for p in study.loss_parts([1]) if p.hook_name == hook)
    row = study.outcome(part)

    tokens = saesub.pack_contexts(bridge, study.split("")[1], n_contexts=6, context_size=64)
    spectrum = study.spectra(part.model, part.corpus)[hook]
    r = spectrum.rank_at(0.99)
    expected = saesub.subspace_loss_recovered(bridge, tokens, hook, spectrum, [r], progress=False)
    assert row["n"]["all"] == expected.n_predicted.sum()
    assert row["clean"]["all"][0] == pytest.approx(expected.ce("clean"), abs=1e-5)
    effects = row["loss"]["effects"]
    for condition, name in ((0, "mean"), (r, "tail")):
        cost = expected.ce(condition) - expected.ce("clean")
        assert effects[name]["all"][0] == pytest.approx(cost, abs=2e-5)
    assert row["energy"]["mean"] == 1
    assert row["energy"]["tail"] == pytest.approx(
        sum(row["tokens"]["of_tail"]) * _tail_of(study, bridge, tokens, hook, spectrum), rel=1e-3
    )
    assert row["divergence"]["effects"]["mean"]["all"][1] > 0


def _tail_of(study, bridge, tokens, hook, spectrum) -> float:
    """The share of the site's variance on these tokens that lies in the tail, by hand."""
    kept = study.kept_positions(bridge, tokens, 1)
    _, cache = bridge.run_with_cache(tokens)
    x = cache[hook][kept].double() - spectrum.mean
    beyond = spectrum.eigenvectors[:, spectrum.rank_at(0.99) :]
    return (((x @ beyond) ** 2).sum() / (x**2).sum()).item()


def test_every_row_has_settings_of_its_own(study):
    parts = [*study.loss_parts(), *study.feature_parts()]
    assert len(set(parts)) == len(parts) == 10 + 6
    assert {p.hooks == set() for p in study.loss_parts()} == {True}
    starts = {(p.start, p.seed) for p in study.feature_parts()}
    assert starts == set(product(("random", "subspace"), range(3)))


def test_the_record_is_whole(study):
    """A tail holds no more than 1 % of the variance, and all that goes is from the site."""
    record = json.loads((study.protocol.RESULTS / "tail.json").read_text())
    rows = record["rows"]
    assert {row["run"] for row in rows} <= set(range(len(record["runs"])))
    made = {study.protocol.trial_of(row, study.Part) for row in rows}
    assert len(made) == len(rows)
    assert made <= {*study.loss_parts(), *study.feature_parts()}
    for row in rows:
        if row["part"] == "features":
            assert row["living"] == round(row["d_sae"] * (1 - row["dead_share"]))
            assert row["fvu_of_parts"]["active"] < row["fvu"] < row["fvu_of_parts"]["tail"]
        else:
            assert row["energy"]["tail"] < 0.02
            for name in ("next", "own"):
                assert sum(row["n"][f"{name} {i}"] for i in range(10)) == row["n"]["all"]
            assert row["n"]["new"] + row["n"]["repeated"] == row["n"]["all"]
