"""`SubspaceSAETrainer` does what `SAETrainer` does with the same SAE, optimizer and checkpoint."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from saesub.errors import SaesubError
from saesub.topk import cpu_library
from saesub.topk.sae import SparseTopKTrainingSAE, use_sparse_step
from saesub.training.comparison import train_together
from saesub.training.mitigations import GhostGradients
from saesub.training.native_step import NativeStep
from saesub.training.trainer import SubspaceSAETrainer

D_IN, D_SAE, K, BATCH, STEPS = 32, 256, 4, 64, 40
needs_native = pytest.mark.skipif(cpu_library.library() is None, reason="no C++ compiler here")
Trainer = Callable[..., SAETrainer]


def make(**settings: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "decoder_init_norm": 0.7} | settings
    return TopKTrainingSAE(TopKTrainingSAEConfig(**settings))


def recipe(steps: int = STEPS, **settings: Any) -> SAETrainerConfig:
    given = {"lr": 2e-3, "lr_end": 2e-4, "lr_warm_up_steps": 5, "lr_decay_steps": 10}
    return SAETrainerConfig(steps * BATCH, BATCH, **(given | settings))


def batches(start: int = 0) -> Iterator[Tensor]:
    """Every batch has its own seed, so that a resumed run gets those that it has not seen."""
    mixing = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    for step in itertools.count(start):
        generator = torch.Generator().manual_seed(1000 + step)
        yield torch.randn(BATCH, D_IN, generator=generator) @ mixing + 1


def adam(cfg: SAETrainerConfig, sae: Any, source: Iterator[Tensor], **more: Any) -> Any:
    return SubspaceSAETrainer(cfg, sae, source, optimizer="adam", **more)


def sparse_adam(cfg: SAETrainerConfig, sae: Any, source: Iterator[Tensor], **more: Any) -> Any:
    return SubspaceSAETrainer(cfg, sae, source, **more)


def take(trainer: SAETrainer, start: int, stop: int) -> list[TrainStepOutput]:
    outputs = []
    for x in itertools.islice(batches(start), stop - start):
        outputs.append(trainer.step(x))
        trainer.n_training_steps += 1
    return outputs


def distance(ours: SAETrainer, theirs: SAETrainer) -> float:
    """Between their weights, as a share of how far `theirs` have moved."""
    a, b, start = (
        torch.cat([parameter.detach().flatten() for parameter in sae.parameters()])
        for sae in (ours.sae, theirs.sae, make())
    )
    return float((a - b).norm() / (b - start).norm())


def lr_of(trainer: SAETrainer) -> float:
    return trainer.optimizer.param_groups[0]["lr"]


# --- the fused step is taken where it is SAELens' step, and nowhere else -------------------------


def other_lr(trainer: Any) -> None:
    sae = trainer.sae
    groups = [{"params": [sae.W_enc, sae.W_dec]}, {"params": [sae.b_enc, sae.b_dec], "lr": 0.1}]
    trainer.optimizer = torch.optim.Adam(groups, lr=1e-3)


def decay(trainer: Any) -> None:
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 10.0


def amsgrad(trainer: Any) -> None:
    trainer.optimizer = torch.optim.Adam(trainer.sae.parameters(), lr=2e-2, amsgrad=True)


def adamw(trainer: Any) -> None:
    trainer.optimizer = torch.optim.AdamW(trainer.sae.parameters(), lr=1e-2, weight_decay=3.0)


def sgd(trainer: Any) -> None:
    trainer.optimizer = torch.optim.SGD(trainer.sae.parameters(), lr=1e-3)


def parameter_hook(trainer: Any) -> None:
    trainer.sae.W_dec.register_hook(lambda gradient: gradient * 0)


def accumulated_hook(trainer: Any) -> None:
    def zero(parameter: Any) -> None:
        parameter.grad.zero_()

    trainer.sae.W_dec.register_post_accumulate_grad_hook(zero)


def optimizer_hook(trainer: Any) -> None:
    def raise_lr(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 1.2

    trainer.optimizer.register_step_pre_hook(raise_lr)


def own_step(trainer: Any) -> None:
    trainer.optimizer.step = lambda: None


def own_pass(trainer: Any) -> None:
    given = trainer.sae.training_forward_pass

    def absolute(step_input: TrainStepInput) -> TrainStepOutput:
        output = given(step_input=step_input)
        output.loss = (output.sae_out - output.sae_in).abs().sum(-1).mean()
        return output

    trainer.sae.training_forward_pass = absolute


def fewer_parameters(trainer: Any) -> None:
    group = trainer.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not trainer.sae.W_enc]


def gradient_left(trainer: Any) -> None:
    trainer.sae.b_enc.grad = torch.ones_like(trainer.sae.b_enc)


def step_lost(trainer: Any) -> None:
    trainer.optimizer.state.pop(trainer.sae.W_enc)


def hook_on_all(trainer: Any) -> None:
    def raise_lr(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 1.2

    HOOKS_ON_ALL.append(register_optimizer_step_pre_hook(raise_lr))


HOOKS_ON_ALL: list[Any] = []
CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "learning rate of a group": (other_lr, "groups of the optimizer have different settings"),
    "weight decay": (decay, "the optimizer has weight_decay"),
    "amsgrad": (amsgrad, "the optimizer has amsgrad"),
    "AdamW": (adamw, "the optimizer is AdamW"),
    "SGD": (sgd, "the optimizer is SGD"),
    "hook on a parameter": (parameter_hook, "a parameter has hooks"),
    "hook on a gradient": (accumulated_hook, "a parameter has hooks"),
    "hook on the optimizer": (optimizer_hook, "the optimizer has hooks"),
    "step of the optimizer": (own_step, "a step of its own"),
    "hook on all optimizers": (hook_on_all, "the optimizer has hooks"),
    "steps": (step_lost, "updated some of the weights more often"),
    "pass": (own_pass, "training_forward_pass of this SAE was replaced"),
    "fewer parameters": (fewer_parameters, "other parameters than the SAE"),
    "gradient left": (gradient_left, "gradients were left"),
}


@needs_native
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed_as_saelens_follows_it(request, change):
    alter, reason = CHANGES[change]
    ours, theirs = (kind(recipe(), make(), iter(())) for kind in (adam, SAETrainer))
    take(ours, 0, 3)  # by the fused step, so that there is a state to be taken over
    take(theirs, 0, 3)
    unchanged = adam(recipe(), make(), iter(()))
    take(unchanged, 0, 10)
    request.addfinalizer(lambda: [HOOKS_ON_ALL.pop().remove() for _ in tuple(HOOKS_ON_ALL)])
    alter(ours)
    with pytest.warns(UserWarning, match=f"torch's autograd and optimizer .*{reason}"):
        take(ours, 3, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{reason}")  # said once
        take(ours, 4, 10)
    for handle in HOOKS_ON_ALL:  # for `theirs` alone, from here on
        handle.remove()
    alter(theirs)
    take(theirs, 3, 10)
    near, far = distance(ours, theirs), distance(ours, unchanged)
    assert near < 0.02  # Adam enlarges rounding where a gradient is about zero
    assert far > 0.1  # the change mattered


@needs_native
def test_the_fused_step_is_taken_again_when_all_weights_are_updated_equally_often():
    ours = adam(recipe(), make(), iter(()))
    take(ours, 0, 3)
    ours.sae.W_dec.requires_grad_(False)
    with pytest.warns(UserWarning, match="some of the weights are frozen"):
        take(ours, 3, 5)
    ours.sae.W_dec.requires_grad_(True)
    with pytest.warns(UserWarning, match="more often than others"):
        take(ours, 5, 6)
    for state in ours.optimizer.state.values():
        state["step"].fill_(6)
    assert ours.native_step.rows(ours) is not None


@needs_native
@pytest.mark.parametrize("name", ["clip_grad_norm_", "autocast_if_enabled"])
def test_replaced_clipping_and_autocast_are_saelens_step(monkeypatch, name):
    ours = adam(recipe(), make(), iter(()))
    assert ours.native_step.rows(ours) is not None
    if name == "clip_grad_norm_":
        monkeypatch.setattr(torch.nn.utils, name, lambda *given: None)
    else:
        ours.autocast_if_enabled = torch.autocast("cpu")
    with pytest.warns(UserWarning, match="clip_grad_norm_ was replaced|autocast is on"):
        assert len(take(ours, 0, 1)) == 1


def test_a_batch_without_tokens_is_refused():
    for backend in ("auto", "torch", "dense"):
        with pytest.raises(SaesubError, match="without tokens"):
            adam(recipe(), make(), iter(()), backend=backend).step(torch.zeros(0, D_IN))


@needs_native
def test_the_fused_step_is_taken_otherwise(monkeypatch):
    taken, take_step = [], NativeStep.take
    monkeypatch.setattr(NativeStep, "take", lambda *a: taken.append(1) or take_step(*a))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*step")
        for optimizer in (adam, sparse_adam):
            sae = make()
            sae.activation_fn.k = K + 1  # pyright: ignore
            take(optimizer(recipe(), sae, iter(())), 0, 5)
    assert len(taken) == 10


@pytest.mark.parametrize("setting", ["weight_decay", "amsgrad", "maximize"])
def test_sparse_adam_refuses_settings_that_it_would_ignore(setting):
    trainer = sparse_adam(recipe(), make(), iter(()), backend="torch")
    trainer.optimizer.param_groups[1][setting] = True
    with pytest.raises(SaesubError, match=f"SparseAdam has no {setting}"):
        take(trainer, 0, 1)


@needs_native
def test_an_added_loss_is_said_and_the_sae_is_left_as_it_was():
    sae = make()
    trainer = adam(
        recipe(), sae, iter(()), mitigations=[GhostGradients()], dead_window_tokens=BATCH
    )
    with pytest.warns(UserWarning, match="GhostGradients adds to the loss"):
        outputs = take(trainer, 0, 5)
    assert outputs[-1].losses["ghost_gradient_loss"] > 0
    assert "training_forward_pass" not in vars(sae)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in", "covariance_whitening"])
def test_fit_ends_with_the_weights_of_saelens_fit(backend, scaling):
    """In float64, where forty steps leave no room for another loss or gradient."""
    settings = {"dtype": "float64", "normalize_activations": scaling}
    cfg = recipe(dead_feature_window=5, n_batches_for_norm_estimate=10)
    ours = adam(cfg, make(**settings), batches(), backend=backend)
    theirs = SAETrainer(cfg, make(**settings), batches())
    for trainer in (ours, theirs):
        trainer.fit()
    assert distance(ours, theirs) < 1e-9
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(ours.dead_neurons, theirs.dead_neurons)
    assert ours.dead_neurons.any()
    for name in ("l0", "num_dead_features"):
        assert ours.sae.cfg.metadata[name] == theirs.sae.cfg.metadata[name]


def test_it_is_generic_as_saelens_trainer_is():
    assert SubspaceSAETrainer[Any, Any]
    assert SubspaceSAETrainer[TopKTrainingSAE, TopKTrainingSAEConfig]


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_a_steps_activations_are_dense_unless_sparse_ones_were_asked_for(backend):
    (output,) = take(adam(recipe(), make(), iter(()), backend=backend), 0, 1)
    assert int((output.feature_acts > 0).sum()) <= BATCH * K
    assert output.feature_acts.mean(0).shape == (D_SAE,)
    settings = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    (output,) = take(adam(recipe(), make(**settings), iter(()), backend=backend), 0, 1)
    assert output.feature_acts.is_sparse


def test_weights_are_contiguous_when_training_has_ended(tmp_path):
    sae = adam(recipe(4), make(), batches()).fit()
    assert isinstance(sae, SparseTopKTrainingSAE)
    sae.W_enc.view(-1)
    save_file(dict(sae.named_parameters()), tmp_path / "by-hand.safetensors")


def test_weights_of_trainers_that_train_together_are_contiguous_in_the_end():
    sae = make()
    train_together(
        {"one": adam(recipe(4), sae, iter(()))},
        lambda start: ({"site": x} for x in batches(start)),
    )
    assert isinstance(sae, SparseTopKTrainingSAE)
    sae.W_enc.view(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer: setattr(trainer.sae.activation_fn, "k", 2),
        lambda trainer: trainer.sae.W_dec.requires_grad_(False),
        lambda trainer: trainer.optimizer.param_groups[0].update(lr=0.1),
        lambda trainer: setattr(
            trainer, "optimizer", torch.optim.SGD(trainer.sae.parameters(), lr=1e-3)
        ),
    ],
    ids=["k", "frozen", "lr", "optimizer"],
)
def test_a_kept_run_is_not_that_of_a_trainer_changed_by_hand(tmp_path, change):
    def run(folder: Path | None, changed: bool) -> Tensor:
        sae = make()
        trainer = adam(recipe(4), sae, iter(()))
        if changed:
            change(trainer)
        given = {"one": trainer}, lambda start: ({"site": x} for x in batches(start))
        train_together(*given, folder=folder)
        return sae.W_enc.detach()

    kept = run(tmp_path, False)
    assert torch.equal(run(tmp_path, False), kept)
    assert torch.equal(run(tmp_path, True), run(None, True))


def test_a_batch_topk_run_is_kept_by_its_threshold_too(tmp_path):
    folders = set()
    for threshold in (0.0, 0.5):
        torch.manual_seed(0)
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
        sae.topk_threshold.fill_(threshold)
        given = {"one": adam(recipe(2), sae, iter(()))}
        train_together(given, lambda start: ({"site": x} for x in batches(start)), folder=tmp_path)
        folders |= {path.name for path in tmp_path.iterdir()}
    assert len(folders) == 2


def _of_own_class(trainer: Any) -> None:
    class Doubling(SubspaceSAETrainer):
        def step(self, batch: Tensor) -> TrainStepOutput:
            return super().step(2 * batch)

    trainer.__class__ = Doubling


def _sae_of_own_class(trainer: Any) -> None:
    class Doubling(type(trainer.sae)):
        def process_sae_in(self, x: Tensor) -> Tensor:
            return super().process_sae_in(2 * x)

    trainer.sae.__class__ = Doubling


def _own_schedule(trainer: Any) -> None:
    halving = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.5**step)
    trainer.lr_scheduler = halving


UNKEPT: dict[str, Callable[[Any], Any]] = {
    "hook of the SAE": lambda t: t.sae.hook_sae_input.add_hook(lambda x, hook: x),
    "hook of a gradient": lambda t: t.sae.W_dec.register_hook(lambda gradient: gradient * 0),
    "hook of a kept gradient": lambda t: t.sae.W_dec.register_post_accumulate_grad_hook(
        lambda weight: weight.grad.zero_()
    ),
    "hook before the step": lambda t: t.optimizer.register_step_pre_hook(lambda *_: None),
    "hook after the step": lambda t: t.optimizer.register_step_post_hook(lambda *_: None),
    "replaced step": lambda t: setattr(t, "step", lambda batch: type(t).step(t, 2 * batch)),
    "class of the trainer": _of_own_class,
    "class of the SAE": _sae_of_own_class,
    "schedule": _own_schedule,
}


@pytest.mark.parametrize("change", UNKEPT.values(), ids=UNKEPT)
def test_a_run_with_code_of_ones_own_is_not_kept(tmp_path, change):
    trainer = adam(recipe(4), make(), iter(()))
    change(trainer)
    with pytest.raises(SaesubError, match="'one' has hooks, replaced functions or classes"):
        train_together(
            {"one": trainer}, lambda start: iter([{"site": torch.ones(2, D_IN)}]), folder=tmp_path
        )


def test_a_sparse_sae_keeps_its_search_and_takes_no_dense_step():
    sae = use_sparse_step(make(), search="exact_search")
    adam(recipe(), sae, iter(()))
    assert sae.search_name == "exact_search"
    adam(recipe(), sae, iter(()), backend="torch")
    assert sae.search_name == "torch"
    with pytest.raises(SaesubError, match="SparseTopKTrainingSAE has a sparse pass"):
        adam(recipe(), sae, iter(()), backend="dense")


class Derived(TopKTrainingSAE):
    pass


class OwnLoss(TopKTrainingSAE):
    def calculate_aux_loss(self, **given: Any) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Derived, "Derived is not derived from saesub.SparseTopKTrainingSAE"),
        (OwnLoss, "OwnLoss has its own calculate_aux_loss"),
    ],
)
def test_a_topk_sae_that_is_trained_densely_is_told_so(kind, reason):
    with pytest.warns(UserWarning, match=f"SAELens' dense step .*{reason}"):
        trainer = adam(recipe(), kind(make().cfg), iter(()))
    (output,) = take(trainer, 0, 1)
    assert output.feature_acts.shape == output.hidden_pre.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAELens' dense step")
        adam(recipe(), kind(make().cfg), iter(()), backend="dense")


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_a_window_of_steps_is_saelens_window_auxk_included(backend):
    cfg = recipe(dead_feature_window=3)
    ours, theirs = adam(cfg, make(), iter(()), backend=backend), SAETrainer(cfg, make(), iter(()))
    assert ours.dead_window_tokens == 4 * BATCH
    for step in range(12):
        a, b = take(ours, step, step + 1)[0], take(theirs, step, step + 1)[0]
        name = "auxiliary_reconstruction_loss"
        torch.testing.assert_close(a.losses[name], b.losses[name], rtol=1e-3, atol=1e-6)
        assert torch.equal(ours.dead_neurons, theirs.dead_neurons)
    assert a.losses[name] > 0
    assert ours.dead_fraction() == theirs.dead_neurons.float().mean()
    assert torch.equal(ours.tokens_since_fired >= 4 * BATCH, ours.dead_neurons)


def test_a_window_of_steps_counts_tokens_where_batches_differ():
    """As many as its steps have with batches of the configured size."""
    ours = adam(recipe(dead_feature_window=3), make(), iter(()))
    fired = []
    for x in itertools.islice(batches(), 12):
        fired.append((ours.step(x[: BATCH // 2]).feature_acts.to_dense() != 0).any(0))
        silent = ~torch.stack(fired[-8:]).any(0)
        assert torch.equal(ours.dead_neurons, silent if len(fired) >= 8 else silent & False)
    assert ours.dead_neurons.any()


def test_two_windows_are_refused():
    with pytest.raises(SaesubError, match=r"Two windows .*dead_feature_window=3 .*tokens=128"):
        adam(recipe(dead_feature_window=3), make(), iter(()), dead_window_tokens=128)


def test_saelens_metadata_keep_saelens_meaning():
    """Over a window of tokens that is shorter than SAELens' thousand steps."""
    ours = adam(recipe(8), make(), batches(), dead_window_tokens=2 * BATCH)
    theirs = SAETrainer(recipe(8), make(), batches())
    ours.fit(), theirs.fit()
    found, expected = ours.sae.cfg.metadata, theirs.sae.cfg.metadata
    assert found.num_dead_features == expected.num_dead_features == 0
    assert found.l0 == pytest.approx(expected.l0)
    assert found.dead_window_tokens == 2 * BATCH
    assert found.dead_share == ours.dead_fraction() > 0
    output = take(ours, 0, 1)[0]
    assert ours.build_train_step_log_dict(output, 1)["sparsity/dead_features"] == 0


# --- checkpoints ---------------------------------------------------------------------------------

TRAINERS: dict[str, Trainer] = {"saelens": SAETrainer, "adam": adam, "sparse_adam": sparse_adam}
SAES = {"plain": make, "sparse": lambda **settings: SparseTopKTrainingSAE(make(**settings).cfg)}


def resumed(kind: Trainer, cfg: SAETrainerConfig, sae: Any, folder: Path, **more: Any) -> Any:
    trainer = kind(cfg, sae, iter(()), **more)
    trainer.load_trainer_state(folder)
    trainer.sae.load_weights_from_checkpoint(folder)
    return trainer


@pytest.mark.parametrize(
    ("dtype", "backend"), [("float32", "auto"), ("float64", "torch"), ("float64", "dense")]
)
@pytest.mark.parametrize("sae", SAES)
@pytest.mark.parametrize("by", TRAINERS)
@pytest.mark.parametrize("saved", TRAINERS)
def test_checkpoints_cross(tmp_path, saved, by, sae, dtype, backend):
    """Saved by one and resumed by the other ends as `by` would have ended alone."""
    first = TRAINERS[saved](recipe(), make(dtype=dtype), iter(()))
    take(first, 0, 20)
    first.save_checkpoint("20", tmp_path)
    more = {} if by == "saelens" else {"backend": backend}
    if more and (sae, backend) == ("sparse", "dense"):
        pytest.skip("they contradict each other")
    arguments = (TRAINERS[by], recipe(), SAES[sae](dtype=dtype), tmp_path / "20")
    if (saved == "sparse_adam") != (by == "sparse_adam"):
        error = ValueError if by == "saelens" else SaesubError
        with pytest.raises(error, match=r"optimizer '|parameter group"):
            resumed(*arguments, **more)
        return
    second = resumed(*arguments, **more)
    take(second, 20, STEPS)
    alone = "sparse_adam" if by == "sparse_adam" else "saelens"
    whole = TRAINERS[alone](recipe(), make(dtype=dtype), iter(()))
    take(whole, 0, STEPS)
    assert distance(second, whole) < (1e-6 if dtype == "float64" else 0.05)
    assert lr_of(second) == lr_of(whole)
    if dtype == "float64":
        assert torch.equal(second.act_freq_scores, whole.act_freq_scores)


def test_silence_is_taken_over_from_saelens(tmp_path):
    first = SAETrainer(recipe(), make(), iter(()))
    take(first, 0, 6)
    first.save_checkpoint("6", tmp_path)
    second = resumed(adam, recipe(), make(), tmp_path / "6")
    whole = adam(recipe(), make(), iter(()))
    take(whole, 0, 6)
    assert torch.equal(second.tokens_since_fired, whole.tokens_since_fired)
    assert second.n_training_steps == 6


@pytest.mark.parametrize("kind", [adam, sparse_adam])
def test_a_finished_run_continues_with_more_tokens(tmp_path, kind):
    """With the schedule of the longer run from there on, and the default window."""
    cfg = recipe(20, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    kind(cfg, make(), batches()).fit()
    longer = recipe(STEPS)
    with pytest.warns(UserWarning, match=r"total_training_samples 1280 \(here 2560\)"):
        second = resumed(kind, longer, make(), tmp_path / "final_1280")
    whole = kind(longer, make(), iter(()))
    assert second.dead_window_tokens == whole.dead_window_tokens
    take(whole, 0, 20)
    assert lr_of(second) == pytest.approx(lr_of(whole), rel=1e-12)
    assert second.n_training_steps == 20
    second.data_provider = batches(20)
    before = second.sae.W_dec.detach().clone()
    second.fit()
    take(whole, 20, STEPS)
    assert second.n_training_samples == STEPS * BATCH
    assert lr_of(second) == pytest.approx(lr_of(whole), rel=1e-9)
    assert (second.sae.W_dec - before).norm() > 0.01 * before.norm()


def test_another_schedule_is_that_of_the_new_settings(tmp_path):
    first = adam(recipe(), make(), iter(()))
    take(first, 0, 8)
    first.save_checkpoint("8", tmp_path)
    cfg = recipe(lr=1e-3, lr_end=1e-4, lr_scheduler_name="cosineannealing", lr_warm_up_steps=0)
    with pytest.warns(UserWarning, match="lr_scheduler_name 'constant' .*here 'cosineannealing'"):
        second = resumed(adam, cfg, make(), tmp_path / "8")
    whole = adam(cfg, make(), iter(()))
    take(whole, 0, 8)
    for step in range(8, STEPS):
        assert lr_of(second) == pytest.approx(lr_of(whole), rel=1e-12)
        take(second, step, step + 1)
        take(whole, step, step + 1)


@pytest.mark.parametrize(("before", "after"), [(BATCH, 2 * BATCH), (BATCH, BATCH // 2)])
def test_a_schedule_continues_from_the_same_token_in_other_batches(tmp_path, before, after):
    def cfg(batch: int) -> SAETrainerConfig:
        steps = {"lr_warm_up_steps": 0, "lr_decay_steps": 20 * BATCH // batch}
        return SAETrainerConfig(STEPS * BATCH, batch, lr=1e-3, lr_end=1e-4, **steps)

    first = adam(cfg(before), make(), iter(()))
    take(first, 0, 30)
    first.save_checkpoint("30", tmp_path)
    with pytest.warns(UserWarning, match="train_batch_size_samples"):
        second = resumed(adam, cfg(after), make(), tmp_path / "30")
    assert lr_of(first) == pytest.approx(5e-4)
    assert lr_of(second) == pytest.approx(5e-4)


def test_another_schedule_than_that_of_a_saelens_checkpoint_is_told(tmp_path):
    first = SAETrainer(recipe(), make(), iter(()))
    take(first, 0, 8)
    first.save_checkpoint("8", tmp_path)
    with pytest.warns(UserWarning, match="another learning rate schedule"):
        resumed(adam, recipe(2 * STEPS), make(), tmp_path / "8")


def test_a_trainer_that_has_trained_takes_a_checkpoints_schedule(tmp_path):
    first = adam(recipe(), make(), iter(()))
    take(first, 0, 8)
    first.save_checkpoint("8", tmp_path)
    second = adam(recipe(2 * STEPS), make(), iter(()))
    take(second, 0, 30)
    with pytest.warns(UserWarning, match="total_training_samples"):
        second.load_trainer_state(tmp_path / "8")
    assert second.lr_scheduler.last_epoch == second.n_training_steps == 8


@pytest.mark.parametrize("scaling", ["expected_average_only_in", "covariance_whitening"])
def test_a_finished_run_of_scaled_inputs_is_not_trained_on(tmp_path, scaling):
    """Adam's moments are those of the scaled weights, and the scaling is folded into these."""
    settings = {"normalize_activations": scaling}
    more = {"n_batches_for_norm_estimate": 10}
    cfg = recipe(20, checkpoint_path=str(tmp_path), save_final_checkpoint=True, **more)
    adam(cfg, make(**settings), batches()).fit()
    again = resumed(adam, recipe(20, **more), make(**settings), tmp_path / "final_1280")
    assert again.sae.cfg.normalize_activations == "none"
    with pytest.warns(UserWarning, match="total"), pytest.raises(SaesubError, match="folded into"):
        resumed(adam, recipe(**more), make(**settings), tmp_path / "final_1280")


def test_other_scalings_than_a_checkpoints_are_refused(tmp_path):
    first = adam(recipe(), make(), iter(()))
    take(first, 0, 2)
    first.save_checkpoint("2", tmp_path)
    other = make(normalize_activations="expected_average_only_in")
    with pytest.raises(SaesubError, match=r"other settings: .*normalize_activations.*'none'"):
        resumed(adam, recipe(), other, tmp_path / "2")


def test_silence_of_a_saelens_run_in_other_batches_is_not_more_than_its_tokens(tmp_path):
    first = SAETrainer(recipe(), make(), iter(()))
    for x in itertools.islice(batches(), 12):
        first.step(x[:16])
    first.save_checkpoint("12", tmp_path)
    second = resumed(adam, recipe(), make(), tmp_path / "12")
    assert second.tokens_since_fired.max() == 12 * 16


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_firing_rates_are_right_where_batches_differ(backend):
    trainer = adam(recipe(), make(), iter(()), backend=backend)
    for x in itertools.islice(batches(), 7):
        trainer.step(x[:10])
    assert trainer.n_frac_active_samples == 70
    assert trainer.feature_sparsity.sum() <= K * (1 + 1e-6)


def test_a_resumed_run_writes_no_checkpoint_twice(tmp_path):
    cfg = recipe(20, checkpoint_path=str(tmp_path), n_checkpoints=3)
    whole = adam(cfg, make(), batches())
    whole.fit()
    names = sorted(int(path.name) for path in tmp_path.iterdir())
    assert len(names) == 3
    second = resumed(adam, cfg, make(), tmp_path / str(names[1]))
    assert second.checkpoint_thresholds == [t for t in second.checkpoint_thresholds if t > names[1]]
    assert len(second.checkpoint_thresholds) == 1


def test_steps_are_counted_where_batches_differ(tmp_path):
    trainer = adam(recipe(), make(), iter(()))
    for x in itertools.islice(batches(), 7):
        trainer.step(x[:10])
        trainer.n_training_steps += 1
    trainer.save_checkpoint("7", tmp_path)
    assert resumed(adam, recipe(), make(), tmp_path / "7").n_training_steps == 7


def test_the_initialisations_metadata_survive_a_resume(tmp_path):
    sae = make()
    sae.cfg.metadata.subspace_init = {"d_init": 7}
    trainer = adam(recipe(), sae, iter(()))
    take(trainer, 0, 2)
    trainer.save_checkpoint("2", tmp_path)
    fresh = make()
    fresh.cfg.metadata.hook_name = "mine"
    found = resumed(adam, recipe(), fresh, tmp_path / "2").sae.cfg.metadata
    assert found.subspace_init == {"d_init": 7}
    assert found.hook_name == "mine"


def test_no_float64_is_moved_to_the_trainers_device(tmp_path, monkeypatch):
    """Which may be one that has none."""
    trainer = adam(recipe(), make(), iter(()))
    take(trainer, 0, 3)
    assert trainer.history
    trainer.save_checkpoint("3", tmp_path)
    moved, to = [], Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, *a, **k: moved.append(x.dtype) or to(x, *a, **k))
    resumed(adam, recipe(), make(), tmp_path / "3")
    assert torch.int64 in moved
    assert torch.float64 not in moved


def test_a_field_that_one_version_lacks_is_no_difference(tmp_path, monkeypatch):
    trainer = adam(recipe(), make(), iter(()))
    kept = trainer.settings()
    newer = {**kept, "a_field_of_tomorrow": 1}
    older = {name: value for name, value in kept.items() if name != "apply_b_dec_to_input"}
    for i, settings in enumerate((newer, older)):
        monkeypatch.setattr(trainer, "settings", lambda settings=settings: settings)
        trainer.save_checkpoint(str(i), tmp_path)
        resumed(adam, recipe(), make(), tmp_path / str(i))


def test_a_checkpoint_that_lost_its_last_file_is_damaged(tmp_path):
    adam(recipe(), make(), iter(())).save_checkpoint("0", tmp_path)
    (tmp_path / "0" / "saesub_state.safetensors").unlink()
    with pytest.raises(SaesubError, match="damaged or incomplete"):
        resumed(adam, recipe(), make(), tmp_path / "0")


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    adam(recipe(), make(), iter(())).save_checkpoint("0", tmp_path)
    for folder in (tmp_path, tmp_path / "nope"):
        with pytest.raises(SaesubError, match=f"No checkpoint is in {folder}:"):
            resumed(sparse_adam, recipe(), make(), folder)


def test_a_saelens_checkpoint_of_another_sae_is_refused(tmp_path):
    SAETrainer(recipe(), make(), iter(())).save_checkpoint("0", tmp_path)
    with pytest.raises(SaesubError, match=r"k 4 \(here 5\)"):
        resumed(adam, recipe(), make(k=5), tmp_path / "0")
    assert json.loads((tmp_path / "0" / "cfg.json").read_text())["k"] == 4


def test_moments_in_other_strides_are_paired_with_their_weights():
    """torch's fused Adam on a CPU takes it for granted that they lie alike."""
    weights = []
    for backend in ("dense", "torch"):
        trainer = adam(recipe(), make(), iter(()), backend=backend)
        for step in range(6):
            if step % 2:
                trainer.sae.W_enc.data = trainer.sae.W_enc.data.T.contiguous().T
            else:
                trainer.sae.W_enc.data = trainer.sae.W_enc.data.contiguous()
            take(trainer, step, step + 1)
        weights.append(trainer.sae.W_enc.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
