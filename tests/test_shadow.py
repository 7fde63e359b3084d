"""The search by an encoder in few bits, in Triton's interpreter or on a card."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from waiting import no_waiting

from saesub.optim import make_optimizer
from saesub.topk import shadow, triton_backend
from saesub.topk.eligibility import lay_out_by_feature
from saesub.topk.ops import dense_search
from saesub.topk.shadow import MEMBERS, EncoderShadow, Tiles, few_bits, group_maxima
from saesub.topk.step import autograd_pass, row_step
from saesub.training import native_step
from saesub.training.mitigations.resampling import Resampling
from saesub.training.trainer import SubspaceSAETrainer

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

BACKEND = triton_backend.BACKEND
DEVICE = BACKEND.device_type


def _sae(d: int, d_sae: int, *, scaled: bool = True, seed: int = 0, **more) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    settings_ = {"k": 4, "rescale_acts_by_decoder_norm": scaled} | more
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=d_sae, **settings_))
    sae.W_dec.data *= 5 * torch.rand(d_sae, 1)
    sae.b_enc.data.normal_(0, 0.1)
    sae.to(DEVICE)
    lay_out_by_feature(sae)
    return sae


def _shadow(sae: TopKTrainingSAE, *, eight_bits: bool = False) -> EncoderShadow:
    settings_ = {"products": BACKEND.row_products, "eight_bits": eight_bits}
    scaled = sae.cfg.rescale_acts_by_decoder_norm
    return EncoderShadow(sae.W_enc, sae.W_dec, scaled=scaled, **settings_)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Let the search take small dictionaries, which the interpreter can bear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "width_of", lambda k, _: k + 4)
        patch.setattr(shadow, "_GROUPS_PER_CHOSEN", 1)
        yield


@pytest.mark.parametrize("eight_bits", [False, True])
@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 40),
    d_sae=st.integers(129, 200),
    scaled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_search_finds_the_best_feature(eight_bits, n, d, d_sae, scaled, seed):
    sae = _sae(d, d_sae, scaled=scaled, seed=seed)
    found = _shadow(sae, eight_bits=eight_bits)
    x = torch.randn(n, d, device=DEVICE)
    given_ = x, sae.W_enc.detach(), sae.b_enc.detach(), 1, found.norms
    features, pre = found.search(*given_)
    expected, best = dense_search(*given_)
    assert torch.equal(features, expected)
    torch.testing.assert_close(pre, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("flatten", [False, True])
def test_maxima_are_those_of_features_that_lie_a_tile_apart(dtype, flatten):
    tiles = Tiles(16, 32, 32, 4, 1, flatten)
    n, d, d_sae = 21, 48, 32 * MEMBERS + 50
    torch.manual_seed(0)
    tokens, scale = few_bits(torch.randn(n, d, device=DEVICE), dtype)
    rows, _ = few_bits(torch.randn(d_sae, d, device=DEVICE), dtype)
    bias = torch.randn(d_sae, device=DEVICE)
    found = group_maxima(tokens, rows, bias, scale, tiles)
    scores = tokens.float() @ rows.float().T + bias * scale[:, None]
    padded = torch.nn.functional.pad(scores, (0, 2 * 32 * MEMBERS - d_sae), value=-torch.inf)
    expected = padded.view(n, 2, MEMBERS, 32).amax(2).flatten(1)
    # The interpreter cuts bfloat16 off where a card rounds.
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("n_dead", [0, 22])
def test_steps_by_a_shadow_equal_those_by_autograd(optimizer, n_dead):
    """Also AuxK, whose dead features are fewer than it asks for; and rows are written as they
    move."""
    sae = _sae(24, 130, aux_loss_coefficient=1 / 32)
    twin = copy.deepcopy(sae)
    ours, theirs = (make_optimizer(optimizer, s, lr=1e-2, betas=(0.9, 0.999)) for s in (sae, twin))
    dead = torch.arange(130, device=DEVICE) % 6 == 0 if n_dead else None
    kept = None
    for _ in range(3):
        x = torch.randn(6, 24, device=DEVICE)
        kept = BACKEND.shadow(sae, kept)
        found = row_step(BACKEND, sae, ours, x, dead, shadow=kept)
        expected = autograd_pass(twin, x, dead)
        expected.loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.times_fired(), expected.times_fired())
    for (name, a), b in zip(sae.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by the gradient's size, so where that is rounding error the update is too.
        assert ((a - b).abs() > 1e-4).float().mean() < 0.01, name
    assert kept is not None
    before = kept.rows.float() / kept.factor, kept.norms.clone()
    kept.rebuild(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(before[0], kept.rows.float() / kept.factor, rtol=2**-9, atol=1e-5)
    torch.testing.assert_close(before[1], kept.norms)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_step_waits_for_the_device_nowhere(optimizer):
    sae = _sae(24, 130, aux_loss_coefficient=1 / 32)
    made = make_optimizer(optimizer, sae, lr=1e-2, betas=(0.9, 0.999))
    dead = torch.arange(130, device=DEVICE) % 6 == 0
    x = torch.randn(6, 24, device=DEVICE)
    kept = BACKEND.shadow(sae, None)
    row_step(BACKEND, sae, made, x, dead, shadow=kept)  # makes the optimizer's state
    with no_waiting():
        kept = BACKEND.shadow(sae, kept)
        row_step(BACKEND, sae, made, x, dead, shadow=kept).times_fired()


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_batch_that_is_not_finite_changes_nothing(optimizer):
    sae = _sae(24, 130)
    made = make_optimizer(optimizer, sae, lr=1e-2, betas=(0.9, 0.999))
    kept = BACKEND.shadow(sae, None)
    row_step(BACKEND, sae, made, torch.randn(6, 24, device=DEVICE), None, shadow=kept)
    before = copy.deepcopy((sae.state_dict(), made.state_dict()["state"], kept.rows.float()))
    for bad in (torch.nan, torch.inf):
        x = torch.randn(6, 24, device=DEVICE)
        x[3, 5] = bad
        row_step(BACKEND, sae, made, x, None, shadow=kept)
        after = (sae.state_dict(), made.state_dict()["state"], kept.rows.float())
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    row_step(BACKEND, sae, made, torch.randn(6, 24, device=DEVICE), None, shadow=kept)
    assert not torch.equal(sae.W_dec, before[0]["W_dec"])


def test_weights_that_others_change_reach_the_shadow(monkeypatch):
    sae = _sae(8, 96)
    kept = _shadow(sae)
    with torch.no_grad():
        sae.W_enc.mul_(2)
    kept.keep_up(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(kept.rows, _shadow(sae).rows * (kept.factor / _shadow(sae).factor))

    sae.W_dec.data[:] *= 0.5  # of which torch keeps no count
    monkeypatch.setattr(shadow, "_REFRESHES", 3)
    for _ in range(3):
        kept.keep_up(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(kept.norms, sae.W_dec.detach().norm(dim=1))


def test_a_trainer_writes_the_whole_shadow_only_where_others_changed_the_weights(monkeypatch):
    monkeypatch.setattr(native_step, "row_backend", lambda *_, **__: BACKEND)
    whole = []
    rebuild = EncoderShadow.rebuild
    monkeypatch.setattr(
        EncoderShadow, "rebuild", lambda self, *w: (whole.append(1), rebuild(self, *w))
    )
    sae = _sae(8, 64, k=1)
    cfg = SAETrainerConfig(
        total_training_samples=200, train_batch_size_samples=2, lr=1e-3, lr_end=1e-4, device=DEVICE
    )
    at = Resampling(at_tokens=(10,), n_batches=1)
    trainer = SubspaceSAETrainer(cfg, sae, iter(()), mitigations=[at], dead_window_tokens=4)
    counts = []
    for step in range(7):
        if step == 3:
            with torch.no_grad():
                sae.W_dec.mul_(1.5)
        trainer.step(torch.randn(2, 8, device=DEVICE))
        counts.append(len(whole))
    assert counts == [1, 1, 1, 2, 2, 3, 3]  # the step at 10 tokens resamples


def test_rows_that_outgrow_the_range_are_seen_and_written_again(monkeypatch):
    monkeypatch.setattr(shadow, "_REFRESHES", 1)
    sae = _sae(8, 96)
    kept = _shadow(sae, eight_bits=True)
    sae.W_enc.data[:, 7] *= 1000
    kept.keep_up(sae.W_enc, sae.W_dec)
    assert not kept.overflowed
    _, factor = few_bits(
        (sae.W_enc.T * sae.W_dec.norm(dim=1)[:, None]).detach().flatten()[None], kept.rows.dtype
    )
    assert kept.factor == float(factor)
