"""What the rivals of rivals.py are: each by its source, and what of it is our own reading.

- Aligned training: `AlignedSAE` and `Aligned`.
- GroupMax: `GroupMaxSAE`.
- AuxK as its authors define it: `AuxKOfGao`.
- Sign descent: `ScheduleFreeSign` and `AverageAtEnd`.

None is saved: SAELens would load a `GroupMaxSAE` as TopK.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from saesub.errors import SaesubError
from saesub.topk.sae import SparseTopKTrainingSAE
from saesub.topk.sae_search import search_for
from saesub.topk.step import autograd_pass
from saesub.training.mitigations import Mitigation


def aligned(
    W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "d_in d_sae"]:
    """The nearest encoder whose inner product with the decoder is 1 for every feature."""
    lacking = 1 - (W_enc * W_dec.T).sum(0)
    return W_enc + W_dec.T * (lacking / W_dec.square().sum(1))


class AlignedSAE(SparseTopKTrainingSAE):
    """Aligned training (arXiv 2605.18629) of a TopK SAE; it takes `Aligned` as a mitigation.

    The abstract says: a reparametrisation without a parameter of its own lets the inner product of
    encoder and decoder be 1 for every feature; nothing else changes. Which reparametrisation it is
    we could not read. Ours: a step uses `aligned(W_enc, W_dec)` for W_enc, so what the encoder has
    along the decoder is no parameter, and the gradient of the decoder includes what its turning
    does to the encoder. After the step W_enc becomes what is used (`Aligned`).

    Decoder rows keep their lengths. With `rescale_acts_by_decoder_norm`, as SAELens has it, a
    feature with its row scaled by c and its column by 1 / c is the same feature, with the same
    inner product, so a unit norm would change nothing but how far Adam's steps turn a row.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The sparse pass, by autograd, with the aligned encoder. Raises SaesubError for AuxK."""
        _refuse_auxk(self)
        free = self._parameters["W_enc"]
        assert free is not None
        self._parameters["W_enc"] = aligned(free, self.W_dec)  # pyright: ignore[reportArgumentType]
        try:
            search = search_for(self, in_subspace=self.in_subspace)
            return autograd_pass(self, step_input.sae_in, None, search=search)
        finally:
            self._parameters["W_enc"] = free


@dataclass(frozen=True)
class Aligned(Mitigation):
    """After each step the encoder becomes the nearest aligned one; see `AlignedSAE`."""

    @torch.no_grad()
    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Align the encoder."""
        sae = trainer.sae
        sae.W_enc.copy_(aligned(sae.W_enc, sae.W_dec))


class GroupMax(nn.Module):
    """The largest of each of k equal groups of features, and ReLU; 0 elsewhere."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """(..., d_sae) pre-activations to activations."""
        features = group_maxima(x, self.k)
        return torch.zeros_like(x).scatter(-1, features, x.gather(-1, features).relu())


def group_maxima(x: Float[Tensor, "... d_sae"], k: int) -> Int[Tensor, "... k"]:
    """The feature with the largest value in each of k groups of successive features.

    Raises SaesubError if k does not divide d_sae.
    """
    d_sae = x.shape[-1]
    if d_sae % k:
        raise SaesubError(f"{d_sae} features make no {k} equal groups: choose a k that divides it.")
    first = torch.arange(0, d_sae, d_sae // k, device=x.device)
    return x.unflatten(-1, (k, -1)).argmax(-1) + first


class GroupMaxSAE(SparseTopKTrainingSAE):
    """A TopK SAE whose k active features are the largest of k groups.

    As in EleutherAI's library `sparsify` (README, experimental features, June 2026), where groups
    are successive features too. It saves the search for the k largest among all.
    """

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """`GroupMax`."""
        return GroupMax(self.cfg.k)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The sparse pass, by autograd, through the maxima. Raises SaesubError for AuxK."""
        _refuse_auxk(self)
        return autograd_pass(self, step_input.sae_in, None, search=_search_groups)


def _search_groups(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The features of `group_maxima`, and their pre-activations."""
    pre = torch.addmm(b_enc, x, W_enc)
    features = group_maxima(pre if feature_scale is None else pre * feature_scale, k)
    return features, pre.gather(1, features)


def _refuse_auxk(sae: SparseTopKTrainingSAE) -> None:
    if sae.cfg.aux_loss_coefficient:
        raise SaesubError(f"{type(sae).__name__} takes no AuxK: set aux_loss_coefficient=0.")


@dataclass(frozen=True)
class AuxKOfGao(Mitigation):
    """AuxK by the definition of Gao et al. (arXiv 2406.04093) and their published code.

    The `k_aux` dead features with the largest pre-activations, through ReLU, reconstruct the
    residual e = x - x̂ as ê. Added to the loss is the coefficient times ‖ê - e‖² over the batch,
    divided by the sum of the squared distances of e to its mean, and 0 where that is NaN. Their
    main loss is divided by the variance of x; SAELens' is not, so the sum here is multiplied by
    that variance (theirs is of one sample, ours of the batch).

    What SAELens does otherwise (`TopKTrainingSAE.calculate_topk_aux_loss`, 6.54): it does not
    divide by the residual's variance, so that its coefficient of 1/32 is about FVU/32 here; there
    is no ReLU; k_aux is d_in // 2, not a power of two near it; with fewer dead features than k_aux
    the loss shrinks in proportion; and the default coefficient is 1. Both leave the decoder bias
    out of ê, as the paper does; the authors' code lets that bias learn from this loss.

    Args:
        coefficient: 1/32, the paper's.
        k_aux: a power of two near half of d_in; 256 in the authors' code, for a d_in of 768.
    """

    coefficient: float = 1 / 32
    k_aux: int = 256
    loss_name: ClassVar[str | None] = "auxk_of_gao"

    def extra_loss(self, trainer: Any, output: TrainStepOutput) -> Float[Tensor, ""]:
        """The loss in the scale of SAELens' main loss; 0 while no feature is dead."""
        sae, rows = trainer.sae, trainer.dead_neurons.nonzero().squeeze(1)
        if not len(rows):
            return sae.b_dec.new_zeros(())
        x = output.sae_in.to(sae.dtype)
        residual = (x - output.sae_out).detach()
        centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
        W_dec = sae.W_dec.index_select(0, rows)
        pre = centred @ sae.W_enc.index_select(1, rows) + sae.b_enc.index_select(0, rows)
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        ranked = (pre * W_dec.norm(dim=1) if scaled else pre).detach()
        best = ranked.topk(min(self.k_aux, len(rows)), sorted=False).indices
        acts = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best).relu())
        error = (acts @ W_dec - residual).square().sum()
        of_variance = (error / _squared_distances(residual)).nan_to_num(0)
        return self.coefficient * of_variance * _squared_distances(x) / len(x)


def _squared_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The sum of the rows' squared distances to their mean."""
    return (x - x.mean(0)).square().sum()


class ScheduleFreeSign(torch.optim.Optimizer):
    """Sign descent inside the schedule-free averaging of Defazio et al. (2024).

    What EleutherAI's library `sparsify` trains by, and calls signum: z moves by the rate against
    the sign of the gradient at y = 0.05 z + 0.95 x, and x is the mean of all z. The parameters are
    y until `average` makes them x. A feature without a gradient has a z that stands still. Its
    authors' rate, without a schedule, is 5e-3 / √(d_sae / 2¹⁴).
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.n_steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """Move z, the mean x of all z, and with them the parameters y, which have a gradient."""
        self.n_steps += 1
        for group in self.param_groups:
            for y in group["params"]:
                z, x = self._z(y), self._x(y, group)
                z.add_(y.grad.sign(), alpha=-group["lr"])
                x.lerp_(z, 1 / self.n_steps)
                y.copy_(z.lerp(x, group["momentum"]))

    @torch.no_grad()
    def average(self) -> None:
        """Let the parameters be x, the weights to use; no step may follow."""
        for group in self.param_groups:
            for y in group["params"]:
                y.copy_(self._x(y, group))

    def _z(self, y: nn.Parameter) -> Tensor:
        state = self.state[y]
        if "z" not in state:
            state["z"] = y.detach().clone()
        return state["z"]

    def _x(self, y: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """From y and z, so that it takes no memory."""
        return (y.detach() - (1 - group["momentum"]) * self._z(y)) / group["momentum"]


@dataclass(frozen=True)
class AverageAtEnd(Mitigation):
    """After the last step the weights become the average of a `ScheduleFreeSign`."""

    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Average, if the run is over."""
        if trainer.n_training_samples >= trainer.cfg.total_training_samples:
            trainer.optimizer.average()
