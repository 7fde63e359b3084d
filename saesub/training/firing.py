"""A SAELens trainer that counts in tokens how long each feature is silent, and keeps a history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from torch import Tensor

from saesub.activations.checks import FiniteWatch
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.training.history import CHECK_EVERY, History

_DEFAULT_WINDOW = SAETrainerConfig.dead_feature_window  # steps


class TokenCountingTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """`SAETrainer` whose dead features can be those silent over a window of tokens, not of steps.

    AuxK takes these too. Arguments and attributes are as in `SubspaceSAETrainer`.

    Attributes:
        tokens_before: those trained on before the last step.
        batch_is_finite: () bool on the device, whether the last batch counts; None where batches
            are checked before they are trained on.
    """

    n_forward_passes_since_fired: Tensor
    batch_is_finite: Bool[Tensor, ""] | None = None

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: Iterator[Tensor],
        dead_window_tokens: int | None,
        evaluator: Evaluator[Any] | None,
        save_checkpoint_fn: SaveCheckpointFn | None,
    ) -> None:
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        self.tokens_before = 0
        self.dead_window_tokens = _window(cfg, dead_window_tokens)
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=cfg.device)
        exact = torch.promote_types(sae.dtype, torch.float32)
        since = torch.zeros(2, dtype=exact, device=cfg.device)
        self.recorder = History(cfg.total_training_steps, since)
        self.bad_batches = FiniteWatch()
        self._steps_unread = 0

    @property
    def history(self) -> list[dict[str, float]]:
        """The points recorded so far."""
        self.recorder.read()
        return self.recorder.points

    def read_device(self) -> None:
        """Read what the device has noted of the steps so far; they did not wait for it.

        Raises:
            SaesubError: batches were not finite and were left out, or a loss was not finite.
        """
        self._steps_unread = 0
        if (bad := self.bad_batches.read()) is not None:
            n, first, last = bad
            raise SaesubError(
                f"Of the batches of steps {first:,} to {last:,}, {n:,} held NaN or infinite "
                "activations and were left out, and the weights are as without them: take them out "
                "of the data and continue."
            )
        self.recorder.read()

    @property
    def dead_neurons(self) -> Bool[Tensor, " d_sae"]:
        """(d_sae,) bool: silent for the whole window. SAELens' AuxK reads this.

        With batches of the configured size, a window of steps gives SAELens' own dead features.
        """
        return self.tokens_since_fired >= self.dead_window_tokens

    def _dead_by_steps(self) -> Bool[Tensor, " d_sae"]:
        """SAELens' own: silent for more than `cfg.dead_feature_window` steps."""
        return super().dead_neurons

    def tokens_of_silent_steps(self, n_steps: int) -> Int[Tensor, " d_sae"]:
        """(d_sae,) int64: what SAELens' count of silent steps is in tokens, if all of the `n_steps`
        so far had equally many."""
        silent = self.n_forward_passes_since_fired.long()
        return silent * (self.n_training_samples // max(1, n_steps))

    @property
    def has_seen_window(self) -> bool:
        """Whether as many tokens as the window has were trained on."""
        return self.n_training_samples >= self.dead_window_tokens

    def dead_fraction(self) -> float:
        """Share of features silent over the last `dead_window_tokens` training tokens.

        Raises:
            SaesubError: fewer tokens than the window has were trained on.
        """
        if not self.has_seen_window:
            raise SaesubError(
                f"Only {self.n_training_samples} tokens were trained on, less than the window of "
                f"{self.dead_window_tokens}: pass a smaller dead_window_tokens, or train longer."
            )
        return float(self._dead_share())

    def _dead_share(self) -> Tensor | float:
        """`dead_fraction`, left on the device."""
        return self.dead_neurons.float().mean()

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One training step on raw activations (batch, d_in), counted and recorded."""
        if self._steps_unread == CHECK_EVERY:
            self.read_device()
        self._steps_unread += 1
        self.tokens_before = before = self.n_training_samples
        output = super().step(batch)
        now, size = self.n_training_samples, self.cfg.train_batch_size_samples
        counts = self.batch_is_finite
        self.tokens_since_fired += now - before if counts is None else counts * (now - before)
        # `_train_step` has just set the counter of steps to zero where a feature fired.
        self.tokens_since_fired.masked_fill_(self.n_forward_passes_since_fired == 0, 0)
        self.recorder.add(output.losses["mse_loss"], (now - before) / size, counts)
        distance = self.recorder.every * size
        if now // distance > before // distance:
            dead_share = self._dead_share() if self.has_seen_window else float("nan")
            self.recorder.record(now, dead_share)
        return output

    @torch.no_grad()
    def _count_firing(self, counts: Int[Tensor, " d_sae"], n_tokens: int) -> None:
        """Keep SAELens' own counters of a step in which each feature fired `counts` times."""
        finite = self.batch_is_finite
        counts = counts if finite is None else counts * finite
        self.n_forward_passes_since_fired += 1 if finite is None else finite
        self.n_forward_passes_since_fired.masked_fill_(counts > 0, 0)
        self.act_freq_scores += counts
        self.n_frac_active_samples += n_tokens

    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        """What SAELens logs of a step and, after one window, the share of dead features.

        `sparsity/dead_features` is SAELens' count over its window of steps. It is logged if
        `cfg.logger` says so, which by default it does not.
        """
        figures = super().build_train_step_log_dict(output, n_training_samples)
        figures["sparsity/dead_features"] = self._dead_by_steps().sum().item()
        if n_training_samples >= self.dead_window_tokens:
            figures["sparsity/dead_share"] = self.dead_fraction()
        return figures

    def set_final_sae_metadata(self) -> None:
        """SAELens' figures, which count the dead over its window of steps, and the dead share over
        the window of tokens, or None if less was trained on.

        Raises SaesubError if the loss was not finite, or as `read_device`.
        """
        self.read_device()
        self.recorder.require_finite(self.n_training_samples)
        super().set_final_sae_metadata()
        metadata = self.sae.cfg.metadata
        if metadata.num_dead_features is not None:
            metadata.num_dead_features = int(self._dead_by_steps().sum())
        metadata.dead_window_tokens = self.dead_window_tokens
        metadata.dead_share = self.dead_fraction() if self.has_seen_window else None


def _window(cfg: SAETrainerConfig, dead_window_tokens: int | None) -> int:
    """The window in tokens. Raises SaesubError for an empty window, and for two of them."""
    if dead_window_tokens is None:  # SAELens' dead are silent for more steps than its window has
        return (cfg.dead_feature_window + 1) * cfg.train_batch_size_samples
    if cfg.dead_feature_window != _DEFAULT_WINDOW:
        raise SaesubError(
            f"Two windows were set, cfg.dead_feature_window={cfg.dead_feature_window} steps and "
            f"dead_window_tokens={dead_window_tokens} tokens: leave one of them out."
        )
    return whole_number(dead_window_tokens, "dead_window_tokens")
