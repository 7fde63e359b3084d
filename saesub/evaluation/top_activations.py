"""The text on which a feature fires most, as a page of shaded snippets."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.checks import require_finite
from saesub.activations.tokens import kept_positions
from saesub.arguments import require_sae, whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_reads, contexts_of, hook_of, site_activations
from saesub.loading.models import Model, load_model
from saesub.topk.encode import encoder_of

_SHADE = "0,114,178"  # Okabe and Ito's blue; one hue, so that only its strength is read
_STRONGEST = 0.55  # opacity at which black text is still easy to read
# What is not seen, or turns the text after it around, is shown by a sign.
_INVISIBLE = {code: 0x2400 + code for code in range(32)} | {ord("\n"): "⏎", ord("\t"): "⇥"}
_INVISIBLE |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


@dataclass(frozen=True)
class Snippet:
    """Tokens around a feature's peak in one context, and its activation at each of them."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def peak(self) -> int:
        """Where the feature is strongest, of either sign."""
        sizes = [abs(value) for value in self.activations]
        return sizes.index(max(sizes))


@dataclass(frozen=True)
class FeatureSnippets:
    """A feature's strongest snippets, strongest first, at most one from each context.

    `density` is the share of the positions that count on which it fires.
    """

    feature: int
    density: float
    snippets: tuple[Snippet, ...]

    def __str__(self) -> str:
        return f"feature {self.feature}, fires on {100 * self.density:.2g} % of tokens"


@dataclass(frozen=True)
class TopActivations:
    """Features with their snippets; shows itself as HTML (text escaped) or as plain text."""

    features: Sequence[FeatureSnippets]

    def __str__(self) -> str:
        lines = []
        for of_feature in self.features:
            lines.append(str(of_feature))
            for snippet in of_feature.snippets:
                words = list(snippet.tokens)
                words[snippet.peak] = f"[{words[snippet.peak]}]"
                lines.append("    " + "".join(words).translate(_INVISIBLE))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join(map(_feature_html, self.features))
        style = "background:#fff;color:#111;padding:0.5em;line-height:1.7"
        return f"<div class='saesub-top-activations' style='{style}'>{body}</div>"


@torch.no_grad()
def top_activations(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    features: Sequence[int],
    *,
    n_snippets: int = 4,
    n_around: int = 12,
    batch_size: int = 8,
    skip_first: int = 1,
) -> TopActivations:
    """The contexts in which each of a few features peaks highest, cut around the peak.

    Special tokens and the first `skip_first` positions are left out, as in training: features are
    shown silent there, and densities are shares of the other positions. Strong is what is far from
    0: the features of an AbsTopK SAE fire with either sign. Warns of an SAE of a model of another
    name.

    Args:
        sae: with its input scaling folded in; its metadata name the hook point.
        tokens: contexts to look through, as `pack_contexts` cuts them.
        features: indices of the features.
        n_snippets: at most so many contexts of each feature; only contexts in which it fires.
        n_around: tokens shown on either side of the peak.

    Raises:
        SaesubError: tokens that are no contexts of this model, none but those left out, a feature
            outside the SAE, metadata without a hook point, an SAE of one head, one whose scaling is
            not folded in, or one that `saesub.topk.encode.encoder_of` refuses.
    """
    bridge, n_snippets = load_model(model), whole_number(n_snippets, "n_snippets")
    n_around = whole_number(n_around, "n_around", 0)
    features = feature_indices(features, sae)
    tokens = contexts_of(bridge, tokens).cpu()
    acts, kept = feature_activations(
        bridge, sae, tokens, features, batch_size=batch_size, skip_first=skip_first
    )
    shown = []
    for feature, own in zip(features, acts.unbind(-1), strict=True):
        density = (own[kept] != 0).float().mean().item()
        found = snippets_of(bridge, tokens, own, n_snippets, n_around)
        snippets = tuple(snippet for snippet, _, _ in found)
        shown.append(FeatureSnippets(feature, density, snippets))
    return TopActivations(shown)


@torch.no_grad()
def feature_activations(
    bridge: TransformerBridge,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    features: Sequence[int],
    *,
    batch_size: int = 8,
    skip_first: int = 1,
) -> tuple[Float[Tensor, "contexts pos features"], Bool[Tensor, "contexts pos"]]:
    """What a few features are at every position, 0 at those left out, and which positions count.

    Raises SaesubError as `top_activations` does.
    """
    hook_name, encode = hook_of(sae), encoder_of(sae)
    batch_size = whole_number(batch_size, "batch_size")
    check_reads(sae, bridge, hook_name)
    acts = torch.zeros(*tokens.shape, len(features), dtype=torch.float32)
    kept = kept_positions(bridge, tokens, skip_first)
    if not kept.any():
        raise SaesubError(
            f"tokens {tuple(tokens.shape)} hold no ordinary token after the first {skip_first} "
            "positions: give longer contexts"
        )
    for of_batch, mask, batch in zip(
        *(t.split(batch_size) for t in (acts, kept, tokens)), strict=True
    ):
        x = site_activations(bridge, batch, hook_name)[mask.to(bridge.cfg.device)]
        require_finite(x)
        of_batch[mask] = encode(x).to_dense()[:, features].float().cpu()
    return acts, kept


def feature_indices(features: Sequence[int], sae: SAE[Any]) -> list[int]:
    """The features as ints. Raises SaesubError for what is no list of features of an SAE."""
    require_sae(sae)
    given = features.tolist() if isinstance(features, (Tensor, np.ndarray)) else features
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SaesubError(f"features is a list of indices, not {features!r}.")
    found = [whole_number(feature, "a feature", 0) for feature in given]
    if bad := [feature for feature in found if feature >= sae.cfg.d_sae]:
        raise SaesubError(
            f"features {bad} do not exist: choose among 0..{sae.cfg.d_sae - 1}, the SAE's own"
        )
    return found


def snippets_of(
    model: TransformerBridge,
    tokens: Int[Tensor, "contexts pos"],
    acts: Float[Tensor, "contexts pos"],
    n: int,
    around: int,
) -> Iterator[tuple[Snippet, int, int]]:
    """A feature's strongest contexts, cut around the peak; with each, its place and the peak's."""
    peaks = acts.abs().max(1)
    assert model.tokenizer is not None  # kept_positions has refused a model without one
    for context in peaks.values.argsort(descending=True)[:n].tolist():
        if peaks.values[context] <= 0:
            return
        peak = int(peaks.indices[context])
        window = slice(max(0, peak - around), peak + around + 1)
        text = (model.tokenizer.decode([i]) for i in tokens[context, window].tolist())
        yield Snippet(tuple(text), tuple(acts[context, window].tolist())), context, peak


def _feature_html(of_feature: FeatureSnippets) -> str:
    strongest = max((abs(s.activations[s.peak]) for s in of_feature.snippets), default=0.0)
    lines = "".join(snippet_html(s, strongest) for s in of_feature.snippets)
    lines = lines or "<div>silent in this text</div>"
    return f"<div style='margin-bottom:0.8em'><b>{of_feature}</b>{lines}</div>"


def snippet_html(snippet: Snippet, strongest: float) -> str:
    """A line of shaded tokens, every text escaped; `strongest` is the activation of full shade."""
    spans = []
    for i, (token, value) in enumerate(zip(snippet.tokens, snippet.activations, strict=True)):
        text = html.escape(token.translate(_INVISIBLE))
        if value:
            style = f"background:rgba({_SHADE},{_STRONGEST * abs(value) / strongest:.2f})"
            if i == snippet.peak:
                style += ";font-weight:bold;text-decoration:underline"
            text = f"<span style='{style}' title='{value:.3g}'>{text}</span>"
        spans.append(text)
    return f"<div style='white-space:pre-wrap;overflow-wrap:anywhere'>{''.join(spans)}</div>"
