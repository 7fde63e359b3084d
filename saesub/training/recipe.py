"""How to train a TopK SAE so that hardly a feature dies, without a sweep.

Five lines, which a reader can apply by hand:

1. Start at whitened tokens drawn from all training documents; where the effective rank of the
   variances is below a twentieth of the width, in the active subspace (`directions="flat"`).
   The bias at the mean, the norm fitted.
2. SparseAdam, batches of 1,024 tokens, β = 0.9 and 0.999.
3. A learning rate of 0.002 · (250 / steps)^¼; 0.0035 in place of 0.002 where the effective rank is
   so low.
4. The rate rises over the first twentieth of the steps and falls to zero over the last half.
5. After the last step, refit the decoder by least squares (`saesub.refit_decoder`). At the one
   place where it was tried, two more passes over the tokens brought more in that time.

`notebooks/studies/recipe.py` compares it with swept baselines in regimes that were fixed before.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from sae_lens import SAE, LanguageModelSAERunnerConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from saesub.activations.spectrum import Spectrum, require_spectrum
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.init.directions import Directions
from saesub.init.subspace import SubspaceInit, initialize_in_subspace
from saesub.topk.optim import OptimizerName

BATCH_SIZE = 1024
LOW_RANK = 0.05  # effective rank of the variances, as a share of the width
RANKS_TRIED = (0.02, 0.064)  # the nearest sites that it was tried at
LR, LR_AT_LOW_RANK = 0.002, 0.0035  # of 250 steps
NORM_BATCHES = 20  # that SAELens reads before training
WARM_UP, DECAY = 0.05, 0.5  # shares of the steps
_SAE_SETTINGS: dict[str, Any] = {
    "normalize_activations": "expected_average_only_in",
    "aux_loss_coefficient": 0.0,
}
# What the studies cover, and a factor of two beyond on each side.
COVERED = {
    "d_in": (288, 1792),
    "d_sae": (1024, 8192),
    "k": (16, 128),
    "d_sae / k": (32, 128),
    "n_tokens": (32_000, 512_000),
}


@dataclass(frozen=True)
class Recipe:
    """Settings for one SAE, with their reasons; `apply` sets them.

    Attributes:
        directions: rule by which features start, see `saesub.init.directions`.
        optimizer: for `SubspaceSAETrainer(optimizer=...)`.
        lr: learning rate of SparseAdam.
        batch_size: tokens of a step.
        n_tokens: tokens of the whole training.
        warm_up_steps: steps in which the rate rises.
        decay_steps: last steps, in which it falls to zero.
        reasons: a sentence for each choice.
        spectrum: of the activations.
    """

    directions: Directions
    optimizer: OptimizerName
    lr: float
    batch_size: int
    n_tokens: int
    warm_up_steps: int
    decay_steps: int
    reasons: tuple[str, ...]
    spectrum: Spectrum = field(repr=False, compare=False)

    def __str__(self) -> str:
        """The settings, and a line for each reason."""
        settings = (
            f"{self.directions} start, {self.optimizer} at {self.lr:g}, batches of "
            f"{self.batch_size:,}, {self.n_tokens:,} tokens, {self.warm_up_steps:,} steps of "
            f"warm-up, the last {self.decay_steps:,} falling to zero, then refit_decoder"
        )
        return "\n".join((settings, *(f"- {reason}" for reason in self.reasons)))

    def apply(
        self,
        sae: SAE[Any],
        cfg: SAETrainerConfig | LanguageModelSAERunnerConfig,
        activations: Float[Tensor, "n d_in"],
        *,
        seed: int = 0,
    ) -> SubspaceInit:
        """Initialise the SAE and set the config's batches, rate and schedule, both in place.

        The SAE's config is set to what the studies had: activations scaled to an average norm of
        √d in training, for which the rate is meant, and no AuxK. The optimizer is an argument of
        the trainer, and the refit a call after training:

            recipe.apply(sae, cfg, tokens)
            saesub.SubspaceSAETrainer(cfg, sae, batches, optimizer=recipe.optimizer).fit()
            saesub.refit_decoder(sae, training_batches)

        SAELens' runner trains with Adam. From its config, train by
        `SubspaceSAETrainer(cfg.to_sae_trainer_config(), ...)`.

        Args:
            sae: an untrained TopK SAE of SAELens.
            cfg: of SAELens' trainer or its runner; the runner's brings a warning.
            activations: (n, d_in), unscaled, from all training documents, best 8 d_sae of them.
            seed: of the tokens that are drawn.

        Raises:
            SaesubError: as `initialize_in_subspace` and `recommend`, or another kind of config.
                Nothing is then changed.
        """
        _check_covered(self.spectrum, getattr(sae, "cfg", None), self.n_tokens)
        sizes = {
            SAETrainerConfig: ("train_batch_size_samples", "total_training_samples"),
            LanguageModelSAERunnerConfig: ("train_batch_size_tokens", "training_tokens"),
        }
        names = next((n for kind, n in sizes.items() if isinstance(cfg, kind)), None)
        if names is None:
            raise SaesubError(
                f"cfg is a {type(cfg).__name__}: pass SAELens' SAETrainerConfig or "
                "LanguageModelSAERunnerConfig."
            )
        if isinstance(cfg, LanguageModelSAERunnerConfig):
            warnings.warn(
                f"SAELens' runner trains with Adam, for which a rate of {self.lr:g} was not tried: "
                "train by saesub.SubspaceSAETrainer(cfg.to_sae_trainer_config(), sae, batches, "
                f"optimizer={self.optimizer!r}).",
                stacklevel=2,
            )
        before = {name: getattr(sae.cfg, name) for name in _SAE_SETTINGS}
        vars(sae.cfg).update(_SAE_SETTINGS)
        try:
            done = initialize_in_subspace(
                sae, self.spectrum, directions=self.directions, activations=activations, seed=seed
            )
        except BaseException:
            vars(sae.cfg).update(before)
            raise
        settings = dict(zip(names, (self.batch_size, self.n_tokens), strict=True)) | {
            "lr": self.lr,
            "lr_end": self.lr,
            "lr_scheduler_name": "constant",
            "lr_warm_up_steps": self.warm_up_steps,
            "lr_decay_steps": self.decay_steps,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "n_batches_for_norm_estimate": NORM_BATCHES,
        }
        for name, value in settings.items():
            setattr(cfg, name, value)
        if isinstance(cfg, LanguageModelSAERunnerConfig):  # it has an SAE's config of its own
            vars(cfg.sae).update(_SAE_SETTINGS)
        return done


def recommend(spectrum: Spectrum, sae_cfg: Any, n_tokens: int) -> Recipe:
    """What to train an SAE with, from what is known before, and why.

    Args:
        spectrum: of the activations, from training documents.
        sae_cfg: `sae.cfg` of a SAELens TopK training SAE.
        n_tokens: tokens of the whole training.

    Raises:
        SaesubError: a config of another width than the spectrum's, or a case that the studies do
            not cover: another architecture than TopK, a spectrum that counts massive tokens, or a
            width, number of features, active features or steps more than a factor of two beyond
            theirs.

    Example:
        >>> recipe = saesub.recommend(spectrum, sae.cfg, n_tokens=256_000)  # doctest: +SKIP
        >>> print(recipe)  # doctest: +SKIP
    """
    require_spectrum(spectrum)
    n_tokens = whole_number(n_tokens, "n_tokens", 1)
    _check_covered(spectrum, sae_cfg, n_tokens)
    steps = n_tokens // BATCH_SIZE
    rank = spectrum.effective_rank("variance") / spectrum.d
    low = rank < LOW_RANK
    between = " It was tried at no site between {:.1%} and {:.1%}.".format(*RANKS_TRIED)
    lr = float(f"{(LR_AT_LOW_RANK if low else LR) * (250 / steps) ** 0.25:.3g}")
    return Recipe(
        directions="flat" if low else "whitened_data",
        optimizer="sparse_adam",
        lr=lr,
        batch_size=BATCH_SIZE,
        n_tokens=n_tokens,
        warm_up_steps=round(WARM_UP * steps),
        decay_steps=round(DECAY * steps),
        reasons=(
            f"Effective rank {100 * rank:.1f} % of the width, "
            + ("below" if low else "not below")
            + f" {100 * LOW_RANK:.0f} %: "
            + ("the active subspace" if low else "whitened tokens")
            + " fitted better there in pilots, which are not recorded."
            + between * (RANKS_TRIED[0] < rank < RANKS_TRIED[1]),
            "SparseAdam: a feature that is silent stands still, and so does not drift away.",
            f"Rate {lr:g}: tried at 62 and 250 steps, where its half and its double had an FVU at "
            "most 8 % lower, mostly higher; elsewhere it follows the fourth root of the steps. "
            f"This run has {steps:,}.",
            "It falls over the last half: in the same pilots that was better than over the last "
            "fifth, and than over all steps where the effective rank is low.",
            "The refit: each feature fires about "
            f"{n_tokens * sae_cfg.k / sae_cfg.d_sae:,.0f} times, too few for gradient steps to "
            "find the best decoder; it changes no feature's firings. On a CPU it takes longer than "
            "the training. At the one place where it was tried, two more passes over the tokens "
            "fitted better in that time (notebook 07): if you can train longer, do that first.",
        ),
        spectrum=spectrum,
    )


def _check_covered(spectrum: Spectrum, sae_cfg: Any, n_tokens: int) -> None:
    if isinstance(sae_cfg, SAE):
        raise SaesubError("The recipe reads an SAE's config: pass sae.cfg.")
    kind = sae_cfg.architecture() if isinstance(sae_cfg, TopKTrainingSAEConfig) else None
    if kind != "topk":
        kind = kind or type(sae_cfg).__name__
        raise SaesubError(
            f"The recipe was tried with TopK SAEs alone, not {kind!r}: pass the cfg of a "
            "TopKTrainingSAE, or sweep the rate yourself from initialize_in_subspace."
        )
    if sae_cfg.normalize_activations not in ("none", "expected_average_only_in"):
        raise SaesubError(
            "The recipe was tried with activations scaled by one number, not "
            f"normalize_activations={sae_cfg.normalize_activations!r}: make the SAE with "
            "'expected_average_only_in'."
        )
    if spectrum.keeps_massive:
        raise SaesubError(
            "The recipe was tried with spectra without massive tokens, and this one counts them: "
            "measure it with keep_massive=False."
        )
    if sae_cfg.d_in != spectrum.d:
        raise SaesubError(
            f"The SAE reads activations of width {sae_cfg.d_in} and the spectrum is of {spectrum.d}"
            ": measure the spectrum at the SAE's hook point."
        )
    values = {
        "d_in": spectrum.d,
        "d_sae": sae_cfg.d_sae,
        "k": sae_cfg.k,
        "d_sae / k": sae_cfg.d_sae / sae_cfg.k,
        "n_tokens": n_tokens,
    }
    for name, value in values.items():
        least, most = COVERED[name]
        if not least <= value <= most:
            told = f"{value:,.1f}".removesuffix(".0")
            raise SaesubError(
                f"{name} would be {told}, and the studies behind the recipe reach from {least:,} "
                f"to {most:,}: take another, or sweep the rate yourself from "
                "initialize_in_subspace."
            )
