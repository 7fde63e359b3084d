"""The refitted decoder against dense least squares, and what must stay as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

import saesub
from saesub.errors import SaesubError
from saesub.topk.encode import encoder_of

D, D_SAE, K = 12, 40, 4
KINDS = [
    (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": False}),
    (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
    (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
    (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
]


def _sae(kind: Any = TopKTrainingSAE, config: Any = TopKTrainingSAEConfig, settings=None) -> Any:
    torch.manual_seed(0)
    sae = kind(config(d_in=D, d_sae=D_SAE, **({"k": K} if settings is None else settings)))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
        sae.b_dec.fill_(0.3)  # the mean of the tokens
        sae.b_enc.normal_(std=0.01)
        sae.b_enc[3] = -1e4  # never fires
    return sae


def _tokens(n: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, D, generator=generator) * torch.linspace(2, 0.2, D) + 0.3


def _dense(sae: Any, x: torch.Tensor) -> torch.Tensor:
    features = encoder_of(sae)(x)
    return features.to_dense() if features.is_sparse else features


@pytest.mark.parametrize(("kind", "config", "settings"), KINDS)
def test_rows_are_the_least_squares_solution(kind, config, settings) -> None:
    sae, x = _sae(kind, config, settings | {"dtype": "float64"}), _tokens().double()
    for value in sae.parameters():
        value.data = value.double()  # SAELens makes thresholds in float32
    a = _dense(sae, x)
    before, rows = _rebuilt(sae, x), sae.W_dec.detach()
    if settings.get("rescale_acts_by_decoder_norm", "k" in settings):
        rows = torch.nn.functional.normalize(rows, dim=1)
    fired = (a > 0).sum(0).clamp(min=1)
    damping = torch.diag(10 * (a**2).sum(0) / fired)
    right = a.T @ (x - sae.b_dec.detach() - a @ rows)
    alive = (a > 0).any(0)
    expected = rows.clone()
    normal = (a.T @ a + damping)[alive][:, alive]
    expected[alive] += torch.linalg.solve(normal, right[alive])

    report = saesub.refit_decoder(sae, [x], iterations=150, progress=False)

    assert torch.allclose(sae.W_dec, expected, atol=1e-4)
    assert not alive[3]
    assert report.n_tokens == len(x)
    assert report.error_before == pytest.approx(_error(before, x), rel=1e-5)
    assert report.error_after == pytest.approx(_error(_rebuilt(sae, x), x), rel=1e-4)
    assert report.error_after < 0.9 * report.error_before
    assert sae.cfg.metadata.decoder_refit["n_tokens"] == len(x)


@pytest.mark.parametrize(("kind", "config", "settings"), KINDS)
def test_features_and_their_values_stay(kind, config, settings) -> None:
    sae, x = _sae(kind, config, settings), _tokens()
    before = _dense(sae, x)
    saesub.refit_decoder(sae, [x], progress=False)
    after = _dense(sae, x)
    assert torch.equal(before > 0, after > 0)
    assert torch.allclose(before, after, rtol=1e-5)


def test_it_is_a_plain_sae_on_disk(tmp_path) -> None:
    sae, x = _sae(), _tokens()
    saesub.refit_decoder(sae, [x], progress=False)
    sae.save_inference_model(tmp_path)
    assert torch.allclose(SAE.load_from_disk(tmp_path)(x), _rebuilt(sae, x), atol=1e-5)


def test_the_error_falls_with_every_iteration() -> None:
    x = _tokens()
    errors = [
        saesub.refit_decoder(_sae(), [x], iterations=n, progress=False).error_after
        for n in (1, 3, 10)
    ]
    assert errors == sorted(errors, reverse=True)
    again = _sae()
    for _ in range(2):
        report = saesub.refit_decoder(again, [x], iterations=60, progress=False)
    assert report.error_after == pytest.approx(report.error_before, rel=1e-2)


@pytest.mark.model
def test_a_trained_sae_fits_unseen_tokens_better(activations) -> None:
    train, held_out = activations[:3000], activations[3000:]
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=128, k=8))
    spectrum = saesub.Spectrum.from_activations(train)
    saesub.initialize_in_subspace(sae, spectrum)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for _ in range(3):
        for x in train.split(256):
            loss = (sae(x) - x).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    before = saesub.reconstruction(sae, [held_out], progress=False).fvu
    saesub.refit_decoder(sae, train.split(256), progress=False)
    assert saesub.reconstruction(sae, [held_out], progress=False).fvu < before


def _matryoshka() -> Any:
    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=K, matryoshka_widths=[20])
    return MatryoshkaBatchTopKTrainingSAE(config)


def _scaled() -> Any:
    return _sae(settings={"k": K, "normalize_activations": "layer_norm"})


def _unfolded() -> Any:
    return _sae(settings={"k": K, "normalize_activations": "expected_average_only_in"})


def _of_one_memory() -> Any:
    sae = _sae()
    sae.W_enc.data = sae.W_dec.data.T
    return sae


def _with_nan(x: torch.Tensor) -> torch.Tensor:
    x[5, 1] = float("nan")
    return x


REFUSED = {
    "several parts": (_matryoshka, [_tokens()], {}),
    "scales each token": (_scaled, [_tokens()], {}),
    "folds into them": (_unfolded, [_tokens()], {}),
    "pass some batches": (_sae, [_tokens()[:0]], {}),
    "iterations": (_sae, [_tokens()], {"iterations": 0}),
    "NaN": (_sae, [_tokens() * float("nan")], {}),
    "reads activations of shape": (_sae, [torch.randn(5, D + 1)], {}),
    "worse than their mean": (_sae, [100 + _tokens()], {}),
    "fires 20.0 times .* at least 1,100 tokens": (_sae, [_tokens(200)], {}),
    "copy it": (_of_one_memory, [_tokens()], {}),
    "not NoneType": (_sae, None, {}),
    "a row for each token": (_sae, _tokens()[0], {}),
    "counted from token 2,000, .* in row 5,": (_sae, [_tokens(2000), _with_nan(_tokens(9))], {}),
    "too coarse": (lambda: _sae().to(dtype=torch.bfloat16), [_tokens()], {}),
}


@pytest.mark.parametrize("how", [lambda x: x.split(100), lambda x: x, lambda x: x.numpy()])
def test_activations_come_in_blocks_or_whole(how) -> None:
    sae, whole, x = _sae(), _sae(), _tokens()
    saesub.refit_decoder(whole, [x], progress=False)
    saesub.refit_decoder(sae, how(x), progress=False)
    assert torch.allclose(sae.W_dec, whole.W_dec, rtol=1e-4, atol=1e-3)


def test_a_feature_with_its_sign_turned_is_refitted_alike() -> None:
    """A feature of AbsTopK fires on either sign."""
    torch.manual_seed(0)
    sae, x = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=K)), _tokens()
    saesub.initialize_in_subspace(sae, saesub.Spectrum.from_activations(x), activations=x)
    with torch.no_grad():
        sae.b_enc.add_(0.3)
    turned = copy.deepcopy(sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        turned.get_parameter(name).data.mul_(-1)
    assert torch.equal(sae(x), turned(x))
    reports = [saesub.refit_decoder(of, [x], progress=False) for of in (sae, turned)]
    assert reports[0] == reports[1]
    assert torch.equal(sae.W_dec, -turned.W_dec)


def test_weights_of_inference_mode_are_refused(tmp_path) -> None:
    with torch.inference_mode():
        _sae().save_model(tmp_path)
        loaded = TopKTrainingSAE.load_from_disk(tmp_path)
    before, flag = loaded.W_enc.clone(), loaded.cfg.rescale_acts_by_decoder_norm
    with pytest.raises(SaesubError, match="outside of it"):
        saesub.refit_decoder(loaded, [_tokens()], progress=False)
    assert torch.equal(loaded.W_enc, before)
    assert loaded.cfg.rescale_acts_by_decoder_norm == flag


def test_a_saved_matryoshka_sae_is_refused_too(tmp_path) -> None:
    sae: Any = _matryoshka()
    sae.topk_threshold.fill_(0.1)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    with pytest.raises(SaesubError, match="several parts"):
        saesub.refit_decoder(loaded, [_tokens()], progress=False)


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_leave_the_sae_as_it_was(message) -> None:
    make, batches, settings = REFUSED[message]
    sae = make()
    before = {name: value.clone() for name, value in sae.named_parameters()}
    with pytest.raises(SaesubError, match=message):
        saesub.refit_decoder(sae, batches, progress=False, **settings)
    assert all(torch.equal(before[name], value) for name, value in sae.named_parameters())
    if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
        assert sae.cfg.rescale_acts_by_decoder_norm == make().cfg.rescale_acts_by_decoder_norm


def _rebuilt(sae: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return sae(x)


def _error(rebuilt: torch.Tensor, x: torch.Tensor) -> float:
    return (rebuilt - x).double().square().sum(-1).mean().item()
