"""What a training step does beside the fused step waits for no GPU, and leaves bad batches out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from waiting import WaitingError, no_waiting

from saesub import precision
from saesub.errors import SaesubError
from saesub.topk.ops import Selected
from saesub.topk.step import Entries, SparseStepOutput
from saesub.training.history import CHECK_EVERY, History
from saesub.training.mitigations import GhostGradients, KAnnealing, Mitigation, Resampling
from saesub.training.trainer import SubspaceSAETrainer

D_IN, D_SAE, BATCH, K = 8, 64, 16, 2

x, mask, counts = torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool), torch.arange(3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: x.sum().item(),
        lambda: bool(mask.any()),
        lambda: float(x[0, 0]),
        lambda: int(counts[0]),
        lambda: range(counts[2]),
        lambda: "a" if x.sum() > 0 else "b",
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.to("cpu"),
        lambda: mask.nonzero(),
        lambda: torch.where(mask),
        lambda: x[mask],
        lambda: x.clone().__setitem__(mask, 0.0),
        lambda: x.masked_select(mask),
        lambda: x.unique(),
        lambda: counts.unique_consecutive(),
        lambda: x.unique(dim=0),
        lambda: counts.repeat_interleave(counts),
        lambda: counts.bincount(),
        lambda: torch.equal(x, x),
        lambda: torch.allclose(x, x),
        lambda: torch.linalg.inv(torch.eye(2)),
        lambda: torch.tensor([1.0], device="cpu"),
        lambda: f"{x.sum()}",
    ],
)
def test_what_waits_is_refused(call: Callable[[], Any]) -> None:
    call()
    with pytest.raises(WaitingError), no_waiting():
        call()


def test_what_does_not_wait_is_let_through() -> None:
    with no_waiting():
        x.to(torch.float16).masked_fill(mask, 0.0)
        x.index_select(0, counts).where(mask[:3], 0.0)
        counts.repeat_interleave(2)
        counts.repeat_interleave(counts, output_size=3)
        x.clone()[1:, 0] += 2
        x[counts]
        x.to(x.device, non_blocking=True).sort(1)
        [row.sum() for row in x.split(2)]


def _stand_in(trainer: Any, rows: Any, sae_in: Tensor) -> SparseStepOutput:
    """The fused step's output: features by the sum of a token, which is NaN in a bad batch."""
    features = (torch.arange(BATCH) % 5)[:, None] * 3 + torch.arange(K)
    pre = (1 + sae_in.sum(1, keepdim=True).square()).expand(BATCH, K)
    selected = Selected.equally(features, pre, D_SAE)
    loss = sae_in.square().sum(1).mean()
    return SparseStepOutput(
        sae_in=sae_in,
        sae_out=sae_in,
        feature_acts=Entries(selected, selected.pre, BATCH),  # pyright: ignore
        hidden_pre=None,  # pyright: ignore
        loss=loss,
        losses={"mse_loss": loss},
    )


def _trainer(monkeypatch: Any = None, n_steps: int = 200, **settings: Any) -> SubspaceSAETrainer:
    """A trainer whose fused step is a stand-in; with `monkeypatch` its CPU is taken for a GPU."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * BATCH, train_batch_size_samples=BATCH, lr=1e-3
    )
    given = {"dead_window_tokens": 3 * BATCH} | settings
    trainer = SubspaceSAETrainer(cfg, sae, iter(()), **given)
    if monkeypatch is not None:
        monkeypatch.setattr(precision, "_WAITING", {"cpu"})
    trainer.native_step.rows = lambda trainer: object()  # pyright: ignore
    trainer.native_step.take = _stand_in  # pyright: ignore
    return trainer


def _batch(step: int, bad: bool = False) -> Tensor:
    batch = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step))
    if bad:
        batch[3, 2] = torch.nan
    return batch


def _take(trainer: SubspaceSAETrainer, steps: range, bad: tuple[int, ...] = ()) -> None:
    for step in steps:
        trainer.step(_batch(step, step in bad))
        trainer.n_training_steps += 1


def _counts(trainer: SubspaceSAETrainer) -> list[Tensor]:
    return [
        trainer.tokens_since_fired,
        trainer.n_forward_passes_since_fired,
        trainer.act_freq_scores,
    ]


def test_no_step_waits_but_every_fiftieth(monkeypatch) -> None:
    """Four steps to a point of the history, and dead features from the third step on."""
    trainer = _trainer(monkeypatch, 160)
    trainer.step(_batch(0))  # makes what is made once
    waited = []
    for step in range(1, 2 * CHECK_EVERY + 1):
        before = copy.deepcopy(trainer.recorder.points)
        try:
            with no_waiting():
                trainer.step(_batch(step))
        except WaitingError:
            waited.append(step)
            assert trainer.recorder.points == before
            trainer.read_device()
            assert len(trainer.recorder.points) > len(before)
            trainer.step(_batch(step))
        trainer.n_training_steps += 1
    assert waited == [CHECK_EVERY, 2 * CHECK_EVERY]


def test_a_step_on_the_cpu_would_wait(monkeypatch) -> None:
    """Else the test above could not fail."""
    with pytest.raises(WaitingError), no_waiting():
        _trainer().step(_batch(0))


def test_what_is_counted_and_recorded_is_the_same_without_waiting(monkeypatch) -> None:
    trainers = [_trainer(n_steps=130), _trainer(monkeypatch, 130)]
    for trainer, waiting in zip(trainers, ("cuda", "cpu"), strict=True):
        monkeypatch.setattr(precision, "_WAITING", {waiting})
        _take(trainer, range(120))
    assert all(map(torch.equal, *map(_counts, trainers)))
    assert trainers[0].history == trainers[1].history
    assert len(trainers[0].history) == 40
    state = [trainer.recorder.state() for trainer in trainers]
    assert all(torch.equal(state[0][name], kept) for name, kept in state[1].items())


def test_a_bad_batch_is_left_out_and_told_of(monkeypatch, tmp_path) -> None:
    """Firing, silence and loss are those of the same run without it, but for the tokens' number."""
    trainer, without = _trainer(monkeypatch), _trainer(monkeypatch)
    _take(trainer, range(20), bad=(4, 5, 11))
    _take(without, range(20))
    without.act_freq_scores -= 3 * _fired()
    assert trainer.act_freq_scores.equal(without.act_freq_scores)
    assert trainer.n_training_samples == without.n_training_samples
    never = trainer.act_freq_scores == 0
    assert (trainer.tokens_since_fired[never] == 17 * BATCH).all()
    assert (trainer.n_forward_passes_since_fired[never] == 17).all()
    assert (trainer.tokens_since_fired[~never] == 0).all()
    told = r"^Of the batches of steps 4 to 11, 3 held NaN .* left out, .* and continue\.$"
    with pytest.raises(SaesubError, match=told):
        trainer.save_checkpoint("c", tmp_path)
    assert not list(tmp_path.iterdir())
    trainer.save_checkpoint("c", tmp_path)  # it was told, and the run continues
    assert all(torch.tensor(point["mse"]).isfinite() for point in trainer.history)


def _fired() -> Tensor:
    """How often each feature fires in a batch of `_stand_in`."""
    trainer = _trainer()
    trainer.step(_batch(0))
    return trainer.act_freq_scores


def test_bad_batches_are_told_of_after_fifty_steps_and_at_the_end(monkeypatch) -> None:
    trainer = _trainer(monkeypatch)
    _take(trainer, range(CHECK_EVERY), bad=(7,))
    with pytest.raises(SaesubError, match="steps 7 to 7, 1 held"):
        trainer.step(_batch(CHECK_EVERY))
    assert trainer.n_training_samples == CHECK_EVERY * BATCH
    _take(trainer, range(CHECK_EVERY, CHECK_EVERY + 3), bad=(CHECK_EVERY,))
    with pytest.raises(SaesubError, match="steps 50 to 50, 1 held"):
        trainer.set_final_sae_metadata()
    trainer.set_final_sae_metadata()


def test_points_of_bad_batches_alone_are_none(monkeypatch) -> None:
    trainer = _trainer(monkeypatch, 80)  # two steps to a point
    _take(trainer, range(6), bad=(2, 3))
    assert [point["tokens"] for point in trainer.history] == [2 * BATCH, 6 * BATCH]


def test_autograd_refuses_a_bad_batch_at_once(monkeypatch) -> None:
    trainer = _trainer(monkeypatch)
    trainer.native_step.rows = lambda trainer: None  # pyright: ignore
    before = copy.deepcopy(trainer.sae.state_dict())
    with pytest.raises(SaesubError, match=r"batch 0 \(after 0 tokens\) .* first nan in row 3"):
        trainer.step(_batch(0, bad=True))
    assert trainer.n_training_samples == 0
    assert all(torch.equal(v, before[k]) for k, v in trainer.sae.state_dict().items())
    trainer.step(_batch(0))
    trainer.read_device()


def test_a_loss_that_is_not_finite_is_told_of_late_and_stays_told(monkeypatch) -> None:
    """Its batches are, so the weights must be at fault."""
    monkeypatch.setattr(precision, "_WAITING", {"cpu"})
    recorder = History(80, torch.zeros(2))
    recorder.add(torch.tensor(torch.inf), 1.0)
    recorder.record(10, 0.5)
    recorder.add(torch.tensor(1.0), 1.0)
    recorder.record(20, 0.5)
    with pytest.raises(SaesubError, match="before 10 tokens"):
        recorder.read()
    with pytest.raises(SaesubError, match="before 30 tokens"):
        recorder.require_finite(30)


def test_more_points_than_are_kept_unread_are_read(monkeypatch) -> None:
    monkeypatch.setattr(precision, "_WAITING", {"cpu"})
    recorder = History(1, torch.zeros(2))
    for step in range(CHECK_EVERY + 5):
        recorder.add(torch.tensor(float(step)), 1.0)
        recorder.record(step, float("nan"))
    assert len(recorder.points) == CHECK_EVERY
    recorder.read()
    assert [point["mse"] for point in recorder.points] == list(range(CHECK_EVERY + 5))


@dataclass(frozen=True)
class _Unknown(Mitigation):
    def after_step(self, trainer: Any, output: Any) -> None:
        """Of a user's, who may do anything."""


def test_which_mitigations_may_have_changed_weights() -> None:
    every = 5 * BATCH
    given = [
        Resampling(every_tokens=every, until=1.0, n_batches=2),
        GhostGradients(),
        KAnnealing(k_start=4, share=0.5),
        _Unknown(),
    ]
    trainer = _trainer(n_steps=20, mitigations=given)
    when = {}
    for step in range(1, 11):
        trainer.tokens_before, trainer.n_training_samples = (step - 1) * BATCH, step * BATCH
        when[step] = [mitigation.may_change_weights(trainer) for mitigation in given]
    resamples = {step for step, (changes, *_) in when.items() if changes}
    assert resamples == {5, 6, 10}
    assert all(others == [False, False, True] for _, *others in when.values())
