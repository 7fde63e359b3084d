"""Why features are dead: their scores taken apart, and whether another bias or norm revives them.

A feature's score on a token decides whether it fires. About the mean m of what the encoder reads:

    score = gain · direction · (x − m) + offset + bias

- gain: norm of the encoder column, times that of the decoder row where the SAE ranks by it;
- direction: the unit encoder column; `spread` is the standard deviation of direction · (x − m);
- offset: gain · direction · m, what the mean adds to every score;
- bias: the encoder's bias, less the feature's own threshold where it has one (JumpReLU, gated).

An AbsTopK feature fires on either sign, so it is taken with the sign that makes offset + bias
positive. A feature fires where its score exceeds the token's threshold: the least active score of a
TopK SAE's token or a BatchTopK SAE's batch; 0 in SAEs whose features fire each by itself. A cause
is the part whose change to a living feature's would raise the best score most, the other features
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    GatedSAE,
    GatedTrainingSAE,
    JumpReLUSAE,
    JumpReLUTrainingSAE,
    StandardSAE,
    StandardTrainingSAE,
    TopKSAE,
    TopKTrainingSAE,
)
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKTrainingSAE
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saesub.activations.spectrum import Spectrum
from saesub.evaluation.passes import TOKENS_PER_BLOCK, Activations, blocks_of
from saesub.init.subspace import choose_d_init
from saesub.topk.encode import encoder_of, flat_heads

CAUSES = {
    "offset": "the mean of the activations keeps their scores down",
    "rate": "training moved them until they were silent (rate, optimizer or sparsity penalty)",
    "norm": "their norms are far smaller than those of living features",
    "subspace": "they point where the activations vary little, or crowd in too few dimensions",
    "unexplained": "their scores are made as those of living features are",
}
REVIVALS = ("recentring", "rescaling", "both", "no change of bias and norm")

_MOVED = 0.5  # cosine of encoder and decoder below which a feature that began tied has moved far
_SMALL = 0.6  # of the living features' median gain
_LOW = 0.25  # quantile of the living features' spread
_STILL = 1e-6  # of the living features' median spread: nothing varies along such a direction
_CROWD = 0.25  # of the dimensions of `d_init="auto"`
_FEWEST = 10  # dead features, to say whether they crowd
_AT_A_TIME = 8192  # features
_CHECKED = 4096  # features whose firing is compared with the SAE's own, on
_CHECKED_ON = 128  # tokens
_DIFFER = 0.01  # of the firings there, by rounding


class Parts(NamedTuple):
    """What each feature's score is made of, (d_sae,) each, as the module says."""

    gain: Float[Tensor, " d_sae"]
    spread: Float[Tensor, " d_sae"]
    offset: Float[Tensor, " d_sae"]
    bias: Float[Tensor, " d_sae"]
    cosine: Float[Tensor, " d_sae"]  # of encoder column and decoder row


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why features are dead.

    Attributes:
        parts: of all features.
        cause: (n_dead,) indices into CAUSES.
        closest: (n_dead,) best score less the token's threshold, over the sample; never above 0 but
            for rounding.
        revived_by: (n_dead,) indices into REVIVALS, the first that lets the feature fire at all on
            the sample: its bias, and what the mean adds at its gain, raised to a living feature's;
            its gain; or both.
        offset_left: ‖m‖ as a share of the standard deviation, both of what the encoder reads.
        crowded: how many dead features crowd.
    """

    parts: Parts
    cause: Int[Tensor, " n_dead"]
    closest: Float[Tensor, " n_dead"]
    revived_by: Int[Tensor, " n_dead"]
    offset_left: float
    crowded: int


@torch.no_grad()
def explain(
    sae: SAE[Any], sample: Float[Tensor, "n d_in"], dead: Bool[Tensor, " d_sae"], spectrum: Spectrum
) -> Explanation | str:
    """Why the dead features of an SAE are silent on a sample of activations; a sentence fragment
    where that cannot be told.

    It takes for granted that encoder columns began as the decoder's rows, as in SAELens. `spectrum`
    is that of the sample.
    """
    if not dead.any():
        return "no feature is dead"
    if dead.all():
        return "no feature lives, so there is nothing to compare the dead with"
    selection = _Selection.of(sae)
    if selection is None:
        return f"the features of an SAE of class {type(sae).__name__} have no scores of their own"
    blocks = sample.split(TOKENS_PER_BLOCK)
    read = _Read(sae, torch.cat([_encoder_input(sae, x) for x in blocks]), selection)
    parts = read.parts
    if not _fires_as_told(sae, blocks[0][:_CHECKED_ON], read, selection):
        return (
            "its features fire otherwise than its weights say (replaced methods, or half precision)"
        )
    peaks = _peaks(sae, blocks, read, selection, parts, dead)
    crowded = _crowded(sae.W_dec[dead].float(), sample, spectrum)
    cause = _causes(_of(parts, dead), _of(parts, ~dead), peaks, crowded)
    fires = torch.stack([peaks[name] > 0 for name in ("recentred", "rescaled", "both")])
    fires = torch.cat([fires, torch.ones_like(fires[:1])])
    return Explanation(
        Parts(*(part.cpu() for part in parts)),
        cause.cpu(),
        peaks["as it is"].cpu(),
        fires.int().argmax(0).cpu(),
        float(read.mean.norm() / read.centred.square().sum(1).mean().sqrt()),
        int(crowded.sum()),
    )


@dataclass(frozen=True, eq=False)
class _Selection:
    """How the features of an SAE are selected: own bias less threshold, and scale of the score, for
    each feature; tokens' thresholds from their active features."""

    bias: Float[Tensor, " d_sae"]
    scale: Float[Tensor, " d_sae"]
    k: float | None = None
    over_batch: bool = False
    either_sign: bool = False

    @classmethod
    def of(cls, sae: Any) -> _Selection | None:
        scale = torch.ones_like(sae.W_dec[:, 0], dtype=torch.float32)
        if isinstance(sae, (TopKSAE, TopKTrainingSAE)):
            if sae.cfg.rescale_acts_by_decoder_norm:
                scale = sae.W_dec.float().norm(dim=1)
            either_sign = isinstance(sae, (AbsTopKSAE, AbsTopKTrainingSAE))
            over_batch = isinstance(sae, BatchTopKTrainingSAE)
            return cls(sae.b_enc.float(), scale, sae.cfg.k, over_batch, either_sign)
        if isinstance(sae, (JumpReLUSAE, JumpReLUTrainingSAE)):
            return cls(sae.b_enc.float() - sae.threshold.float().clamp(min=0), scale)
        if isinstance(sae, (StandardSAE, StandardTrainingSAE)):
            return cls(sae.b_enc.float(), scale)
        if isinstance(sae, (GatedSAE, GatedTrainingSAE)):
            magnitude = sae.b_mag.float() / sae.r_mag.float().exp()
            return cls(torch.minimum(sae.b_gate.float(), magnitude), scale)
        return None

    def thresholds(self, features: Float[Tensor, "n d_sae"]) -> Float[Tensor, " n"]:
        """What a score on each token must exceed, given the features that are active."""
        entries = (features if features.is_sparse else features.to_sparse()).coalesce()
        n = len(features)
        if self.k is None:
            return torch.zeros(n, device=features.device, dtype=torch.float32)
        token, size = entries.indices()[0], entries.values().float().abs()
        token, size = token[size > 0], size[size > 0]
        if self.over_batch:
            full = len(size) >= int(self.k * n)
            return size.new_full((n,), float(size.min()) if full else 0.0)
        least = size.new_full((n,), torch.inf)
        least = least.scatter_reduce(0, token, size, "amin")
        return least.where(torch.bincount(token, minlength=n) >= self.k, 0.0)

    def shown(self, score: Tensor) -> Tensor:
        return score.abs() if self.either_sign else score


def _encoder_input(sae: SAE[Any], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    with flat_heads(sae):
        return sae.process_sae_in(x.to(sae.device)).float()


class _Read:
    """What the encoder reads of the sample: its mean, what is left without it, the directions."""

    def __init__(self, sae: Any, read: Float[Tensor, "n d_in"], selection: _Selection) -> None:
        self.mean = read.mean(0)
        self.centred = read - self.mean
        encoder = sae.W_enc.float().T
        directions, gain = normalize(encoder, dim=1), encoder.norm(dim=1) * selection.scale
        offset, bias = gain * (directions @ self.mean), selection.bias * selection.scale
        sign = torch.ones_like(gain)
        if selection.either_sign:
            sign = sign.where(offset + bias >= 0, -1.0)
        self.directions = directions * sign[:, None]
        covariance = self.centred.T @ self.centred / len(self.centred)
        spread = ((directions @ covariance) * directions).sum(1).clamp(min=0).sqrt()
        cosine = cosine_similarity(encoder, sae.W_dec.float())
        self.parts = Parts(gain, spread, offset * sign, bias * sign, cosine)


def _of(parts: Parts, features: Tensor) -> Parts:
    return Parts(*(part[features] for part in parts))


def _fires_as_told(
    sae: SAE[Any], x: Float[Tensor, "n d_in"], read: _Read, selection: _Selection
) -> bool:
    """Whether some features fire on these tokens where their scores say so, but for rounding."""
    features = encoder_of(sae)(x)
    some = torch.arange(0, sae.cfg.d_sae, -(-sae.cfg.d_sae // _CHECKED), device=sae.device)
    own = _of(read.parts, some)
    score = read.centred[: len(x)] @ (read.directions[some] * own.gain[:, None]).T
    score = selection.shown(score + own.offset + own.bias)
    threshold = selection.thresholds(features)[:, None]
    told = (score > 0) & (score >= threshold * (1 - 1e-4))
    fires = features.to_dense()[:, some] != 0
    return bool((told != fires).sum() <= _DIFFER * fires.sum().clamp(min=100))


def _peaks(
    sae: SAE[Any],
    blocks: tuple[Tensor, ...],
    read: _Read,
    selection: _Selection,
    parts: Parts,
    dead: Bool[Tensor, " d_sae"],
) -> dict[str, Float[Tensor, " n_dead"]]:
    """Best score less threshold of each dead feature: as it is, and with parts made as large as in
    a living feature, where they are smaller."""
    own, living = _of(parts, dead), _of(parts, ~dead)
    gain, tall = own.gain, own.gain.clamp(min=float(living.gain.median()))
    along_mean, bias = _along_mean(own), own.bias  # the offset is the first times the gain
    closer, lifted = _lifted(own, living)
    turned = own.spread.clamp(min=float(living.spread.quantile(_LOW))) / own.spread.clamp(min=1e-20)
    changes = {
        "as it is": (gain, gain * along_mean + bias),
        "recentred": (gain, gain * closer + lifted),
        "rescaled": (tall, tall * along_mean + bias),
        "both": (tall, tall * closer + lifted),
        "turned": (gain * turned, gain * along_mean + bias),
    }
    best = {name: torch.full_like(gain, -torch.inf) for name in changes}
    encode, centred = encoder_of(sae), iter(read.centred.split(TOKENS_PER_BLOCK))
    columns = dead.nonzero().flatten()
    for x in blocks:
        threshold, inside = selection.thresholds(encode(x))[:, None], next(centred)
        for part in torch.arange(len(columns), device=columns.device).split(_AT_A_TIME):
            along = inside @ read.directions[columns[part]].T
            for name, (factor, added) in changes.items():
                score = selection.shown(along * factor[part] + added[part]) - threshold
                best[name][part] = torch.maximum(best[name][part], score.amax(0))
    return best


def _along_mean(parts: Parts) -> Float[Tensor, " n"]:
    """direction · m of each feature: a small gain makes its offset small, and is no offset."""
    return parts.offset / parts.gain.clamp(min=1e-20)


def _lifted(own: Parts, living: Parts) -> tuple[Tensor, Tensor]:
    """direction · m and bias of each feature, where they are lower than living ones' medians made
    as large as these."""
    along_mean = _along_mean(own).clamp(min=float(_along_mean(living).median()))
    return along_mean, own.bias.clamp(min=float(living.bias.median()))


def _crowded(
    rows: Float[Tensor, "n_dead d"], sample: Float[Tensor, "n d"], spectrum: Spectrum
) -> Bool[Tensor, " n_dead"]:
    """Which decoder rows are more like the other dead rows than tokens are like one another, and
    than rows in a quarter of the `d_init="auto"` dimensions would be."""
    if len(rows) < _FEWEST:
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    tokens = sample.float() - spectrum.mean.to(sample.device, torch.float32)
    alike = float(_mean_square_cosine(tokens).mean())
    return _mean_square_cosine(rows) > max(alike, 1 / (_CROWD * choose_d_init(spectrum)))


def _mean_square_cosine(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Of each row with all others; 1 / r in the mean for isotropic ones in r dimensions."""
    unit = normalize(rows, dim=1)
    return (((unit @ (unit.T @ unit)) * unit).sum(1) - 1) / (len(rows) - 1)


def _causes(
    own: Parts, living: Parts, peaks: dict[str, Tensor], crowded: Bool[Tensor, " n_dead"]
) -> Int[Tensor, " n_dead"]:
    small = own.gain < _SMALL * living.gain.median()
    now = peaks["as it is"]
    raises = {
        "level": peaks["recentred"] - now,
        "norm": (peaks["rescaled"] - now).where(small, 0.0),
        "subspace": peaks["turned"] - now,
    }
    most, which = torch.stack(list(raises.values())).nan_to_num(0.0).max(0)
    closer, lifted = _lifted(own, living)
    by_offset = own.gain * closer - own.offset >= lifted - own.bias
    names = list(CAUSES)

    def code(name: str) -> Tensor:
        return torch.full_like(which, names.index(name))

    cause = code("subspace").where(which == 2, code("norm"))
    cause = torch.where(which == 0, code("offset").where(by_offset, code("rate")), cause)
    cause = cause.where(most > 0, code("norm").where(small, code("unexplained")))
    still = (own.spread <= _STILL * living.spread.median()) & (own.gain > 0)
    cause = code("subspace").where(crowded | still, cause)
    return code("rate").where((own.cosine < _MOVED) & (own.gain > 0), cause)


def sampled(
    activations: Activations, n_tokens: int, n_sample: int, kept: list[Tensor]
) -> Iterator[Tensor]:
    """The activations in blocks; about `n_sample` of the first `n_tokens`, evenly spaced, are added
    to `kept`. Raises SaesubError as `blocks_of`."""
    every, n = max(1, n_tokens // n_sample), 0
    for block in blocks_of(activations):
        kept.append(block[-n % every : max(0, n_tokens - n) : every].cpu().clone())
        n += len(block)
        yield block
