"""What sums in float64 works on MPS, which has none, and gives what the CPU gives."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_mps import MPS, fake_mps
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from saesub.activations.spectrum import Spectrum
from saesub.evaluation import language_model_loss
from saesub.evaluation.dead_features import dead_features
from saesub.evaluation.features import feature_density
from saesub.evaluation.reconstruction import reconstruction
from saesub.init.biases import geometric_median
from saesub.init.directions import reading_directions
from saesub.init.encoder_scale import fit_encoder_scale
from saesub.init.norm import fit_norm
from saesub.training.mitigations.resampling import _draw_by_squared_loss

D = 12


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(300, D, generator=torch.Generator().manual_seed(0)) + 3


def test_the_fake_refuses_float64_and_computes(x):
    with fake_mps():
        there = x.to(MPS)
        assert there.device == (there @ there.T).device == torch.zeros(2, device="mps").device
        assert torch.equal((there + 1).cpu(), x + 1)
        for wide in (
            lambda: there.double(),
            lambda: there.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device=there.device),
            lambda: there.to("cpu", torch.float64),  # by way of float64 on MPS
            lambda: there.cpu().double().to(MPS),
        ):
            with pytest.raises(TypeError, match="MPS Tensor to float64"):
                wide()


def both(measure, *tensors: torch.Tensor):
    """What `measure` gives on the CPU, and on MPS from there brought back."""
    expected = measure(*tensors)
    with fake_mps(), torch.no_grad():
        found = measure(*(t.to(MPS) for t in tensors))
        return expected, found.cpu() if isinstance(found, torch.Tensor) else found


def test_spectra(x):
    expected, found = both(Spectrum.from_activations, x)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance, expected.covariance)
    assert found.mean_norm == pytest.approx(expected.mean_norm)


def test_medians_keep_their_device(x):
    with fake_mps():
        assert geometric_median(x.to(MPS)).device == MPS
    torch.testing.assert_close(*both(geometric_median, x))


def test_directions_that_are_read(x):
    spectrum, rows = Spectrum.from_activations(x), torch.eye(D)

    def read(rows, x, y):
        return reading_directions(rows, spectrum, 5, x, y)

    torch.testing.assert_close(*both(read, rows, x, x.roll(1, 1)))


def made(kind: str, device: str):
    torch.manual_seed(0)
    if kind == "topk":
        settings = {"d_in": D, "d_sae": 40, "k": 4}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings))
        there = TopKTrainingSAE(TopKTrainingSAEConfig(**settings, device=device))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=40))
        there = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=40, device=device))
    there.load_state_dict(sae.state_dict())
    return there


JUDGES = {
    "reconstruction": lambda sae, x: torch.tensor(reconstruction(sae, x)),
    "density": lambda sae, x: feature_density(sae, x, n_tokens=len(x)),
    "dead": lambda sae, x: dead_features(sae, x, n_tokens=len(x)),
    "norm": lambda sae, x: torch.tensor(fit_norm(sae, Spectrum.from_activations(x), activations=x)),
    "scale": lambda sae, x: torch.tensor(fit_encoder_scale(sae, x)),
}


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("judge", JUDGES)
def test_saes(x, kind, judge):
    expected = JUDGES[judge](made(kind, "cpu"), x)
    with fake_mps(), torch.no_grad():
        found = JUDGES[judge](made(kind, "mps"), x.to(MPS)).cpu()
    torch.testing.assert_close(found, expected)


def test_the_loss_of_a_site_cut_down(x, monkeypatch):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(2, 5, dtype=torch.bool)

    def cut_down(device: str) -> dict:
        def run_with_hooks(batch, fwd_hooks):
            return logits.to(device)

        cfg = SimpleNamespace(device=device, dtype=torch.float32, model_name="none")
        bridge = SimpleNamespace(cfg=cfg, run_with_hooks=run_with_hooks)
        monkeypatch.setattr(language_model_loss, "load_model", lambda model: model)
        monkeypatch.setattr(language_model_loss, "contexts_of", lambda _, tokens: tokens.to(device))
        monkeypatch.setattr(language_model_loss, "in_eval_mode", nullcontext)
        for check in ("_check_width", "check_site", "check_model"):
            monkeypatch.setattr(language_model_loss, check, lambda *given: None)
        given = torch.arange(10).view(2, 5) % 7
        spectrum = Spectrum.from_activations(x)
        measured = language_model_loss.subspace_loss_recovered(
            bridge, given, "site", spectrum, [3], progress=False
        )
        return {name: sums.tolist() for name, sums in measured.loss_sums.items()}

    monkeypatch.setattr(
        language_model_loss, "kept_positions", lambda _, batch, __: everywhere.to(batch.device)
    )
    expected = cut_down("cpu")
    with fake_mps():
        assert cut_down("mps") == expected


def test_resampling_draws(x):
    def drawn(x, x_hat):
        class Output:
            sae_in, sae_out = x, x_hat

        everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return _draw_by_squared_loss(Output, everything, 9, np.random.default_rng(0))

    expected, found = both(drawn, x, x.roll(1, 0))
    assert found.tolist() == expected.tolist()
