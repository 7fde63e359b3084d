"""The language model's loss with a site cut down to a subspace, or with an SAE spliced in.

`subspace_loss_recovered` keeps the top principal directions of a site, or of several at once.
`sae_loss` replaces a site by an SAE's reconstruction. Losses come from logits in float32 or wider
and are summed in float64, whatever the model's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, Transcoder
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.forward_pass import vectors
from saesub.activations.spectrum import Spectrum, require_spectrum
from saesub.activations.tokens import kept_positions
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import (
    check_model,
    check_reads,
    check_site,
    contexts_of,
    hook_of,
    site_activations,
)
from saesub.loading.models import Model, context_tokens, in_eval_mode, load_model, model_name
from saesub.progress import bar
from saesub.topk.encode import autoencoder_of

Ablation = Literal["mean", "zero"]
Condition = int | Literal["clean", "zero"]
Replace = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]
_ABLATED: dict[Ablation, Condition] = {"mean": 0, "zero": "zero"}
_RESAMPLES = 1000  # of the bootstrap
_LEAST_COST = 1e-6  # nats a token; what float32 leaves of an ablation that costs nothing


class Estimate(NamedTuple):
    """A value and the 95 % bootstrap interval around it.

    The value is NaN where ablation costs nothing, so that there is no loss to recover. An end of
    the interval is NaN where that is so in too many resamples to tell it, and both are where only
    one context was measured, of which there are no resamples.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class SubspaceLoss:
    """Cross-entropy (nats a token) with sites cut down to their top principal directions.

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
        interpolation between the numbers measured, mean ablation among them as 0: measure numbers
        on both sides of the crossing. NaN, with a warning, if ablation adds no loss. Raises
        SaesubError for a share outside (0, 1].
        """
        return _estimate(_crossings(self._resampled(ablation), share) / self.d)

    def components_beyond(
        self, other: SubspaceLoss, share: float = 0.9, ablation: Ablation = "mean"
    ) -> Estimate:
        """`components_for` less that of another site on the same contexts; the interval is of the
        difference. Raises SaesubError for a loss of other contexts, and as `components_for`."""
        if not np.array_equal(self.n_predicted, other.n_predicted):
            raise SaesubError(
                "the two losses are of different contexts: measure both on the same tokens"
            )
        of_self, of_other = self._resampled(ablation), other._resampled(ablation)
        needed = _crossings(of_self, share) / self.d
        return _estimate(needed - _crossings(of_other, share) / other.d)

    @cached_property
    def _resamples(self) -> np.ndarray:
        """Counts of each context: a row for the sample itself, the others for the bootstrap."""
        n = len(self.n_predicted)
        draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=_RESAMPLES)
        return np.concatenate([np.ones((1, n)), draws if n > 1 else np.full((1, 1), np.nan)])

    def _resampled(self, ablation: Ablation) -> dict[int, Float[np.ndarray, " resamples"]]:
        """Number of directions, ascending -> share of the loss recovered in every resample."""
        if ablation not in _ABLATED:
            raise SaesubError(f"ablation must be 'mean' or 'zero', not {ablation!r}")
        weight = self._resamples @ self.n_predicted
        with np.errstate(invalid="ignore"):  # contexts without a prediction alone: NaN
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


def _crossings(curve: Mapping[int, np.ndarray], share: float) -> Float[np.ndarray, " resamples"]:
    """The number of directions that recovers `share` of the loss, in every resample."""
    if not 0 < share <= 1:
        raise SaesubError(f"share of the loss must lie in (0, 1], not {share}")
    grid, curves = np.array([*curve]), np.stack([*curve.values()], axis=1)
    return np.array([_crossing(grid, values, share) for values in curves])


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
    hook_name: str | Sequence[str],
    spectrum: Spectrum | Mapping[str, Spectrum],
    n_components: Sequence[int],
    *,
    batch_size: int = 8,
    skip_first: int = 1,
    progress: bool = True,
) -> SubspaceLoss:
    """The loss with x at `hook_name` replaced by mean + U_r U_rᵀ (x - mean), for each r.

    The mean and the directions are the spectrum's; `tokens` should be contexts that it has not
    seen. Several hook points, such as those of all layers, are replaced at once, each by its own
    spectrum: `spectrum` then holds them by name, as `measure_spectra` gives them. Special tokens
    and the first `skip_first` positions, which the spectrum leaves out, stay as they are in every
    condition, and predictions made at them are not counted. Each r takes one full forward pass,
    and three more are needed: choose few r.

    Warns of a spectrum of a model of another name.

    Raises:
        SaesubError: tokens that are no contexts of this model, or in which nothing is predicted at
            ordinary text; an unknown hook point, or none; a spectrum that is missing, or of another
            hook point or width; hook points of different widths; no r, or an r beyond a spectrum.
    """
    bridge = load_model(model)
    tokens, batch_size = contexts_of(bridge, tokens), whole_number(batch_size, "batch_size")
    spectra = _spectrum_of_each(hook_name, spectrum)
    d = next(iter(spectra.values())).d
    kept_numbers = _directions_kept(n_components, spectra.values())
    for name, of_site in spectra.items():
        _check_width(bridge, tokens, name, "the spectrum", of_site.d)
        check_site("the spectrum", of_site.metadata.get("hook_name"), name, bridge)
        check_model("the spectrum", of_site.metadata.get("model"), model_name(bridge))
    kept = kept_positions(bridge, tokens, skip_first)
    predicts = _predicting(kept)
    wide, device = torch.promote_types(bridge.cfg.dtype, torch.float32), bridge.cfg.device
    axes = {
        name: (s.mean.to(wide).to(device), s.eigenvectors.to(wide).to(device))
        for name, s in spectra.items()
    }
    replacements: dict[Condition, dict[str, Replace]] = {"clean": {}}
    for c in ("zero", 0, *kept_numbers):
        replacements[c] = {name: _cut_down(c, *of_site) for name, of_site in axes.items()}
    sums: dict[Condition, list[Tensor]] = {c: [] for c in replacements}
    parts = [t.split(batch_size) for t in (tokens, kept, predicts)]
    shown = bar(total=len(tokens) * len(sums), unit="ctx", progress=progress)
    with shown, in_eval_mode(bridge):
        for batch, at, predicting in zip(*parts, strict=True):
            following = batch.roll(-1, 1)[predicting]
            context = predicting.nonzero()[:, 0].cpu()
            for condition, of_batches in sums.items():
                logits = _logits(bridge, batch, predicting, replacements[condition], at)
                nats = _nats(logits, following)
                sum_of = torch.zeros(len(batch), dtype=torch.float64, device="cpu")
                of_batches.append(sum_of.index_add_(0, context, nats))
                shown.update(len(batch))
    measured: dict[Condition, np.ndarray] = {
        c: torch.cat(of_batches).numpy() for c, of_batches in sums.items()
    }
    return SubspaceLoss(d, measured, predicts.sum(1).cpu().numpy())


def _spectrum_of_each(
    hook_name: str | Sequence[str], spectrum: Spectrum | Mapping[str, Spectrum]
) -> dict[str, Spectrum]:
    """The spectra by hook point. Raises SaesubError if there is none, one is missing, or they are
    of different widths."""
    if isinstance(hook_name, str):
        require_spectrum(spectrum)
        return {hook_name: cast(Spectrum, spectrum)}
    if not isinstance(spectrum, Mapping):
        raise SaesubError(
            "several hook points have a spectrum each: give them by name, as measure_spectra does"
        )
    names = hook_name if isinstance(hook_name, Iterable) else [hook_name]
    if missing := [name for name in names if name not in spectrum]:
        raise SaesubError(f"there is no spectrum of {missing[0]}: measure one for each hook point")
    spectra = {name: spectrum[name] for name in names}
    for name, given in spectra.items():
        require_spectrum(given, f"the spectrum of {name}")
    if not spectra:
        raise SaesubError("no hook point was named: name at least one")
    if len({s.d for s in spectra.values()}) > 1:
        raise SaesubError(
            "the hook points are of different widths, and r directions of them are different "
            "shares: measure each width by itself"
        )
    return spectra


def _directions_kept(n_components: Sequence[int], spectra: Iterable[Spectrum]) -> list[int]:
    """The numbers of directions, ascending. Raises SaesubError if there are none, or one is beyond
    a spectrum."""
    if not isinstance(n_components, Iterable):
        raise SaesubError(f"n_components is a list of numbers of directions, not {n_components!r}.")
    numbers = sorted({whole_number(r, "a number of directions") for r in n_components})
    if not numbers:
        raise SaesubError("n_components is empty: name at least one number of directions")
    for spectrum in spectra:
        spectrum.basis(numbers[-1])  # refuses an r beyond the spectrum
    return numbers


def _check_width(
    bridge: TransformerBridge, tokens: Tensor, hook_name: str, what: str, d: int
) -> None:
    """Raise SaesubError if the hook point is not as wide as what replaces it."""
    width = site_activations(bridge, tokens[:1, :2], hook_name).shape[-1]
    if width != d:
        raise SaesubError(f"{what} is {d} wide and {hook_name} is {width}: use one made there")


def _predicting(counted: Bool[Tensor, "contexts pos"]) -> Bool[Tensor, "contexts pos"]:
    """The positions at which predictions are counted: those with a following token. Raises
    SaesubError if there are none."""
    predicts = counted.clone()
    predicts[:, -1] = False
    if not predicts.any():
        raise SaesubError(
            f"in tokens of shape {tuple(counted.shape)} nothing is predicted at ordinary text, for "
            "special tokens and the first positions are left out: give longer contexts"
        )
    return predicts


def _logits(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    read_at: Bool[Tensor, "batch pos"],
    replacements: Mapping[str, Replace],
    kept: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "n d_vocab"]:
    """The model's logits at some positions, in float32 or wider, with the vectors at the `kept`
    positions of some hook points replaced."""

    def spliced(hook_name: str, replace: Replace, tensor: Tensor, hook: HookPoint) -> Tensor:
        x, at = vectors(tensor, tokens, hook_name).clone(), kept.to(tensor.device)
        if at.any():
            x[at] = replace(x[at]).to(x)
        return x.view(tensor.shape)

    hooks: list[Any] = [(name, partial(spliced, name, r)) for name, r in replacements.items()]
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)[read_at]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cut_down(condition: Condition, mean: Tensor, directions: Tensor) -> Replace:
    """What leaves of x (n, d) the mean and the first directions, or nothing for "zero"."""
    if condition == "zero":
        return torch.zeros_like
    kept, away = directions[:, :condition], directions[:, condition:]

    def cut(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        wide = x.to(mean)
        centred = wide - mean
        if kept.shape[1] < away.shape[1]:
            return mean + centred @ kept @ kept.T
        return wide - centred @ away @ away.T  # x itself, to the bit, if none is away

    return cut


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


@torch.no_grad()
def sae_loss(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    *,
    batch_size: int = 8,
) -> SaeLoss:
    """The language model's loss when the SAE's reconstruction replaces its hook point.

    Counted are the predictions made at ordinary text: not those made at special tokens nor at the
    first position, which the SAE does not replace either. A model's first token is an attention
    sink, which no SAE trained by this package has seen; in a model without BOS it is replaced by
    the separator of documents. `sae_lens.evals` gives the same numbers with
    `exclude_special_tokens`; by default it also counts what is predicted from BOS alone and at
    separators, the first words of a text, which raises every loss by some tenths of a nat, and
    puts the SAE in at BOS. The divergences are averaged over the
    last position of each context too. The baseline is zero ablation, at every position, as in
    SAELens. A BatchTopK SAE in training form shares out its features over the replaced positions
    of a batch.

    Warns of an SAE of a model of another name.

    Args:
        sae: with its input scaling folded in, as SAELens leaves it after training; its metadata
            name the hook point.
        tokens: contexts that the SAE was not trained on, which cannot be checked here.

    Raises:
        SaesubError: tokens that are no contexts of this model, or in which nothing is predicted at
            ordinary text; a transcoder, an SAE of one head, one whose scaling is not folded in, or
            one that `saesub.topk.encode.encoder_of` refuses; metadata without a hook point, or one
            that is unknown or of another width.
    """
    return sae_losses(model, [sae], tokens, batch_size=batch_size)[0]


@torch.no_grad()
def sae_losses(
    model: Model,
    saes: Sequence[SAE[Any]],
    tokens: Int[Tensor, "contexts pos"],
    *,
    batch_size: int = 8,
) -> list[SaeLoss]:
    """`sae_loss` of several SAEs of one hook point, in their order.

    The clean and the ablated model run once for all of them. Raises SaesubError as `sae_loss`, and
    for no SAE, or SAEs of several hook points.
    """
    if any(isinstance(sae, Transcoder) for sae in saes):
        raise SaesubError(
            "a transcoder does not reconstruct what it reads, so sae_loss cannot put its output "
            "there: give an autoencoder"
        )
    bridge, hook_names = load_model(model), {hook_of(sae) for sae in saes}
    readers = [autoencoder_of(sae) for sae in saes]
    if len(hook_names) != 1:
        raise SaesubError(
            f"the SAEs are of {len(hook_names)} hook points: give at least one SAE, and those of "
            "one hook point at a time"
        )
    (hook_name,) = hook_names
    tokens, batch_size = contexts_of(bridge, tokens), whole_number(batch_size, "batch_size")
    for sae in saes:
        check_reads(sae, bridge, hook_name)
        _check_width(bridge, tokens, hook_name, "the SAE", sae.cfg.d_in)
    tokens, counted = _counted(bridge, tokens)
    predicts = _predicting(counted)
    replacements = [partial(_rebuilt, reader) for reader in readers]
    ce: list[Tensor] = []
    kl: list[Tensor] = []
    parts = [t.split(batch_size) for t in (tokens, counted, predicts)]
    with in_eval_mode(bridge):
        for batch, at, predicting in zip(*parts, strict=True):
            following, has_next = batch.roll(-1, 1)[predicting], predicting[at]
            clean = _logits(bridge, batch, at, {}, at)
            ce_of, kl_of = [_nats(clean[has_next], following)], []
            for replace, where in [(torch.zeros_like, torch.ones_like(at))] + [
                (replacement, at) for replacement in replacements
            ]:
                logits = _logits(bridge, batch, at, {hook_name: replace}, where)
                ce_of.append(_nats(logits[has_next], following))
                kl_of.append(_divergence(clean, logits))
            ce.append(torch.stack(ce_of))
            kl.append(torch.stack(kl_of))
    clean, ablated, *rebuilt = torch.cat(ce, 1).mean(1).tolist()
    kl_ablated, *kl_rebuilt = torch.cat(kl, 1).mean(1).tolist()
    return [
        SaeLoss(clean, own, ablated, kl_own, kl_ablated)
        for own, kl_own in zip(rebuilt, kl_rebuilt, strict=True)
    ]


def _rebuilt(
    reader: Callable[[Tensor], tuple[Tensor, Tensor]], x: Float[Tensor, "n d"]
) -> Float[Tensor, "n d"]:
    return reader(x)[1]


def _counted(
    bridge: TransformerBridge, tokens: Int[Tensor, "contexts pos"]
) -> tuple[Int[Tensor, "contexts pos"], Bool[Tensor, "contexts pos"]]:
    """The contexts, begun with a separator in a model without BOS, and which of their positions
    `sae_loss` replaces and counts."""
    specials = context_tokens(bridge)
    if specials.bos_id is None and specials.separator_id is not None:
        tokens = tokens.clone()
        tokens[:, 0] = specials.separator_id
    counted = ~torch.isin(tokens, torch.tensor(specials.special_ids, device=tokens.device))
    counted[:, 0] = False
    return tokens, counted


def _nats(logits: Float[Tensor, "n d_vocab"], following: Int[Tensor, " n"]) -> Tensor:
    """(n,) cross-entropies, float64 on the CPU. Raises SaesubError if one is not finite."""
    nats = cross_entropy(logits, following, reduction="none").cpu().double()
    if not nats.isfinite().all():
        raise SaesubError(
            "the model's loss is NaN or infinite: load the model in another dtype, such as "
            "torch.float32"
        )
    return nats


def _divergence(clean: Float[Tensor, "n d_vocab"], other: Float[Tensor, "n d_vocab"]) -> Tensor:
    """(n,) divergences of the other predictions from the clean ones, float64 on the CPU."""
    return kl_div(other.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1).cpu().double()
