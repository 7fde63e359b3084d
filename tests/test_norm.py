"""The fitted norm and the biases against their definitions: norms at which the untrained SAE
reconstructs best, medians that are minima, biases that centre."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from scipy.optimize import minimize

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.evaluation.dead_features import dead_features
from saesub.evaluation.reconstruction import reconstruction
from saesub.init.biases import center_at, center_biases, geometric_median
from saesub.init.encoder_scale import fit_encoder_scale, scale_encoder
from saesub.init.norm import fit_norm, sample_of
from saesub.init.subspace import initialize_in_subspace

D_SAE = 700
pytestmark = pytest.mark.model


def _topk(**settings) -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=D_SAE, k=8, **settings))


def _silent() -> TopKTrainingSAE:
    sae = _topk()
    sae.b_enc.data.fill_(-1e6)
    return sae


def _zero_row() -> TopKTrainingSAE:
    sae = _topk()
    sae.W_dec.data[3] = 0.0
    return sae


def _fit(sae, x: torch.Tensor) -> None:
    fit_norm(sae, Spectrum.from_activations(torch.randn(800, 576)), activations=x)


def _pursuit() -> MatchingPursuitTrainingSAE:
    return MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(d_in=576, d_sae=D_SAE))


def _jumprelu() -> JumpReLUTrainingSAE:
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=576, d_sae=D_SAE))


def _transcoder() -> Transcoder:
    return Transcoder(
        TranscoderConfig(d_in=576, d_out=576, d_sae=D_SAE, apply_b_dec_to_input=False)
    )


def _sum_of_distances(x: torch.Tensor, point: torch.Tensor) -> float:
    return (x.double() - point.double()).norm(dim=1).sum().item()


def test_the_geometric_median_minimises_the_sum_of_distances(activations):
    """On real activations with outliers: less than at any of many points around it."""
    x = activations.clone()
    x[:200] += 40 * x.std() * torch.randn(576, generator=torch.Generator().manual_seed(1))
    median = geometric_median(x)
    assert median.dtype == x.dtype
    least = _sum_of_distances(x, median)
    assert least < _sum_of_distances(x, x.mean(0))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-1, 1.0):
        steps = size * torch.randn(20, 576, generator=generator) / 24
        assert all(_sum_of_distances(x, median + step) > least for step in steps)
    gradient = torch.nn.functional.normalize(median.double() - x.double(), dim=1).mean(0)
    assert gradient.norm() < 1e-5
    assert (median - x[200:].mean(0)).norm() < 0.5 * (x.mean(0) - x[200:].mean(0)).norm()


def test_it_agrees_with_a_general_minimiser(activations):
    x = activations[:200, :5].double()
    found = minimize(lambda p: _sum_of_distances(x, torch.from_numpy(p)), x.mean(0), tol=1e-10)
    torch.testing.assert_close(
        geometric_median(x), torch.from_numpy(found.x), atol=1e-4 * x.std().item(), rtol=0
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], [0.0, 0]),  # the mean is a row already
        ([[0.0, 0], [4, 0.1], [4, -0.1], [-1, 0.1], [-1, -0.1]], [0.0, 0]),  # met on the way
        ([[0.0, 0], [0, 0], [0, 0], [9, 1], [7, 8]], [0.0, 0]),  # held by its multiplicity
        ([[2.0, 3]], [2.0, 3]),
        ([[2.0, 3]] * 4, [2.0, 3]),
        ([[0.0, 0], [1, 0], [5, 0]], [1.0, 0]),  # the median of a line
    ],
)
def test_a_row_can_be_the_median(points, expected):
    got = geometric_median(torch.tensor(points))
    assert torch.equal(got, torch.tensor(expected))


def test_it_leaves_a_row_that_is_not_the_median():
    """Weiszfeld's plain iteration stops at the mean here, which is a row."""
    x = torch.tensor([[0.0, 0], [-3, 0], [1, 1], [1, -1], [1, 0]], dtype=torch.float64)
    assert torch.equal(x.mean(0), x[0])
    median = geometric_median(x)
    assert _sum_of_distances(x, median) < _sum_of_distances(x, x[0]) - 1e-3
    found = minimize(lambda p: _sum_of_distances(x, torch.from_numpy(p)), [0.3, 0.1], tol=1e-12)
    assert _sum_of_distances(x, median) <= found.fun + 1e-6


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "n at least 1"),
        (torch.zeros(3), "n at least 1"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
    ],
)
def test_what_has_no_median_is_refused(x, message):
    with pytest.raises(SaesubError, match=message):
        geometric_median(x)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in"])
def test_center_at_the_mean_is_center_biases(activations, scaling, apply_b_dec_to_input):
    spectrum = Spectrum.from_activations(activations)
    settings = {
        "normalize_activations": scaling,
        "apply_b_dec_to_input": apply_b_dec_to_input,
    }
    ours, theirs = _topk(**settings), _topk(**settings)
    center_at(ours, spectrum.mean, mean_norm=spectrum.mean_norm)
    center_biases(theirs, spectrum)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    center = geometric_median(activations)
    center_at(ours, center, mean_norm=spectrum.mean_norm)
    scale = 1.0 if scaling == "none" else 24 / spectrum.mean_norm
    _, pre = ours.encode_with_hidden_pre((center * scale).unsqueeze(0))
    torch.testing.assert_close(pre, torch.zeros_like(pre), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.b_dec.detach(), center * scale)


def test_every_encoder_bias_is_centred(activations):
    sae = GatedTrainingSAE(
        GatedTrainingSAEConfig(d_in=576, d_sae=D_SAE, apply_b_dec_to_input=False)
    )
    center = activations.mean(0)
    center_at(sae, center)
    for bias in (sae.b_gate, sae.b_mag):
        pre = center @ sae.W_enc + bias
        torch.testing.assert_close(pre, torch.zeros(D_SAE), atol=1e-5, rtol=0)


def test_scale_encoder_scales_pre_activations(activations):
    sae, twin = (_topk(apply_b_dec_to_input=False) for _ in range(2))
    for one in (sae, twin):
        spectrum = Spectrum.from_activations(activations)
        initialize_in_subspace(one, spectrum, directions="data", activations=activations)
    scale_encoder(sae, 2.5)
    x = activations[:50]
    torch.testing.assert_close(
        sae.encode_with_hidden_pre(x)[1],
        2.5 * twin.encode_with_hidden_pre(x)[1],
        atol=1e-4,
        rtol=1e-4,
    )
    assert torch.equal(sae.W_dec, twin.W_dec)


NOT_FITTED = {"jumprelu", "matching_pursuit"}  # and refused, below
SETTINGS = {
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "batchtopk": {"k": 8},
    "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [100, D_SAE]},
}


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "scaling", ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
)
@pytest.mark.parametrize("architecture", sorted(set(SAE_TRAINING_CLASS_REGISTRY) - NOT_FITTED))
def test_the_fitted_scale_reconstructs_best(
    activations, architecture, scaling, apply_b_dec_to_input
):
    """Squared errors in the scale of training, with SAELens' own forward pass; the mean is far from
    zero, so a factor fitted to anything but x - b_dec would not be the best."""
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    torch.manual_seed(0)
    settings = SETTINGS.get(architecture, {}) | {"apply_b_dec_to_input": apply_b_dec_to_input}
    settings |= {"decoder_init_norm": 1.0, "normalize_activations": scaling}
    sae = sae_class(cfg_class(d_in=576, d_sae=D_SAE, **settings))
    x = activations[:1024] + 1.0
    initialize_in_subspace(sae, Spectrum.from_activations(x))
    in_training = x * 24 / x.norm(dim=-1).mean() if scaling == "expected_average_only_in" else x

    def error() -> float:
        return (sae(in_training) - in_training).square().sum().item()

    before = {name: value.clone() for name, value in sae.state_dict().items()}
    factor = fit_encoder_scale(sae, x)
    for name, value in sae.state_dict().items():
        by = factor if name in ("W_enc", "b_enc", "b_gate", "b_mag") else 1.0
        torch.testing.assert_close(value, by * before[name])
    best = error()
    for by in (0.99, 1.01 / 0.99):
        scale_encoder(sae, by)
        assert error() > best


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "scaling", ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
)
@pytest.mark.parametrize(
    "architecture", sorted(set(SAE_TRAINING_CLASS_REGISTRY) - {"matching_pursuit"})
)
def test_the_fitted_norm_reconstructs_best(
    activations, architecture, scaling, apply_b_dec_to_input
):
    """At SAELens' default norm before, with SAELens' own forward pass, against norms around it; a
    JumpReLU's error is flat near its least, where its thresholds hardly matter."""
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    torch.manual_seed(0)
    settings = SETTINGS.get(architecture, {}) | {"apply_b_dec_to_input": apply_b_dec_to_input}
    sae = sae_class(cfg_class(d_in=576, d_sae=D_SAE, normalize_activations=scaling, **settings))
    x = activations[:1024] + 1.0
    spectrum = Spectrum.from_activations(x)
    report = initialize_in_subspace(sae, spectrum, activations=x)
    in_training = x * 24 / x.norm(dim=-1).mean() if scaling == "expected_average_only_in" else x

    def error(factor: float) -> float:
        _scale_both(sae, factor)
        found = (sae(in_training) - in_training).square().sum().item()
        _scale_both(sae, 1 / factor)
        return found

    assert report.norm_from == "activations"
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((D_SAE,), report.norm))
    best = error(1.0)
    assert all(error(factor) > best for factor in (0.1, 0.97, 1.03, 10.0))


def _scale_both(sae, factor: float) -> None:
    for name, parameter in sae.named_parameters():
        if name in ("W_dec", "W_enc", "b_enc", "b_gate", "b_mag"):
            parameter.data.mul_(factor)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu"])
def test_the_spectrum_alone_gives_nearly_the_norm_of_the_activations(activations, architecture):
    """Also for BatchTopK, whose long tokens take most of its active entries."""
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    spectrum, norms = Spectrum.from_activations(activations), []
    for x in (activations, None):
        settings = SETTINGS.get(architecture, {})
        sae = sae_class(cfg_class(d_in=576, d_sae=D_SAE, **settings))
        norms.append(initialize_in_subspace(sae, spectrum, activations=x).norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_the_two_lines_leave_fewer_dead_than_saelens_norm(activations):
    """By SAELens' own trainer, at its defaults but for the size."""
    spectrum, dead, fvu = Spectrum.from_activations(activations), {}, {}
    for norm in ("keep", "fit"):
        torch.manual_seed(0)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=1024, k=8))
        initialize_in_subspace(sae, spectrum, norm=norm)
        generator = torch.Generator().manual_seed(0)
        batches = (
            activations[torch.randint(len(activations), (256,), generator=generator)]
            for _ in itertools.count()
        )
        cfg = SAETrainerConfig(
            total_training_samples=60 * 256, train_batch_size_samples=256, lr=1e-3, lr_end=1e-4
        )
        SAETrainer(cfg, sae, batches).fit()
        silent = dead_features(sae, activations, n_tokens=len(activations), progress=False)
        dead[norm] = silent.float().mean().item()
        fvu[norm] = reconstruction(sae, activations.split(1000)).fvu
    assert dead["fit"] < dead["keep"] / 3
    assert fvu["fit"] < fvu["keep"]


def test_a_baseline_keeps_its_directions_and_its_tie(activations):
    spectrum, sae = Spectrum.from_activations(activations), _topk(decoder_init_norm=None)
    before = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    center_biases(sae, spectrum)
    norm = fit_norm(sae, spectrum)
    torch.testing.assert_close(sae.W_dec.detach(), norm * before)
    torch.testing.assert_close(sae.W_enc.T, sae.W_dec)


def test_the_drawn_sample_has_the_moments_of_the_spectrum(activations):
    spectrum = Spectrum.from_activations(activations)
    drawn = Spectrum.from_activations(sample_of(spectrum, None, seed=0))
    assert drawn.mean_norm == pytest.approx(spectrum.mean_norm, rel=1e-3)
    scale = spectrum.eigenvalues.sum().sqrt()
    assert (drawn.mean - spectrum.mean).norm() < 0.05 * scale
    assert drawn.eigenvalues.sum() == pytest.approx(spectrum.eigenvalues.sum().item(), rel=0.1)
    assert drawn.rank_at(0.99) == pytest.approx(spectrum.rank_at(0.99), rel=0.1)


def test_the_drawn_sample_has_the_covariance_of_the_spectrum(activations):
    """Entry by entry: draws along the right directions, not only of the right sizes."""
    spectrum = Spectrum.from_activations(activations)
    drawn = Spectrum.from_activations(sample_of(spectrum, None, seed=1))
    error = (drawn.covariance - spectrum.covariance).norm() / spectrum.covariance.norm()
    assert error < 0.3


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in"])
def test_a_baseline_gets_the_best_norm_too(activations, scaling, given):
    """Against norms around it, in the scale of training."""
    spectrum, sae = Spectrum.from_activations(activations), _topk(normalize_activations=scaling)
    center_biases(sae, spectrum)
    norm = fit_norm(sae, spectrum, activations=activations if given else None)
    x = activations * (1 if scaling == "none" else 24 / spectrum.mean_norm)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((D_SAE,), norm))

    def error(factor: float) -> float:
        _scale_both(sae, factor)
        found = (sae(x) - x).square().sum().item()
        _scale_both(sae, 1 / factor)
        return found

    assert all(error(factor) > error(1.0) for factor in (0.1, 0.93, 1.07, 10.0))


def test_the_norm_is_fitted_to_tokens_from_the_first_to_the_last(activations):
    loud = torch.cat([activations, activations, 100 * activations])
    chosen = sample_of(Spectrum.from_activations(loud), loud, seed=0)
    assert len(chosen) == 4096
    assert torch.equal(chosen[0], loud[0])
    assert torch.equal(chosen[-1], loud[-1])


def test_draws_are_independent_of_directions_of_the_same_seed(activations):
    spectrum, norms = Spectrum.from_activations(activations), []
    for given in (activations, None):
        sae = _topk()
        report = initialize_in_subspace(sae, spectrum, spectrum.d, activations=given)
        norms.append(report.norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_a_mean_that_hides_the_lengths_is_refused_for_batchtopk(activations):
    spectrum = Spectrum.from_activations(activations + 100.0)
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY["batchtopk"]
    sae = sae_class(cfg_class(d_in=576, d_sae=D_SAE, k=8))
    with pytest.raises(SaesubError, match="pass activations="):
        initialize_in_subspace(sae, spectrum)
    assert sae.cfg.metadata.hook_name is None
    assert initialize_in_subspace(sae, spectrum, activations=activations + 100.0).norm > 0
    assert initialize_in_subspace(_topk(), spectrum).norm > 0


def test_thresholds_that_nothing_passes_are_refused(activations):
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=576, d_sae=D_SAE, jumprelu_init_threshold=1e12)
    )
    spectrum = Spectrum.from_activations(activations, {"hook_name": "blocks.4.hook_attn_out"})
    with pytest.raises(SaesubError, match="thresholds may be too high"):
        initialize_in_subspace(sae, spectrum)
    assert sae.cfg.metadata.hook_name is None  # nothing is noted of what was not done


def test_more_active_features_than_there_are_is_refused(activations):
    spectrum = Spectrum.from_activations(activations)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=64, k=100))
    for act in (initialize_in_subspace, fit_norm):
        with pytest.raises(SaesubError, match=r"k must lie in 1\.\.64 \(d_sae\), not 100"):
            act(sae, spectrum)


def test_matching_pursuit_keeps_the_unit_norm_that_saelens_prescribes(activations):
    sae = _pursuit()
    report = initialize_in_subspace(sae, Spectrum.from_activations(activations))
    assert report.norm == 1.0
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_the_scale_is_fitted_in_any_precision(activations):
    """As in float32, in float16 even where the norms are beyond it."""
    half = (activations * (6e4 / activations.abs().max())).half()
    assert half.isfinite().all()
    assert half.norm(dim=-1).isinf().any()
    factors = []
    for x in (activations, half, activations.double()):
        sae = _topk(**SCALED)
        initialize_in_subspace(sae, Spectrum.from_activations(x.float()))
        factors.append(fit_encoder_scale(sae, x[:1500]))
    assert factors[1:] == pytest.approx([factors[0]] * 2, rel=1e-3)


WHITENED = {"normalize_activations": "covariance_whitening"}
SCALED = {"normalize_activations": "expected_average_only_in"}


@pytest.mark.parametrize(
    ("make", "act", "message"),
    [
        (lambda: _topk(**WHITENED), lambda s, x: center_at(s, x[0]), "covariance_whitening"),
        (
            lambda: _topk(**WHITENED),
            lambda s, x: initialize_in_subspace(s, Spectrum.from_activations(x)),
            "covariance_whitening",
        ),
        (lambda: _topk(**SCALED), lambda s, x: center_at(s, x[0]), "pass the activations' mean"),
        (_topk, lambda s, x: center_at(s, x[0, :-1]), "a centre \\(576,\\), not of shape \\(575"),
        (_topk, lambda s, x: center_at(s, x[0] * float("nan")), "NaN or infinite"),
        (_transcoder, lambda s, x: center_at(s, x[0]), "a transcoder reads one space"),
        (_pursuit, lambda s, x: scale_encoder(s, 2.0), "no encoder to scale"),
        (_topk, lambda s, x: scale_encoder(s, 0.0), "above 0"),
        (_topk, lambda s, x: scale_encoder(s, float("inf")), "above 0"),
        (_topk, lambda s, x: center_at(s, x), "a centre \\(576,\\), not of shape"),
        (_topk, lambda s, x: fit_encoder_scale(s, x[:0]), "n at least 1, 576 wide, not"),
        (_topk, lambda s, x: fit_encoder_scale(s, x[0]), "n at least 1, 576 wide, not"),
        (_topk, lambda s, x: fit_encoder_scale(s, 0 * x), "all zero"),
        (  # a token of norm 0 has no scale
            lambda: _topk(normalize_activations="constant_norm_rescale"),
            lambda s, x: fit_encoder_scale(s, torch.cat([0 * x[:1], x])),
            "not finite",
        ),
        (_topk, lambda s, x: fit_encoder_scale(s, x[:, 1:]), "576 wide, not"),
        (_topk, lambda s, x: fit_encoder_scale(s, x / 0), "NaN or infinite"),
        (_transcoder, fit_encoder_scale, "a transcoder reads one space"),
        (_pursuit, fit_encoder_scale, "no encoder to scale"),
        (_jumprelu, fit_encoder_scale, "JumpReLU's thresholds"),
        (lambda: _topk(**WHITENED), fit_encoder_scale, "covariance_whitening"),
        (_silent, fit_encoder_scale, "reconstruct nothing"),
        (_silent, _fit, "reconstruct nothing"),
        (_topk, lambda s, x: _fit(s, x[:0]), "n at least 1, 576 wide, not"),
        (_topk, lambda s, x: _fit(s, 0 * x), "all zero"),
        (_topk, lambda s, x: _fit(s, x / 0), "NaN or infinite"),
        (_transcoder, _fit, "a transcoder reads one space"),
        (lambda: _topk(**WHITENED), _fit, "covariance_whitening"),
        (_zero_row, _fit, "1 decoder rows are zero"),
    ],
)
def test_what_contradicts_or_cannot_be_is_refused(activations, make, act, message):
    sae = make()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(SaesubError, match=message):
        act(sae, activations)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_a_few_massive_activations_do_not_decide_the_norm() -> None:
    """A BatchTopK SAE would give them most of its active entries."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(20_000, 64, generator=generator) * torch.logspace(0, -1.5, 64)
    x, hit = clean.clone(), torch.rand(20_000, generator=generator) < 0.002
    x[hit] += torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0) * 500

    def norm(x: torch.Tensor, **settings: Any) -> float | None:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=64, d_sae=256, k=8))
        spectrum = Spectrum.from_activations(x, **settings)
        found = initialize_in_subspace(sae, spectrum, 32, activations=x)
        assert fit_norm(sae, spectrum, activations=x) == pytest.approx(found.norm, rel=1e-4)
        return found.norm

    assert norm(x) == pytest.approx(norm(clean[~hit]), rel=0.01)
    assert norm(x, keep_massive=True) != pytest.approx(norm(clean[~hit]), rel=0.03)
