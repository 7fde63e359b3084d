"""The contexts in which a feature fires most, as a page of shaded text."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.tokens import kept_positions
from saesub.errors import SaesubError
from saesub.evaluation.passes import site_activations
from saesub.evaluation.language_model_loss import hook_of
from saesub.loading.models import Model, load_model
from saesub.topk.encode import flat_heads

_SHADE = "0,114,178"  # Okabe and Ito's blue; one hue, so that only its strength is read
_STRONGEST = 0.55  # opacity at which black text is still easy to read
_INVISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class Snippet:
    """Tokens around a feature's peak in one context, and its activation at each of them."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class FeatureExamples:
    """A feature's strongest contexts, strongest first, no two from the same context.

    `density` is the share of the text's tokens it fires on.
    """

    feature: int
    density: float
    snippets: tuple[Snippet, ...]


class ExamplesPage:
    """Features with their snippets; shows itself as HTML (text escaped) or as plain text."""

    def __init__(self, features: Sequence[FeatureExamples]) -> None:
        self.features = list(features)

    def __str__(self) -> str:
        return "\n".join(_lines(self.features))

    def _repr_html_(self) -> str:
        body = "".join(map(_feature_html, self.features))
        style = "background:#fff;color:#111;padding:0.5em;line-height:1.7"
        return f"<div class='saesub-examples' style='{style}'>{body}</div>"


def top_contexts(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    features: Sequence[int],
    *,
    n_snippets: int = 4,
    n_around: int = 12,
    batch_size: int = 8,
    skip_first: int = 1,
) -> ExamplesPage:
    """The contexts in which each of a few features peaks highest, cut around the peak.

    Special tokens and the first `skip_first` positions count as silent, as in training.

    Args:
        sae: with its input scaling folded in; its metadata name the hook point.
        tokens: contexts to look through, as `pack_contexts` cuts them.
        features: indices of the features.
        n_snippets: contexts shown of each at most; those in which it is silent are not shown.
        n_around: tokens shown on either side of the peak.

    Raises:
        SaesubError: a feature outside the dictionary, or metadata without a hook point.
    """
    bridge = load_model(model)
    if bad := [f for f in features if not 0 <= f < sae.cfg.d_sae]:
        raise SaesubError(f"features {bad} do not exist: the SAE has 0..{sae.cfg.d_sae - 1}")
    chosen = torch.tensor(list(features), device=sae.device)
    blocks = tokens.split(batch_size)
    acts = torch.cat([_chosen_acts(bridge, sae, b, chosen, skip_first) for b in blocks])
    page = []
    for column, feature in enumerate(features):
        own = acts[..., column]
        density = (own != 0).float().mean().item()
        snippets = tuple(_snippets(bridge, tokens, own, n_snippets, n_around))
        page.append(FeatureExamples(int(feature), density, snippets))
    return ExamplesPage(page)


@torch.no_grad()
def _chosen_acts(
    model: TransformerBridge, sae: SAE[Any], tokens: Tensor, chosen: Tensor, skip_first: int
) -> Float[Tensor, "contexts pos features"]:
    kept = kept_positions(model, tokens, skip_first)
    x = site_activations(model, tokens, hook_of(sae))[kept.to(model.cfg.device)].to(sae.device)
    acts = torch.zeros(*tokens.shape, len(chosen))
    with flat_heads(sae):
        acts[kept] = sae.encode(x).to_dense()[:, chosen].float().cpu()
    return acts


def _snippets(
    model: TransformerBridge, tokens: Tensor, acts: Tensor, n: int, around: int
) -> Iterator[Snippet]:
    peaks = acts.max(1)
    assert model.tokenizer is not None  # its contexts were cut with one
    for context in peaks.values.argsort(descending=True)[:n].tolist():
        if peaks.values[context] <= 0:
            return
        peak = int(peaks.indices[context])
        window = slice(max(0, peak - around), peak + around + 1)
        text = (model.tokenizer.decode([i]) for i in tokens[context, window].tolist())
        yield Snippet(tuple(text), tuple(acts[context, window].tolist()))


def _feature_html(examples: FeatureExamples) -> str:
    strongest = max((max(s.activations) for s in examples.snippets), default=0.0)
    lines = "".join(_snippet_html(s, strongest) for s in examples.snippets)
    head = f"<b>{_title(examples)}</b>"
    return (
        f"<div style='margin-bottom:0.8em'>{head}{lines or '<div>silent in this text</div>'}</div>"
    )


def _snippet_html(snippet: Snippet, strongest: float) -> str:
    peak = max(range(len(snippet.tokens)), key=snippet.activations.__getitem__)
    spans = (
        _token_html(token, value, strongest, i == peak)
        for i, (token, value) in enumerate(zip(snippet.tokens, snippet.activations, strict=True))
    )
    return f"<div style='white-space:pre-wrap'>{''.join(spans)}</div>"


def _token_html(token: str, value: float, strongest: float, is_peak: bool) -> str:
    text = html.escape(token.translate(_INVISIBLE))
    if value <= 0:
        return text
    shade = f"background:rgba({_SHADE},{_STRONGEST * value / strongest:.2f})"
    mark = ";font-weight:bold;text-decoration:underline" if is_peak else ""
    return f"<span style='{shade}{mark}' title='{value:.3g}'>{text}</span>"


def _title(examples: FeatureExamples) -> str:
    return f"feature {examples.feature}, fires on {100 * examples.density:.2g} % of tokens"


def _lines(features: Sequence[FeatureExamples]) -> Iterator[str]:
    for examples in features:
        yield _title(examples)
        for snippet in examples.snippets:
            peak = max(range(len(snippet.tokens)), key=snippet.activations.__getitem__)
            words = list(snippet.tokens)
            words[peak] = f"[{words[peak]}]"
            yield "    " + "".join(words).translate(_INVISIBLE)
