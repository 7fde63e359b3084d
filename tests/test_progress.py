"""Bars of the long jobs: rate and time left, hidden on demand; one follows another process."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from saesub import SubspaceSAETrainer, dead_features, progress, train_together

N_STEPS, BATCH = 30, 64
RATE_AND_TIME_LEFT = re.compile(r"\[\d\d:\d\d<\d\d:\d\d, +[\d.]+k?(it|tok)/s\]")


def trainer() -> SubspaceSAETrainer:
    n = N_STEPS * BATCH
    cfg = SAETrainerConfig(total_training_samples=n, train_batch_size_samples=BATCH)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    return SubspaceSAETrainer(cfg, sae, slow_batches())


def slow_batches(n: int = N_STEPS) -> Iterator[torch.Tensor]:
    for _ in range(n):
        time.sleep(0.05)
        yield torch.randn(BATCH, 8)


def train_one_condition() -> None:
    train_together({"a": trainer()}, lambda _: ({"site": x} for x in slow_batches(N_STEPS + 1)))


JOBS = {
    "fit": lambda: trainer().fit(),
    "conditions": train_one_condition,
    "dead features": lambda: dead_features(trainer().sae, slow_batches(), n_tokens=N_STEPS * BATCH),
}


@pytest.mark.parametrize("job", JOBS)
def test_long_jobs_show_their_rate_and_the_time_left(
    capsys: pytest.CaptureFixture[str], job: str
) -> None:
    JOBS[job]()
    assert RATE_AND_TIME_LEFT.search(capsys.readouterr().err)


def test_a_bar_is_hidden_by_its_argument_and_by_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead_features(trainer().sae, slow_batches(), n_tokens=N_STEPS * BATCH, progress=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    JOBS["dead features"]()
    assert capsys.readouterr().err == ""


def test_a_bar_follows_what_is_written_and_never_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine's load: it is waited for, until the follower has looked so often."""
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    (tmp_path / "before").write_bytes(b"x" * 50)
    looks = 0
    count = progress._bytes_under

    def counted(folder: Path) -> int:
        nonlocal looks
        looks += 1
        return count(folder)

    monkeypatch.setattr(progress, "_bytes_under", counted)
    with progress.bar(total=100, progress=True, file=io.StringIO()) as shown:
        shown.update(5)
        with progress.following(shown, tmp_path, most=45):
            for size, expected in [(10, 15), (30, 35), (5, 35), (1000, 45)]:
                (tmp_path / "wheel").write_bytes(b"x" * size)
                before, end = looks, time.monotonic() + 60
                while looks < before + 3 and time.monotonic() < end:
                    time.sleep(0.01)
                assert shown.n == expected
        before = looks
        time.sleep(0.1)
        assert looks == before
