"""Every rule of drawing directions against what it promises, on real activations."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.init import directions
from saesub.init.directions import directions_at, draw_tokens, random_directions
from saesub.init.subspace import initialize_in_subspace

RULES = ("flat", "spectrum", "data", "whitened_data")


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


def _draw(rule, spectrum, activations, n=512, rank=None, seed=0):
    rank, generator = rank or spectrum.d, torch.Generator().manual_seed(seed)
    if "data" not in rule:
        return random_directions(spectrum, rank, rule, n, generator)
    tokens = draw_tokens(spectrum, rank, rule, n, generator, activations)
    return directions_at(spectrum, rank, rule, activations[tokens])


def _sae(d_sae: int = 64) -> TopKTrainingSAE:
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=d_sae, k=8))


@pytest.mark.parametrize("rule", RULES)
def test_unit_rows_inside_the_subspace(rule, spectrum, activations):
    rows, basis = _draw(rule, spectrum, activations, rank=50), spectrum.basis(50)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(512))
    assert (rows - rows @ basis @ basis.T).norm() < 1e-4 * rows.norm()
    assert not torch.equal(rows, _draw(rule, spectrum, activations, rank=50, seed=1))


def test_tokens_without_a_direction_in_the_subspace_are_no_start():
    """Whitened data, which have a choice, take others; any tokens are refused."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator) @ torch.eye(4, 12)
    spectrum = Spectrum.from_activations(x)
    x[::4] = spectrum.mean.float() + 3 * torch.eye(12)[10]
    rows = _draw("whitened_data", spectrum, x, n=40, rank=4)
    assert rows[:, :4].norm(dim=-1).min() > 0.999
    with pytest.raises(SaesubError, match=r"of the 40 tokens .* top 4 directions: pass other"):
        _draw("data", spectrum, x, n=40, rank=4)


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
    assert shares["whitened_data"] < shares["data"] / 2


def test_whitening_is_what_its_formula_says(spectrum, activations):
    rows = directions_at(spectrum, spectrum.d, "whitened_data", activations[:512])
    values, vectors = torch.linalg.eigh(spectrum.covariance)
    inverse_root = (vectors * values.rsqrt()) @ vectors.T
    expected = (activations[:512] - spectrum.mean).double() @ inverse_root
    cosine = torch.nn.functional.cosine_similarity(rows.double(), expected, dim=-1)
    # Not exact: what varies least of all is not blown up.
    assert cosine.median() > 0.99


def test_of_tokens_that_are_the_same_one_is_taken(spectrum, activations):
    repeated = torch.cat([activations[:300]] * 3)
    generator = torch.Generator().manual_seed(0)
    tokens = draw_tokens(spectrum, 576, "whitened_data", 300, generator, repeated)
    assert len((tokens % 300).unique()) > 0.85 * 300  # of two draws in three; at random 63 %


def test_likeness_is_the_largest_cosine_with_a_row_before(monkeypatch, activations):
    """Against a loop over rows: over several blocks, and where the window leaves early rows out."""
    rows = torch.nn.functional.normalize(activations[:700] - activations.mean(0), dim=-1)
    monkeypatch.setattr(directions, "_ROWS", 128)
    for window in (10_000, 300):
        monkeypatch.setattr(directions, "_COMPARED", window)
        likeness = directions._likeness(rows)
        assert likeness[0] == -1
        for row in (1, 127, 128, 300, 511, 699):
            # A block of rows is compared from `window` before its first row on.
            first = max(0, row // 128 * 128 - window)
            expected = (rows[first:row] @ rows[row]).max()
            assert likeness[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_whitened_features_all_vary_alike(spectrum, activations):
    sae = _sae(512)
    initialize_in_subspace(sae, spectrum, directions="whitened_data", activations=activations)
    deviation = ((activations - spectrum.mean.float()) @ sae.W_enc).std(dim=0)
    assert deviation.max() < 1.01 * deviation.min()
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(512))
    norms = (sae.W_enc.norm(dim=0) / sae.W_dec.norm(dim=-1)).detach()
    assert norms.median() == pytest.approx(1, abs=0.01)


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
        ({"activations": torch.zeros(100, 5)}, "The norm is fitted to activations of width 576"),
        ({"activations": torch.full((9, 576), torch.nan)}, "NaN or infinite"),
        ({"activations": torch.zeros(100, 576)}, "all zero"),
        ({"input_activations": torch.zeros(100, 576)}, "are for transcoders"),
    ],
)
def test_mistakes_are_refused(settings, message, spectrum):
    sae = _sae()
    before = sae.W_dec.clone()
    with pytest.raises(SaesubError, match=message):
        initialize_in_subspace(sae, spectrum, **settings)
    assert torch.equal(sae.W_dec, before)
