"""Mean and covariance of activations, measured block by block, and their principal directions.

Each block is centred on its own mean and merged exactly (Chan, Golub & LeVeque 1983), so a mean a
thousand times the standard deviation costs no accuracy although the products run in float32.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesub.activations.checks import require_finite
from saesub.arguments import batch_of
from saesub.errors import SaesubError
from saesub.files import Form, damaged, read_checksummed, write_checksummed
from saesub.precision import where_float64, without_autocast

_FORM = Form(
    format="saesub-spectrum-1",
    key="scalars",
    what="spectrum",
    missing="measure it and save it there first",
    damaged="measure it again",
    named=False,
)
_BLOCK = 8192
_GRAM_PANEL = 192
_ROUNDING = 2.0**-23  # of float32, which centring leaves in constant activations
_SAME_WHEN_MERGED = ("hook_name", "model")
_COUNTED, _KEPT = "massive_tokens", "kept"
_MASSIVE = 20.0  # times the median distance from the mean
_ROWS_FOR_CENTER = 256  # whose median is near enough
_ROWS_TO_JUDGE = 32  # of a block, for its median to say what is usual
_WARNED_SHARE = 1e-3


def massive(x: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Which tokens are massive activations: more than 20 times as far from the mean of the others
    as their median token is.

    A model writes them at a few tokens, mostly delimiters and the first ones, as attention sinks
    (Sun et al. 2024, arXiv 2402.17762), a hundred times as large as ordinary ones; they tell
    nothing of the text and would dominate a covariance. Most sites have none: of 3,000 to 8,000
    tokens of each packaged model after the first position, at four hook points of seven layers,
    none reached 20 times the median. Some have many: 1.3 % of all tokens at the MLP output of layer
    2 of SmolLM2-135M (notebook 01). Less than 32 tokens are not judged, and where the others are
    all equal no token is massive.
    """
    return _judge(x)[0]


def _judge(x: Float[Tensor, "n d"]) -> tuple[Bool[Tensor, " n"], float]:
    """Which tokens are massive, and the median distance of the others from their mean; infinite
    where it tells nothing, so that no token is far."""
    if len(x) < _ROWS_TO_JUDGE:
        return x.new_zeros(len(x), dtype=torch.bool), float("inf")
    some = x[:: max(1, len(x) // _ROWS_FOR_CENTER)]
    center = some.median(dim=0).values  # a mean would be pulled to massive ones
    distance = (x - center).norm(dim=1)
    usual = _usual(distance, center)
    far = distance > _MASSIVE * usual
    if far.any():
        mean = x[~far].mean(dim=0)
        distance = (x - mean).norm(dim=1)
        usual = _usual(distance[~far], mean)
        far = distance > _MASSIVE * usual
    return far, usual


def _usual(distance: Float[Tensor, " n"], center: Float[Tensor, " d"]) -> float:
    """The median distance; infinite where it is rounding."""
    usual = distance.median().item()
    return usual if usual > len(center) * _ROUNDING * center.norm().item() else float("inf")


def require_spectrum(given: Any, name: str = "spectrum") -> None:
    """Raise SaesubError, with what to give, for what is no `Spectrum`."""
    if isinstance(given, Spectrum):
        return
    advice = "measure one with saesub.measure_spectrum"
    if isinstance(given, dict):
        advice = "of what measure_spectra gives take one, spectra[hook_name]"
    elif isinstance(given, (str, os.PathLike)):
        advice = "read a file with saesub.Spectrum.load(path)"
    raise SaesubError(f"{name} must be a Spectrum, not a {type(given).__name__}: {advice}")


class SpectrumAccumulator:
    """Count, mean, centred scatter and mean norm of a stream of activations of width `d`.

    Holds one (d, d) float64 matrix, never the activations. Massive activations, as `massive` finds
    them in each block, are counted and left out. Blocks of less than 32 tokens wait until they are
    32 together; the last of them are judged by the block before.

    Args:
        d: width of the activations.
        keep_massive: leave no token out.
    """

    def __init__(self, d: int, *, keep_massive: bool = False) -> None:
        if d < 1:
            raise SaesubError(f"the width of activations must be at least 1, not {d}")
        self.d, self._keep_massive = d, keep_massive
        self._n = self._n_massive = 0
        self._usual = float("inf")  # distance from the mean in the last block that was judged
        self._waiting: list[Tensor] = []
        self._mean = torch.zeros(d, dtype=torch.float64, device="cpu")
        self._scatter = torch.zeros(d, d, dtype=torch.float64, device="cpu")  # its upper triangle
        self._norm_sum = 0.0

    @without_autocast()
    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Add a block of activations, on any device, in any floating type.

        Raises SaesubError if the width differs from `d`, or if `x` holds a NaN or an infinity, or
        no values at all (meta device); the totals then stay as they were.
        """
        x = batch_of(x, "activations")
        if x.ndim != 2 or x.shape[1] != self.d:
            raise SaesubError(f"expected activations of shape (n, {self.d}), got {tuple(x.shape)}")
        if len(x) == 0:
            return
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        norms = where_float64(x.norm(dim=1))
        if not norms.sum(dtype=torch.float64) < float("inf"):
            require_finite(x)
            raise SaesubError(f"activations overflow {x.dtype} when squared: scale them down")
        if self._waiting or len(x) < _ROWS_TO_JUDGE:
            self._waiting.append(x.clone())
            if sum(map(len, self._waiting)) >= _ROWS_TO_JUDGE:
                self._add_waiting()
        else:
            self._add(x, norms)

    def _add_waiting(self) -> None:
        x, self._waiting = torch.cat(self._waiting), []
        self._add(x, where_float64(x.norm(dim=1)))

    def _add(self, x: Float[Tensor, "n d"], norms: Float[Tensor, " n"]) -> None:
        far = self._massive(x)
        if far.any():
            self._n_massive += int(far.sum())
            x, norms = x[~far], norms[~far.to(norms.device)]
            if len(x) == 0:
                return
        mean = x.mean(dim=0)
        centred = x - mean
        norm_sum = norms.sum(dtype=torch.float64).item()
        # The rounding error of the float32 mean; its square, the scatter's error, is negligible.
        rest = where_float64(centred.mean(dim=0)).double()
        self._merge_mean(len(x), where_float64(mean).double() + rest, norm_sum)
        _add_gram(self._scatter, centred)

    def _massive(self, x: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        if self._keep_massive:
            return x.new_zeros(len(x), dtype=torch.bool)
        if len(x) >= _ROWS_TO_JUDGE:
            far, self._usual = _judge(x)
            return far
        return (x - self._mean.to(x)).norm(dim=1) > _MASSIVE * self._usual

    def _merge_mean(self, n: int, mean: Tensor, norm_sum: float) -> None:
        """Chan's update for a group of `n`, but for the group's own scatter."""
        self._mean, self._scatter = self._mean.to(mean.device), self._scatter.to(mean.device)
        total = self._n + n
        delta = mean - self._mean
        self._scatter.addr_(delta, delta, alpha=self._n * n / total)
        self._mean += delta * (n / total)
        self._n, self._norm_sum = total, self._norm_sum + norm_sum

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `from_state` makes the same accumulator."""
        numbers = [self._n, self._norm_sum, self._n_massive, self._usual, self._keep_massive]
        totals = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        waiting = torch.cat(self._waiting) if self._waiting else self._mean.new_empty(0, self.d)
        kept = {"mean": self._mean, "scatter": self._scatter, "totals": totals}
        return kept | {"waiting": waiting}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> SpectrumAccumulator:
        """An accumulator that continues where the one of that state stopped."""
        accumulator = cls(len(state["mean"]))
        accumulator._mean, accumulator._scatter = state["mean"], state["scatter"]
        n, accumulator._norm_sum, n_massive, usual, kept = state["totals"].tolist()
        accumulator._n, accumulator._n_massive = int(n), int(n_massive)
        accumulator._usual, accumulator._keep_massive = usual, bool(kept)
        accumulator._waiting = [state["waiting"]] if len(state["waiting"]) else []
        return accumulator

    def finish(self, metadata: dict[str, str] | None = None) -> Spectrum:
        """The statistics so far; more blocks may follow.

        The number of tokens left out is noted in the metadata, "massive_tokens"; where it is more
        than one in a thousand, a warning says so. Raises SaesubError if there were no blocks.
        """
        if self._waiting:
            self._add_waiting()
        if self._n == 0:
            raise SaesubError("no activations were given: give at least one token")
        metadata = dict(metadata or {})
        if self._n_massive or self._keep_massive:
            metadata[_COUNTED] = _KEPT if self._keep_massive else str(self._n_massive)
        _warn_of_massive(self._n_massive, self._n, metadata)
        upper = self._scatter.cpu().triu() / self._n
        return Spectrum(
            n_tokens=self._n,
            mean=self._mean.cpu().clone(),
            covariance=upper + upper.triu(1).T,
            mean_norm=self._norm_sum / self._n,
            metadata=metadata,
        )


def _warn_of_massive(n_massive: int, n: int, metadata: dict[str, str]) -> None:
    share = n_massive / (n_massive + n)
    if share > _WARNED_SHARE:
        warnings.warn(
            f"{n_massive} of {n_massive + n} tokens ({share:.2%}) at "
            f"{metadata.get('hook_name', 'this site')} lie more than {_MASSIVE:.0f} times as far "
            "from the mean as the median token: they were left out as massive activations; pass "
            "keep_massive=True to count them.",
            stacklevel=4,
        )


def _add_gram(total: Float[Tensor, "d d"], y: Float[Tensor, "n d"]) -> None:
    """Add yᵀy to the upper triangle of `total`, in panels of columns: about half the work."""
    d = y.shape[1]
    width = _GRAM_PANEL if y.device.type == "cpu" else d
    for i in range(0, d, width):
        total[i : i + width, i:] += where_float64(y[:, i : i + width].T @ y[:, i:])


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Mean and covariance of the activations at one hook point, and their principal directions.

    `covariance` is centred and divided by `n_tokens`; `mean_norm` is the mean L2 norm of the
    activations themselves (what SAELens scales inputs by); `metadata` says where they come from
    (hook_name, model, corpus, context_size, ...), and under "massive_tokens" how many tokens were
    left out as massive activations, if any were, or "kept".
    """

    n_tokens: int
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    mean_norm: float
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_activations(
        cls,
        x: Float[Tensor, "n d"],
        metadata: dict[str, str] | None = None,
        *,
        keep_massive: bool = False,
    ) -> Spectrum:
        """The spectrum of activations already held as one matrix, a tensor or a NumPy array.

        Massive activations are left out unless `keep_massive` is set, see `SpectrumAccumulator`.
        Raises as `update` does.
        """
        x = batch_of(x, "activations")
        if x.ndim != 2:
            raise SaesubError(f"expected activations of shape (n, d), got {tuple(x.shape)}")
        accumulator = SpectrumAccumulator(x.shape[1], keep_massive=keep_massive)
        for block in x.split(_BLOCK):
            try:
                accumulator.update(block)
            except SaesubError:
                require_finite(x)  # counts rows from the first of all
                raise
        return accumulator.finish(metadata)

    def __repr__(self) -> str:
        where = self.metadata.get("hook_name", "unnamed activations")
        return f"Spectrum({where}, {self.n_tokens:,} tokens, d {self.d})"

    @property
    def d(self) -> int:
        """Width of the activations."""
        return len(self.mean)

    @property
    def keeps_massive(self) -> bool:
        """Whether massive activations were counted like all others."""
        return self.metadata.get(_COUNTED) == _KEPT

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " d"]:
        """Variances along the principal directions, descending, never negative; float64."""
        # Half the time of `eigh`: ranks of many sites need no directions.
        return torch.linalg.eigvalsh(self.covariance).flip(0).clamp(min=0)

    @cached_property
    def eigenvectors(self) -> Float[Tensor, "d d"]:
        """Principal directions as columns, in the order of `eigenvalues`; float64."""
        return torch.linalg.eigh(self.covariance).eigenvectors.flip(1)

    def rank_at(self, share: float = 0.99) -> int:
        """Smallest r such that the top r directions hold `share` of the variance; a count, 1 to d.

        Raises SaesubError for a share outside (0, 1], or with no more tokens than dimensions.
        """
        if not 0 < share <= 1:
            raise SaesubError(f"share of variance must lie in (0, 1], got {share}")
        self._require_rank_visible()
        cumulative = self.eigenvalues.cumsum(0)
        # The margin keeps rounding in the sum from deciding where the share is met exactly.
        return int((cumulative < share * cumulative[-1] * (1 - 1e-12)).sum()) + 1

    def variance_in(self, r: int) -> float:
        """Share of the variance, 0 to 1, held by the top `r` directions. Raises SaesubError for r
        outside 1..d, or constant activations."""
        self._require_r(r)
        self._require_variance()
        return float(self.eigenvalues[:r].sum() / self.eigenvalues.sum())

    def effective_rank(self, of: Literal["singular_values", "variance"]) -> float:
        """exp of the entropy of the normalised spectrum (Roy & Vetterli 2007); a count, 1 to d.

        `of` says what is normalised: the singular values of the centred activations, as in that
        paper, or the variances, their squares. Raises SaesubError with no more tokens than
        dimensions.
        """
        if of not in ("singular_values", "variance"):
            raise SaesubError(f"effective rank is of 'singular_values' or 'variance', not {of!r}")
        self._require_rank_visible()
        weights = self.eigenvalues.sqrt() if of == "singular_values" else self.eigenvalues
        return float(torch.special.entr(weights / weights.sum()).sum().exp())

    def basis(self, r: int) -> Float[Tensor, "d r"]:
        """The top `r` principal directions as orthonormal float32 columns.

        Raises SaesubError for r outside 1..d, or beyond the directions `n_tokens` tokens span.
        """
        self._require_r(r)
        if r > self.n_tokens - 1:
            raise SaesubError(
                f"{self.n_tokens} tokens span at most {self.n_tokens - 1} centred directions, "
                f"{r} were asked for; pass n_tokens >= {r + 1}"
            )
        return self.eigenvectors[:, :r].float()

    def __add__(self, other: Spectrum) -> Spectrum:
        """The spectrum of both samples together, exactly. Raises SaesubError for differing widths,
        hook points or models, or where one has kept massive activations and the other has not."""
        if self.d != other.d:
            raise SaesubError(
                f"cannot merge spectra of widths {self.d} and {other.d}: merge those of one site"
            )
        if self.keeps_massive != other.keeps_massive:
            raise SaesubError(
                "one of these spectra has kept massive activations and the other has not: measure "
                "both with the same keep_massive"
            )
        merged = SpectrumAccumulator(self.d, keep_massive=self.keeps_massive)
        for s in (self, other):
            merged._merge_mean(s.n_tokens, s.mean, s.mean_norm * s.n_tokens)
            merged._scatter += s.covariance * s.n_tokens
            if not s.keeps_massive:
                merged._n_massive += int(s.metadata.get(_COUNTED, 0))
        return merged.finish(_merge_metadata(self.metadata, other.metadata))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, never a half-written one. Raises SaesubError where the disk
        is full or cannot be written."""
        scalars = json.dumps([self.n_tokens, self.mean_norm, self.metadata])
        tensors = {"mean": self.mean, "covariance": self.covariance}
        write_checksummed(path, _FORM, tensors, scalars)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read what `save` wrote. Raises SaesubError for a missing, foreign or damaged file."""
        tensors, scalars = read_checksummed(path, _FORM)
        try:
            mean, covariance = tensors["mean"], tensors["covariance"]
            n_tokens, mean_norm, metadata = json.loads(scalars)
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError("its mean and covariance do not go together")
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, _FORM, error) from error
        return cls(n_tokens, mean, covariance, mean_norm, metadata)

    def _require_r(self, r: int) -> None:
        if not 1 <= r <= self.d:
            raise SaesubError(f"number of directions must lie in 1..{self.d}, got {r}")

    def _require_rank_visible(self) -> None:
        if self.n_tokens <= self.d:
            raise SaesubError(
                f"{self.n_tokens} tokens cannot show the rank of {self.d} dimensions; pass "
                f"n_tokens >= {self.d + 1}, better {10 * self.d}"
            )
        self._require_variance()

    def _require_variance(self) -> None:
        if not self.eigenvalues[0] > (_ROUNDING * self.mean.norm()) ** 2:
            raise SaesubError("the activations are constant: measure more text, or another site")


def _merge_metadata(a: dict[str, str], b: dict[str, str]) -> dict[str, str]:
    for key in _SAME_WHEN_MERGED:
        if key in a and key in b and a[key] != b[key]:
            raise SaesubError(
                f"cannot merge spectra of {key} {a[key]!r} and {b[key]!r}: merge those of one site"
            )
    both = a | b
    return {k: f"{a[k]} + {b[k]}" if a.get(k, v) != b.get(k, v) else v for k, v in both.items()}
