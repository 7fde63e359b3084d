"""The sparse SAE classes in SAELens' own trainers, against SAELens' own classes there."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopK
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import save_file
from torch import Tensor, nn

import saesub
from saesub.errors import SaesubError
from saesub.topk.sae import SparseBatchTopKTrainingSAE, SparseTopKTrainingSAE, use_sparse_step
from saesub.topk.step import SparseStepOutput

D_IN, D_SAE, K, BATCH, STEPS = 32, 256, 4, 64, 40
KINDS = ["topk", "batchtopk"]


def make(kind: str = "topk", sparse: bool = False, **settings: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "decoder_init_norm": 0.7} | settings
    if kind == "batchtopk":
        sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**settings))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings))
    sae.W_dec.data *= torch.linspace(0.5, 2, D_SAE, dtype=sae.dtype)[:, None]
    return use_sparse_step(sae) if sparse else sae


def recipe(steps: int = STEPS, **settings: Any) -> SAETrainerConfig:
    """AuxK's window is short, so that it acts."""
    given = {"lr": 2e-3, "lr_end": 2e-4, "lr_warm_up_steps": 5, "lr_decay_steps": 10}
    given |= {"dead_feature_window": 5} | settings
    return SAETrainerConfig(steps * BATCH, BATCH, **given)


def batches(dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(D_IN, D_IN, generator=generator)
    while True:
        yield (torch.randn(BATCH, D_IN, generator=generator) @ mixing + 1).to(dtype)


def assert_same(ours: SAETrainer, theirs: SAETrainer, tolerance: float = 1e-9) -> None:
    for (name, a), b in zip(ours.sae.named_parameters(), theirs.sae.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
    assert ours.n_frac_active_samples == theirs.n_frac_active_samples
    assert ours.lr_scheduler.state_dict() == theirs.lr_scheduler.state_dict()


@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("kind", KINDS)
def test_saelens_trainer_ends_with_the_weights_of_the_dense_pass(kind, scaling):
    """In float64, where forty steps leave no room for another loss or gradient."""
    trained = []
    for sparse in (True, False):
        sae = make(kind, sparse, dtype="float64", normalize_activations=scaling)
        cfg = recipe(n_batches_for_norm_estimate=10)
        trainer = SAETrainer(cfg, sae, batches(torch.float64))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="SAELens' dense step")
            trainer.fit()
        trained.append(trainer)
    ours, theirs = trained
    assert_same(ours, theirs)
    assert ours.dead_neurons.any()  # so AuxK acted
    assert ours.sae.cfg == theirs.sae.cfg
    if kind == "batchtopk":
        torch.testing.assert_close(ours.sae.topk_threshold, theirs.sae.topk_threshold)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["auto", "exact_search", "torch"])
def test_in_float32_each_search_follows_the_dense_pass(kind, search):
    losses = []
    for sae in (use_sparse_step(make(kind), search=search), make(kind)):
        trainer, source = SAETrainer(recipe(), sae, iter(())), batches()
        losses.append([trainer.step(next(source)).losses["mse_loss"].item() for _ in range(STEPS)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)


def test_saelens_trainer_of_several_saes_does_too():
    ours, theirs = (
        MultiSAETrainer(
            recipe(20),
            {kind: make(kind, sparse, dtype="float64") for kind in KINDS},
            dict.fromkeys(KINDS, "hook"),
            ({"hook": x} for x in batches(torch.float64)),
        )
        for sparse in (True, False)
    )
    for multi in (ours, theirs):
        multi.fit()
    for kind in KINDS:
        assert type(ours.saes[kind]) in (SparseTopKTrainingSAE, SparseBatchTopKTrainingSAE)
        assert_same(ours.trainers[kind], theirs.trainers[kind])


@pytest.mark.model
def test_saelens_runner_does_too_and_saves_a_plain_sae(model, corpus, tmp_path):
    found = []
    for sparse in (True, False):
        sae_cfg = TopKTrainingSAEConfig(d_in=576, d_sae=1152, k=8)
        torch.manual_seed(0)
        sae = (SparseTopKTrainingSAE if sparse else TopKTrainingSAE)(sae_cfg)
        cfg = LanguageModelSAERunnerConfig(
            sae=sae_cfg,
            model_name="smollm2-135m",
            hook_name="blocks.4.hook_attn_out",
            training_tokens=12 * 256,
            train_batch_size_tokens=256,
            context_size=64,
            n_batches_in_buffer=4,
            store_batch_size_prompts=4,
            is_dataset_tokenized=False,
            lr=1e-3,
            checkpoint_path=None,
            output_path=str(tmp_path / str(sparse)),
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        runner = LanguageModelSAETrainingRunner(
            cfg, override_dataset=corpus, override_model=model, override_sae=sae
        )
        found.append(runner.run())
    ours, theirs = found
    assert type(ours) is SparseTopKTrainingSAE
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
    saved, plain = (SAE.load_from_disk(tmp_path / str(sparse)) for sparse in (True, False))
    assert type(saved) is type(plain) is TopKSAE
    assert saved.cfg.to_dict() == plain.cfg.to_dict()


def test_a_compiled_pass_is_the_sparse_one():
    """As the runner compiles it, with `compile_sae`."""
    sae, plain = make(sparse=True), make()
    compiled = torch.compile(sae.training_forward_pass, backend="aot_eager")
    x = next(batches())
    dead = torch.arange(D_SAE) % 3 == 0
    found = compiled(step_input=TrainStepInput(x, {}, dead, 0, False))
    expected = plain.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    assert found.feature_acts.is_sparse
    torch.testing.assert_close(found.loss, expected.loss)


# --- the objects ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "inference"), [("topk", TopKSAE), ("batchtopk", JumpReLUSAE)])
def test_what_is_saved_is_saelens_own(kind, inference, tmp_path):
    sae = make(kind, sparse=True)
    SAETrainer(recipe(3), sae, batches()).fit()
    sae.save_model(tmp_path / "training")
    assert type(TrainingSAE.load_from_disk(tmp_path / "training")) is type(make(kind))
    again = type(sae).load_from_disk(tmp_path / "training")
    assert type(again) is type(sae)
    for a, b in zip(again.parameters(), sae.parameters(), strict=True):
        assert torch.equal(a, b)
    sae.save_inference_model(tmp_path / "inference")
    assert type(SAE.load_from_disk(tmp_path / "inference")) is inference
    with pytest.raises(ValueError, match="not of type SparseBatchTopKTrainingSAE"):
        SparseBatchTopKTrainingSAE.from_dict(make("topk").cfg.to_dict())


def test_weights_keep_their_place_in_memory(tmp_path):
    """So that views of them stay, and optimizers that know no strides pair their moments right."""
    sae = make(sparse=True)
    views = {name: p.data.view(-1) for name, p in sae.named_parameters()}
    trainer = SAETrainer(recipe(), sae, iter(()))
    trainer.step(next(batches()))
    for name, parameter in sae.named_parameters():
        assert parameter.is_contiguous()
        assert parameter.data_ptr() == views[name].data_ptr()
        assert parameter.grad is None
    save_file(sae.state_dict(), tmp_path / "by-hand.safetensors")
    assert copy.deepcopy(sae).W_enc.equal(sae.W_enc)


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_optimizer_of_ones_own_goes_on_where_the_class_changes(first):
    weights = []
    for changes in (True, False):
        sae = make(dtype="float64", sparse=changes and first)
        trainer, source = SAETrainer(recipe(), sae, iter(())), batches(torch.float64)
        trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        for step in range(10):
            if changes and not first and step == 5:
                use_sparse_step(sae)
            trainer.step(next(source))
        weights.append(sae.W_enc.detach())
    assert (weights[0] - weights[1]).norm() < 1e-9 * weights[1].norm()


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_the_activations_trains_as_in_saelens(kind, rescaled):
    x, gradients = next(batches(torch.float64)), []
    for sparse in (True, False):
        settings = {"dtype": "float64", "rescale_acts_by_decoder_norm": rescaled}
        sae = make(kind, sparse, **settings)
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        acts = output.feature_acts.to_dense()
        loss = output.loss + 0.5 * acts.sum() + acts.square().sum()
        gradients.append(torch.autograd.grad(loss, list(sae.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 1e-9 * b.norm()


def test_second_derivatives_are_refused_by_torch_and_not_wrong():
    sae = make(sparse=True)
    output = sae.training_forward_pass(TrainStepInput(next(batches()), {}, None, 0, False))
    (gradient,) = torch.autograd.grad(output.loss, [sae.W_enc], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_an_sae_becomes_sparse_in_place_and_others_are_refused():
    sae = make()
    weights, hook = sae.W_enc, sae.hook_sae_input
    assert saesub.use_sparse_step(sae) is sae
    assert isinstance(sae, SparseTopKTrainingSAE)
    assert sae.W_enc is weights
    assert sae.hook_sae_input is hook
    assert type(use_sparse_step(sae, search="torch")) is SparseTopKTrainingSAE
    assert sae.search_name == "torch"

    class Mine(TopKTrainingSAE):
        pass

    others = [
        Mine(TopKTrainingSAEConfig(d_in=4, d_sae=8, k=2)),
        StandardTrainingSAE(StandardTrainingSAEConfig(d_in=4, d_sae=8)),
        MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, matryoshka_widths=[4])
        ),
    ]
    for other in others:
        with pytest.raises(SaesubError, match=f"{type(other).__name__} has no sparse step"):
            use_sparse_step(other)  # pyright: ignore


def test_the_output_keeps_active_entries_alone():
    sae = make(sparse=True)
    x = next(batches())
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    assert isinstance(output, SparseStepOutput)
    assert output.feature_acts.is_sparse
    torch.testing.assert_close(output.feature_acts.to_dense(), sae.encode(x))
    with pytest.raises(SaesubError, match="keeps no pre-activations"):
        _ = output.hidden_pre
    assert "loss" in repr(output)


# --- what the sparse pass cannot do, SAELens' own does, and says so ------------------------------


class Squared(nn.Module):
    k = K

    def forward(self, x: Tensor) -> Tensor:
        return TopK(K)(x) ** 2


class OwnDecoder(SparseTopKTrainingSAE):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts) + 1


class OwnName(SparseTopKTrainingSAE):
    def get_name(self) -> str:
        return "mine"


def aux_of_one(**_: Any) -> dict[str, Tensor]:
    return {"auxiliary_reconstruction_loss": torch.ones(())}


def hook(sae: TopKTrainingSAE) -> None:
    sae.hook_sae_acts_pre.add_hook(lambda acts, hook: acts * 2)


def put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda sae: setattr(sae, name, value)


def activation_hook(sae: Any) -> None:
    sae.activation_fn.register_forward_hook(lambda module, given, found: found * 2)


def torch_hook(sae: Any) -> None:
    sae.hook_sae_acts_post.register_forward_hook(lambda module, given, found: found * 2)


def pre_hook(sae: Any) -> None:
    sae.hook_sae_input.register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def backward_pre_hook(sae: Any) -> None:
    sae.activation_fn.register_full_backward_pre_hook(lambda module, gradient: gradient)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (hook, "hook points have hooks"),
    "hook of torch": (torch_hook, "hook points have hooks"),
    "hook before": (pre_hook, "hook points have hooks"),
    "hook point": (put("hook_sae_acts_pre", nn.Softplus()), "hook points have hooks"),
    "backward hook": (backward_pre_hook, "activation function has hooks"),
    "activation function": (put("activation_fn", Squared()), "activation function is Squared"),
    "hook on it": (activation_hook, "activation function has hooks"),
    "aux loss": (put("calculate_aux_loss", aux_of_one), "calculate_aux_loss of this SAE"),
    "error": (put("mse_loss_fn", lambda a, b: (a - b).abs()), "mse_loss_fn of this SAE"),
    "input": (put("run_time_activation_norm_fn_in", lambda x: 2 * x), "run_time_activation_norm"),
    "bfloat16": (lambda sae: sae.to(torch.bfloat16), "weights are in torch.bfloat16"),
    "parametrised": (
        lambda sae: nn.utils.parametrizations.weight_norm(sae, "W_dec"),
        "own W_dec|weights are parametrised",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_sae_is_trained_as_saelens_does(kind, change):
    alter, reason = CHANGES[change]
    if kind == "batchtopk" and change == "activation function":
        pytest.skip("its k is that of a token")
    sae, plain = make(kind, sparse=True), make(kind)
    for each in (sae, plain):
        alter(each)
    x, dead = next(batches()), torch.arange(D_SAE) % 3 == 0
    with pytest.warns(UserWarning, match=f"SAELens' dense step .*{reason}"):
        found = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    expected = plain.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.feature_acts, expected.feature_acts)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAELens' dense step")  # said once
        sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))


def test_settings_that_change_each_token_take_saelens_pass():
    for settings, reason in [
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
    ]:
        sae, plain = make(sparse=True, **settings), make(**settings)
        x = next(batches())
        with pytest.warns(UserWarning, match=reason):
            found = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        assert torch.equal(
            found.loss, plain.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss
        )


def test_autocast_takes_saelens_pass():
    ours, theirs = (
        SAETrainer(recipe(3, autocast=True), make(sparse=sparse), batches())
        for sparse in (True, False)
    )
    with pytest.warns(UserWarning, match="autocast is on"):
        ours.fit()
    theirs.fit()
    assert_same(ours, theirs, 0)


def test_the_k_of_the_activation_function_counts_as_in_saelens():
    for kind in KINDS:
        sae, plain = make(kind, sparse=True), make(kind)
        for each in (sae, plain):
            each.activation_fn.k = 2 * K  # pyright: ignore
        x = next(batches())
        found, expected = (
            each.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
            for each in (sae, plain)
        )
        assert found.feature_acts.is_sparse
        torch.testing.assert_close(found.feature_acts.to_dense(), expected.feature_acts)
        assert len(found.feature_acts.values()) == 2 * K * BATCH


def test_inputs_of_other_kinds_take_saelens_pass():
    sae, plain, x = make(sparse=True), make(), next(batches())
    inputs = {"its input asks for a gradient": x.clone().requires_grad_(), "3 dimensions": x[None]}
    for reason, given in inputs.items():
        with pytest.warns(UserWarning, match=reason):
            found = sae.training_forward_pass(TrainStepInput(given, {}, None, 0, False))
        expected = plain.training_forward_pass(TrainStepInput(given, {}, None, 0, False))
        assert torch.equal(found.loss, expected.loss)


def test_a_k_that_is_not_whole_is_left_to_saelens():
    sae = make(sparse=True)
    sae.activation_fn.k = 2.5  # pyright: ignore
    with pytest.warns(UserWarning, match=r"its k is 2\.5"), pytest.raises(TypeError):
        sae.training_forward_pass(TrainStepInput(next(batches()), {}, None, 0, False))


class Penalised(SparseTopKTrainingSAE):
    def training_forward_pass(self, step_input: TrainStepInput) -> Any:
        output = super().training_forward_pass(step_input)
        output.loss = output.loss + 1
        return output


def test_a_pass_of_ones_own_may_call_the_sparse_one():
    sae = Penalised(make().cfg)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAELens' dense step")
        output = sae.training_forward_pass(TrainStepInput(next(batches()), {}, None, 0, False))
    assert output.feature_acts.is_sparse
    assert output.loss == output.losses["mse_loss"] + 1


def test_a_class_of_ones_own_is_loaded_as_itself(tmp_path):
    sae = OwnName(make().cfg)
    sae.save_model(tmp_path)
    assert type(OwnName.load_from_disk(tmp_path)) is OwnName


def test_activations_are_coalesced_as_they_say():
    sae = make(sparse=True)
    acts = sae.training_forward_pass(
        TrainStepInput(next(batches()), {}, None, 0, False)
    ).feature_acts
    assert acts.is_coalesced()
    again = acts.detach().to_dense().to_sparse()
    torch.testing.assert_close((acts * again).sum(), acts.to_dense().square().sum())


def test_a_wrapped_method_of_the_class_is_seen(monkeypatch):
    decode = TopKTrainingSAE.decode

    @functools.wraps(decode)
    def doubled(self: Any, feature_acts: Tensor) -> Tensor:
        return 2 * decode(self, feature_acts)

    monkeypatch.setattr(TopKTrainingSAE, "decode", doubled)
    with pytest.warns(UserWarning, match="has its own decode"):
        make(sparse=True).training_forward_pass(TrainStepInput(next(batches()), {}, None, 0, False))


def test_an_unknown_search_is_refused():
    with pytest.raises(SaesubError, match="Unknown search 'exact': did you mean 'exact_search'"):
        use_sparse_step(make(), search="exact")  # pyright: ignore


def test_a_pass_that_was_replaced_before_is_refused():
    sae = make()
    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    with pytest.raises(SaesubError, match="call use_sparse_step before"):
        use_sparse_step(sae)


def test_a_class_of_ones_own_keeps_the_sparse_pass_unless_it_replaces_a_part():
    cfg, x = TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K), next(batches())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAELens' dense step")
        OwnName(cfg).training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    sae = OwnDecoder(cfg)
    with pytest.warns(UserWarning, match="OwnDecoder has its own decode"):
        found = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    torch.testing.assert_close(found.sae_out, sae.decode(sae.encode(x)))
