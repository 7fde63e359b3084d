"""Training of SAELens' transcoders, for which SAELens has inference classes only.

A transcoder reads activations x at one hook point and predicts y at another through sparse
features (Dunefsky, Chlenski & Nanda 2024, arXiv 2406.11944); a skip transcoder adds a linear map
of x (Paulo, Shabalin & Belrose 2025, arXiv 2501.18823). The objects trained here are SAELens' own
with a loss added, so what they save loads with `SAE.load_from_disk` as a plain SAELens transcoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from safetensors.torch import load_file
from torch import Tensor

from saesub.activations.checks import require_finite
from saesub.activations.store import ActivationStore
from saesub.arguments import batch_of
from saesub.errors import SaesubError
from saesub.evaluation.passes import TOKENS_PER_BLOCK, encoded
from saesub.evaluation.reconstruction import Reconstruction, unexplained
from saesub.topk.encode import predictor_of
from saesub.training.comparison import StoreBatches, joint_batches


@dataclass
class TrainingTranscoderConfig(TranscoderConfig):
    """SAELens' `TranscoderConfig` (d_in, d_out, d_sae, ...) with `l1_coefficient`, in the units of
    the target (twice the target's scale asks for twice the coefficient), and `l1_warm_up_steps`.

    Raises SaesubError for an input that is rescaled, which SAELens cannot fold into a transcoder.
    """

    apply_b_dec_to_input: bool = False  # b_dec lives in the target's space; True is refused
    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations != "none":
            raise SaesubError(
                f"normalize_activations={self.normalize_activations!r} scales x alone or x and y "
                "alike, and SAELens cannot fold that into a transcoder: use 'none'."
            )


@dataclass
class TrainingSkipTranscoderConfig(TrainingTranscoderConfig, SkipTranscoderConfig):
    """`TrainingTranscoderConfig` of a skip transcoder."""


class TrainingTranscoder(Transcoder):
    """SAELens' `Transcoder`, ReLU, with the loss of its `StandardTrainingSAE`.

    `saesub.SubspaceSAETrainer` trains it on batches that hold x and y side by side,
    (batch, d_in + d_out), as in the values of `paired_batches`.

    Example:
        >>> cfg = TrainingTranscoderConfig(d_in=576, d_sae=4608, d_out=576, l1_coefficient=3.0)
        >>> transcoder = TrainingTranscoder(cfg)
        >>> initialize_in_subspace(transcoder, target, input_spectrum=source)  # doctest: +SKIP
        >>> SubspaceSAETrainer(recipe, transcoder, batches).fit()  # doctest: +SKIP
    """

    cfg: TrainingTranscoderConfig

    @property
    def batch_width(self) -> int:
        """Width of a training batch: d_in + d_out."""
        return self.cfg.d_in + self.cfg.d_out

    def get_coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """The coefficient of the penalty, as `SAETrainer` asks for it."""
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """‖y − ŷ‖² + l1 Σ_i f_i ‖W_dec_i‖, both averaged over tokens.

        `step_input.sae_in` (batch, d_in + d_out) holds x and y side by side. The output's `sae_in`
        is y, which is what SAELens compares its `sae_out` with.
        """
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        predicted, features = self.forward_with_activations(x)
        losses = {
            "mse_loss": (predicted - y).square().sum(-1).mean(),
            "l1_loss": step_input.coefficients["l1"] * (features @ self.W_dec.norm(dim=-1)).mean(),
        }
        return TrainStepOutput(
            sae_in=y,
            sae_out=predicted,
            feature_acts=features,
            hidden_pre=features,  # SAELens' trainer passes it on and never reads it
            loss=losses["mse_loss"] + losses["l1_loss"],
            losses=losses,
        )

    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """As SAELens' training SAEs do, for runs that are resumed."""
        self.load_state_dict(load_file(Path(checkpoint_path) / SAE_WEIGHTS_FILENAME))


class TrainingSkipTranscoder(TrainingTranscoder, SkipTranscoder):
    """`TrainingTranscoder` of SAELens' `SkipTranscoder`, which adds a linear map of x."""

    cfg: TrainingSkipTranscoderConfig


def paired_batches(
    source: ActivationStore,
    target: ActivationStore,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
) -> StoreBatches:
    """Endless shuffled batches of the same tokens at two sites, side by side, for `train_together`.

    Raises:
        SaesubError: the stores hold different tokens.
    """
    if source.settings != target.settings:
        raise SaesubError(
            f"The stores of {source.hook_name} and {target.hook_name} come from different text or "
            "settings: harvest both hook points in one call."
        )
    sites = {"source": source, "target": target}
    name = f"{source.hook_name} -> {target.hook_name}"
    batches = joint_batches(sites, batch_size, seed=seed, start_step=start_step)
    pairs = ({name: torch.cat(list(batch.values()), dim=1)} for batch in batches)
    return StoreBatches(pairs, batches.identity)


@torch.no_grad()
def transcoder_reconstruction(
    transcoder: Transcoder,
    pairs: Iterable[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]],
) -> Reconstruction:
    """FVU of the target, Σ‖y − ŷ‖² / Σ‖y − mean(y)‖², and mean L0, of any SAELens transcoder.

    A skip transcoder's linear part counts as what it predicts, not as features.

    Args:
        transcoder: in training or inference form.
        pairs: blocks (x, y) of the same tokens.

    Raises:
        SaesubError: blocks of other widths or unequal lengths, none at all, values that are not
            finite, constant targets, or an autoencoder.
    """
    if not isinstance(transcoder, Transcoder):
        raise SaesubError("this SAE predicts what it reads: judge it by saesub.reconstruction.")
    read, widths = predictor_of(transcoder), (transcoder.cfg.d_in, transcoder.cfg.d_out)

    def judged() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for pair in pairs:
            x, y = _pair(pair)
            if x.ndim != 2 or len(x) != len(y) or (x.shape[-1], *y.shape[1:]) != widths:
                raise SaesubError(
                    f"blocks of shapes {tuple(x.shape)} and {tuple(y.shape)} came, but the "
                    f"transcoder reads (n, {widths[0]}) and predicts (n, {widths[1]}): pass both "
                    "of the same tokens."
                )
            require_finite(y, "targets")
            targets = y.to(transcoder.device).split(TOKENS_PER_BLOCK)
            blocks = encoded(transcoder, x, read, progress=False)
            for target, (_, (features, predicted)) in zip(targets, blocks, strict=False):
                yield target, predicted, features

    return unexplained(judged())


def _pair(given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """x and y. Raises SaesubError for what is no pair of blocks of activations."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise SaesubError(f"give pairs (x, y) of blocks, not {type(given).__name__}.")
    return batch_of(given[0]), batch_of(given[1])
