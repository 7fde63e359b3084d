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

from saesub.topk import maxima, shadow, triton_backend
from saesub.topk.eligibility import lay_out_by_feature
from saesub.topk.maxima import MEMBERS, Tiles, group_maxima, maxima_by_torch
from saesub.topk.ops import dense_search
from saesub.topk.optim import make_optimizer
from saesub.topk.shadow import EncoderShadow, few_bits
from saesub.topk.step import WHOLE, _select, autograd_pass, row_step
from saesub.training import native_step
from saesub.training.mitigations.resampling import Resampling
from saesub.training.trainer import SubspaceSAETrainer

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

BACKEND = triton_backend.BACKEND
DEVICE = BACKEND.device_type
D, D_SAE = 12, 70  # of most tests: the interpreter takes a millisecond for each row


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
        if DEVICE == "cpu":
            patch.setattr(maxima, "STRIDE", 16)
        yield


@pytest.mark.parametrize("eight_bits", [False, True])
@settings(max_examples=6, deadline=None, derandomize=True)
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
    if eight_bits:  # with the few candidates of this test another may be as good
        scale = 1 if found.norms is None else found.norms
        gap = best * scale[expected] - pre * scale[features] if scaled else best - pre
        assert (gap <= 0.1 * best.abs().amax() * (scale.amax() if scaled else 1)).all()
        return
    assert torch.equal(features, expected)
    torch.testing.assert_close(pre, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tiles", [Tiles(16, 32, 32, 4, 1, True), Tiles(16, 16, 32, 4, 1, False)])
def test_maxima_are_those_of_features_that_lie_a_stride_apart(monkeypatch, dtype, tiles):
    """Whatever the tiles are; the last ones are not full."""
    monkeypatch.setattr(maxima, "STRIDE", 32)
    n, d, d_sae = 21, 48, 32 * MEMBERS + 50
    torch.manual_seed(0)
    tokens, scale = few_bits(torch.randn(n, d, device=DEVICE), dtype)
    rows, _ = few_bits(torch.randn(d_sae, d, device=DEVICE), dtype)
    bias = torch.randn(d_sae, device=DEVICE)
    found = group_maxima(tokens, rows, bias, scale, tiles)
    expected = maxima_by_torch(tokens, rows, bias, scale)
    scores = tokens.float() @ rows.float().T + bias * scale[:, None]
    for group, members in ((0, range(0, 256, 32)), (37, (261, 293))):
        assert torch.equal(expected[:, group], scores[:, list(members)].amax(1))
    # The interpreter cuts bfloat16 off where a card rounds.
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("n_dead", [None, 22])
def test_steps_by_a_shadow_equal_those_by_autograd(optimizer, n_dead):
    """Also AuxK; and rows are written as they move."""
    sae = _sae(D, D_SAE, aux_loss_coefficient=1 / 32)
    twin = copy.deepcopy(sae)
    ours, theirs = (make_optimizer(optimizer, s, lr=1e-2, betas=(0.9, 0.999)) for s in (sae, twin))
    dead = torch.arange(D_SAE, device=DEVICE) % 6 == 0 if n_dead else None
    kept = None
    for _ in range(3):
        x = torch.randn(6, D, device=DEVICE)
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
        acts = found.feature_acts.to_dense(), expected.feature_acts.detach().to_dense()
        torch.testing.assert_close(*acts, rtol=1e-3, atol=1e-4)
    for (name, a), b in zip(sae.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by the gradient's size, so where that is rounding error the update is too.
        assert ((a - b).abs() > 1e-4).float().mean() < 0.01, name
    assert kept is not None
    before = kept.rows.float() / kept.factor, kept.norms.clone()
    kept.rebuild(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(before[0], kept.rows.float() / kept.factor, rtol=2**-9, atol=1e-5)
    torch.testing.assert_close(before[1], kept.norms)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_step_waits_for_the_device_nowhere(monkeypatch, optimizer):
    sae = _sae(D, D_SAE, aux_loss_coefficient=1 / 32)
    made = make_optimizer(optimizer, sae, lr=1e-2, betas=(0.9, 0.999))
    dead = torch.arange(D_SAE, device=DEVICE) % 6 == 0
    x = torch.randn(6, D, device=DEVICE)
    kept = BACKEND.shadow(sae, None)
    row_step(BACKEND, sae, made, x, dead, shadow=kept)  # makes the optimizer's state
    # On a card the number is asked for and read when it has come.
    monkeypatch.setattr(shadow._Pending, "arrived", lambda self: False)
    with no_waiting():
        kept = BACKEND.shadow(sae, kept)
        row_step(BACKEND, sae, made, x, dead, shadow=kept).times_fired()


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_batch_that_is_not_finite_changes_nothing(optimizer):
    sae = _sae(D, D_SAE)
    made = make_optimizer(optimizer, sae, lr=1e-2, betas=(0.9, 0.999))
    kept = BACKEND.shadow(sae, None)
    row_step(BACKEND, sae, made, torch.randn(6, D, device=DEVICE), None, shadow=kept)
    before = copy.deepcopy((sae.state_dict(), made.state_dict()["state"], kept.rows.float()))
    for bad in (torch.nan, torch.inf):
        x = torch.randn(6, D, device=DEVICE)
        x[3, 5] = bad
        row_step(BACKEND, sae, made, x, None, shadow=kept)
        after = (sae.state_dict(), made.state_dict()["state"], kept.rows.float())
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    row_step(BACKEND, sae, made, torch.randn(6, D, device=DEVICE), None, shadow=kept)
    assert not torch.equal(sae.W_dec, before[0]["W_dec"])


@pytest.mark.parametrize("n_dead", [0, 1, 2])
def test_few_dead_features_are_each_taken_once(n_dead):
    """AuxK asks for 12. The first feature is among the dead, and members that do not exist are
    numbered as it is."""
    sae, x = _sae(D, D_SAE, aux_loss_coefficient=1 / 32), torch.randn(3, D, device=DEVICE)
    kept, dead = _shadow(sae), torch.arange(D_SAE, device=DEVICE) < n_dead
    _, aux = _select(sae, x, dead, kept.norms, kept.search, WHOLE, waits=False)
    assert aux is not None
    used = aux.selected.pre != 0
    assert used.view(3, -1).sum(1).tolist() == [n_dead] * 3
    assert dead[aux.selected.features[used]].all()


def test_other_weights_are_not_searched_by_the_shadow():
    sae, x = _sae(D, D_SAE), torch.randn(5, D, device=DEVICE)
    other = torch.randn(D_SAE, D, device=DEVICE).T
    features, _ = _shadow(sae).search(x, other, sae.b_enc.detach() * 0, 4)
    assert torch.equal(features.sort().values, (x @ other).topk(4).indices.sort().values)


def test_small_dictionaries_are_left_to_the_other_search(monkeypatch):
    """Of fewer features than candidates some would be missing."""
    monkeypatch.setattr(shadow, "_GROUPS_PER_CHOSEN", 8)
    sae, x = _sae(D, 60), torch.randn(5, D, device=DEVICE)
    kept = _shadow(sae)
    monkeypatch.setattr(kept, "_candidates", None)
    given_ = x, sae.W_enc.detach(), sae.b_enc.detach(), 4, kept.norms
    found, expected = kept.search(*given_)[0], dense_search(*given_)[0]
    assert torch.equal(found.sort().values, expected.sort().values)


def test_a_shadow_of_another_ranking_is_made_anew():
    sae = _sae(8, 96)
    kept = BACKEND.shadow(sae, None)
    sae.cfg.rescale_acts_by_decoder_norm = False
    assert BACKEND.shadow(sae, kept).norms is None


def test_a_token_of_zeros_has_the_features_of_the_largest_biases():
    sae, x = _sae(D, D_SAE, scaled=False), torch.zeros(2, D, device=DEVICE)
    bias = sae.b_enc.detach()
    features, _ = _shadow(sae).search(x, sae.W_enc.detach(), bias, 4)
    assert torch.equal(features[0].sort().values, bias.topk(4).indices.sort().values)


@pytest.mark.parametrize("change", ["encoder", "decoder"])
def test_a_change_that_torch_does_not_count_is_seen_by_the_search(change):
    sae, x = _sae(D, D_SAE), torch.randn(5, D, device=DEVICE)
    kept, bias = _shadow(sae), sae.b_enc.detach()
    kept.search(x, sae.W_enc.detach(), bias, 4, kept.norms)
    assert not kept.stale
    weights = sae.W_enc if change == "encoder" else sae.W_dec
    weights.data.mul_(1.5)
    kept.search(x, sae.W_enc.detach(), bias, 4, kept.norms)
    assert kept.stale
    kept.keep_up(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(kept.norms, sae.W_dec.detach().norm(dim=1))
    assert not kept.stale


def test_weights_in_another_layout_are_refused():
    sae = _sae(D, D_SAE)
    with pytest.raises(TypeError, match="contiguous"):
        EncoderShadow(
            sae.W_enc, sae.W_dec.T.contiguous().T, scaled=True, products=BACKEND.row_products
        )


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


def test_a_stale_copy_is_heard_of_while_the_gpu_is_behind(monkeypatch):
    """An answer that has come is read before the question is asked again, which forgets it."""
    sae = _sae(8, 96)
    kept, whole = _shadow(sae), []
    monkeypatch.setattr(EncoderShadow, "rebuild", lambda self, *w: whole.append(1))
    monkeypatch.setattr(shadow, "reading_waits", lambda _: True)
    answers = [False, False, False, True]  # to the three questions of the first step

    class Event:
        def query(self) -> bool:
            return bool(answers) and answers.pop(0)

    kept._pending._here, kept._pending._event = torch.ones(1, dtype=torch.int32), Event()
    kept.keep_up(sae.W_enc, sae.W_dec)
    assert not whole
    kept.keep_up(sae.W_enc, sae.W_dec)
    assert whole


def test_wide_dictionaries_are_searched_in_eight_bits_where_that_pays(monkeypatch):
    """On a Hopper, from a width on; and wherever it is asked for."""
    sae = _sae(8, 96)

    def dtype(backend: triton_backend.TritonBackend) -> torch.dtype:
        return backend.shadow(sae, None).rows.dtype

    for hopper in (False, True):
        monkeypatch.setattr(triton_backend, "is_hopper", lambda _, hopper=hopper: hopper)
        for least, few in ((96, torch.float8_e4m3fn), (97, torch.float16)):
            monkeypatch.setattr(triton_backend, "LEAST_FOR_EIGHT_BITS", least)
            expected = few if hopper else torch.float16
            assert dtype(triton_backend.TritonBackend()) == expected
    assert dtype(triton_backend.TritonBackend(eight_bits=True)) == torch.float8_e4m3fn
    monkeypatch.setattr(triton_backend, "LEAST_FOR_EIGHT_BITS", 1)
    assert dtype(triton_backend.TritonBackend(eight_bits=False)) == torch.float16


@pytest.mark.parametrize(
    ("n", "d_sae", "width", "blocks"),
    [(5000, 2**20, 6, [2048, 2048, 904]), (5000, 2**16, 6, [5000]), (25, 2**16, 6000, [10, 10, 5])],
)
def test_so_many_tokens_are_searched_at_once(monkeypatch, n, d_sae, width, blocks):
    """As few blocks as the memory of the groups' maxima allows, or of their members' scores."""
    monkeypatch.setattr(shadow, "width_of", lambda *_: width)
    if width > 6:
        monkeypatch.setattr(shadow, "_MOST_SCORES", 10 * MEMBERS * width)
        monkeypatch.setattr(shadow, "_LEAST_TOKENS", 1)
    seen = []

    def candidates(self, x, bias, width):
        seen.append(len(x))
        return torch.zeros(len(x), width, dtype=torch.int64), torch.zeros(len(x), width)

    monkeypatch.setattr(EncoderShadow, "_candidates", candidates)
    monkeypatch.setattr(EncoderShadow, "_compare", lambda *_: None)
    monkeypatch.setattr(EncoderShadow, "_write", lambda *_: None)
    monkeypatch.setattr(maxima, "STRIDE", 256)
    W_enc, W_dec = torch.zeros(d_sae, 1).T, torch.zeros(d_sae, 1)
    products = lambda x, selected, table: torch.zeros(len(selected.features))  # noqa: E731
    kept = EncoderShadow(W_enc, W_dec, scaled=False, products=products)
    kept.search(torch.zeros(n, 1), W_enc, torch.zeros(d_sae), 2)
    assert seen == blocks


def test_rows_that_outgrow_the_range_are_seen_and_written_again(monkeypatch):
    monkeypatch.setattr(shadow, "_REFRESHES", 1)
    sae = _sae(8, 96)
    kept = _shadow(sae, eight_bits=True)
    x = torch.randn(2, 8, device=DEVICE)
    sae.W_enc.data[:, 7] *= 1000
    kept.keep_up(sae.W_enc, sae.W_dec)
    assert kept.stale
    kept.search(x, sae.W_enc.detach(), sae.b_enc.detach(), 1, kept.norms)
    kept.keep_up(sae.W_enc, sae.W_dec)
    scaled = (sae.W_enc.T * sae.W_dec.norm(dim=1)[:, None]).detach()
    assert kept.factor == float(few_bits(scaled.flatten()[None], kept.rows.dtype)[1])
    assert not kept.stale
