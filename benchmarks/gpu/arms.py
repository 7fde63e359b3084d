"""One SAE of the headline: made, trained on activations that lie on the card, and judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import stage
import torch
from model import HOOK
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

import saesub
from saesub.topk import cuda_search, triton_backend

K = 32
_JUDGED_AT_ONCE = 16_384
_MOST_DRAWN_FROM = 2**22  # tokens among which a start at tokens chooses
_FIRST_WINDOW = 8192
_RECALL_TOKENS = 4096


class OutOfTimeError(Exception):
    """An arm did not end within its seconds."""


@dataclass(frozen=True)
class Arm:
    """How an SAE is trained. `start` is "random", "subspace" or "whitened_data"; `fitted` says
    whether its norm is the one of least error before training, else it is 1; the rate falls to
    1/32 over the last share of the steps that `cooling` is; the decoder is refitted to the first
    `refitted` training tokens, if any."""

    start: str
    optimizer: str
    lr: float
    d_sae: int
    batch: int
    steps: int
    fitted: bool = True
    cooling: float = 0.2
    refitted: int = 0
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch

    @property
    def cooling_steps(self) -> int:
        return int(self.cooling * self.steps)


@dataclass(frozen=True)
class Site:
    """Training rows and held-out rows on the device, the first of the former and their spectrum on
    the CPU."""

    train: saesub.ActivationStore
    held_out: saesub.ActivationStore
    spectrum: saesub.Spectrum
    x: Tensor


def site(rows: Tensor, n_held_out: int, n_spectrum: int = 200_000) -> Site:
    """Split rows (n, d) in the order of the text; the last are held out."""
    train, held_out = saesub.ActivationStore.of(rows, HOOK).split(n_held_out)
    x = train.rows(0, min(n_spectrum, train.n_tokens)).cpu()
    return Site(train, held_out, saesub.Spectrum.from_activations(x), x)


class Untrained:
    """SAEs at step 0. The random weights of a width and seed are drawn once, on the CPU, as those
    of the CPU's records are."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._drawn: tuple[tuple[int, int, int], TopKTrainingSAE] | None = None

    def __call__(self, arm: Arm, place: Site) -> TopKTrainingSAE:
        sae = copy.deepcopy(self._random(place.spectrum.d, arm.d_sae, arm.seed))
        sae.cfg.device = self.device
        sae = sae.to(self.device)
        norm = "fit" if arm.fitted else "keep"
        given: dict[str, Any] = {"activations": place.x, "seed": arm.seed}
        if arm.start == "subspace":
            saesub.initialize_in_subspace(sae, place.spectrum, "auto", norm=norm, **given)
            return sae
        if arm.start == "whitened_data":
            given |= {"activations": _drawn_from(place.train), "directions": arm.start}
            saesub.initialize_in_subspace(sae, place.spectrum, norm=norm, **given)
            return sae
        saesub.center_biases(sae, place.spectrum)
        if arm.fitted:
            saesub.fit_norm(sae, place.spectrum, **given)
        return sae

    def _random(self, d_in: int, d_sae: int, seed: int) -> TopKTrainingSAE:
        key = d_in, d_sae, seed
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = None
            torch.manual_seed(seed)
            cfg = TopKTrainingSAEConfig(
                d_in=d_in,
                d_sae=d_sae,
                k=K,
                decoder_init_norm=1.0,
                aux_loss_coefficient=0.0,
                normalize_activations="expected_average_only_in",
            )
            self._drawn = key, TopKTrainingSAE(cfg)
        return self._drawn[1]


def trainer_of(
    sae: TopKTrainingSAE, arm: Arm, device: str, backend: str, window: int
) -> saesub.SubspaceSAETrainer:
    """The trainer of an arm that has made no step. Its counts of firing are never set back."""
    cooling = {"lr_end": arm.lr / 32, "lr_decay_steps": arm.cooling_steps}
    cfg = SAETrainerConfig(
        total_training_samples=arm.tokens,
        train_batch_size_samples=arm.batch,
        lr=arm.lr,
        lr_warm_up_steps=max(1, arm.steps // 20) if arm.cooling else min(10, arm.steps - 1),
        n_batches_for_norm_estimate=20,
        feature_sampling_window=arm.steps + 1,
        device=device,
        **(cooling if arm.cooling else {"lr_end": arm.lr / 10}),
    )
    given: dict[str, Any] = {"optimizer": arm.optimizer, "backend": backend}
    return saesub.SubspaceSAETrainer(cfg, sae, iter(()), dead_window_tokens=window, **given)


@dataclass(frozen=True)
class Outcome:
    """What is said of an arm, and counts of firing (d_sae,) by name."""

    about: dict[str, Any]
    counts: dict[str, np.ndarray]


def outcome(arm: Arm, place: Site, untrained: Untrained, backend: str, seconds: float) -> Outcome:
    """Train and judge an arm.

    Raises:
        OutOfTimeError: training would take more than `seconds`.
    """
    start = time.monotonic()
    sae = untrained(arm, place)
    norm = float(sae.W_dec[0].detach().norm())
    trainer = trainer_of(sae, arm, untrained.device, backend, arm.tokens // 2)
    made = time.monotonic()
    cooling = _train(trainer, arm, place, seconds)
    _wait(untrained.device)
    trained = time.monotonic()
    fires = trainer.act_freq_scores.round().to(torch.int64)
    found = saesub.judge(trainer.sae, _blocks(place.held_out), n_tokens=place.held_out.n_tokens)
    about = asdict(arm) | {
        "backend": backend,
        "tokens": arm.tokens,
        "epochs": arm.tokens / place.train.n_tokens,
        "norm_at_start": norm,
        "fvu": found.fvu,
        "l0": found.l0,
        "held_out_tokens": found.n_tokens,
        "silent_held_out": found.silent,
        "silent_at_end_of_training": _silent(trainer.tokens_since_fired, arm.tokens),
        "never_fired_in_training": float((fires == 0).double().mean()),
        "mean_fires_in_training": float(fires.double().mean()),
        "history": trainer.history,
        "seconds": {
            "made": made - start,
            "trained": trained - made,
            "judged": time.monotonic() - trained,
        },
        "tokens_per_second": arm.tokens / (trained - made),
        "peak_bytes": _peak(untrained.device),
        "recall": _recall(trainer.sae, place.held_out) if backend == "triton" else None,
    }
    if arm.refitted:
        about |= _refitted(trainer.sae, place, arm.refitted)
    counts = {"training": fires, "held_out": found.counts}
    if cooling is not None:
        counts["cooling"] = fires - cooling
    return Outcome(about, {name: c.cpu().numpy().astype("<u4") for name, c in counts.items()})


def seconds_per_step(
    arm: Arm, place: Site, untrained: Untrained, backend: str, n: tuple[int, int] = (5, 15)
) -> float:
    """Seconds of a step of the arm, over the last `n[1]` of `n[0] + n[1]` steps."""
    arm = replace(arm, steps=sum(n), fitted=False, cooling=0.0)
    trainer = trainer_of(untrained(arm, place), arm, untrained.device, backend, arm.tokens)
    trainer.activation_scaler.scaling_factor = 1.0
    batches = place.train.batches(arm.batch, seed=arm.seed)
    start = 0.0
    for step in range(sum(n)):
        if step == n[0]:
            _wait(untrained.device)
            start = time.monotonic()
        trainer.step(next(batches))
        trainer.n_training_steps += 1
    _wait(untrained.device)
    return (time.monotonic() - start) / n[1]


def _train(
    trainer: saesub.SubspaceSAETrainer, arm: Arm, place: Site, seconds: float
) -> Tensor | None:
    """Train to the end; returns the counts of firing when the rate begins to fall, if it does.

    The batches are those of the CPU's studies: `train_together` on one condition.
    """
    clock, at_cooling = stage.Clock(seconds), []
    first = arm.steps - arm.cooling_steps if arm.cooling else None

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        # Not `joint_batches`, which computes a checksum of all rows.
        for batch in place.train.batches(arm.batch, seed=arm.seed, start_step=step):
            if clock.left < 0:
                done = trainer.n_training_samples
                raise OutOfTimeError(f"{done:,} of {arm.tokens:,} tokens in {seconds:.0f} s")
            if trainer.n_training_steps == first and not at_cooling:
                at_cooling.append(trainer.act_freq_scores.round().to(torch.int64))
            yield {HOOK: batch}

    saesub.train_together({"arm": trainer}, batches)
    return at_cooling[0] if at_cooling else None


def _refitted(sae: TopKTrainingSAE, place: Site, n_tokens: int) -> dict[str, Any]:
    """The error on held-out tokens once the decoder is refitted, and what that takes."""
    start = time.monotonic()
    blocks = _blocks(place.train, min(n_tokens, place.train.n_tokens))
    report = saesub.refit_decoder(sae, blocks, progress=False)
    seconds = time.monotonic() - start
    found = saesub.judge(sae, _blocks(place.held_out), n_tokens=place.held_out.n_tokens)
    about = {"fvu": found.fvu, "dead": list(found.silent.values())[-1], "seconds": seconds}
    return {"after_refit": about | asdict(report)}


@torch.no_grad()
def _recall(sae: TopKTrainingSAE, held_out: saesub.ActivationStore) -> dict[str, float]:
    """The share of the float32 top k that the search in few bits finds, on trained weights."""
    x = held_out.rows(0, min(_RECALL_TOKENS, held_out.n_tokens)).to(sae.device)
    x = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    W_enc, k, found = sae.W_enc.detach().T.contiguous().T, sae.activation_fn.k, {}
    for bits in (16, 8):
        backend = triton_backend.TritonBackend(eight_bits=bits == 8)
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        shadow = backend.shadow_of(W_enc, sae.W_dec.detach(), scaled=scaled)
        given = (x, W_enc, sae.b_enc, k, shadow.norms)
        features, _ = shadow.search(*given)
        exact, _ = cuda_search.search(*given, exact=True)
        hit = (exact[:, :, None] == features[:, None, :]).any(2)
        found[f"{bits} bits"] = float(hit.double().mean())
    return found


def _blocks(store: saesub.ActivationStore, n_tokens: int | None = None) -> Iterator[Tensor]:
    """The first `n_tokens` rows, or all of them."""
    n = store.n_tokens if n_tokens is None else n_tokens
    for start in range(0, n, _JUDGED_AT_ONCE):
        yield store.rows(start, min(start + _JUDGED_AT_ONCE, n))


def _drawn_from(store: saesub.ActivationStore) -> Tensor:
    """At most `_MOST_DRAWN_FROM` rows, evenly spaced over the text, float32 on their device."""
    step = -(-store.n_tokens // _MOST_DRAWN_FROM)
    return torch.cat([block[::step] for block in _blocks(store)])


def _silent(since_fired: Tensor, tokens: int) -> dict[int, float]:
    """The share of features that were silent over the last 8,192, 16,384, ... training tokens."""
    windows = [_FIRST_WINDOW << i for i in range(40) if _FIRST_WINDOW << i < tokens] + [tokens]
    return {w: float((since_fired >= w).double().mean()) for w in windows}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
