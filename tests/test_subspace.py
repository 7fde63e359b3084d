"""ASI for every SAELens dictionary: in the span, tied, norms kept, biases centred, loadable."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardTrainingSAEConfig, TopKSAE, TopKSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.init.biases import center_at, center_biases
from saesub.init.norm import fit_norm
from saesub.init.subspace import choose_d_init, initialize_in_subspace
from saesub.training.trainer import SubspaceSAETrainer

D_IN, D_OUT, D_SAE = 24, 20, 96
EXTRA = {"matryoshka_batchtopk": {"matryoshka_widths": [32, 64, 96]}}
HAS_K = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
TRANSCODERS = sorted(name for name in SAE_CLASS_REGISTRY if "transcoder" in name)


def _spectrum(d: int, rank: int, n: int = 2000, seed: int = 0) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=generator) @ torch.randn(rank, d, generator=generator)
    return Spectrum.from_activations(x + torch.randn(d, generator=generator))


def _training_sae(architecture: str, **settings) -> TrainingSAE:
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    settings |= EXTRA.get(architecture, {})
    if architecture in HAS_K:
        settings["k"] = 4
    if architecture == "matching_pursuit":
        settings |= {"residual_threshold": 0.1, "max_iterations": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, **settings))


def _transcoder(architecture: str) -> SAE:
    sae_class, cfg_class = SAE_CLASS_REGISTRY[architecture]
    return sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False))


def _assert_in_span(rows: torch.Tensor, basis: torch.Tensor) -> None:
    outside = rows - rows @ basis @ basis.T
    assert outside.norm() / rows.norm() < 1e-5


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_training_architecture_starts_in_the_span_and_tied(architecture):
    spectrum, sae = _spectrum(D_IN, 10), _training_sae(architecture)
    report = initialize_in_subspace(sae, spectrum, d_init=10)
    _assert_in_span(sae.W_dec.detach(), spectrum.basis(10))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert report.norm_from == "spectrum"
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((D_SAE,), report.norm))
    assert torch.linalg.matrix_rank(sae.W_dec.detach()) == 10
    torch.testing.assert_close(sae.b_dec.double(), spectrum.mean, rtol=1e-5, atol=1e-6)
    assert report.variance_share == pytest.approx(1.0)
    assert sae.cfg.metadata.subspace_init["d_init"] == 10


def test_norms_can_be_kept():
    sae = _training_sae("topk", decoder_init_norm=None)
    norms = sae.W_dec.norm(dim=-1).clone()
    report = initialize_in_subspace(sae, _spectrum(D_IN, 10), norm="keep")
    assert (norms.max() / norms.min()) > 1.1
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), norms)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert report.norm is report.norm_from is None


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_use_both_spaces_and_see_centred_inputs(architecture):
    spectrum, read = _spectrum(D_OUT, 8), _spectrum(D_IN, 10, seed=1)
    transcoder = _transcoder(architecture)
    norms = transcoder.W_enc.norm(dim=0).clone()
    report = initialize_in_subspace(transcoder, spectrum, d_init=0.999, input_spectrum=read)
    _assert_in_span(transcoder.W_dec.detach(), spectrum.basis(report.d_init))
    _assert_in_span(transcoder.W_enc.detach().T, read.basis(report.input_d_init))
    torch.testing.assert_close(transcoder.W_enc.norm(dim=0), norms)
    at_mean = read.mean.float() @ transcoder.W_enc + transcoder.b_enc
    assert at_mean.abs().max() < 1e-5


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_pairs_tie_a_transcoder_by_what_predicts_each_row(architecture):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3000, 10, generator=generator) @ torch.randn(10, D_IN, generator=generator)
    through = torch.randn(D_IN, D_OUT, generator=generator)
    y = x @ through + 3.0
    read, spectrum = Spectrum.from_activations(x + 1.0), Spectrum.from_activations(y)
    transcoder = _transcoder(architecture)
    # Few pairs, which are not the spectra's own sample.
    settings = {"activations": y[:40], "input_activations": x[:40] + 1.0}
    report = initialize_in_subspace(
        transcoder, spectrum, d_init=10, input_spectrum=read, **settings
    )
    _assert_in_span(transcoder.W_dec.detach(), spectrum.basis(10))
    _assert_in_span(transcoder.W_enc.detach().T, read.basis(report.input_d_init))
    assert report.norm_from == "activations"
    for norms in (transcoder.W_enc.norm(dim=0), transcoder.W_dec.norm(dim=-1)):
        torch.testing.assert_close(norms, torch.full((D_SAE,), report.norm))
    # The target is linear in the input, so a feature tells exactly what is along its row.
    seen = (x + 1.0) @ transcoder.W_enc.detach() + transcoder.b_enc.detach()
    along = (y - y.mean(0)) @ transcoder.W_dec.detach().T
    assert torch.nn.functional.cosine_similarity(seen, along, dim=0).min() > 0.9999


def test_the_tie_of_a_transcoder_to_its_own_input_is_an_autoencoders():
    sae_class, cfg_class = SAE_CLASS_REGISTRY["transcoder"]
    transcoder: SAE = sae_class(
        cfg_class(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)
    )
    x = torch.randn(3000, D_IN) * torch.linspace(0.1, 3, D_IN) + 1
    settings = {"activations": x, "input_activations": x, "d_init": 9}
    spectrum = Spectrum.from_activations(x)
    initialize_in_subspace(transcoder, spectrum, input_spectrum=spectrum, **settings)
    cosine = torch.nn.functional.cosine_similarity(transcoder.W_enc.T, transcoder.W_dec, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(D_SAE))


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        (torch.zeros(50, D_OUT), None, "start at pairs"),
        (None, torch.zeros(50, D_IN), "start at pairs"),
        (torch.zeros(50, D_OUT), torch.zeros(49, D_IN), "start at pairs"),
        (torch.zeros(50, D_IN), torch.zeros(50, D_IN), rf"\(n, {D_OUT}\)"),
        (torch.zeros(6, D_OUT), torch.zeros(6, D_IN), "pass more than 6"),
    ],
)
def test_pairs_that_do_not_fit_a_transcoder_are_refused(written, read, message):
    transcoder = _transcoder("transcoder")
    before = transcoder.W_enc.clone()
    settings = {"activations": written, "input_activations": read, "d_init": 6}
    with pytest.raises(SaesubError, match=message):
        initialize_in_subspace(
            transcoder, _spectrum(D_OUT, 8), input_spectrum=_spectrum(D_IN, 10), **settings
        )
    assert torch.equal(transcoder.W_enc, before)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_encoders_see_centred_inputs(architecture, apply_b_dec_to_input):
    spectrum = _spectrum(D_IN, 10)
    sae = _training_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    initialize_in_subspace(sae, spectrum, d_init=10)
    _, at_mean = sae.encode_with_hidden_pre(spectrum.mean.float()[None])
    assert at_mean.abs().max() < 1e-5


def test_scaled_inputs_get_the_mean_in_their_own_scale():
    spectrum = _spectrum(D_IN, 10)
    sae = _training_sae("topk", normalize_activations="expected_average_only_in")
    initialize_in_subspace(sae, spectrum, d_init=10)
    scale = D_IN**0.5 / spectrum.mean_norm
    torch.testing.assert_close(sae.b_dec.double(), spectrum.mean * scale, rtol=1e-5, atol=1e-6)


def test_centering_a_baseline_leaves_its_directions_alone():
    sae = _training_sae("topk")
    W_dec, W_enc = sae.W_dec.clone(), sae.W_enc.clone()
    center_biases(sae, _spectrum(D_IN, 10))
    assert torch.equal(sae.W_dec, W_dec)
    assert torch.equal(sae.W_enc, W_enc)
    assert sae.b_dec.norm() > 0


def test_the_seed_decides_the_draw():
    spectrum = _spectrum(D_IN, 10)
    draws = []
    for seed in (0, 0, 1):
        sae = _training_sae("topk")
        initialize_in_subspace(sae, spectrum, seed=seed)
        draws.append(sae.W_dec.detach().clone())
    torch.testing.assert_close(draws[0], draws[1])
    assert (draws[0] - draws[2]).norm() > draws[0].norm()


def test_what_d_init_means():
    spectrum = _spectrum(D_IN, 10)
    assert choose_d_init(spectrum, 7) == 7
    assert choose_d_init(spectrum, 0.9) == spectrum.rank_at(0.9)
    # Ten directions of equal variance: half of them.
    assert choose_d_init(spectrum, "auto") == round(spectrum.effective_rank("singular_values") / 2)
    assert 4 <= choose_d_init(spectrum, "auto") <= 6


def test_auto_is_not_fooled_by_one_massive_direction():
    x = torch.randn(3000, 30, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100
    spectrum = Spectrum.from_activations(x)
    assert spectrum.rank_at(0.99) == 1
    assert choose_d_init(spectrum, "auto") > 1


def test_an_unknown_norm_is_refused():
    with pytest.raises(SaesubError, match="did you mean 'keep'"):
        initialize_in_subspace(_training_sae("topk"), _spectrum(D_IN, 10), norm="keeep")


@pytest.mark.parametrize("bad", [0, -1, D_IN + 1, 0.0, 1.0, 1.5, True, "half", None])
def test_bad_d_init_is_refused(bad):
    with pytest.raises(SaesubError, match="d_init"):
        initialize_in_subspace(_training_sae("topk"), _spectrum(D_IN, 10), d_init=bad)


def test_misfits_are_refused_and_nothing_is_changed():
    sae = _training_sae("topk")
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    with pytest.raises(SaesubError, match=f"{D_OUT} wide but the SAE needs {D_IN}"):
        initialize_in_subspace(sae, _spectrum(D_OUT, 5))
    with pytest.raises(SaesubError, match="input_spectrum is for transcoders"):
        initialize_in_subspace(sae, _spectrum(D_IN, 5), input_spectrum=_spectrum(D_IN, 5))
    with pytest.raises(SaesubError, match="input_spectrum="):
        initialize_in_subspace(_transcoder("transcoder"), _spectrum(D_OUT, 5))
    whitening = _training_sae("standard", normalize_activations="covariance_whitening")
    with pytest.raises(SaesubError, match="whitens its input"):
        initialize_in_subspace(whitening, _spectrum(D_IN, 5))
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())


def _nan(sae: SAE) -> SAE:
    with torch.no_grad():
        sae.W_dec[3, 1] = torch.nan
    return sae


def _hooked(sae: SAE) -> SAE:
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts * 2)
    return sae


def _trained() -> SAE:
    sae = _training_sae("topk")
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32)
    return SubspaceSAETrainer(cfg, sae, iter(torch.randn(2, 32, D_IN))).fit()


def _in_training() -> SAE:
    sae = _training_sae("topk", normalize_activations="expected_average_only_in")
    cfg = SAETrainerConfig(
        total_training_samples=320, train_batch_size_samples=32, n_batches_for_norm_estimate=1
    )
    with pytest.raises(SaesubError, match="ended"):
        SubspaceSAETrainer(cfg, sae, iter(torch.randn(3, 32, D_IN))).fit()
    return sae


def _of_inference() -> SAE:
    return TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4))


UNFIT = {
    "for inference": (_of_inference, "TopKSAE is made for inference"),
    "trained": (_trained, "was trained .*l0 and num_dead_features"),
    "in training": (_in_training, "was trained .*activations_scaled_by"),
    "bfloat16": (lambda: _training_sae("topk", dtype="bfloat16"), "dtype='float32'"),
    "float16": (lambda: _training_sae("gated", dtype="float16"), "dtype='float32'"),
    "NaN": (lambda: _nan(_training_sae("topk")), "W_dec holds NaN"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("start", [initialize_in_subspace, center_biases, fit_norm])
def test_an_sae_whose_weights_cannot_be_drawn_is_left_as_it_was(kind, start):
    make, message = UNFIT[kind]
    sae = make()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(SaesubError, match=message):
        start(sae, _spectrum(D_IN, 10))
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("start", [initialize_in_subspace, fit_norm])
def test_a_norm_is_not_fitted_through_hooks(start):
    sae = _hooked(_training_sae("topk"))
    before = sae.W_dec.clone()
    with pytest.raises(SaesubError, match=r"sae\.reset_hooks\(\)"):
        start(sae, _spectrum(D_IN, 10))
    assert torch.equal(sae.W_dec, before)
    sae.reset_hooks()
    start(sae, _spectrum(D_IN, 10))


@pytest.mark.parametrize("part", ["mean", "covariance", "mean_norm"])
@pytest.mark.parametrize("start", [initialize_in_subspace, center_biases, fit_norm])
def test_a_spectrum_that_is_not_finite_is_refused(start, part):
    spectrum = _spectrum(D_IN, 10)
    broken = replace(spectrum, **{part: getattr(spectrum, part) * float("nan")})
    with pytest.raises(SaesubError, match="spectrum holds NaN"):
        start(_training_sae("topk"), broken)


@pytest.mark.parametrize(
    ("hook_name", "model", "said"),
    [
        ("blocks.3.hook_resid_post", "maker/Model-1B", []),
        ("blocks.3.hook_resid_post", "model-1b", []),
        ("blocks.4.hook_resid_post", "model-1b", ["hook_name 'blocks.4.hook_resid_post'"]),
        ("blocks.3.hook_resid_post", "model-2b", ["model_name 'model-2b'"]),
        (None, None, []),
    ],
)
@pytest.mark.parametrize("start", [initialize_in_subspace, center_biases, fit_norm])
def test_a_spectrum_of_another_site_is_said(start, hook_name, model, said):
    sae = _training_sae("topk")
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.cfg.metadata.model_name = "maker/model-1b"
    known = {"hook_name": hook_name, "model": model} if hook_name else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(sae, replace(_spectrum(D_IN, 10), metadata=known))
    assert len(caught) == len(said)
    assert all(text in str(w.message) for text, w in zip(said, caught, strict=True))


@pytest.mark.parametrize(
    ("of_sae", "of_spectrum"),
    [("gpt2-small", "gpt2"), ("tiny-stories-1L-21M", "roneneldan/TinyStories-1Layer-21M")],
)
def test_transformer_lens_has_names_of_its_own_for_models(of_sae, of_spectrum, recwarn):
    sae = _training_sae("topk")
    sae.cfg.metadata.model_name = of_sae
    center_biases(sae, replace(_spectrum(D_IN, 10), metadata={"model": of_spectrum}))
    assert not recwarn.list


@pytest.mark.parametrize("number", [float, np.float32, np.float64, np.int64])
def test_whole_numbers_of_any_kind_are_taken(number):
    spectrum = _spectrum(D_IN, 10)
    saes = [_training_sae("topk") for _ in range(2)]
    report = initialize_in_subspace(saes[0], spectrum, number(7), seed=number(3))
    initialize_in_subspace(saes[1], spectrum, 7, seed=3)
    assert report.d_init == 7
    assert isinstance(report.seed, int)
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert fit_norm(saes[0], spectrum, seed=number(3)) == fit_norm(saes[1], spectrum, seed=3)
    assert choose_d_init(spectrum, np.float32(0.5)) == choose_d_init(spectrum, 0.5)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, float("nan")])
@pytest.mark.parametrize("start", [initialize_in_subspace, fit_norm])
def test_seeds_that_cannot_be_are_refused(start, seed):
    with pytest.raises(SaesubError, match="seed must be a whole number"):
        start(_training_sae("topk"), _spectrum(D_IN, 10), seed=seed)


ROWS = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(3))
GIVEN = {
    "numpy": ROWS.numpy(),
    "strided numpy": np.asfortranarray(ROWS.numpy()),
    "list of one": [ROWS],
    "with gradients": ROWS.clone().requires_grad_(),
    "float64": ROWS.double(),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("directions", ["flat", "data", "whitened_data"])
def test_activations_in_other_forms_start_the_same(given, directions):
    spectrum = Spectrum.from_activations(ROWS)
    starts = []
    for activations in (ROWS, GIVEN[given]):
        sae = _training_sae("topk")
        initialize_in_subspace(sae, spectrum, directions=directions, activations=activations)
        starts.append((sae.W_dec.detach(), fit_norm(sae, spectrum, activations=activations)))
    assert not starts[1][0].requires_grad
    assert torch.equal(starts[0][0], starts[1][0])
    assert starts[0][1] == starts[1][1]


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (torch.ones(300, D_IN, dtype=torch.int64), "floating-point"),
        (np.ones((300, D_IN), dtype=int), "not int64: give x.astype"),
        ({"x": ROWS}, "not a dict"),
        ([ROWS, ROWS], "list of 2"),
        (ROWS * float("nan"), "NaN"),
        (ROWS * 0, "all zero"),
        (ROWS[:0], "activations"),
    ],
)
@pytest.mark.parametrize("start", [initialize_in_subspace, fit_norm])
def test_activations_that_cannot_be_are_refused(start, activations, message):
    sae = _training_sae("topk")
    before = sae.W_dec.clone()
    with pytest.raises(SaesubError, match=message):
        start(sae, _spectrum(D_IN, 10), activations=activations)
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("mean_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_centre_is_not_scaled_by_a_norm_that_cannot_be(mean_norm):
    sae = _training_sae("topk", normalize_activations="expected_average_only_in")
    with pytest.raises(SaesubError, match="mean_norm must be above 0"):
        center_at(sae, torch.ones(D_IN), mean_norm=mean_norm)
    center_at(sae, np.ones(D_IN), mean_norm=2.0)  # pyright: ignore
    torch.testing.assert_close(sae.b_dec, torch.full((D_IN,), D_IN**0.5 / 2))


def test_weights_that_would_not_be_finite_are_not_kept():
    sae = _training_sae("topk")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    far = torch.full((D_IN,), 1e39, dtype=torch.float64)  # beyond float32
    with pytest.raises(SaesubError, match="b_dec became NaN or infinite"):
        center_biases(sae, replace(_spectrum(D_IN, 10), mean=far))
    with pytest.raises(SaesubError, match="b_dec became NaN or infinite"):
        center_at(sae, far)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


_LOAD_ALONE = """
import json, sys
sys.modules["saesub"] = None  # an import of saesub would now fail
from sae_lens import SAE
saes = [SAE.load_from_disk(folder) for folder in sys.argv[1:]]
print(json.dumps([[s.cfg.architecture(), s.cfg.metadata.subspace_init["d_init"]] for s in saes]))
"""


def test_saved_saes_load_where_saesub_is_not(tmp_path):
    folders = []
    for architecture in ("topk", "batchtopk"):
        sae = _training_sae(architecture)
        initialize_in_subspace(sae, _spectrum(D_IN, 10), d_init=9)
        folders.append(str(tmp_path / architecture))
        sae.save_inference_model(folders[-1])
    out = subprocess.run(
        [sys.executable, "-c", _LOAD_ALONE, *folders],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(out.stdout.strip().splitlines()[-1]) == [["topk", 9], ["jumprelu", 9]]


def test_standard_config_is_covered():
    """The registry really holds SAELens' own classes, so the sweep above is not empty."""
    assert SAE_TRAINING_CLASS_REGISTRY["standard"][1] is StandardTrainingSAEConfig
    assert len(SAE_TRAINING_CLASS_REGISTRY) >= 8
    assert len(TRANSCODERS) >= 4


@pytest.mark.parametrize("change", [initialize_in_subspace, fit_norm, center_biases])
def test_a_decoder_that_is_the_encoders_memory_is_refused(change):
    """Each factor would be taken twice, and the norm that is reported would not be the SAE's."""
    sae = _training_sae("topk")
    sae.W_enc.data = sae.W_dec.data.T
    before = sae.W_dec.detach().clone()
    with pytest.raises(SaesubError, match="are one memory"):
        change(sae, _spectrum(sae.cfg.d_in, 4))
    assert torch.equal(sae.W_dec, before)
    sae.W_enc.data = sae.W_enc.data.clone()
    change(sae, _spectrum(sae.cfg.d_in, 4))


@pytest.mark.parametrize("change", [initialize_in_subspace, fit_norm, center_biases])
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"blocks.0.hook_attn_out": _spectrum(16, 4)}, r"spectra\[hook_name\]"),
        ("spectrum.safetensors", r"Spectrum\.load"),
        (None, "measure one"),
    ],
    ids=["of measure_spectra", "a path", "none"],
)
def test_what_is_no_spectrum_is_refused_with_what_to_give(change, given, advice):
    with pytest.raises(SaesubError, match=f"must be a Spectrum, .*{advice}"):
        change(_training_sae("topk"), given)
    with pytest.raises(SaesubError, match=f"must be a Spectrum, .*{advice}"):
        choose_d_init(given)


def test_a_spectrum_and_an_sae_in_the_wrong_order_are_refused():
    with pytest.raises(SaesubError, match="An SAE must be"):
        initialize_in_subspace(_spectrum(16, 4), _training_sae("topk"))


def test_torchs_default_dtype_decides_nothing():
    spectrum, saes = _spectrum(24, 4), (_training_sae("topk"), _training_sae("topk"))
    initialize_in_subspace(saes[0], spectrum)
    torch.set_default_dtype(torch.float64)
    try:
        initialize_in_subspace(saes[1], spectrum)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
