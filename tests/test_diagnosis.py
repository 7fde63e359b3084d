"""What `saesub.diagnose` says of SAEs with planted faults, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.abstopk_sae import (
    AbsTopKSAE,
    AbsTopKSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
)
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

import saesub
from saesub import cli
from saesub.errors import SaesubError
from saesub.evaluation import diagnosis
from saesub.evaluation import saved as saved_saes
from saesub.evaluation.causes import CAUSES, REVIVALS
from saesub.evaluation.diagnosis import ranking
from saesub.evaluation.saved import find_saes, load_activations, load_sae
from saesub.reproduce import studies

HOOK = "blocks.12.hook_attn_out"
N_TRAIN, N_HELD, D_SAE, K = 13_000, 7_000, 512, 16  # 7,000 tokens are 218 firings a feature
BATCH = 256


@pytest.fixture(scope="module")
def real(model) -> Tensor:
    """(20000, 576) attention outputs, shuffled."""
    store = saesub.harvest(model, "wiki-en", [HOOK], n_tokens=N_TRAIN + N_HELD, progress=False)[
        HOOK
    ]
    x = store.rows(0, N_TRAIN + N_HELD).float()
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def far_from_zero(x: Tensor) -> Tensor:
    """The same with a mean of three standard deviations more."""
    away = normalize(torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1)), dim=0)
    return x + 3 * (x - x.mean(0)).norm(dim=1).square().mean().sqrt() * away


def train(
    x: Tensor,
    *,
    lr: float = 5e-4,
    optimizer: str = "sparse_adam",
    d_init: Any = "auto",
    norm: float | None = None,
    start: str = "subspace",
    center: bool = True,
    steps: int = 250,
) -> TopKTrainingSAE:
    torch.manual_seed(0)
    x, spectrum = x[:N_TRAIN], saesub.Spectrum.from_activations(x[:N_TRAIN])
    settings: Any = {"d_in": 576, "d_sae": D_SAE, "k": K, "aux_loss_coefficient": 0.0}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings, decoder_init_norm=norm or 1.0))
    if start == "subspace":
        saesub.initialize_in_subspace(sae, spectrum, d_init, norm="keep" if norm else "fit")
    else:
        saesub.center_biases(sae, spectrum)
        if start == "mixed":
            drawn = sae.W_dec.detach().clone()
            saesub.initialize_in_subspace(sae, spectrum, norm="keep")
            sae.W_dec.data[: D_SAE // 2] = drawn[: D_SAE // 2]
            sae.W_enc.data = sae.W_dec.data.T.clone()
        saesub.fit_norm(sae, spectrum)
    if not center:
        sae.b_dec.data.zero_()

    def batches() -> Iterator[Tensor]:
        while True:
            yield from x[torch.randperm(len(x))][: len(x) // BATCH * BATCH].split(BATCH)

    cfg = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=steps // 5,
        adam_beta1=0.9,
        adam_beta2=0.999,
        n_restart_cycles=1,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        device="cpu",
        autocast=False,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return saesub.SubspaceSAETrainer(cfg, sae, batches(), optimizer=optimizer).fit()  # pyright: ignore


PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "healthy": ("healthy", {}),
    "offset": ("offset", {"start": "random", "center": False}),
    "norm": ("norm", {"norm": 0.05, "lr": 1e-3, "optimizer": "adam"}),
    "rate": ("rate", {"lr": 1e-2, "optimizer": "adam"}),
    "narrow": ("subspace", {"d_init": 2}),
    "mixed": ("subspace", {"start": "mixed", "lr": 1e-3}),
}


@pytest.fixture(scope="module")
def trained(real) -> dict[str, tuple[SAE[Any], Tensor]]:
    """Each planted SAE with held-out activations."""
    found = {}
    for name, (_, settings) in PLANTED.items():
        x = far_from_zero(real) if name == "offset" else real
        found[name] = train(x, **settings), x[N_TRAIN:]
    return found


def told(sae: SAE[Any], x: Tensor) -> diagnosis.SAEDiagnosis:
    return saesub.diagnose(sae, x, progress=False)


@pytest.mark.model
@pytest.mark.parametrize("fault", PLANTED)
def test_each_planted_fault_is_the_main_cause(trained, fault) -> None:
    sae, x = trained[fault]
    found = told(sae, x)
    assert found.cause == PLANTED[fault][0], (found.dead_share, found.causes)
    assert torch.equal(found.dead, saesub.dead_features(sae, x, n_tokens=len(x), progress=False))
    if fault == "healthy":
        assert "No change is needed" not in found.advice  # 512 features are not studied
        assert found.dead_share < 0.01
    else:
        assert found.causes[found.cause] > 0.5
        frame = found.table()
        assert (frame["cause"].dropna() == found.cause).mean() == found.causes[found.cause]
        assert frame.loc[frame["dead"], "closest"].max() < 1e-3


@pytest.mark.model
def test_of_a_mixed_start_the_random_half_dies_and_subspace_is_the_reason(trained) -> None:
    dead = told(*trained["mixed"]).dead
    assert dead[: D_SAE // 2].sum() > 4 * dead[D_SAE // 2 :].sum()


def replanted(sae: SAE[Any], x: Tensor) -> tuple[TopKTrainingSAE, list[str]]:
    """A copy of a healthy SAE whose first 120 features have one of three faults each."""
    copy = TopKTrainingSAE(sae.cfg)
    copy.load_state_dict(sae.state_dict())
    spectrum = saesub.Spectrum.from_activations(x)
    torch.manual_seed(0)
    tail = normalize(torch.randn(120, 60), dim=1) @ spectrum.eigenvectors[:, -60:].T.float()
    with torch.no_grad():
        length = sae.W_dec.norm(dim=1).median()
        copy.W_dec[:40] *= 0.02
        copy.W_enc[:, :40] = copy.W_dec[:40].T
        copy.W_dec[40:80] = tail[40:80] * length
        copy.W_enc[:, 40:80] = copy.W_dec[40:80].T
        copy.W_enc[:, 80:120] = tail[80:].T * 3 * length
        copy.b_enc[80:120] = -5.0
    return copy, ["norm"] * 40 + ["subspace"] * 40 + ["rate"] * 40


@pytest.mark.model
def test_each_dead_feature_has_its_own_cause_wherever_it_is(trained) -> None:
    sae, x = trained["healthy"]
    sae, causes = replanted(sae, x)
    found = told(sae, x).table()
    assert found["cause"][:120].tolist() == causes
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
    moved = TopKTrainingSAE(sae.cfg)
    moved.load_state_dict(sae.state_dict())
    with torch.no_grad():
        moved.W_dec.copy_(sae.W_dec[order])
        moved.W_enc.copy_(sae.W_enc[:, order])
        moved.b_enc.copy_(sae.b_enc[order])
    again = told(moved, x).table()
    for column in ("dead", "cause", "revived_by"):
        assert again[column].tolist() == found[column].to_numpy()[order.numpy()].tolist()


@pytest.mark.parametrize(
    ("gain", "along_mean", "cause"), [(0.01, 0.0, "norm"), (1.0, -2.0, "offset")]
)
def test_a_feature_that_is_too_short_did_not_die_of_the_mean(gain, along_mean, cause) -> None:
    """Living features point along the mean. The scores of short ones lack the mean's part, too, but
    because they are short; those of long ones that point away from it, because of the mean."""
    x = torch.randn(9000, 24, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 40.0
    sae = TopKSAE(TopKSAEConfig(**SIZES, k=4))
    torch.manual_seed(0)
    rows = torch.randn(160, 24)
    rows[:, 0] = rows[:, 0].abs()
    rows[:40, 0] = along_mean
    rows = normalize(rows, dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows * 0.3)
        sae.W_enc.copy_(rows.T)
        sae.W_enc[:, :40] *= gain
        sae.b_dec.zero_()
    found = told(sae, x).table()
    assert found["dead"][:40].all()
    assert set(found["cause"][:40]) == {cause}


@pytest.mark.model
def test_what_revives_a_feature_revives_it(trained) -> None:
    """The change is made to the SAE itself, one feature at a time."""
    sae, x = trained["norm"]
    found = told(sae, x)
    living = ~found.dead
    norm = (sae.W_enc.norm(dim=0) * sae.W_dec.norm(dim=1))[living].median()
    frame = found.table()
    by_norm = frame.index[frame["revived_by"] == "rescaling"][:3].tolist()
    assert by_norm
    for feature in by_norm:
        copy = TopKTrainingSAE(sae.cfg)
        copy.load_state_dict(sae.state_dict())
        with torch.no_grad():
            factor = norm / (copy.W_enc[:, feature].norm() * copy.W_dec[feature].norm())
            copy.W_enc[:, feature] *= factor
        counts = saesub.judge(copy, x, n_tokens=len(x), progress=False).counts
        assert counts[feature] > 0


SIZES: dict[str, Any] = {"d_in": 24, "d_sae": 160}


def gaussian(n: int = 9000) -> Tensor:
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(1, 0.05, 24)


def _with(sae: SAE[Any], **weights: Tensor) -> SAE[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        rows = normalize(torch.randn(160, 24), dim=1)
        sae.W_dec.copy_(rows * 0.3)
        if "W_enc" in dict(sae.named_parameters()):
            sae.W_enc.copy_(rows.T)
        for name, value in weights.items():
            dict(sae.named_parameters())[name].copy_(value)
    return sae


_LOW = torch.where(torch.arange(160) % 3 == 0, -9.0, 0.0)
ARCHITECTURES = {
    "topk": lambda: _with(TopKSAE(TopKSAEConfig(**SIZES, k=4)), b_enc=_LOW),
    "batchtopk": lambda: _with(
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=4)), b_enc=_LOW
    ),
    "standard": lambda: _with(StandardSAE(StandardSAEConfig(**SIZES)), b_enc=_LOW),
    "jumprelu": lambda: _with(JumpReLUSAE(JumpReLUSAEConfig(**SIZES)), threshold=-_LOW),
    "gated, by gate": lambda: _with(GatedSAE(GatedSAEConfig(**SIZES)), b_gate=_LOW),
    "gated, by magnitude": lambda: _with(GatedSAE(GatedSAEConfig(**SIZES)), b_mag=_LOW),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_of_every_architecture_say_when_its_features_fire(kind) -> None:
    sae = ARCHITECTURES[kind]()
    found = told(sae, gaussian())
    frame = found.table()
    assert frame.loc[_LOW.numpy() < 0, "cause"].tolist() == ["rate"] * 54
    assert (frame.loc[_LOW.numpy() < 0, "closest"] < 0).all()
    assert set(frame.loc[_LOW.numpy() < 0, "revived_by"]) <= {"recentring", "both"}


@pytest.mark.parametrize("scaling", ["none", "layer_norm", "constant_norm_rescale"])
def test_heads_and_scaled_inputs_are_read_as_the_sae_reads_them(scaling) -> None:
    settings: Any = {"k": 4, "normalize_activations": scaling, "reshape_activations": "hook_z"}
    sae = _with(TopKSAE(TopKSAEConfig(**SIZES, **settings)), b_enc=_LOW)
    before = set(vars(sae))
    flat, heads = (told(sae, x) for x in (gaussian(), gaussian().view(-1, 3, 8)))
    assert flat.table()["cause"][_LOW.numpy() < 0].eq("rate").all()
    assert str(flat) == str(heads)
    assert set(vars(sae)) == before


def test_features_that_fire_with_either_sign_are_told_by_their_size() -> None:
    sae = _with(AbsTopKSAE(AbsTopKSAEConfig(**SIZES, k=4)))
    sae.W_enc.data[:, ::3] *= 1e-3
    frame = told(sae, gaussian()).table()[::3]
    assert frame["cause"].eq("norm").all()
    assert frame["revived_by"].eq("rescaling").all()


def test_without_scores_or_living_features_no_cause_is_told() -> None:
    pursuit = _with(MatchingPursuitSAE(MatchingPursuitSAEConfig(**SIZES, max_iterations=4)))
    with torch.no_grad():
        pursuit.W_dec[:40] = 0
    silent = _with(StandardSAE(StandardSAEConfig(**SIZES)), b_enc=torch.full((160,), -99.0))
    for sae in (pursuit, silent):
        found = told(sae, gaussian())
        assert found.dead[:40].all()
        assert found.cause == "unknown"
        assert "No cause is told" in found.advice
        assert "cause" not in found.table()


def test_a_short_window_has_no_verdict_and_says_how_long_it_must_be() -> None:
    found = saesub.diagnose(ARCHITECTURES["topk"](), gaussian(), n_tokens=4000, progress=False)
    assert found.cause == "unknown"
    assert "100 times on average over 4,000 tokens" in found.advice
    assert "which 8,800 tokens give" in found.advice
    assert found.firings == 100


def test_advice_is_withheld_beyond_the_studies(monkeypatch) -> None:
    sae = ARCHITECTURES["topk"]()
    assert "2,048 to 8,192 features, and this SAE has 160" in told(sae, gaussian()).advice
    monkeypatch.setattr(diagnosis, "_WIDTHS", (100, 200))
    assert "the studies have k 32 or 64, and this SAE 4" in told(sae, gaussian()).advice
    monkeypatch.setattr(diagnosis, "_KS", (4,))
    assert f"widths 576 to 896, and this SAE reads {sae.cfg.d_in}" in told(sae, gaussian()).advice
    monkeypatch.setattr(diagnosis, "_D_IN", (1, 100))
    told_length = "no record says how many this SAE saw: set sae.cfg.metadata.training_tokens"
    assert told_length in told(sae, gaussian()).advice
    sae.cfg.metadata.lr, sae.cfg.metadata.training_tokens = 0.02, 10**6
    found = told(sae, gaussian())
    assert not found.withheld
    assert "Halve the learning rate of 0.02" in found.advice
    assert "SparseAdam" in found.advice
    sae.cfg.metadata.optimizer = "sparse_adam"
    assert "SparseAdam" not in told(sae, gaussian()).advice
    sae.cfg.metadata.training_tokens = 10**9
    assert "and this SAE saw 1,000,000,000" in told(sae, gaussian()).advice
    relu = told(ARCHITECTURES["standard"](), gaussian())
    assert "the studies are of TopK SAEs, and this one is 'standard'" in relu.advice


def test_the_studies_are_as_the_advice_says() -> None:
    folder = Path(diagnosis.__file__).parents[2] / "data" / "results" / "studies"
    rows = [
        row
        for name in ("cure", "width", "subspace_size", "mitigations", "baselines", "offset")
        for row in json.loads((folder / f"{name}.json").read_text())["rows"]
    ]
    widths = [row["d_sae"] for row in rows]
    assert (min(widths), max(widths)) == diagnosis._WIDTHS
    assert max(row["n_train"] for row in rows) == diagnosis._TOKENS
    assert {row["k"] for row in rows} == set(diagnosis._KS)
    width = {"smollm2-135m": 576, "gemma3-270m": 640, "qwen2.5-coder-0.5b": 896}
    d_in = [width[row["model"]] for row in rows]
    assert (min(d_in), max(d_in)) == diagnosis._D_IN


def test_sparse_adam_keeps_random_features_alive_at_the_rate_that_is_advised() -> None:
    rows = studies.recorded("cure").rows
    rows = rows[(rows["condition"] == "random + SparseAdam") & (rows["beta1"].fillna(0.9) == 0.9)]
    low = rows["lr"] <= diagnosis._SPARSE_ADAM_LR
    assert rows.loc[low, "dead_share"].max() < diagnosis._ALIVE < rows.loc[~low, "dead_share"].max()


def _small(kind: Any, config: Any, **settings: Any) -> tuple[Any, Tensor]:
    """A small SAE in the subspace of 9,000 uneven Gaussian tokens, 16 wide, and the tokens."""
    x = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(1, 0.2, 16) + 0.5
    torch.manual_seed(0)
    sae = kind(config(d_in=16, d_sae=64, **settings))
    saesub.initialize_in_subspace(sae, saesub.Spectrum.from_activations(x), 8, activations=x)
    return sae, x


def test_a_feature_with_its_sign_turned_has_the_same_causes() -> None:
    """A feature of AbsTopK fires on either sign."""
    sae, x = _small(AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, k=4)
    with torch.no_grad():
        sae.b_enc[20:] = 1.5
        sae.W_dec *= 0.6
        sae.W_enc[:, :20] *= 0.7
    turned = copy.deepcopy(sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        turned.get_parameter(name).data.mul_(-1)
    found, other = (saesub.diagnose(of, x, progress=False) for of in (sae, turned))
    assert found.dead.sum() >= 10
    assert found.causes == other.causes
    assert found.revived_by == other.revived_by
    bias, again = sae.b_enc[20:].median().item(), 0
    for feature in found.dead.nonzero().flatten().tolist():
        lifted = copy.deepcopy(sae)
        lifted.b_enc.data[feature] = bias
        again += bool((lifted.encode(x)[:, feature] != 0).any())
    assert abs(again - found.revived_by["recentring"]) <= 1


def test_a_direction_in_which_nothing_varies_is_outside_of_the_subspace() -> None:
    sae, x = _small(TopKTrainingSAE, TopKTrainingSAEConfig, k=4)
    x[:, 0] = 0
    with torch.no_grad():
        sae.W_dec[:4] = 0
        sae.W_dec[:4, 0] = 0.6
        sae.W_enc[:, :4] = sae.W_dec[:4].T
    table = saesub.diagnose(sae, x, progress=False).table()
    assert table["spread"][:4].max() < 1e-6
    assert table["cause"][:4].tolist() == ["subspace"] * 4


def test_auxk_is_that_of_the_training_and_not_of_the_construction() -> None:
    sae, x = _small(TopKTrainingSAE, TopKTrainingSAEConfig, k=4)
    assert sae.cfg.metadata.training_architecture_details["aux_loss_coefficient"] == 1
    sae.cfg.aux_loss_coefficient = 0.0
    assert saesub.diagnose(sae, x, progress=False).recorded["aux_loss_coefficient"] == 0


def test_a_default_of_float64_changes_nothing() -> None:
    for kind, config, settings in (
        (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 4}),
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4}),
        (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    ):
        sae, x = _small(kind, config, **settings)
        sae.b_enc.data[:8] = -9
        told = saesub.diagnose(sae, x, progress=False)
        torch.set_default_dtype(torch.float64)
        try:
            again = saesub.diagnose(sae, x, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert again.causes == told.causes


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_thresholds_that_saelens_keeps_in_float32_are_read(dtype) -> None:
    sae, x = _small(JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
    sae.to(dtype=getattr(torch, dtype))
    assert sae.threshold.dtype == torch.float32 != sae.W_enc.dtype
    assert saesub.diagnose(sae, x, progress=False).judgement.counts.shape == (64,)


def test_more_active_features_than_there_are_is_refused() -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=64))  # SAELens' default k is 100
    with pytest.raises(SaesubError, match=r"k must lie in 1\.\.64"):
        saesub.diagnose(sae, torch.randn(100, 16), progress=False)


def _hooked() -> SAE[Any]:
    sae = ARCHITECTURES["topk"]()
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts)
    return sae


def _unfolded() -> SAE[Any]:
    settings: Any = {"k": 4, "normalize_activations": "expected_average_only_in"}
    return TopKSAE(TopKSAEConfig(**SIZES, **settings))


REFUSED = {
    "width": (lambda: ARCHITECTURES["topk"](), gaussian()[:, :20], "reads activations of shape"),
    "nan": (lambda: ARCHITECTURES["topk"](), gaussian() * torch.nan, "NaN"),
    "one token": (lambda: ARCHITECTURES["topk"](), gaussian()[:20], "give more tokens"),
    "blocks": (lambda: ARCHITECTURES["topk"](), [gaussian()], "pass n_tokens"),
    "hooks": (_hooked, gaussian(), "reset_hooks"),
    "no SAE": (lambda: None, gaussian(), "must be one of SAELens' classes"),
    "a path": (lambda: "saes/a", gaussian(), "load_from_disk"),
    "stores": (lambda: ARCHITECTURES["topk"](), {"h": gaussian()}, "take one store"),
    "a number": (lambda: ARCHITECTURES["topk"](), 3.0, "not float"),
    "no rows": (lambda: ARCHITECTURES["topk"](), torch.tensor(1.0), "pass n_tokens"),
    "scaling": (_unfolded, gaussian(), "which has it folded in"),
    "other site": (
        lambda: _with(TopKSAE(TopKSAEConfig(**SIZES, k=4)), b_dec=torch.full((24,), 5.0)),
        gaussian(),
        "their mean alone has 1",
    ),
    "transcoder": (
        lambda: Transcoder(TranscoderConfig(**SIZES, d_out=24, apply_b_dec_to_input=False)),
        gaussian(),
        "a transcoder writes to another place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_diagnosed_is_refused(case) -> None:
    make, x, message = REFUSED[case]
    with pytest.raises(SaesubError, match=message):
        saesub.diagnose(make(), x, progress=False)


def test_blocks_equal_a_matrix_and_the_sae_stays_as_it_was() -> None:
    sae, x = ARCHITECTURES["topk"](), gaussian()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    whole = told(sae, x)
    blocks = saesub.diagnose(sae, iter(x.split(700)), n_tokens=len(x), progress=False)
    assert str(whole) == str(blocks)
    assert whole.table().equals(blocks.table())
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_a_store_is_read_whole_unless_a_window_is_named() -> None:
    sae, x = ARCHITECTURES["topk"](), gaussian()
    store = saesub.ActivationStore.of(x, "h")
    assert str(saesub.diagnose(sae, store, progress=False)) == str(told(sae, x))
    judged, alone = (saesub.judge(sae, given, progress=False) for given in (store, x))
    assert judged.n_tokens == len(x)
    assert torch.equal(judged.counts, alone.counts)
    assert (judged.fvu, judged.silent) == (alone.fvu, alone.silent)
    first = saesub.judge(sae, store, n_tokens=100, progress=False)
    assert torch.equal(first.counts, saesub.judge(sae, x[:100], progress=False).counts)
    with pytest.raises(SaesubError, match="pass n_tokens"):
        saesub.judge(sae, iter([x]))


def test_causes_of_nearly_as_many_features_are_all_named(monkeypatch) -> None:
    found = told(ARCHITECTURES["topk"](), gaussian())
    first, second = list(found.causes)[:2]
    assert f"Main cause: {first} (" in found.advice
    gap = found.causes[first] - found.causes[second]
    monkeypatch.setattr(diagnosis, "_TIED", gap + 1e-6)
    assert f"Causes of nearly as many each, so mend one after the other: {first} (" in found.advice
    assert f"; {second} (" in found.advice


def test_auxk_is_named_where_the_rate_is_one_of_several_causes(monkeypatch) -> None:
    found = told(ARCHITECTURES["topk"](), gaussian())
    shares = {"norm": 0.5, "rate": 0.45, "subspace": 0.05}
    monkeypatch.setattr(diagnosis.SAEDiagnosis, "causes", shares)
    found.recorded["aux_loss_coefficient"] = 1.0
    assert "norm (50%)" in found.advice
    assert "it may be AuxK that moved them" in found.advice
    monkeypatch.setattr(diagnosis, "_TIED", 0.01)
    assert "AuxK" not in found.advice


def test_an_fvu_above_1_is_warned_of_first() -> None:
    found = told(ARCHITECTURES["topk"](), gaussian())
    assert not found.advice.startswith("The SAE rebuilds these activations worse")
    worse = replace(found, judgement=found.judgement._replace(fvu=1.01))
    assert worse.advice.startswith("The SAE rebuilds these activations worse than their mean")


def test_a_healthy_sae_has_no_main_cause(monkeypatch) -> None:
    found = told(ARCHITECTURES["topk"](), gaussian())
    monkeypatch.setattr(diagnosis, "_ALIVE", 1.1)
    assert found.cause == diagnosis.HEALTHY
    assert "cause" not in found.advice


def test_a_sample_is_evenly_spaced_over_the_window(monkeypatch) -> None:
    kept: list[Tensor] = []
    x = torch.arange(1000.0)[:, None]
    list(diagnosis.sampled(iter(x.split(37)), 900, 100, kept))
    assert torch.cat(kept).flatten().tolist() == list(range(0, 900, 9))


def test_the_report_prints_a_table_and_a_paragraph() -> None:
    found = told(ARCHITECTURES["topk"](), gaussian())
    text = str(found)
    assert f"silent after {9000:,}" in text
    assert "cause: rate" in text
    assert text.endswith(found.advice)
    assert sum(found.causes.values()) == pytest.approx(1)
    assert sum(found.revived_by.values()) == int(found.dead.sum())
    assert set(found.causes) == set(CAUSES)
    assert set(found.revived_by) == set(REVIVALS)


def test_saes_are_ranked_over_one_window() -> None:
    reports = {name: told(ARCHITECTURES[name](), gaussian()) for name in ("standard", "topk")}
    lines = ranking(reports).splitlines()
    assert len(lines) == 3
    shares = [reports[line.split()[0]].dead_share for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    reports["topk"] = saesub.diagnose(
        ARCHITECTURES["topk"](), gaussian(), n_tokens=8500, progress=False
    )
    with pytest.raises(SaesubError, match="8,500 and 9,000 tokens do not compare"):
        ranking(reports)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of an inference SAE, one in training form, and a run's settings beside one."""
    ARCHITECTURES["topk"]().save_model(tmp_path / "saes" / "a")
    ARCHITECTURES["batchtopk"]().save_model(tmp_path / "saes" / "b" / "c")
    (tmp_path / "saes" / "a" / "runner_cfg.json").write_text('{"lr": 0.5, "training_tokens": 7}')
    np.save(tmp_path / "x.npy", gaussian().numpy())
    save_file({"x": gaussian()}, tmp_path / "x.safetensors")
    return tmp_path


def test_saved_saes_are_found_and_loaded_in_their_form(saved) -> None:
    found = find_saes(saved / "saes")
    assert list(found) == ["a", "b/c"]
    loaded = load_sae(found["a"])
    assert (loaded.cfg.metadata.lr, loaded.cfg.metadata.training_tokens) == (0.5, 7)
    assert isinstance(load_sae(found["b/c"]), BatchTopKTrainingSAE)
    assert list(find_saes(saved / "saes" / "a")) == ["a"]


def test_the_command_diagnoses_one_sae_and_ranks_a_folder(saved, capsys) -> None:
    one = ["diagnose", str(saved / "saes" / "a"), "--activations", str(saved / "x.npy")]
    assert cli.main(one) == 0
    assert "cause: rate" in capsys.readouterr().out
    for name in ("x.npy", "x.safetensors"):
        both = ["diagnose", str(saved / "saes"), "--activations", str(saved / name)]
        assert cli.main(both) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].startswith("SAE")
        assert {"a", "b/c"} == {line.split()[0] for line in out.splitlines()[1:3]}


def test_saes_that_are_refused_do_not_hide_the_others(saved, capsys) -> None:
    TopKSAE(TopKSAEConfig(d_in=20, d_sae=64, k=4)).save_model(saved / "saes" / "other")
    both = ["diagnose", str(saved / "saes"), "--activations", str(saved / "x.npy")]
    assert cli.main(both) == 1
    shown = capsys.readouterr()
    assert {"a", "b/c"} == {line.split()[0] for line in shown.out.splitlines()[1:3]}
    assert "no diagnosis of other: The SAE reads activations of shape (n, 20)" in shown.err
    np.save(saved / "narrow.npy", np.ones((9, 3), dtype=np.float32))
    none = ["diagnose", str(saved / "saes"), "--activations", str(saved / "narrow.npy")]
    assert cli.main(none) == 2
    errors = capsys.readouterr().err
    assert all(f"no diagnosis of {name}: " in errors for name in ("a", "b/c", "other"))


def test_the_text_is_read_from_its_last_document_back(saved, monkeypatch) -> None:
    """A run on the same corpus, which begins at the first, was trained on those."""
    read = []

    def harvest(model: str, text: Any, hooks: list[str], **_: Any) -> dict:
        read.append(text["text"])
        return {hook: saesub.ActivationStore.of(gaussian(), hook) for hook in hooks}

    monkeypatch.setattr(saved_saes, "harvest", harvest)
    texts = saved / "texts.jsonl"
    texts.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    reports, refused = saved_saes.diagnose_saved(
        saved / "saes", model="m", hook_name="h", corpus=str(texts), n_tokens=9000
    )
    assert (list(reports), refused) == (["a", "b/c"], [])
    assert read == [["three", "two", "one"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["saes/a"], "does not say which activations it reads: pass --model and --hook, or --act"),
        (["saes/a", "--activations", "saes/a/cfg.json"], "give a .npy, .safetensors file"),
        (["saes/a", "--activations", "none.npy"], "there is no none.npy"),
        (["saes/a", "--activations", "x.npy", "--hook", "h"], "leave out the model"),
        (["saes/a", "--activations", "x.npy", "--tokens", "0"], "tokens must be a whole number"),
    ],
)
def test_mistakes_at_the_command(saved, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(saved)
    assert cli.main(["diagnose", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_damaged_files_are_refused(saved) -> None:
    (saved / "nothing").mkdir()
    with pytest.raises(SaesubError, match="holds no SAE of SAELens"):
        find_saes(saved / "nothing")
    (saved / "saes" / "a" / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(SaesubError, match="cannot load the SAE"):
        load_sae(saved / "saes" / "a")
    (saved / "saes" / "b" / "c" / "cfg.json").write_text("{}")
    with pytest.raises(SaesubError, match="cannot load the SAE"):
        load_sae(saved / "saes" / "b" / "c")
    save_file({"x": gaussian(), "y": gaussian()}, saved / "two.safetensors")
    with pytest.raises(SaesubError, match="holds 2 arrays"):
        load_activations(saved / "two.safetensors")
    np.save(saved / "whole.npy", np.arange(4))
    with pytest.raises(SaesubError, match="floating-point"):
        load_activations(saved / "whole.npy")


@pytest.mark.model
def test_the_command_reads_model_and_hook_from_the_metadata(trained, tmp_path, capsys) -> None:
    sae, _ = trained["norm"]
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "smollm2-135m", HOOK
    sae.save_inference_model(tmp_path / "sae")
    assert cli.main(["diagnose", str(tmp_path / "sae"), "--tokens", "7000"]) == 0
    assert "cause: norm" in capsys.readouterr().out


def test_the_figure_shows_what_was_found() -> None:
    from saesub.reproduce import plots

    found = told(ARCHITECTURES["topk"](), gaussian())
    figure = plots.diagnosis(found)
    assert len(figure.axes) == 3
    bars = sum(bar.get_width() for bar in figure.axes[1].patches)  # pyright: ignore
    assert bars == pytest.approx(1)
    short = saesub.diagnose(ARCHITECTURES["topk"](), gaussian(), n_tokens=4000, progress=False)
    assert len(plots.diagnosis(short).axes) == 1
