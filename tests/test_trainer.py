"""The trainer on a real model's activations: equal to SAELens' own, tokens counted, resumable."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from stopping import StoppedError, stopping

from saesub.activations.forward_pass import ReadSoFar
from saesub.activations.spectrum import Spectrum
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import StoreWriter
from saesub.errors import SaesubError
from saesub.init.biases import center_biases
from saesub.init.subspace import initialize_in_subspace
from saesub.topk.eligibility import why_dense
from saesub.topk.encode import times_fired
from saesub.training import checkpoint
from saesub.training.checkpoint import check_same_shapes
from saesub.training.comparison import joint_batches, train_together
from saesub.training.mitigations import GhostGradients
from saesub.training.trainer import SubspaceSAETrainer

HOOK = "blocks.4.hook_attn_out"
D_SAE, K, BATCH = 1152, 8, 128
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


@pytest.fixture(scope="module")
def store(activations, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, HOOK, torch.float32, {}) as writer:
        writer.write(activations)
        writer.finish(len(activations), ReadSoFar(1, {}, 1.0))
    return ActivationStore.open(folder, HOOK)


def _cfg(steps: int, **settings) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=5,
        n_batches_for_norm_estimate=4,
        **settings,
    )


def _topk(seed: int = 0, **settings) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    settings = {"aux_loss_coefficient": 0.0, "k": K} | settings
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=D_SAE, **settings))


def _batches(store: ActivationStore, start: int = 0):
    return store.batches(BATCH, seed=0, start_step=start)


@pytest.mark.parametrize("k", [K, 4])
def test_the_dead_are_counted_by_tokens_as_brute_force_does(store, k):
    sae = _topk(k=k)
    window = 10 * BATCH
    trainer = SubspaceSAETrainer(_cfg(30), sae, _batches(store), dead_window_tokens=window)
    fired = []
    for step, x in zip(range(30), _batches(store), strict=False):
        with torch.no_grad():
            fired.append(times_fired(sae.encode(x)) > 0)
        trainer.step(x)
        trainer.n_training_steps = step + 1
    expected = ~torch.stack(fired[-10:]).any(0)
    assert torch.equal(trainer.dead_neurons, expected)
    assert trainer.dead_fraction() == pytest.approx(expected.float().mean().item())
    assert 0 < expected.sum() < D_SAE


@pytest.mark.parametrize(
    "settings", [{}, {"backend": "torch"}, {"mitigations": [GhostGradients()]}]
)
def test_the_history_averages_its_steps_and_keeps_none_of_their_tensors(store, settings):
    trainer = SubspaceSAETrainer(_cfg(400), _topk(), iter(()), **settings)
    losses, kept = [], []
    for step, x in zip(range(20), _batches(store), strict=False):
        output = trainer.step(x)
        trainer.n_training_steps = step + 1
        losses.append(output.losses["mse_loss"].item())
        tensors = [output.loss, output.sae_out, output.sae_in, *output.losses.values()]
        kept += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        del output, tensors, x
    means = torch.tensor(losses).view(2, 10).mean(1).tolist()
    assert [point["mse"] for point in trainer.history] == pytest.approx(means)
    assert not [ref for ref in kept if ref() is not None]


def test_a_window_longer_than_the_run_gives_no_answer(store):
    trainer = SubspaceSAETrainer(_cfg(3), _topk(), _batches(store), dead_window_tokens=10**6)
    trainer.fit()
    with pytest.raises(SaesubError, match="less than the window"):
        trainer.dead_fraction()


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_fit_learns_and_saves_a_plain_saelens_sae(store, spectrum, tmp_path, optimizer):
    sae = _topk()
    initialize_in_subspace(sae, spectrum)
    trainer = SubspaceSAETrainer(_cfg(60), sae, _batches(store), optimizer=optimizer)
    x = store.rows(0, 500)
    before = (sae(x) - x).square().sum().item()
    assert trainer.fit() is sae
    assert (sae(x) - x).square().sum().item() < 0.6 * before
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "topk"
    told = loaded.cfg.metadata
    assert (told.optimizer, told.lr, told.training_tokens) == (optimizer, _cfg(60).lr, 60 * BATCH)
    torch.testing.assert_close(
        loaded(store.rows(0, 50)), sae(store.rows(0, 50)), rtol=1e-4, atol=1e-4
    )


def test_a_store_is_no_iterator_of_batches(store):
    with pytest.raises(SaesubError, match=r"store\.batches\(batch_size, seed=0\)"):
        SubspaceSAETrainer(_cfg(3), _topk(), store)


def test_settings_out_of_a_table_are_saved_and_resumed(store, tmp_path):
    """Their numbers are NumPy's."""
    cfg = _cfg(4)
    cfg.lr, cfg.lr_end, cfg.lr_warm_up_steps = np.float64(1e-3), np.float64(1e-4), np.int64(5)
    window = np.int64(2 * BATCH)
    trainer = SubspaceSAETrainer(cfg, _topk(), _batches(store), dead_window_tokens=window)
    trainer.step(next(_batches(store)))
    trainer.save_trainer_state(tmp_path)
    again = SubspaceSAETrainer(_cfg(4), _topk(), _batches(store), dead_window_tokens=2 * BATCH)
    again.load_trainer_state(tmp_path)


def test_other_architectures_take_saelens_own_step(store, spectrum):
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=576, d_sae=D_SAE, l1_coefficient=1.0))
    center_biases(sae, spectrum)
    trainer = SubspaceSAETrainer(_cfg(5), sae, _batches(store))
    assert why_dense(sae) == "StandardTrainingSAE is no TopK SAE"
    trainer.fit()
    assert trainer.n_training_samples == 5 * BATCH


def test_scaled_inputs_are_folded_back(store, spectrum):
    sae = _topk(normalize_activations="expected_average_only_in")
    initialize_in_subspace(sae, spectrum)
    SubspaceSAETrainer(_cfg(40), sae, _batches(store)).fit()
    assert sae.cfg.normalize_activations == "none"
    x = store.rows(0, 500)
    assert (sae(x) - x).square().sum() < 0.9 * (x - x.mean(0)).square().sum()


def _conditions(store: ActivationStore, spectrum: Spectrum) -> dict[str, SubspaceSAETrainer]:
    conditions = {}
    for name, optimizer in [("random", "adam"), ("asi", "sparse_adam")]:
        sae = _topk(seed=1, normalize_activations="expected_average_only_in")
        center_biases(sae, spectrum)
        if name == "asi":
            initialize_in_subspace(sae, spectrum)
        conditions[name] = SubspaceSAETrainer(_cfg(24), sae, iter(()), optimizer=optimizer)
    return conditions


def test_an_interrupted_run_of_conditions_ends_with_the_same_weights(
    store, spectrum, tmp_path, monkeypatch
):
    def batches(start, stop_at=None):
        stream = joint_batches({HOOK: store}, BATCH, seed=3, start_step=start)
        return stopping(stream, start, stop_at)

    monkeypatch.setattr("saesub.training.history._POINTS", 6)  # one every four steps
    whole = _conditions(store, spectrum)
    history = train_together(whole, batches)
    with pytest.raises(StoppedError):
        train_together(
            _conditions(store, spectrum), lambda s: batches(s, stop_at=17), folder=tmp_path
        )
    starts = []
    resumed = _conditions(store, spectrum)
    again = train_together(resumed, lambda s: (starts.append(s), batches(s))[1], folder=tmp_path)
    assert starts[-1] > 0
    assert starts[-1] % 4  # the losses since the last point of the history were restored too
    for name in whole:
        for a, b in zip(whole[name].sae.parameters(), resumed[name].sae.parameters(), strict=True):
            assert torch.equal(a, b)
    assert again.equals(history)
    finished = _conditions(store, spectrum)
    assert train_together(finished, batches, folder=tmp_path).equals(history)
    assert torch.equal(finished["asi"].sae.W_dec, whole["asi"].sae.W_dec)


def test_conditions_see_the_same_batches(store, spectrum):
    conditions = _conditions(store, spectrum)
    twin = _conditions(store, spectrum)["random"]
    train_together(
        conditions, lambda start: joint_batches({HOOK: store}, BATCH, seed=3, start_step=start)
    )
    alone = {"alone": twin}
    train_together(
        alone, lambda start: joint_batches({HOOK: store}, BATCH, seed=3, start_step=start)
    )
    assert torch.equal(twin.sae.W_dec, conditions["random"].sae.W_dec)


def test_conditions_of_unequal_length_are_refused(store, spectrum):
    conditions = _conditions(store, spectrum)
    conditions["longer"] = SubspaceSAETrainer(_cfg(25), _topk(), iter(()))
    with pytest.raises(SaesubError, match="equal tokens"):
        train_together(conditions, lambda start: joint_batches({HOOK: store}, BATCH, seed=0))


def test_bad_batches_are_refused_before_any_weight_moves(store):
    sae = _topk()
    trainer = SubspaceSAETrainer(_cfg(5), sae, _batches(store))
    before = copy.deepcopy(sae.state_dict())
    bad = store.rows(0, BATCH).clone()
    bad[7, 3] = float("nan")
    with pytest.raises(
        SaesubError, match=r"activations of batch 0 .* first nan in row 7, column 3"
    ):
        trainer.step(bad)
    with pytest.raises(SaesubError, match="the SAE reads"):
        trainer.step(torch.zeros(BATCH, 100))
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    with pytest.raises(SaesubError, match="Unknown optimizer"):
        SubspaceSAETrainer(_cfg(5), _topk(), _batches(store), optimizer="sgd")  # pyright: ignore


def test_float16_batches_of_large_sums_are_taken(store):
    trainer = SubspaceSAETrainer(_cfg(5), _topk(), _batches(store))
    trainer.step(torch.full((BATCH, 576), 2.0).half())
    assert trainer.n_training_samples == BATCH


def test_checkpoints_are_not_written_again_after_a_resume(store, spectrum, tmp_path):
    def batches(start, stop_at=None):
        stream = joint_batches({HOOK: store}, BATCH, seed=3, start_step=start)
        return stopping(stream, start, stop_at)

    with pytest.raises(StoppedError):
        train_together(_conditions(store, spectrum), lambda s: batches(s, 17), folder=tmp_path)
    (place,) = tmp_path.iterdir()
    written = {p.name for p in place.iterdir()}
    assert written
    with pytest.raises(StoppedError):
        train_together(_conditions(store, spectrum), lambda s: batches(s, 18), folder=tmp_path)
    assert {p.name for p in place.iterdir()} == written


def test_a_damaged_checkpoint_is_named(store, tmp_path):
    trainer = SubspaceSAETrainer(_cfg(5), _topk(), _batches(store))
    trainer.fit()
    trainer.save_trainer_state(tmp_path)
    path = tmp_path / "saesub_state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    fresh = SubspaceSAETrainer(_cfg(5), _topk(), _batches(store))
    with pytest.raises(SaesubError, match="damaged"):
        fresh.load_trainer_state(tmp_path)
    path.unlink()
    with pytest.raises(SaesubError, match="damaged or incomplete"):
        fresh.load_trainer_state(tmp_path)


def test_a_checkpoint_of_another_version_says_so(store, tmp_path, monkeypatch):
    trainer = SubspaceSAETrainer(_cfg(5), _topk(), _batches(store))
    trainer.save_trainer_state(tmp_path)
    monkeypatch.setattr(checkpoint, "_FORM", replace(checkpoint._FORM, format="saesub-trainer-0"))
    with pytest.raises(SaesubError, match="another version of saesub wrote it"):
        trainer.load_trainer_state(tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(store, tmp_path):
    SubspaceSAETrainer(_cfg(5), _topk(), _batches(store)).save_trainer_state(tmp_path)
    other = SubspaceSAETrainer(_cfg(6), _topk(k=5), _batches(store), optimizer="adam")
    settings = r"k 8 \(here 5\), optimizer 'sparse_adam' \(here 'adam'\)\. Resume"
    with pytest.raises(SaesubError, match=settings):
        other.load_trainer_state(tmp_path)


def test_conditions_that_were_trained_before_are_refused(store, spectrum, tmp_path):
    conditions = _conditions(store, spectrum)
    conditions["random"].step(next(_batches(store)))
    with pytest.raises(SaesubError, match=r"\['random'\] were trained before"):
        train_together(conditions, lambda start: iter(()), folder=tmp_path)


def test_a_state_of_other_shapes_is_refused(tmp_path):
    weights = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    state = {"tokens_since_fired": torch.zeros(4)}
    check_same_shapes(tmp_path, state, optimizer, 4)
    with pytest.raises(SaesubError, match="holds 4 features, this SAE has 5"):
        check_same_shapes(tmp_path, state, optimizer, 5)
    optimizer.state[weights]["exp_avg"] = torch.ones(3, 4)
    with pytest.raises(SaesubError, match=r"moments of shape \(3, 4\) .* of shape \(4, 3\)"):
        check_same_shapes(tmp_path, state, optimizer, 4)


def test_conditions_that_share_an_sae_are_refused(store, spectrum):
    conditions = _conditions(store, spectrum)
    first, other = conditions
    conditions[other].sae = conditions[first].sae
    before = conditions[first].sae.W_dec.detach().clone()
    with pytest.raises(SaesubError, match=f"'{first}' and '{other}' share weights"):
        train_together(conditions, lambda start: iter([{"site": torch.ones(2, 4)}]))
    assert torch.equal(conditions[first].sae.W_dec, before)


def test_one_iterator_for_all_calls_is_refused(store, spectrum):
    stream = joint_batches({"site": store}, BATCH, seed=0)
    with pytest.raises(SaesubError, match="the same iterator at every call"):
        train_together(_conditions(store, spectrum), lambda start: stream)


def test_other_parts_of_stores_give_no_joint_batches(store):
    parts = store.split(store.n_tokens // 2)
    with pytest.raises(SaesubError, match="different parts of it"):
        joint_batches(dict(zip("ab", parts, strict=True)), BATCH, seed=0)


def test_a_kept_run_is_of_all_its_batches(store, spectrum, tmp_path):
    def kept(batches) -> set[str]:
        train_together(_conditions(store, spectrum), batches, folder=tmp_path)
        return {path.name for path in tmp_path.iterdir()}

    def own(change_at=None):
        def batches(start):
            for step in range(start, 24):
                x = store.rows(step * BATCH, (step + 1) * BATCH)
                if step == change_at:
                    x[-1, -1] += 1e-3
                yield {"site": x}

        return batches

    first = kept(own())
    assert kept(own()) == first
    assert len(kept(own(change_at=23))) == 2  # one value of the last batch
    part = store.split(100)[0]
    assert part.identity != store.identity
    for stores, seed in [({"site": store}, 0), ({"site": store}, 1), ({"site": part}, 0)]:
        before = len(list(tmp_path.iterdir()))
        found = kept(lambda start: joint_batches(stores, BATCH, seed=seed, start_step=start))  # noqa: B023
        assert len(found) == before + 1


def test_stores_of_different_text_give_no_joint_batches(tmp_path):
    stores = {}
    for name in ("a", "b"):
        with StoreWriter(tmp_path / name, HOOK, torch.float32, {"text": name}) as writer:
            writer.write(torch.randn(300, 4))
            writer.finish(300, ReadSoFar(1, {}, 1.0))
        stores[name] = ActivationStore.open(tmp_path / name, HOOK)
    with pytest.raises(SaesubError, match="not of the same tokens"):
        joint_batches(stores, BATCH, seed=0)
