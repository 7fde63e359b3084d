"""What a site's directions, or an SAE, are worth to the language model: its loss.

`subspace_loss_recovered` cuts a site down to its top principal directions; `sae_loss` puts an
SAE's reconstruction in its place, by SAELens' own `run_evals`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.forward_pass import hook_points
from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions
from saesub.errors import SaesubError
from saesub.loading.models import Model, context_tokens, load_model
from saesub.progress import bar

Ablation = Literal["mean", "zero"]
_CLEAN, _ZERO, _MEAN = "clean", "zero", 0


class Estimate(NamedTuple):
    """A value and the 95 % bootstrap interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class SubspaceLoss:
    """Cross-entropy (nats a token) with a site cut down to its top principal directions.

    `loss_sums` holds, for each condition, the summed loss of every context over its `n_predicted`
    predictions; a condition is a number of directions kept (0 is mean ablation), "clean" or "zero"
    (zero ablation). `d` directions kept is the clean run.
    """

    hook_name: str
    d: int
    n_components: tuple[int, ...]
    loss_sums: dict[int | str, Float[np.ndarray, " contexts"]]
    n_predicted: Int[np.ndarray, " contexts"]
    n_bootstrap: int = 1000
    seed: int = 0

    def ce(self, condition: int | str) -> float:
        """Mean cross-entropy under a condition: "clean", "zero", 0 (mean ablation), or r."""
        if condition not in self.loss_sums:
            raise SaesubError(f"{condition!r} was not measured: known {list(self.loss_sums)}")
        return float(self.loss_sums[condition].sum() / self.n_predicted.sum())

    @property
    def ce_clean(self) -> float:
        """Cross-entropy of the model as it is."""
        return self.ce(_CLEAN)

    @property
    def ce_mean_ablated(self) -> float:
        """Cross-entropy with the site replaced by its mean."""
        return self.ce(_MEAN)

    @property
    def ce_zero_ablated(self) -> float:
        """Cross-entropy with the site replaced by zero."""
        return self.ce(_ZERO)

    def recovered(self, ablation: Ablation = "mean") -> dict[int, Estimate]:
        """(CE_ablated - CE_r) / (CE_ablated - CE_clean) for each r measured, with its interval
        over contexts."""
        curves = self._curves(ablation)
        return {r: _estimate(curves[:, self._grid.index(r)]) for r in self.n_components}

    def components_for(self, share: float = 0.9, ablation: Ablation = "mean") -> Estimate:
        """The smallest share of the d directions that recovers `share` of the loss, by linear
        interpolation between the numbers measured. Raises SaesubError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise SaesubError(f"share of the loss must lie in (0, 1], got {share}")
        grid = np.array(self._grid, dtype=float) / self.d
        return _estimate(np.array([_crossing(grid, c, share) for c in self._curves(ablation)]))

    @property
    def _grid(self) -> list[int]:
        return sorted({0, *self.n_components, self.d})

    @cached_property
    def _resamples(self) -> np.ndarray:
        """Counts of each context: first the sample itself, then the bootstrap's."""
        n = len(self.n_predicted)
        draws = np.random.default_rng(self.seed).multinomial(n, [1 / n] * n, size=self.n_bootstrap)
        return np.concatenate([np.ones((1, n)), draws])

    def _curves(self, ablation: Ablation) -> np.ndarray:
        """Recovered share (1 + n_bootstrap, grid)."""
        if ablation not in ("mean", "zero"):
            raise SaesubError(f"ablation is 'mean' or 'zero', not {ablation!r}")
        weight = self._resamples @ self.n_predicted
        ce = {c: self._resamples @ sums / weight for c, sums in self.loss_sums.items()}
        ablated, clean = ce[_MEAN if ablation == "mean" else _ZERO], ce[_CLEAN]
        kept = [ce.get(r, clean) for r in self._grid]
        return (ablated[:, None] - np.stack(kept, axis=1)) / (ablated - clean)[:, None]


def _estimate(values: np.ndarray) -> Estimate:
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (values[0],) * 2
    return Estimate(float(values[0]), float(low), float(high))


def _crossing(grid: np.ndarray, curve: np.ndarray, share: float) -> float:
    """Where the curve first reaches `share`; its last point is 1 up to rounding."""
    i = int(np.argmax(curve >= share - 1e-9))
    if i == 0:
        return float(grid[0])
    part = (share - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(grid[i - 1] + min(part, 1.0) * (grid[i] - grid[i - 1]))


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

    The mean and the directions are the spectrum's; `tokens` should be contexts it has not seen.
    Special tokens and the first `skip_first` positions, which the statistics leave out, pass
    through untouched in every condition, ablations included, and predictions made at them are not
    counted. One full forward pass for each r and three more: choose few r.

    Raises SaesubError for an unknown hook point, another width, or r beyond the spectrum.
    """
    bridge = load_model(model)
    point = hook_points(bridge, [hook_name])[hook_name]
    if not n_components:
        raise SaesubError("n_components is empty: name at least one number of directions")
    for r in n_components:
        spectrum.basis(r)
    conditions: list[int | str] = [_CLEAN, _ZERO, _MEAN, *sorted(set(n_components))]
    directions = spectrum.eigenvectors.float().to(bridge.cfg.device)
    mean = spectrum.mean.float().to(bridge.cfg.device)
    sums: dict[int | str, list[Tensor]] = {c: [] for c in conditions}
    counts: list[Tensor] = []
    with bar(total=len(tokens) * len(conditions), unit="ctx", progress=progress) as shown:
        for batch in tokens.split(batch_size):
            batch = batch.to(bridge.cfg.device)
            kept = kept_positions(bridge, batch, skip_first)
            counts.append(kept[:, :-1].sum(1).cpu())
            for c in conditions:
                replaced = None if c == _CLEAN else _Replace(c, mean, directions, kept)
                sums[c].append(_context_loss(bridge, batch, kept, point, replaced).cpu())
                shown.update(len(batch))
    return SubspaceLoss(
        hook_name,
        spectrum.d,
        tuple(sorted(set(n_components))),
        {c: torch.cat(parts).numpy() for c, parts in sums.items()},
        torch.cat(counts).numpy(),
    )


class _Replace:
    """A hook that keeps r principal directions, or none of x at all, at the kept positions."""

    def __init__(self, condition: int | str, mean: Tensor, directions: Tensor, kept: Tensor):
        self._mean, self._kept = mean, kept
        self._lost = None if condition == _ZERO else directions[:, int(condition) :]

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        x = tensor.flatten(2).float()
        if x.shape[-1] != len(self._mean):
            raise SaesubError(
                f"the spectrum is {len(self._mean)} wide and {hook.name} is {x.shape[-1]}"
            )
        # Taking the lost directions away leaves x itself, to the bit, when none is lost.
        lost = x if self._lost is None else (x - self._mean) @ self._lost @ self._lost.T
        out = torch.where(self._kept[..., None], x - lost, x)
        return out.view(tensor.shape).to(tensor.dtype)


@torch.no_grad()
def _context_loss(
    model: TransformerBridge,
    tokens: Tensor,
    kept: Tensor,
    point: HookPoint,
    replaced: _Replace | None,
) -> Float[Tensor, " contexts"]:
    """Summed next-token loss of each context over the predictions made at kept positions."""
    level = model.context_level + 1
    try:
        if replaced is not None:
            point.add_hook(replaced, level=level)
        logits = model(tokens, return_type="logits")
    finally:
        point.remove_hooks("fwd", level=level)
    made = kept[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1][made].float(), tokens[:, 1:][made], reduction="none"
    ).double()
    return (
        torch.zeros(made.shape, dtype=loss.dtype, device=loss.device)
        .masked_scatter(made, loss)
        .sum(1)
    )


class SaeLoss(NamedTuple):
    """What an SAE in place of its hook point does to the language model, in nats a token.

    `clean`, `with_sae` and `zero_ablated` are cross-entropies; `kl_with_sae` and `kl_zero_ablated`
    the divergence of the model's predictions from its own clean ones.
    """

    clean: float
    with_sae: float
    zero_ablated: float
    kl_with_sae: float
    kl_zero_ablated: float

    @property
    def recovered(self) -> float:
        """(zero_ablated - with_sae) / (zero_ablated - clean). Noisy where ablation costs little."""
        return (self.zero_ablated - self.with_sae) / (self.zero_ablated - self.clean)

    @property
    def kl_recovered(self) -> float:
        """1 - kl_with_sae / kl_zero_ablated: the same for predictions, and steadier, since chance
        cannot make a distorted prediction look better than the clean one."""
        return 1 - self.kl_with_sae / self.kl_zero_ablated


def sae_loss(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    *,
    batch_size: int = 8,
) -> SaeLoss:
    """The language model's loss when the SAE's reconstruction replaces its hook point.

    Measured by `sae_lens.evals.run_evals`, zero ablation being its baseline. Special tokens are
    left as they are and not counted. In a model without BOS the first token of every context is
    made the separator of documents, and so left out too: its activations are an attention sink's,
    which no SAE trained by this package has seen.

    Args:
        sae: with its input scaling folded in, as SAELens leaves it after training; the hook point
            is the one its metadata name.
        tokens: contexts that the SAE was not trained on; a number divisible by `batch_size`.

    Raises:
        SaesubError: metadata without a hook point, or contexts that do not fill the batches.
    """
    bridge = load_model(model)
    hook_points(bridge, [hook_of(sae)])
    if len(tokens) == 0 or len(tokens) % batch_size:
        raise SaesubError(
            f"{len(tokens)} contexts do not fill batches of {batch_size}: give a multiple of it"
        )
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=len(tokens) // batch_size,
        compute_ce_loss=True,
        compute_kl=True,
    )
    store = _token_store(bridge, sae, tokens, batch_size)
    lm = cast(Any, bridge)  # SAELens annotates it more narrowly than what it takes
    specials = context_tokens(bridge).special_ids
    with warnings.catch_warnings():  # one for every context, about the store's own copying
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        metrics, _ = run_evals(
            sae, store, lm, ActivationScaler(), config, exclude_special_tokens=specials
        )
    ce, kl = metrics["model_performance_preservation"], metrics["model_behavior_preservation"]
    return SaeLoss(
        *(ce[f"ce_loss_{name}"] for name in ("without_sae", "with_sae", "with_ablation")),
        *(kl[f"kl_div_{name}"] for name in ("with_sae", "with_ablation")),
    )


def hook_of(sae: SAE[Any]) -> str:
    """The hook point that an SAE's metadata name. Raises SaesubError if they name none."""
    if not sae.cfg.metadata.hook_name:
        raise SaesubError(
            "the SAE does not say which hook point it reads: set sae.cfg.metadata.hook_name"
        )
    return sae.cfg.metadata.hook_name


def _token_store(
    model: TransformerBridge, sae: SAE[Any], tokens: Tensor, batch_size: int
) -> ActivationsStore:
    specials, tokens = context_tokens(model), tokens.cpu()
    if specials.bos_id is None and specials.separator_id is not None:
        tokens = tokens.index_fill(1, torch.tensor([0]), specials.separator_id)
    if sae.cfg.metadata.prepend_bos is None:  # SAELens asks, though the tokens have decided it
        sae.cfg.metadata.prepend_bos = specials.bos_id is not None
    return ActivationsStore.from_sae(
        cast(Any, model),
        sae,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        context_size=tokens.shape[1],
        store_batch_size_prompts=batch_size,
        total_tokens=len(tokens),  # it warns where samples are fewer than tokens
        device=str(model.cfg.device),
    )
