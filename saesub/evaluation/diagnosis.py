"""What is wrong with an SAE that is already trained: its dead features, why they died, what helps.

Facts are measured on the SAE and the activations that are given. Advice comes from the studies of
this project, and is withheld where they do not reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from sae_lens import SAE
from torch import Tensor

from saesub.activations.spectrum import Spectrum, massive
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.causes import CAUSES, REVIVALS, Explanation, explain, sampled
from saesub.evaluation.held_out import Judgement, judge
from saesub.evaluation.passes import Activations, all_tokens, check_folded
from saesub.evaluation.protocol import FIRINGS_FOR_A_VERDICT, mean_firings, too_few_firings
from saesub.evaluation.reconstruction import require_autoencoder
from saesub.init.norm import check_unhooked
from saesub.init.subspace import choose_d_init
from saesub.precision import without_autocast
from saesub.topk.encode import encoder_of

if TYPE_CHECKING:
    import pandas as pd

HEALTHY, UNKNOWN = "healthy", "unknown"

_SAMPLE = 16_384  # tokens on which causes are told
_ALIVE = 0.01  # share of dead features below which an SAE is called healthy
_FALLS = 1.1  # last but one share of silent features by the last, above which the curve still falls
_WORSE = 1.1  # times the error of writing zero
_TIED = 0.1  # of the dead features: causes whose shares are closer are all main ones
_BROKEN = 0.5  # share of dead features above which an SAE may fit so badly on its own activations
# What the studies cover (data/results/studies; notebooks 04 to 07 and 11).
_ARCHITECTURE = "topk"
_WIDTHS = 2048, 8192  # features
_D_IN = 576, 896
_KS = 32, 64
_TOKENS = 1_024_000  # of training, at most
_SPARSE_ADAM_LR = 0.002  # at most: cure.json, where random features survive under SparseAdam
_STUDIED = (
    "This comes from TopK SAEs of three small models, with k 32 or 64, 2,048 to 8,192 features and "
    "up to 1,024,000 tokens of training."
)
_WORSE_THAN_MEAN = (
    "The SAE rebuilds these activations worse than their mean would (FVU above 1): make sure that "
    "they are of its own model, hook point and scale, or what follows means nothing."
)


@dataclass(frozen=True, eq=False)
class SAEDiagnosis:
    """What `saesub.diagnose` found; printed, a short table and a paragraph.

    Attributes:
        judgement: FVU, L0, firing counts and the share of silent features by window.
        firings: of an average feature over the window.
        spectrum: of a sample of the activations, without massive tokens.
        explanation: of each dead feature; why there is none, as a sentence fragment.
        recorded: what the SAE's metadata say of its training.
        withheld: why there is no advice; empty if there is some.
    """

    judgement: Judgement
    firings: float
    spectrum: Spectrum
    explanation: Explanation | str
    recorded: dict[str, Any]
    withheld: tuple[str, ...]

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Which features did not fire over the window."""
        return (self.judgement.counts == 0).cpu()

    @property
    def dead_share(self) -> float:
        """Share of features that did not fire over the window."""
        return float(self.dead.double().mean())

    @property
    def offset(self) -> float:
        """‖mean‖ of the activations by their standard deviation, γ of arXiv 2605.31518."""
        return _offset(self.spectrum)

    @property
    def causes(self) -> dict[str, float]:
        """Cause -> its share of the dead features, the largest first; empty if not told."""
        if isinstance(self.explanation, str):
            return {}
        counts = torch.bincount(self.explanation.cause, minlength=len(CAUSES)).double()
        shares = dict(zip(CAUSES, (counts / counts.sum()).tolist(), strict=True))
        return {c: shares[c] for c in sorted(shares, key=shares.__getitem__, reverse=True)}

    @property
    def cause(self) -> str:
        """The cause of most dead features; "healthy" if less than 1 % are dead; "unknown" if the
        window carries no verdict or no cause can be told."""
        if too_few_firings(self.judgement.n_tokens, d_sae=len(self.dead), l0=self.judgement.l0):
            return UNKNOWN
        return HEALTHY if self.dead_share < _ALIVE else next(iter(self.causes), UNKNOWN)

    @property
    def revived_by(self) -> dict[str, int]:
        """What lets dead features fire again -> how many, each changed alone; empty if not told."""
        if isinstance(self.explanation, str):
            return {}
        counts = torch.bincount(self.explanation.revived_by, minlength=len(REVIVALS))
        return dict(zip(REVIVALS, counts.tolist(), strict=True))

    def table(self) -> pd.DataFrame:
        """A row for each feature: dead, density, and the parts of its score
        (`saesub.evaluation.causes`); of the dead ones also the cause, what would revive them, and
        how close they came: their best score less the token's threshold."""
        import pandas as pd

        frame = pd.DataFrame({"dead": self.dead.numpy()})
        frame["density"] = self.judgement.counts.cpu().numpy() / self.judgement.n_tokens
        if isinstance(self.explanation, str):
            return frame
        for name, part in self.explanation.parts._asdict().items():
            frame[name] = part.numpy()
        rows, found = frame["dead"].to_numpy(), self.explanation
        frame["cause"] = frame["revived_by"] = None
        frame.loc[rows, "cause"] = np.array(list(CAUSES))[found.cause.numpy()]
        frame.loc[rows, "revived_by"] = np.array(REVIVALS)[found.revived_by.numpy()]
        frame.loc[rows, "closest"] = found.closest.numpy()
        return frame

    @property
    def advice(self) -> str:
        """One paragraph: what was found and what to change, or why that is not said."""
        if self.withheld:
            change = f"No advice: {'; '.join(self.withheld)}."
        elif self.cause == HEALTHY:
            change = "No change is needed for dead features."
        else:
            change = f"{_change(self)} {_STUDIED}"
        return " ".join((*self._findings(), change))

    def __str__(self) -> str:
        told = self.judgement
        lines = [
            f"{len(told.counts):,} features over {told.n_tokens:,} tokens ({self.firings:,.0f} "
            f"firings a feature): FVU {told.fvu:.4f}, L0 {told.l0:.1f}, offset {self.offset:.2f}",
            *(f"{'silent after ' + format(n, ','):<40}{s:7.2%}" for n, s in told.silent.items()),
            *(
                f"{'cause: ' + cause:<40}{share:7.1%} of dead"
                for cause, share in self.causes.items()
                if share
            ),
            *(f"{'revived by ' + how:<40}{n:7,}" for how, n in self.revived_by.items() if n),
        ]
        return "\n".join((*lines, "", self.advice))

    def _findings(self) -> list[str]:
        n, silent = int(self.dead.sum()), list(self.judgement.silent.values())
        found = [f"{n:,} of {len(self.dead):,} features ({self.dead_share:.2%}) did not fire."]
        if self.judgement.fvu > 1:
            found.insert(0, _WORSE_THAN_MEAN)
        if n and len(silent) > 1 and silent[-2] > _FALLS * silent[-1]:
            found.append("The share still falls as the window grows: some are rare, not dead.")
        if isinstance(self.explanation, str):
            return [*found, f"No cause is told: {self.explanation}."] if n else found
        main = self._main_causes()
        if main:
            each = "; ".join(f"{of} ({share:.0%}), {CAUSES[of]}" for of, share in main.items())
            several = "Causes of nearly as many each, so mend one after the other"
            found.append(f"{several if len(main) > 1 else 'Main cause'}: {each}.")
        if "rate" in main and self.recorded.get("aux_loss_coefficient"):
            found.append("AuxK moves dead features too, so it may be AuxK that moved them.")
        if self.offset > 1 > self.explanation.offset_left:
            found.append(
                f"The activations' mean is {self.offset:.1f} standard deviations long. The SAE "
                "takes it off now; whether it did at the start cannot be seen."
            )
        revived = n - self.revived_by[REVIVALS[-1]]
        return [
            *found,
            f"Another bias or norm of its own would let {revived:,} of them fire, which does not "
            "say that they would be useful.",
        ]

    def _main_causes(self) -> dict[str, float]:
        """The cause of most dead features and all that have nearly as many, with their shares; none
        of a healthy SAE."""
        largest = max(self.causes.values())
        near = {of: share for of, share in self.causes.items() if share > largest - _TIED}
        return {} if self.cause == HEALTHY else near


@torch.no_grad()
@without_autocast()
def diagnose(
    sae: SAE[Any],
    activations: Activations,
    *,
    n_tokens: int | None = None,
    progress: bool = True,
) -> SAEDiagnosis:
    """Dead features of a trained SAE: how many by window, why, which could be revived, what to do.

    Causes are told from the weights and about 16,000 of the tokens: see `saesub.evaluation.causes`
    for what they mean. An offset that the biases have learned to take off leaves no trace, and
    "rate" is told where the encoder column of a dead feature has turned away from its decoder row;
    so it takes for granted that both began alike, as in SAELens.

    Args:
        sae: any SAELens SAE, in training or inference form, from a disk, the hub or a trainer.
        activations: (n, d_in) at its hook point, held out from its training; or a store, or an
            iterable of blocks of rows.
        n_tokens: the longest window; by default all of a matrix or a store; blocks need it. There
            is no verdict from fewer than 200 firings of an average feature, which take
            200 · d_sae / L0 tokens.
        progress: show a bar, if it takes more than a second.

    Raises:
        SaesubError: what `saesub.judge` refuses, an SAE with hooks or whose input scaling is not
            folded in, no more tokens than dimensions, or activations that the SAE reconstructs
            worse than their mean would (than zero would, where most features are dead).

    Example:
        >>> print(saesub.diagnose(sae, held_out))  # doctest: +SKIP
    """
    encoder_of(sae)  # which refuses what is no SAE or cannot be read
    require_autoencoder(sae)
    check_folded(sae)
    check_unhooked(sae)
    n_tokens = all_tokens(activations) if n_tokens is None else n_tokens
    n_tokens, kept = whole_number(n_tokens, "n_tokens"), []
    blocks = sampled(activations, n_tokens, _SAMPLE, kept)
    judgement = judge(sae, blocks, n_tokens=n_tokens, progress=progress)
    sample = torch.cat(kept).float().flatten(1)
    sample = sample[~massive(sample)]
    if len(sample) <= sae.cfg.d_in:
        raise SaesubError(
            f"{len(sample):,} ordinary tokens do not tell the {sae.cfg.d_in:,} dimensions of the "
            "activations apart: give more tokens"
        )
    spectrum = Spectrum.from_activations(sample, keep_massive=True)
    _check_fit(judgement, spectrum)
    window = {"d_sae": sae.cfg.d_sae, "l0": judgement.l0}
    too_few = too_few_firings(n_tokens, **window)
    explanation = too_few or explain(sae, sample, judgement.counts == 0, spectrum)
    recorded = _recorded(sae)
    return SAEDiagnosis(
        judgement,
        mean_firings(n_tokens, **window),
        spectrum,
        explanation,
        recorded,
        tuple(_withheld(judgement, sae.cfg.d_in, recorded, explanation)),
    )


def ranking(reports: Mapping[str, SAEDiagnosis]) -> str:
    """A line for each SAE, that with the largest share of dead features first.

    Raises SaesubError for windows of different lengths.
    """
    windows = {report.judgement.n_tokens for report in reports.values()}
    if len(windows) > 1:
        raise SaesubError(
            f"shares of dead features over {' and '.join(f'{n:,}' for n in sorted(windows))} "
            "tokens do not compare: give all SAEs one n_tokens"
        )
    width = max((len(name) for name in reports), default=0)
    lines = [f"{'SAE':<{width}}     dead  firings     FVU  main cause"]
    for name, of in sorted(reports.items(), key=lambda item: -item[1].dead_share):
        lines.append(
            f"{name:<{width}}  {of.dead_share:7.2%}  {of.firings:7,.0f}  {of.judgement.fvu:6.4f}  "
            f"{of.cause}"
        )
    return "\n".join(lines)


def _offset(spectrum: Spectrum) -> float:
    return float(spectrum.mean.norm() / spectrum.eigenvalues.sum().sqrt())


def _check_fit(judgement: Judgement, spectrum: Spectrum) -> None:
    """Refuse activations that the SAE rebuilds worse than their mean would; where most features are
    dead, as an offset leaves them, worse than zero would."""
    broken = float((judgement.counts == 0).double().mean()) > _BROKEN
    if judgement.fvu > (_WORSE * (1 + _offset(spectrum) ** 2) if broken else 1):
        raise SaesubError(
            f"the SAE's FVU on these activations is {judgement.fvu:.3g}, and their mean alone has "
            "1: they are not what it was trained on, or its training diverged; give activations "
            "of its own model and hook point, scaled as in training"
        )


def _recorded(sae: SAE[Any]) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    found = {
        "architecture": metadata.training_architecture or sae.cfg.architecture(),
        "k": getattr(sae.cfg, "k", None),
        **_details(sae),
        **{n: metadata[n] for n in ("optimizer", "lr", "training_tokens", "subspace_init")},
    }
    if metadata.norm_fitted_to_d_sae:
        found["decoder_init_norm"] = None  # the norm was fitted after SAELens had set it
    return {name: value for name, value in found.items() if value is not None}


def _details(sae: SAE[Any]) -> dict[str, Any]:
    """Settings of training: of a training SAE as they are now, else as they were saved."""
    now = getattr(sae.cfg, "get_training_architecture_details", dict)()
    return now or sae.cfg.metadata.training_architecture_details or {}


def _withheld(
    judgement: Judgement, d_in: int, recorded: dict[str, Any], explanation: Explanation | str
) -> Iterable[str]:
    d_sae, (least, most) = len(judgement.counts), _WIDTHS
    if reason := too_few_firings(judgement.n_tokens, d_sae=d_sae, l0=judgement.l0):
        # L0 varies from text to text, so a few tokens more are asked for.
        wanted = 11 * FIRINGS_FOR_A_VERDICT * d_sae
        tokens = 100 * ceil(wanted / (1000 * judgement.l0)) if judgement.l0 else 0
        yield reason + (f", which {tokens:,} tokens give" if tokens else "")
        return
    if isinstance(explanation, str) and judgement.counts.eq(0).double().mean() >= _ALIVE:
        yield "no cause is told"
    if recorded["architecture"] != _ARCHITECTURE:
        yield f"the studies are of TopK SAEs, and this one is {recorded['architecture']!r}"
    elif (k := recorded.get("k")) not in _KS:
        yield f"the studies have k {' or '.join(map(str, _KS))}, and this SAE {k}"
    if not _D_IN[0] <= d_in <= _D_IN[1]:
        yield f"the studies are of widths {_D_IN[0]} to {_D_IN[1]}, and this SAE reads {d_in:,}"
    if not least <= d_sae <= most:
        yield f"the studies are of {least:,} to {most:,} features, and this SAE has {d_sae:,}"
    if (tokens := recorded.get("training_tokens")) is None:
        yield (
            f"the studies train on at most {_TOKENS:,} tokens, and no record says how many this "
            "SAE saw: set sae.cfg.metadata.training_tokens"
        )
    elif tokens > _TOKENS:
        yield f"the studies train on at most {_TOKENS:,} tokens, and this SAE saw {tokens:,}"


def _change(found: SAEDiagnosis) -> str:
    recorded, explanation = found.recorded, found.explanation
    assert not isinstance(explanation, str)
    if found.cause == "offset":
        return "Set the biases to the mean before training: saesub.center_biases(sae, spectrum)."
    if found.cause == "norm":
        norm = recorded.get("decoder_init_norm")
        began = f", where these rows began at norm {norm:g}" if norm else ""
        return f"Call saesub.fit_norm(sae, spectrum) before training{began}."
    if found.cause == "subspace" and 2 * explanation.crowded > len(explanation.cause):
        d_init = (recorded.get("subspace_init") or {}).get("d_init")
        began = f", not {d_init}" if d_init else ""
        return (
            'The dead features crowd in few dimensions; begin in more: d_init="auto" is '
            f"{choose_d_init(found.spectrum)} here{began}."
        )
    if found.cause == "subspace":
        return (
            "Begin where the activations vary: saesub.initialize_in_subspace(sae, spectrum); or "
            f"train with SparseAdam at a rate of {_SPARSE_ADAM_LR:g} or less, which kept nearly "
            "all random features alive at the one site where that was tried (SmolLM2, attention "
            "output of layer 12)."
        )
    if found.cause == "rate":
        rate = f" of {recorded['lr']:g}" if "lr" in recorded else ""
        other = "" if recorded.get("optimizer") == "sparse_adam" else ", or train with SparseAdam"
        return f"Halve the learning rate{rate} and compare FVU and dead features{other}."
    return "The weights do not tell why, so train it again with one setting changed at a time."
