"""The language model's loss with a site cut down to a subspace, or with an SAE spliced in.

`subspace_loss_recovered` keeps the top principal directions of a site. `sae_loss` replaces a site
by an SAE's reconstruction, with SAELens' own measurement.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_contexts, site_activations
from saesub.loading.models import Model, context_tokens, load_model
from saesub.progress import bar
from saesub.topk.encode import flat_heads

Ablation = Literal["mean", "zero"]
Condition = int | Literal["clean", "zero"]
_ABLATED: dict[Ablation, Condition] = {"mean": 0, "zero": "zero"}
_RESAMPLES = 1000  # of the bootstrap
_LEAST_COST = 1e-6  # nats a token; what float32 leaves of an ablation that costs nothing


class Estimate(NamedTuple):
    """A value and the 95 % bootstrap interval around it.

    The value is NaN where ablation costs nothing, so that there is no loss to recover. An end of
    the interval is NaN where that is so in too many resamples to tell it.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class SubspaceLoss:
    """Cross-entropy (nats a token) with a site cut down to its top principal directions.

    `loss_sums` holds, for each condition, the summed loss of every context over its `n_predicted`
    predictions. A condition is a number of directions kept (0 is mean ablation), "clean" or "zero"
    (zero ablation). Keeping all `d` directions is the clean run.
    """

    d: int
    loss_sums: Mapping[Condition, Float[np.ndarray, " contexts"]]
    n_predicted: Int[np.ndarray, " contexts"]

    def ce(self, condition: Condition) -> float:
        """Mean cross-entropy under a condition: "clean", "zero", 0 (mean ablation), or r."""
        if condition not in self.loss_sums:
            raise SaesubError(
                f"{condition!r} was not measured: choose one of {list(self.loss_sums)}"
            )
        return float(self.loss_sums[condition].sum() / self.n_predicted.sum())

    def recovered(self, ablation: Ablation = "mean") -> dict[int, Estimate]:
        """(CE_ablated - CE_r) / (CE_ablated - CE_clean) for each r measured; the interval is over
        contexts. NaN, with a warning, if ablation adds no loss."""
        curve = self._resampled(ablation)
        return {r: _estimate(curve[r]) for r in curve if r and r in self.loss_sums}

    def components_for(self, share: float = 0.9, ablation: Ablation = "mean") -> Estimate:
        """The smallest share of the d directions that recovers `share` of the loss, by linear
        interpolation between the numbers measured; NaN, with a warning, if ablation adds no loss.
        Raises SaesubError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise SaesubError(f"share of the loss must lie in (0, 1], not {share}")
        curve = self._resampled(ablation)
        grid, curves = np.array([*curve]) / self.d, np.stack([*curve.values()], axis=1)
        return _estimate(np.array([_crossing(grid, values, share) for values in curves]))

    @cached_property
    def _resamples(self) -> np.ndarray:
        """Counts of each context: a row for the sample itself, the others for the bootstrap."""
        n = len(self.n_predicted)
        draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=_RESAMPLES)
        return np.concatenate([np.ones((1, n)), draws])

    def _resampled(self, ablation: Ablation) -> dict[int, Float[np.ndarray, " resamples"]]:
        """Number of directions, ascending -> share of the loss recovered in every resample."""
        if ablation not in _ABLATED:
            raise SaesubError(f"ablation must be 'mean' or 'zero', not {ablation!r}")
        weight = self._resamples @ self.n_predicted
        ce = {c: self._resamples @ sums / weight for c, sums in self.loss_sums.items()}
        kept = {self.d: ce["clean"]} | {c: v for c, v in ce.items() if isinstance(c, int)}
        ablated = ce[_ABLATED[ablation]]
        cost = ablated - ce["clean"]
        if not cost[0] > _LEAST_COST:
            warnings.warn(_no_cost(ablation, cost[0]), stacklevel=3)
        cost[~(cost > _LEAST_COST)] = np.nan
        return {r: (ablated - kept[r]) / cost for r in sorted(kept)}


def _no_cost(ablation: Ablation, cost: float) -> str:
    return (
        f"{ablation} ablation costs {cost:.2g} nats a token, so there is no loss to recover and "
        "the share is NaN: measure more contexts, or another site"
    )


def _estimate(values: Float[np.ndarray, " resamples"]) -> Estimate:
    resampled = values[1:]
    unknown = np.isnan(resampled)
    with np.errstate(invalid="ignore"):  # an end that is infinite, and so unknown, becomes NaN
        low = np.quantile(np.where(unknown, -np.inf, resampled), 0.025)
        high = np.quantile(np.where(unknown, np.inf, resampled), 0.975)
    return Estimate(float(values[0]), float(low), float(high))


def _crossing(grid: np.ndarray, curve: np.ndarray, share: float) -> float:
    """Where the curve first reaches `share`, if it has values; its last point is 1."""
    if np.isnan(curve[-1]):
        return float("nan")
    i = int(np.argmax(curve >= share - 1e-9))
    if i == 0:
        return float(grid[0])
    part = (share - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(grid[i - 1] + min(part, 1.0) * (grid[i] - grid[i - 1]))


@torch.no_grad()
def subspace_loss_recovered(
    model: Model,
    tokens: Int[Tensor, "contexts pos"],
    hook_name: str,
    spectrum: Spectrum,
    n_components: Sequence[int],
    *,
    batch_size: int = 8,
    skip_first: int = 1,
    progress: bool = True,
) -> SubspaceLoss:
    """The loss with x at `hook_name` replaced by mean + U_r U_rᵀ (x - mean), for each r.

    The mean and the directions are the spectrum's; `tokens` should be contexts that it has not
    seen. Special tokens and the first `skip_first` positions, which the spectrum leaves out, stay
    as they are in every condition, and predictions made at them are not counted. Each r takes one
    full forward pass, and three more are needed: choose few r.

    Raises:
        SaesubError: no tokens, an unknown hook point, a spectrum of another width, no r, or an r
            beyond the spectrum.
    """
    bridge = _checked(model, tokens, batch_size, hook_name, "the spectrum", spectrum.d)
    kept_numbers = sorted(set(n_components))
    if not kept_numbers:
        raise SaesubError("n_components is empty: name at least one number of directions")
    for r in kept_numbers:
        spectrum.basis(r)  # refuses an r beyond the spectrum
    directions = spectrum.eigenvectors.float().to(bridge.cfg.device)
    mean = spectrum.mean.float().to(bridge.cfg.device)
    sums: dict[Condition, list[Tensor]] = {c: [] for c in ("clean", "zero", 0, *kept_numbers)}
    counts: list[Tensor] = []
    with bar(total=len(tokens) * len(sums), unit="ctx", progress=progress) as shown:
        for batch in tokens.to(bridge.cfg.device).split(batch_size):
            kept = kept_positions(bridge, batch, skip_first)
            predicts, following = kept[:, :-1], batch[:, 1:]
            counts.append(predicts.sum(1).cpu())
            for condition, of_batches in sums.items():
                hook = _cut_down(condition, mean, directions, kept)
                logits = bridge.run_with_hooks(batch, fwd_hooks=[(hook_name, hook)])[:, :-1]
                of_tokens = cross_entropy(
                    logits[predicts].float(), following[predicts], reduction="none"
                )
                losses = torch.zeros(predicts.shape, dtype=torch.float64, device="cpu")
                losses[predicts.cpu()] = of_tokens.cpu().double()
                of_batches.append(losses.sum(1))
                shown.update(len(batch))
    measured: dict[Condition, np.ndarray] = {
        c: torch.cat(of_batches).numpy() for c, of_batches in sums.items()
    }
    return SubspaceLoss(spectrum.d, measured, torch.cat(counts).numpy())


def _checked(
    model: Model, tokens: Tensor, batch_size: int, hook_name: str, what: str, d: int
) -> TransformerBridge:
    """The model, if the hook point is as wide as what replaces it. Raises SaesubError if not."""
    bridge = load_model(model)
    check_contexts(tokens, batch_size)
    width = site_activations(bridge, tokens[:1, :1], hook_name).shape[-1]
    if width != d:
        raise SaesubError(f"{what} is {d} wide and {hook_name} is {width}: use one made there")
    return bridge


def _cut_down(
    condition: Condition, mean: Tensor, directions: Tensor, kept: Bool[Tensor, "batch pos"]
) -> Callable[..., Tensor | None]:
    """A hook that makes a condition at the kept positions."""

    def replace(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        if condition == "clean":
            return None
        lost = x = tensor.flatten(2).float()
        if condition != "zero":
            away = directions[:, condition:]
            lost = (x - mean) @ away @ away.T  # leaves x itself, to the bit, if none is away
        return torch.where(kept[..., None], x - lost, x).view(tensor.shape).to(tensor.dtype)

    return replace


class SaeLoss(NamedTuple):
    """What an SAE in place of its hook point does to the language model, in nats a token.

    `clean`, `with_sae` and `zero_ablated` are cross-entropies. `kl_with_sae` and `kl_zero_ablated`
    are the divergence of the model's predictions from its own clean ones.
    """

    clean: float
    with_sae: float
    zero_ablated: float
    kl_with_sae: float
    kl_zero_ablated: float

    @property
    def recovered(self) -> float:
        """(zero_ablated - with_sae) / (zero_ablated - clean). Noisy where ablation costs little;
        NaN, with a warning, where it costs nothing."""
        return _share(self.zero_ablated - self.with_sae, self.zero_ablated - self.clean)

    @property
    def kl_recovered(self) -> float:
        """1 - kl_with_sae / kl_zero_ablated: the same for predictions, and steadier, since chance
        cannot make a distorted prediction look better than the clean one. NaN, with a warning,
        where ablation changes nothing."""
        return _share(self.kl_zero_ablated - self.kl_with_sae, self.kl_zero_ablated)


def _share(recovered: float, cost: float) -> float:
    if cost > _LEAST_COST:
        return recovered / cost
    warnings.warn(_no_cost("zero", cost), stacklevel=3)
    return float("nan")


# SAELens' names of the fields of `SaeLoss`
_MEASURED = (
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "ce_loss_with_ablation",
    "kl_div_with_sae",
    "kl_div_with_ablation",
)


@torch.no_grad()
def sae_loss(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    *,
    batch_size: int = 8,
) -> SaeLoss:
    """The language model's loss when the SAE's reconstruction replaces its hook point.

    `sae_lens.evals` measures it; its baseline is zero ablation. Special tokens are left as they
    are and not counted. In a model without BOS the first token of every context is replaced by the
    separator of documents and so left out too: its activations are an attention sink's, which no
    SAE trained by this package has seen.

    Args:
        sae: with its input scaling folded in, as SAELens leaves it after training; its metadata
            name the hook point.
        tokens: contexts that the SAE was not trained on.

    Raises:
        SaesubError: no tokens, a transcoder, metadata without a hook point, or one that is unknown
            or of another width.
    """
    if hasattr(sae.cfg, "d_out"):
        raise SaesubError(
            "a transcoder does not reconstruct what it reads, so sae_loss cannot put its output "
            "there: give an autoencoder"
        )
    bridge = _checked(model, tokens, batch_size, hook_of(sae), "the SAE", sae.cfg.d_in)
    tokens, specials = tokens.to(bridge.cfg.device), context_tokens(bridge)
    if specials.bos_id is None and specials.separator_id is not None:
        tokens = tokens.clone()
        tokens[:, 0] = specials.separator_id
    counted = ~torch.isin(tokens, torch.tensor(specials.special_ids, device=tokens.device))
    measured: list[dict[str, Tensor]] = []
    for batch, mask in zip(tokens.split(batch_size), counted.split(batch_size), strict=True):
        with flat_heads(sae):
            values = get_recons_loss(
                sae,
                cast(Any, bridge),  # SAELens annotates it more narrowly than what it takes
                ActivationScaler(),
                batch,
                compute_kl=True,
                compute_ce_loss=True,
                ignore_tokens=list(specials.special_ids),
            )
        # a context's last token has no loss
        measured.append({name: v[mask[:, : v.shape[1]]] for name, v in values.items()})
    return SaeLoss(*(torch.cat([m[name] for m in measured]).mean().item() for name in _MEASURED))


def hook_of(sae: SAE[Any]) -> str:
    """The hook point that an SAE's metadata name. Raises SaesubError if they name none."""
    if not sae.cfg.metadata.hook_name:
        raise SaesubError(
            "the SAE does not say which hook point it reads: set sae.cfg.metadata.hook_name"
        )
    return sae.cfg.metadata.hook_name
