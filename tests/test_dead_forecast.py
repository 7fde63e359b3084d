"""The forecast against its record, its own two numbers, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.paths import data_file
from saesub.reproduce.dead_forecast import (
    LEAST,
    calibration,
    expected_share,
    forecast_dead,
    subspace_numbers,
)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(data_file("results/studies/forecast.json").read_text())


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


def _cfg(**settings) -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(**{"d_in": 576, "d_sae": 8192, "k": 32} | settings)


def test_waste_and_crowding_of_known_spectra():
    flat = np.ones(100)
    assert subspace_numbers(flat, 100) == pytest.approx((0, 0), abs=1e-12)
    assert subspace_numbers(flat, 25) == pytest.approx((0, 0.75))
    half = np.r_[np.ones(50), np.zeros(50)]  # half of the space is empty
    assert subspace_numbers(half, 100) == pytest.approx((0.5, 0))
    assert subspace_numbers(half, 50) == pytest.approx((0, 0), abs=1e-12)


def test_the_recorded_forecasts_follow_from_the_recorded_spectra(record):
    for row in record["rows"]:
        variances = np.array(record["variances"][f"{row['model']} {row['hook_name']}"])
        per_active = row["d_sae"] / row["k"]
        share, *_ = expected_share(
            calibration()["weights"], variances, row["rank"], per_active, row["lr"]
        )
        assert share == pytest.approx(row["forecast"], rel=1e-3)


def test_fit_and_test_have_no_hook_point_in_common_and_the_errors_are_those_stated(record):
    rows = record["rows"]
    fitted, tested = (
        {(r["model"], r["hook_name"]) for r in rows if r["test"] is test} for test in (False, True)
    )
    assert fitted
    assert not fitted & tested
    assert {model for model, _ in tested} - {model for model, _ in fitted}  # another model
    for model in {model for model, _ in tested}:
        gaps = [
            abs(r["forecast"] - r["dead_share"]) for r in rows if r["test"] and r["model"] == model
        ]
        stated = record["errors"][f"test, {model}"]
        assert stated["n"] == len(gaps)
        assert stated["mean_absolute_error"] == pytest.approx(np.mean(gaps))


def test_a_wider_dictionary_a_higher_rate_and_a_random_initialisation_lose_more(spectrum):
    whole = spectrum.d
    narrow = forecast_dead(spectrum, _cfg(), lr=2e-3, d_init=whole)
    assert LEAST <= narrow.low < narrow.dead_share < narrow.high < 1
    wide = forecast_dead(spectrum, _cfg(d_sae=16_384), lr=2e-3, d_init=whole)
    assert wide.dead_share > narrow.dead_share
    slow = forecast_dead(spectrum, _cfg(), lr=1e-3, d_init=whole)
    assert slow.dead_share < narrow.dead_share
    asi = forecast_dead(spectrum, _cfg(), lr=2e-3, d_init="auto")
    assert asi.dead_share < narrow.dead_share
    assert asi.waste < narrow.waste
    assert asi.crowding > narrow.crowding == 0


def test_what_it_refuses(spectrum):
    with pytest.raises(SaesubError, match="no top-k threshold"):
        forecast_dead(
            spectrum, StandardTrainingSAEConfig(d_in=576, d_sae=1024), lr=1e-3, d_init=100
        )
    with pytest.raises(SaesubError, match="576 wide, the SAE reads 64"):
        forecast_dead(spectrum, _cfg(d_in=64), lr=1e-3, d_init=100)
    for lr in (0, float("inf"), float("nan"), "2e-3"):
        with pytest.raises(SaesubError, match="lr must be a positive number"):
            forecast_dead(spectrum, _cfg(), lr=lr, d_init=100)
    for k in (0, 9000):
        with pytest.raises(SaesubError, match="no top-k threshold"):
            forecast_dead(spectrum, _cfg(k=k), lr=1e-3, d_init=100)
    elsewhere = replace(spectrum, metadata={"hook_name": "blocks.4.hook_mlp_out"})
    cfg = _cfg(metadata=SAEMetadata(hook_name="blocks.4.hook_attn_out"))
    with pytest.raises(SaesubError, match=r"is of blocks\.4\.hook_mlp_out, not of"):
        forecast_dead(elsewhere, cfg, lr=1e-3, d_init=100)
    with pytest.raises(SaesubError, match="out of range"):
        forecast_dead(spectrum, _cfg(), lr=1e-3, d_init=577)
