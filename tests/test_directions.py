"""Every rule of drawing directions against what it promises, on real activations."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY

from saesub.directions import draw_directions
from saesub.errors import SaesubError
from saesub.spectrum import Spectrum
from saesub.subspace import initialize_in_subspace

RULES = ("flat", "spectrum", "data", "whitened_data")


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


def _draw(rule, spectrum, activations, n=512, rank=None, seed=0):
    given = activations if "data" in rule else None
    generator = torch.Generator().manual_seed(seed)
    return draw_directions(spectrum, rank or spectrum.d, rule, generator, n=n, activations=given)


def _sae(d_sae: int = 64) -> TopKTrainingSAE:
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=d_sae, k=8))


@pytest.mark.parametrize("rule", RULES)
def test_unit_rows_inside_the_subspace(rule, spectrum, activations):
    rows, basis = _draw(rule, spectrum, activations, rank=50), spectrum.basis(50)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(512))
    assert (rows - rows @ basis @ basis.T).norm() < 1e-4 * rows.norm()
    assert not torch.equal(rows, _draw(rule, spectrum, activations, rank=50, seed=1))


def test_data_directions_are_centred_tokens(spectrum, activations):
    rows = _draw("data", spectrum, activations)
    centred = torch.nn.functional.normalize(activations - spectrum.mean.float(), dim=-1)
    best, token = (rows @ centred.T).max(dim=-1)
    assert best.min() > 1 - 1e-4
    assert len(token.unique()) == len(rows)


def test_weights_follow_the_spectrum(spectrum, activations):
    """Where the rows' own variance lies: flat for "flat", the data's for "data", between them
    for the other two."""
    shares = {}
    for rule in RULES:
        rows = _draw(rule, spectrum, activations, n=2000) @ spectrum.basis(spectrum.d)
        shares[rule] = rows[:, :58].square().sum(-1).mean().item()  # a tenth of the directions
    assert shares["flat"] == pytest.approx(58 / 576, rel=0.05)
    assert shares["flat"] < shares["spectrum"] < shares["data"]
    assert shares["flat"] < shares["whitened_data"] < shares["data"]


def test_whitening_by_half_is_what_its_formula_says(spectrum, activations):
    whole, half = (_draw(rule, spectrum, activations) for rule in ("data", "whitened_data"))
    basis, variance = spectrum.basis(spectrum.d), spectrum.eigenvalues.float()
    expected = torch.nn.functional.normalize(whole @ basis * variance.pow(-0.25), dim=-1)
    cosine = (expected * (half @ basis)).sum(-1)
    assert cosine.min() > 0.999


def test_a_transcoder_starts_at_pairs_of_the_same_token(spectrum, activations):
    sae_class, cfg_class = SAE_CLASS_REGISTRY["transcoder"]
    transcoder: SAE = sae_class(
        cfg_class(d_in=576, d_sae=64, d_out=576, apply_b_dec_to_input=False)
    )
    read = activations.roll(100, dims=1)
    read_spectrum = Spectrum.from_activations(read)
    initialize_in_subspace(
        transcoder,
        spectrum,
        directions="data",
        activations=activations,
        input_spectrum=read_spectrum,
        input_activations=read,
    )
    encoder = torch.nn.functional.normalize(transcoder.W_enc.T.roll(-100, dims=1), dim=-1)
    decoder = torch.nn.functional.normalize(transcoder.W_dec, dim=-1)
    assert (encoder * decoder).sum(-1).min() > 0.999
    with pytest.raises(SaesubError, match="start at pairs"):
        initialize_in_subspace(
            transcoder,
            spectrum,
            directions="data",
            activations=activations,
            input_spectrum=read_spectrum,
        )


def test_the_report_says_what_was_done(spectrum, activations):
    report = initialize_in_subspace(
        _sae(), spectrum, directions="whitened_data", activations=activations
    )
    assert report.directions == "whitened_data"
    assert report.d_init == spectrum.d


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": "whitend_data"}, "did you mean 'whitened_data'"),
        ({"directions": "data"}, "pass activations="),
        ({"directions": "data", "activations": torch.zeros(10, 576)}, "64 features need"),
        ({"directions": "data", "activations": torch.zeros(100, 5)}, "width 576"),
        ({"activations": torch.zeros(100, 576)}, "spectrum alone"),
        ({"input_activations": torch.zeros(100, 576)}, "for a transcoder"),
    ],
)
def test_mistakes_are_refused(settings, message, spectrum):
    sae = _sae()
    before = sae.W_dec.clone()
    with pytest.raises(SaesubError, match=message):
        initialize_in_subspace(sae, spectrum, **settings)
    assert torch.equal(sae.W_dec, before)
