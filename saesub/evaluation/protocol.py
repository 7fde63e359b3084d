"""What a comparison of SAEs must survive: long windows, equal tuning, equal fit, paired seeds.

Whether a feature is dead depends on how long one waits: in a window of T tokens a feature of a
dictionary of `d_sae` features, of which k are active, fires T · k / d_sae times on average, so that
a wider dictionary looks deader in the same window. And a lower learning rate leaves fewer features
dead and fits worse, so that two conditions at one rate, or each at its best, compare two things at
once. The functions here state both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from saesub.arguments import whole_number
from saesub.errors import SaesubError

FIRINGS_OF_A_WINDOW = 1000  # on average, of a feature, over the window that decides
FIRINGS_FOR_A_VERDICT = 200
LONGEST_WINDOW = 10_000_000  # tokens, the field's
AS_GOOD = 0.01  # an FVU above the best by this share of it may be chance; a seed's spread is 0.4 %
_FEWEST_RESAMPLES = 100  # of which the 2.5 % at either end are a few
_LEAST_BASELINE = 0.02  # share dead; a ratio to less says nothing


def mean_firings(n_tokens: float, *, d_sae: int, l0: float) -> float:
    """How often an average feature fires over `n_tokens` tokens, with `l0` active ones a token."""
    return float(n_tokens) * float(l0) / float(d_sae)  # NumPy's whole numbers would overflow


def window_for(d_sae: int, k: float) -> int:
    """Tokens over which a feature fires 1,000 times on average, at most ten million.

    Raises SaesubError unless both numbers are above zero.

    >>> window_for(8192, 32)
    256000
    """
    if not (0 < d_sae < math.inf and 0 < k < math.inf):
        raise SaesubError(f"d_sae is {d_sae} and k is {k}: give numbers above zero")
    return min(math.ceil(FIRINGS_OF_A_WINDOW * float(d_sae) / float(k)), LONGEST_WINDOW)


def dead_share_at(silent: Mapping[int, float], n_tokens: int) -> float:
    """Share of features that have not fired after `n_tokens` tokens, as `saesub.judge` counted.

    Args:
        silent: tokens -> share, the `silent` of a `Judgement`.
        n_tokens: one of its windows.

    Raises SaesubError for a window longer than the data, one at which nothing was counted, or a
    share that is no finite number.
    """
    n_tokens = whole_number(n_tokens, "n_tokens")
    windows = {int(n): share for n, share in silent.items()}  # JSON has texts as keys
    if not windows or n_tokens > max(windows):
        raise SaesubError(
            f"a window of {n_tokens:,} tokens is longer than the {max(windows, default=0):,} that "
            "were judged: judge more tokens, or state the shorter window"
        )
    if n_tokens not in windows:
        raise SaesubError(
            f"silent features were counted after {', '.join(f'{n:,}' for n in sorted(windows))} "
            f"tokens, not after {n_tokens:,}: take one of these windows"
        )
    return _numbers([windows[n_tokens]])[0]


def too_few_firings(n_tokens: float, *, d_sae: int, l0: float) -> str:
    """Why a window carries no verdict on dead features; empty if it does."""
    firings = mean_firings(n_tokens, d_sae=d_sae, l0=l0)
    if firings >= FIRINGS_FOR_A_VERDICT:
        return ""
    return (
        f"a feature fires {firings:.0f} times on average over {n_tokens:,.0f} tokens; a verdict "
        f"needs {FIRINGS_FOR_A_VERDICT}"
    )


@dataclass(frozen=True)
class Sweep:
    """One condition trained at several learning rates.

    Attributes:
        rates: rising; all else is a mean over seeds.
        validation_fvu: at each rate, on tokens that no reported number uses; it chooses the rate.
        fvu, dead: at each rate, on the tokens that are reported.

    Raises SaesubError for rates that do not rise from above zero, measures that are not one for
    each rate, or a number that is NaN or infinite.
    """

    rates: tuple[float, ...]
    validation_fvu: tuple[float, ...]
    fvu: tuple[float, ...]
    dead: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.rates), len(self.validation_fvu), len(self.fvu), len(self.dead)}
        if lengths != {len(self.rates)} or not self.rates:
            raise SaesubError(
                "a sweep needs a validation FVU, an FVU and a share of dead features for each rate"
            )
        rise = np.diff([0, *self.rates])
        if not (np.isfinite(rise) & (rise > 0)).all():
            raise SaesubError(
                f"the rates of a sweep rise from above zero, which {self.rates} do not: give them "
                "from the lowest to the highest"
            )
        measures = np.array([self.validation_fvu, self.fvu, self.dead])
        if len(bad := np.flatnonzero(~np.isfinite(measures).all(0))):
            raise SaesubError(
                f"at the rate {self.rates[bad[0]]:g} a measure is NaN or infinite: leave out "
                "a rate at which training diverges"
            )

    @property
    def best(self) -> int:
        """Index of the rate with the least FVU on the validation part."""
        return int(np.argmin(self.validation_fvu))

    @property
    def as_good(self) -> list[int]:
        """Indices of the rates whose FVU on the validation part is within 1 % of the least."""
        most = (1 + AS_GOOD) * min(self.validation_fvu)
        return [i for i, fvu in enumerate(self.validation_fvu) if fvu <= most]

    @property
    def interior(self) -> bool:
        """Whether a lower and a higher rate than the best were tried."""
        return 0 < self.best < len(self.rates) - 1

    def next_rate(self) -> float | None:
        """The rate to try next, beyond the edge that is best; None if the best is interior."""
        if self.interior:
            return None
        return self.rates[-1] * 2 if self.best == len(self.rates) - 1 else self.rates[0] / 2

    def dead_at(self, fvu: float) -> float:
        """Share of dead features at the rate below the best at which the condition fits as well as
        `fvu`, linear between tried rates.

        Raises SaesubError if the FVU is below the best one, or above that of the lowest rate.
        """
        fits, dead = self.fvu[: self.best + 1][::-1], self.dead[: self.best + 1][::-1]
        # From the best rate downwards FVU rises; where it does not, noise is levelled out.
        rising = np.maximum.accumulate(fits)
        rises = np.diff(rising, prepend=-math.inf) > 0  # of equal points, that of the higher rate
        if not rising[0] <= fvu <= rising[-1]:
            raise SaesubError(
                f"an FVU of {fvu:.4f} is not among the {rising[0]:.4f} to {rising[-1]:.4f} of the "
                "rates tried: try lower rates, or compare at another FVU"
            )
        return float(np.interp(fvu, rising[rises], np.array(dead)[rises]))


def dead_at_equal_fvu(a: Sweep, b: Sweep) -> tuple[float, float, float]:
    """(dead of a, dead of b, FVU), both at the FVU that the worse of the two reaches at its best.

    The better one is taken at the lower rate at which it fits as badly. Raises SaesubError if that
    rate is below those tried.
    """
    fvu = max(a.fvu[a.best], b.fvu[b.best])
    return a.dead_at(fvu), b.dead_at(fvu), fvu


def sweep_of(rows: Iterable[Mapping[str, Any]]) -> Sweep:
    """One condition at several rates, with the mean over seeds at each.

    Args:
        rows: lr, seed, validation_fvu, fvu and dead_share of one SAE each.

    Raises SaesubError without rows, for a seed twice at one rate, or where the best rate, or one
    that is as good (`Sweep.as_good`), lacks a seed that another rate has: chance would choose.
    """
    by_rate = _by_rate(rows)
    for rate, of in by_rate.items():
        if len({row["seed"] for row in of}) < len(of):
            raise SaesubError(f"a seed is there twice at the rate {rate:g}: give one condition")
    return _swept(by_rate, lambda of, name: float(np.mean([row[name] for row in of])))


def sweep_at_l0(rows: Iterable[Mapping[str, Any]], l0: float) -> Sweep:
    """One condition at several rates, each at the same number of active features.

    Args:
        rows: as for `sweep_of`, with validation_l0 and coefficient besides. Of the lowest seed any
            number of coefficients of a penalty at each rate: between them all is linear in the
            logarithm of L0, and where all lie on one side of `l0` the nearest counts. Another seed
            moves the result by its difference from the lowest at the same coefficient.
        l0: active features a token.

    Raises SaesubError as `sweep_of`, where a seed has a coefficient that the lowest has not, for
    an L0 that is no finite number, or unless `l0` is a number above zero.
    """
    if not (math.isfinite(l0) and l0 > 0):
        raise SaesubError(f"l0 is {l0}: give a number of active features above zero")
    by_rate = _by_rate(rows)
    measured = [row["validation_l0"] for of in by_rate.values() for row in of]
    if bad := [n for n in measured if not 0 <= n < math.inf]:
        raise SaesubError(f"an L0 on the validation part is {bad[0]}: measure that SAE again")
    for rate, of in by_rate.items():
        trained = [(row["seed"], row["coefficient"]) for row in of]
        first = min(seed for seed, _ in trained)
        if len(set(trained)) < len(trained):
            raise SaesubError(f"a seed is there twice at the rate {rate:g}: give one condition")
        if lacking := {c for _, c in trained} - {c for seed, c in trained if seed == first}:
            raise SaesubError(
                f"at the rate {rate:g} seed {first} lacks the coefficients {sorted(lacking)}, "
                "which other seeds have: train it with them too"
            )

    def at(of: _Rows, name: str) -> float:
        first = min(row["seed"] for row in of)
        tried = sorted(
            (r for r in of if r["seed"] == first),
            key=lambda r: (r["validation_l0"], r["coefficient"]),
        )
        active = np.log([max(row["validation_l0"], 1e-9) for row in tried])
        value = float(np.interp(math.log(l0), active, [row[name] for row in tried]))
        own = {row["coefficient"]: row[name] for row in tried}
        moves: dict[int, list[float]] = {}
        for row in of:
            moves.setdefault(row["seed"], []).append(row[name] - own[row["coefficient"]])
        return value + float(np.mean([np.mean(several) for several in moves.values()]))

    return _swept(by_rate, at)


_Rows = list[Mapping[str, Any]]


def _by_rate(rows: Iterable[Mapping[str, Any]]) -> dict[float, _Rows]:
    found: dict[float, _Rows] = {}
    for row in sorted(rows, key=lambda row: row["lr"]):
        found.setdefault(row["lr"], []).append(row)
    return found


def _swept(by_rate: Mapping[float, _Rows], at: Callable[[_Rows, str], float]) -> Sweep:
    columns = ("validation_fvu", "fvu", "dead_share")
    sweep = Sweep(
        tuple(by_rate), *(tuple(at(of, name) for of in by_rate.values()) for name in columns)
    )
    seeds = {rate: {row["seed"] for row in of} for rate, of in by_rate.items()}
    for rate in (sweep.rates[i] for i in sweep.as_good):
        if lacking := sorted(set.union(*seeds.values()) - seeds[rate]):
            raise SaesubError(
                f"the rate {rate:g} is the best or fits as well, and lacks the seeds {lacking}, "
                "which another rate has: train them, or chance chooses the rate"
            )
    return sweep


class Interval(NamedTuple):
    """A mean or another statistic with its 95 % interval, and how many values it is of."""

    mean: float
    low: float
    high: float
    n: int


def paired(
    condition: Mapping[int, float],
    baseline: Mapping[int, float],
    how: Literal["difference", "ratio"] = "difference",
) -> Interval:
    """Condition minus baseline, or divided by it, seed by seed, with Student's 95 % interval.

    Args:
        condition, baseline: seed -> measure. Seeds are pairs: the same batches in the same order.
        how: "ratio" is NaN where less than 2 % of a baseline is dead: it says nothing then.

    Raises SaesubError for anything but mappings, a condition without its baseline, fewer than
    three pairs, a measure that is no finite number, or another `how`.
    """
    if how not in ("difference", "ratio"):
        raise SaesubError(f'how is {how!r}: choose "difference" or "ratio"')
    if not (isinstance(condition, Mapping) and isinstance(baseline, Mapping)):
        raise SaesubError(
            "seeds are paired by number: give two mappings of seed to measure, such as a pandas "
            "Series' to_dict()"
        )
    if missing := sorted(set(condition) ^ set(baseline), key=str):
        raise SaesubError(
            f"seeds {missing} have a condition without its baseline, or the reverse: train both"
        )
    if len(condition) < 3:
        raise SaesubError(
            f"{len(condition)} seeds give no interval: train at least three seeds of both"
        )
    both = [of[seed] for seed in sorted(condition, key=str) for of in (condition, baseline)]
    measures = iter(_numbers(both))
    pairs = list(zip(measures, measures, strict=True))
    if how == "difference":
        values = [a - b for a, b in pairs]
    elif min(b for _, b in pairs) < _LEAST_BASELINE:
        return Interval(math.nan, math.nan, math.nan, len(pairs))
    else:
        values = [a / b for a, b in pairs]
    return interval(values)


def interval(values: Iterable[float]) -> Interval:
    """Mean and Student's 95 % interval of independent values.

    Raises SaesubError below three, for a table, or for a value that is no finite number.
    """
    if isinstance(values, Mapping) or hasattr(values, "columns"):
        raise SaesubError("a table does not say what its values are: give a list of them")
    values = _numbers(values)
    if len(values) < 3:
        raise SaesubError(f"{len(values)} values give no interval: measure at least three")
    mean, n = float(np.mean(values)), len(values)
    reach = float(np.std(values, ddof=1) / math.sqrt(n) * student_t.ppf(0.975, n - 1))
    return Interval(mean, mean - reach, mean + reach, n)


def _numbers(values: Iterable[Any]) -> list[float]:
    """The measures as floats, so that a small dtype neither overflows nor rounds."""
    values = list(values)
    try:
        found = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise SaesubError(f"a measure is no number ({error}): give numbers") from error
    if bad := sum(not math.isfinite(value) for value in found):
        raise SaesubError(
            f"{bad} of {len(found)} measures are None, NaN or infinite: leave out a rate at "
            "which training diverges, or measure them again"
        )
    return found


def bootstrap(
    statistic: Callable[[list[Any]], float], groups: Iterable[Any], *, n: int = 2000, seed: int = 0
) -> Interval:
    """A statistic of groups with the 95 % interval over resampled groups, each drawn whole.

    Args:
        statistic: of a list of groups.
        groups: what is independent, such as documents; or layers, with all their sites.
        n: resamples, at least 100.
        seed: of the draws.

    Raises SaesubError below three groups, for a table, whose groups it cannot know, or where the
    statistic is NaN or infinite for the groups or some of the draws: the interval would be that of
    the others.
    """
    if isinstance(groups, Mapping) or hasattr(groups, "columns"):
        raise SaesubError("a table does not say what its groups are: give a list of groups")
    groups, n = list(groups), whole_number(n, "n", _FEWEST_RESAMPLES)
    if len(groups) < 3:
        raise SaesubError(f"{len(groups)} groups give no interval: measure at least three")
    value = statistic(groups)
    draws = np.random.default_rng(seed).integers(len(groups), size=(n, len(groups)))
    values = [statistic([groups[i] for i in draw]) for draw in draws]
    nothing = int((~np.isfinite(values)).sum())
    if nothing or not math.isfinite(value):
        where = f"{nothing:,} of {n:,} resamples of the groups" if nothing else "the groups"
        raise SaesubError(
            f"the statistic has no value for {where}: take a statistic that each group has, or "
            "state no interval"
        )
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(value), float(low), float(high), len(groups))
