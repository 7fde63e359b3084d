"""The protocol's functions against known answers, brute force and bad input."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from scipy import stats

import saesub
from saesub.errors import SaesubError
from saesub.evaluation import protocol


def test_windows_are_a_thousand_firings_up_to_ten_million_tokens():
    assert protocol.window_for(8192, 32) == 256_000
    assert protocol.window_for(32_768, 32) == 1_024_000
    assert protocol.window_for(2**20, 32) == 10_000_000
    assert protocol.mean_firings(256_000, d_sae=8192, l0=32) == 1000


def test_a_feature_that_fires_once_in_a_thousand_tokens_is_dead_only_in_short_windows():
    """Feature i of 8 fires on every 4**i-th token, and the last one never."""
    n = 40_000
    x = torch.full((n, 8), -1.0)
    for feature in range(7):
        x[4**feature - 1 :: 4**feature, feature] = 1.0
    sae = TopKSAE(TopKSAEConfig(d_in=8, d_sae=8, k=8))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(8))
        sae.W_dec.copy_(torch.eye(8))
    found = saesub.judge(sae, x, n_tokens=n, progress=False)
    assert found.counts.tolist() == [n // 4**i for i in range(7)] + [0]
    assert protocol.dead_share_at(found.silent, 8192) == 1 / 8  # 4**6 tokens have passed
    assert protocol.dead_share_at(found.silent, n) == 1 / 8
    short = saesub.judge(sae, x[:1000], n_tokens=1000, progress=False)
    # Those of 4**5 and 4**6 tokens have not fired yet.
    assert protocol.dead_share_at(short.silent, 1000) == 3 / 8
    # A record in JSON has texts as keys.
    kept = {str(tokens): share for tokens, share in found.silent.items()}
    assert protocol.dead_share_at(kept, n) == 1 / 8


def test_a_window_longer_than_the_data_gives_no_number():
    with pytest.raises(SaesubError, match="longer than the 16,384 that were judged"):
        protocol.dead_share_at({8192: 0.5, 16_384: 0.4}, 20_000)
    with pytest.raises(SaesubError, match="take one of these windows"):
        protocol.dead_share_at({8192: 0.5, 16_384: 0.4}, 10_000)
    with pytest.raises(SaesubError, match="longer than the 0"):
        protocol.dead_share_at({}, 1)


def test_too_few_firings_are_said():
    assert not protocol.too_few_firings(51_200, d_sae=8192, l0=32)
    assert "199 times" in protocol.too_few_firings(51_000, d_sae=8192, l0=32)


def _sweep(fvu, dead, validation=None, rates=(1.0, 2.0, 4.0, 8.0)):
    return protocol.Sweep(rates, tuple(validation or fvu), tuple(fvu), tuple(dead))


def test_the_validation_part_chooses_the_rate():
    sweep = _sweep((0.4, 0.3, 0.2, 0.3), (0, 0, 0.1, 0.5), validation=(0.4, 0.1, 0.2, 0.3))
    assert sweep.best == 1
    assert sweep.interior
    assert sweep.next_rate() is None
    assert _sweep((0.4, 0.3, 0.25, 0.2), (0, 0, 0.1, 0.5)).next_rate() == 16
    assert _sweep((0.1, 0.3, 0.25, 0.2), (0, 0, 0.1, 0.5)).next_rate() == 0.5
    assert not _sweep((0.1, 0.3, 0.25, 0.2), (0, 0, 0.1, 0.5)).interior


def test_equal_fit_is_read_below_the_best_rate():
    """The baseline at its best has FVU 0.30 and 40 % dead; the condition fits as badly midway
    between its first two rates."""
    baseline = _sweep((0.40, 0.35, 0.30, 0.33), (0.1, 0.2, 0.4, 0.8))
    condition = _sweep((0.32, 0.28, 0.25, 0.40), (0.00, 0.02, 0.10, 0.90))
    dead, dead_baseline, fvu = protocol.dead_at_equal_fvu(condition, baseline)
    assert (dead_baseline, fvu) == (0.4, 0.30)
    assert dead == pytest.approx(0.01)
    assert protocol.dead_at_equal_fvu(baseline, condition)[0] == 0.4  # which is which is free
    assert condition.dead_at(0.25) == 0.10  # at its best itself


def test_equal_fit_beyond_the_rates_tried_is_refused():
    worse = _sweep((0.9, 0.8, 0.7, 0.75), (0.1, 0.2, 0.4, 0.8))
    better = _sweep((0.32, 0.28, 0.25, 0.40), (0.00, 0.02, 0.10, 0.90))
    with pytest.raises(SaesubError, match="try lower rates"):
        protocol.dead_at_equal_fvu(better, worse)
    with pytest.raises(SaesubError, match=r"not among the 0\.2500 to 0\.3200"):
        better.dead_at(0.2)


def test_noise_in_fvu_does_not_turn_the_curve_around():
    noisy = _sweep((0.34, 0.35, 0.30, 0.40), (0.00, 0.10, 0.30, 0.90))
    values = [noisy.dead_at(fvu) for fvu in np.linspace(0.30, 0.35, 9)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((1.0, 2.0), (0.1,), (0.1, 0.2), (0.1, 0.2)), "for each rate"),
        (((), (), (), ()), "for each rate"),
        (((2.0, 1.0), (0.1, 0.2), (0.1, 0.2), (0.1, 0.2)), "from the lowest to the highest"),
        (((1.0, 1.0), (0.1, 0.2), (0.1, 0.2), (0.1, 0.2)), "from the lowest to the highest"),
        (((1.0, 2.0), (0.1, math.nan), (0.1, 0.2), (0.1, 0.2)), "at the rate 2 a measure is NaN"),
        (((1.0, 2.0), (0.1, 0.2), (0.1, 0.2), (math.inf, 0.2)), "at the rate 1 a measure is NaN"),
    ],
)
def test_sweeps_of_nothing_are_refused(arguments, says):
    with pytest.raises(SaesubError, match=says):
        protocol.Sweep(*arguments)


def _rows(fvu, **more):
    """A row for each rate and seed, from rate -> FVU of the seeds 0, 1, ..."""
    return [
        {"lr": lr, "seed": seed, "validation_fvu": value, "fvu": 2 * value, "dead_share": lr * seed}
        | more
        for lr, values in fvu.items()
        for seed, value in enumerate(values)
    ]


def test_a_sweep_takes_means_over_seeds():
    sweep = protocol.sweep_of(_rows({2.0: (0.20, 0.24), 1.0: (0.21, 0.21), 4.0: (0.5,)}))
    assert sweep.rates == (1.0, 2.0, 4.0)
    assert sweep.best == 0  # the first seed alone would say 1
    assert sweep.validation_fvu == pytest.approx((0.21, 0.22, 0.5))
    assert sweep.fvu == pytest.approx((0.42, 0.44, 1.0))
    assert sweep.dead == pytest.approx((0.5, 1.0, 0.0))
    assert sweep.as_good == [0]
    near = protocol.sweep_of(_rows({1.0: (0.2019, 0.2019), 2.0: (0.2, 0.2), 4.0: (0.2021, 0.2021)}))
    assert near.as_good == [0, 1]


@pytest.mark.parametrize(
    "fvu", [{1.0: (0.2, 0.2), 2.0: (0.201,)}, {1.0: (0.2,), 2.0: (0.201, 0.201)}]
)
def test_two_rates_that_fit_alike_need_the_same_seeds(fvu):
    rows = _rows(fvu, coefficient=0.0, validation_l0=32.0)
    with pytest.raises(SaesubError, match=r"fits as well, and lacks the seeds \[1\]"):
        protocol.sweep_of(rows)
    with pytest.raises(SaesubError, match="fits as well"):
        protocol.sweep_at_l0(rows, 32)


def test_a_best_rate_with_fewer_seeds_is_refused():
    """The seed that all rates have prefers the other rate."""
    with pytest.raises(SaesubError, match=r"the rate 2 is the best.*lacks the seeds \[1, 2\]"):
        protocol.sweep_of(_rows({1.0: (0.20, 0.23, 0.23), 2.0: (0.206,)}))


def test_a_seed_twice_is_two_conditions():
    with pytest.raises(SaesubError, match="twice at the rate 1: give one condition"):
        protocol.sweep_of([*_rows({1.0: (0.2,)}), *_rows({1.0: (0.2,)})])


def test_other_seeds_move_a_sweep_at_equal_l0_by_their_difference():
    """The first seed has two coefficients, on either side of 32; the second only the first."""
    row = {"lr": 1.0, "dead_share": 0.0}
    rows = [
        row | {"seed": seed, "coefficient": c, "validation_l0": l0, "validation_fvu": v, "fvu": v}
        for seed, c, l0, v in [(0, 1.0, 64.0, 0.2), (0, 4.0, 16.0, 0.4), (1, 1.0, 60.0, 0.24)]
    ]
    sweep = protocol.sweep_at_l0(rows, 32)
    assert sweep.fvu == pytest.approx((0.3 + 0.04 / 2,))
    both = [*rows, rows[2] | {"coefficient": 4.0, "validation_fvu": 0.42, "fvu": 0.42}]
    assert protocol.sweep_at_l0(both, 32).fvu == pytest.approx((0.3 + (0.04 + 0.02) / 2 / 2,))
    with pytest.raises(SaesubError, match=r"seed 0 lacks the coefficients \[2.0\]"):
        protocol.sweep_at_l0([*rows, rows[2] | {"coefficient": 2.0}], 32)
    with pytest.raises(SaesubError, match="twice at the rate 1"):
        protocol.sweep_at_l0([*rows, rows[2]], 32)


def test_paired_intervals_are_those_of_a_paired_t_test():
    a, b = {0: 0.10, 1: 0.13, 2: 0.12}, {0: 0.30, 1: 0.32, 2: 0.33}
    found = protocol.paired(a, b)
    expected = stats.ttest_rel([*a.values()], [*b.values()]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(-0.2)
    assert found.n == 3
    ratio = protocol.paired(a, b, "ratio")
    assert ratio.mean == pytest.approx(np.mean([0.1 / 0.3, 0.13 / 0.32, 0.12 / 0.33]))
    shuffled = {2: 0.12, 0: 0.10, 1: 0.13}
    assert protocol.paired(shuffled, b) == found  # by seed, not by order


def test_a_ratio_to_a_baseline_that_lost_nothing_says_nothing():
    found = protocol.paired({0: 0.0, 1: 0.0, 2: 0.0}, {0: 0.3, 1: 0.01, 2: 0.3}, "ratio")
    assert math.isnan(found.mean)
    assert math.isnan(found.low)
    assert found.n == 3


def test_a_condition_without_its_baseline_and_too_few_seeds_are_refused():
    with pytest.raises(SaesubError, match=r"seeds \[2\] have a condition without its baseline"):
        protocol.paired({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0})
    with pytest.raises(SaesubError, match=r"to_dict\(\)"):
        protocol.paired(pd.Series([1.0, 1.0, 1.0]), pd.Series([1.0, 1.0, 1.0]))
    with pytest.raises(SaesubError, match="train at least three seeds"):
        protocol.paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    with pytest.raises(SaesubError, match="measure at least three"):
        protocol.interval([1.0, 2.0])
    with pytest.raises(SaesubError, match=r"seeds \[0, 'a'\] have a condition without"):
        protocol.paired({"a": 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    with pytest.raises(SaesubError, match='choose "difference" or "ratio"'):
        protocol.paired({0: 1.0}, {0: 1.0}, "Difference")


def test_small_dtypes_neither_overflow_nor_wrap():
    fewer = {i: np.uint8(n) for i, n in enumerate((10, 11, 12))}
    more = {i: np.uint8(n) for i, n in enumerate((20, 22, 24))}
    assert protocol.paired(fewer, more).mean == -11
    assert protocol.window_for(np.int32(2**22), 32) == protocol.LONGEST_WINDOW
    assert protocol.window_for(np.int16(8192), np.int16(32)) == 256_000
    fired = protocol.mean_firings(np.int32(10_000_000), d_sae=8192, l0=np.int32(320))
    assert fired == pytest.approx(390_625)
    assert math.isfinite(protocol.interval(np.array([6e4, 5e4, 6e4], np.float16)).high)


@pytest.mark.parametrize("bad", ["high", 1j, [0.1], pd.NA])
def test_a_measure_that_is_no_number_is_refused(bad):
    three = {0: 0.1, 1: 0.2, 2: 0.3}
    for refused in (
        lambda: protocol.interval([0.1, 0.2, bad]),
        lambda: protocol.paired(three | {2: bad}, three),
        lambda: protocol.dead_share_at({8192: bad}, 8192),
    ):
        with pytest.raises(SaesubError, match="no number"):
            refused()


@pytest.mark.parametrize("table", [{0: 0.1, 1: 0.2, 2: 0.3}, pd.DataFrame({0: [1.0, 2.0]})])
def test_a_table_has_no_interval(table):
    """Its keys would be taken for its values."""
    with pytest.raises(SaesubError, match="table"):
        protocol.interval(table)


def test_the_best_of_two_equal_fits_is_read_at_its_own_rate():
    """At the next lower rate the worse condition fits as well on these tokens, by chance."""
    better = protocol.Sweep((1, 2, 4), (0.35, 0.28, 0.25), (0.35, 0.28, 0.25), (0, 0.02, 0.1))
    for fvu in (0.2990, 0.3, 0.3001):
        worse = protocol.Sweep((1, 2, 4), (0.4, 0.301, 0.3), (0.4, fvu, 0.3), (0, 0.1, 0.5))
        assert protocol.dead_at_equal_fvu(better, worse)[1] == 0.5


@pytest.mark.parametrize("l0", [math.nan, math.inf, -1.0])
def test_an_l0_that_is_none_is_refused(l0):
    def row(coefficient, l0):
        measures = {"validation_fvu": 0.2, "fvu": 0.2, "dead_share": 0.1}
        return {"lr": 1.0, "seed": 0, "coefficient": coefficient, "validation_l0": l0} | measures

    with pytest.raises(SaesubError, match="an L0 on the validation part"):
        protocol.sweep_at_l0([row(1, 64.0), row(2, l0)], 32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_measures_that_are_no_numbers_give_no_interval(bad):
    """A ratio that says nothing is another thing than one that was not measured."""
    three = {0: 1.0, 1: 1.0, 2: 1.0}
    for how in ("difference", "ratio"):
        for pair in ((three | {1: bad}, three), (three, three | {1: bad})):
            with pytest.raises(SaesubError, match="1 of 6 measures are None, NaN or infinite"):
                protocol.paired(*pair, how)
    with pytest.raises(SaesubError, match="1 of 3 measures"):
        protocol.interval(value for value in (1.0, bad, 2.0))


@pytest.mark.parametrize("rates", [(1e-3, math.nan), (1e-3, math.inf), (-1e-3, 1e-3), (0.0, 1.0)])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(SaesubError, match="rise from above zero"):
        protocol.Sweep(rates, (0.2, 0.2), (0.2, 0.2), (0.0, 0.0))


def test_a_window_or_an_l0_of_no_active_feature_is_refused():
    row = {"lr": 1.0, "seed": 0, "coefficient": 1.0, "validation_l0": 8.0, "validation_fvu": 0.2}
    for l0 in (0, -1.0, math.nan, math.inf):
        with pytest.raises(SaesubError, match="give a number of active features above zero"):
            protocol.sweep_at_l0([row | {"fvu": 0.2, "dead_share": 0.0}], l0)
    for sizes in ((8192, 0), (0, 32), (8192, math.nan)):
        with pytest.raises(SaesubError, match="give numbers above zero"):
            protocol.window_for(*sizes)


def test_intervals_of_three_seeds_cover_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(1.0, 0.5, (4000, 3))
    covered = [low <= 1.0 <= high for _, low, high, _ in map(protocol.interval, draws.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_of_a_mean_is_that_of_theory_and_keeps_groups_whole():
    values = np.random.default_rng(1).normal(2.0, 1.0, 200)
    found = protocol.bootstrap(lambda groups: float(np.mean(groups)), values.tolist())
    reach = 1.96 * values.std() / math.sqrt(200)
    assert found.mean == values.mean()
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - reach, values.mean() + reach), abs=0.02
    )
    # Twenty groups of ten equal values are twenty values, not two hundred.
    groups = [[v] * 10 for v in values[:20]]
    whole = protocol.bootstrap(lambda gs: float(np.mean(np.concatenate(gs))), groups)
    assert whole.high - whole.low == pytest.approx(
        3.92 * values[:20].std() / math.sqrt(20), rel=0.1
    )
    with pytest.raises(SaesubError, match="2 groups give no interval"):
        protocol.bootstrap(len, [1, 2])
    with pytest.raises(SaesubError, match=r"no value for \d+ of 100 resamples"):
        protocol.bootstrap(lambda drawn: 1.0 if 0 in drawn else math.nan, [0, 1, 2], n=100)
    with pytest.raises(SaesubError, match=r"no value for [\d,]+ of 2,000 resamples"):
        protocol.bootstrap(lambda drawn: float(np.mean(drawn)), [math.inf, 1, 2])
    with pytest.raises(SaesubError, match="no value for the groups"):
        protocol.bootstrap(lambda drawn: math.nan if len(set(drawn)) == 9 else 1.0, range(9), n=200)
    with pytest.raises(SaesubError, match="give a list of groups"):
        protocol.bootstrap(len, pd.DataFrame({"a": [1, 2, 3]}))
    with pytest.raises(SaesubError, match="n must be a whole number"):
        protocol.bootstrap(len, [1, 2, 3], n=0)
    named = pd.Series([1.0, 2.0, 3.0], index=[0, 1, 5])
    of_values = protocol.bootstrap(lambda drawn: float(np.mean(drawn)), named)
    assert of_values == protocol.bootstrap(lambda drawn: float(np.mean(drawn)), [1.0, 2.0, 3.0])


def test_planted_deaths_are_found_and_told_by_the_planted_subspace():
    """Data of rank 8 in 32 dimensions; features outside of it read nothing but a negative bias."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    x = torch.randn(20_000, 8) @ basis[:, :8].T
    inside = torch.nn.functional.normalize(torch.randn(64, 8), dim=1) @ basis[:, :8].T
    outside = torch.nn.functional.normalize(torch.randn(64, 24), dim=1) @ basis[:, 8:].T
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=128, k=4))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([inside, outside]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-1e-3)
    found = saesub.judge(sae, x, n_tokens=20_000, progress=False)
    assert torch.equal(found.counts == 0, torch.arange(128) >= 64)
    spectrum = saesub.Spectrum.from_activations(x)
    told = saesub.overlap_test(sae.W_dec.detach(), found.counts == 0, spectrum.basis(8))
    assert told.auc == 1.0
