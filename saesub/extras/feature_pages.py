"""Features that one can look at: where each fires, what it writes, what wrote it, its neighbours.

An attention output is a sum over heads and source tokens, z_h W_O and pattern × value, so a
feature that reads one (`hook_attn_out`) has a share of its activation from each of them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.forward_pass import capture, hook_points
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import contexts_of, hook_of
from saesub.evaluation.top_activations import (
    Snippet,
    feature_activations,
    feature_indices,
    snippet_html,
    snippets_of,
)
from saesub.loading.models import Model, load_model

_MOST = 200  # features of a page
_BINS = 12
_AGREEMENT = 1e-3  # of the attention output with the sum of what its heads write
_ATTENTION = "hook_attn_out"
_CENTRES = 1e-3  # of a norm's gain, what it makes of a constant if it takes the mean away


@dataclass(frozen=True)
class Source:
    """What wrote a feature's activation at a peak: a head, or a source token, and how much."""

    name: str
    amount: float


@dataclass(frozen=True)
class Peak:
    """A snippet, and for attention outputs the heads and source tokens that wrote its peak."""

    snippet: Snippet
    heads: tuple[Source, ...] = ()
    tokens: tuple[Source, ...] = ()


@dataclass(frozen=True)
class FeatureView:
    """What a page shows of a feature.

    Attributes:
        density: share of the positions that count on which it fires.
        counts: of its activations by size, from 0 to the largest in equal steps.
        largest: its largest activation.
        raises, lowers: tokens whose logits its decoder row raises and lowers most. The amounts are
            in units of their own, since the last norm divides by the length of the whole stream:
            their order and ratios count.
        near: the features whose decoder rows are nearest, with the cosine.
    """

    feature: int
    density: float
    counts: tuple[int, ...]
    largest: float
    peaks: tuple[Peak, ...]
    raises: tuple[Source, ...]
    lowers: tuple[Source, ...]
    near: tuple[Source, ...]


@dataclass(frozen=True)
class FeaturePage:
    """Features by group; shows itself as HTML, each folded, without scripts."""

    groups: Mapping[str, Sequence[FeatureView]]

    def _repr_html_(self) -> str:
        parts = [
            f"<h4>{html.escape(name)}</h4>" + "".join(map(_feature_html, views))
            for name, views in self.groups.items()
        ]
        style = "background:#fff;color:#111;padding:0.5em;line-height:1.6"
        return f"<div class='saesub-features' style='{style}'>{''.join(parts)}</div>"


@torch.no_grad()
def feature_page(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    groups: Mapping[str, Sequence[int]],
    *,
    n_snippets: int = 3,
    n_around: int = 10,
    n_named: int = 6,
) -> FeaturePage:
    """What features do in some text, by group.

    Args:
        sae: with its input scaling folded in; its metadata name the hook point.
        tokens: contexts to look through, as `pack_contexts` cuts them.
        groups: indices of the features by what is written above them.
        n_snippets, n_around: as `top_activations` takes them.
        n_named: tokens and neighbours that are named.

    Raises SaesubError as `top_activations` does, and for more than 200 features.
    """
    bridge, n_named = load_model(model), whole_number(n_named, "n_named")
    n_snippets = whole_number(n_snippets, "n_snippets")
    n_around = whole_number(n_around, "n_around", 0)
    if not isinstance(groups, Mapping) or not all(isinstance(name, str) for name in groups):
        raise SaesubError(
            "groups is a dictionary of lists of features by name: give one, such as {'dead': [3]}"
        )
    chosen = {name: feature_indices(own, sae) for name, own in groups.items()}
    features = sorted({feature for own in chosen.values() for feature in own})
    if not features or len(features) > _MOST:
        raise SaesubError(f"a page shows 1 to {_MOST} features, not {len(features)}: choose fewer")
    tokens = contexts_of(bridge, tokens).cpu()
    acts, kept = feature_activations(bridge, sae, tokens, features)
    rows = F.normalize(sae.W_dec.detach().float(), dim=1)
    effects = _logit_effects(bridge, sae.W_dec.detach()[features])
    views = {}
    for place, feature in enumerate(features):
        own = acts[..., place]
        found = list(snippets_of(bridge, tokens, own, n_snippets, n_around))
        counts, largest = _counts(own[kept])
        views[feature] = FeatureView(
            feature,
            density=(own[kept] != 0).float().mean().item(),
            counts=counts,
            largest=largest,
            peaks=tuple(Peak(snippet) for snippet, *_ in found),
            raises=_extreme(bridge, effects[place], n_named, largest=True),
            lowers=_extreme(bridge, effects[place], n_named, largest=False),
            near=_nearest(rows, feature, n_named),
        )
        if hook_of(sae).endswith(_ATTENTION):
            at = [(context, peak, own[context, peak].sign().item()) for _, context, peak in found]
            written = _written_by(bridge, hook_of(sae), tokens, at, sae.W_enc.detach()[:, feature])
            peaks = zip(views[feature].peaks, written, strict=True)
            peaks = tuple(replace(peak, heads=h, tokens=t) for peak, (h, t) in peaks)
            views[feature] = replace(views[feature], peaks=peaks)
    return FeaturePage({name: [views[i] for i in own] for name, own in chosen.items()})


def _counts(values: Float[Tensor, " n"]) -> tuple[tuple[int, ...], float]:
    """How many activations lie in each step up to the largest, in size."""
    sizes = values[values != 0].abs()
    if not len(sizes):
        return (0,) * _BINS, 0.0
    largest = sizes.max().item()
    places = (sizes / largest * _BINS).long().clamp(max=_BINS - 1)
    return tuple(torch.bincount(places, minlength=_BINS).tolist()), largest


def _logit_effects(
    model: TransformerBridge, rows: Float[Tensor, "n d"]
) -> Float[Tensor, "n vocab"]:
    """The change of the logits by each row, less its mean, through the last norm's gain."""
    rows = rows.to(model.W_U)
    x = torch.ones_like(rows[0])
    x[1::2] = -1  # of mean 0 and mean square 1: neither kind of norm changes it but by its gain
    x = x.view(1, 1, -1)
    gain = (model.ln_final(x) - model.ln_final(-x)) / (2 * x)
    # A norm that takes the mean away makes nothing of a constant; one that does not keeps it.
    constant = model.ln_final(x + 1) - model.ln_final(x)
    if constant.abs().mean() < _CENTRES * gain.abs().mean():
        rows = rows - rows.mean(dim=1, keepdim=True)
    effects = (rows * gain.view(-1)) @ model.W_U
    return effects - effects.mean(dim=1, keepdim=True)


def _extreme(
    model: TransformerBridge, effects: Float[Tensor, " vocab"], n: int, *, largest: bool
) -> tuple[Source, ...]:
    assert model.tokenizer is not None  # `contexts_of` has refused a model without one
    found = effects.topk(min(n, len(effects)), largest=largest)
    names = (model.tokenizer.decode([i]) for i in found.indices.tolist())
    return tuple(Source(*pair) for pair in zip(names, found.values.tolist(), strict=True))


def _nearest(rows: Float[Tensor, "d_sae d"], feature: int, n: int) -> tuple[Source, ...]:
    cosines = rows @ rows[feature]
    cosines[feature] = -2
    found = cosines.topk(min(n, len(rows) - 1))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return tuple(Source(str(index), value) for index, value in pairs)


def _written_by(
    model: TransformerBridge,
    hook_name: str,
    tokens: Int[Tensor, "contexts pos"],
    peaks: Iterable[tuple[int, int, float]],
    reads: Float[Tensor, " d"],
) -> Iterator[tuple[tuple[Source, ...], tuple[Source, ...]]]:
    """The heads and the source tokens that wrote most of what a feature reads at each peak, which
    is a context, a position, and the activation's sign there.

    Biases are left out. Nothing where the attention output is not the sum of what its heads write
    and its bias, as behind a norm.
    """
    layer = int(hook_name.split(".")[1])
    names = [f"blocks.{layer}.attn.hook_{what}" for what in ("pattern", "v", "z")] + [hook_name]
    W_O, bias = model.W_O[layer], getattr(model.blocks[layer].attn, "b_O", None)
    for context, peak, sign in peaks:
        found: dict[str, Tensor] = {}
        given = tokens[context : context + 1].to(model.cfg.device)
        capture(model, given, hook_points(model, names), found.__setitem__)
        pattern, v, z, out = (found[name][0] for name in names)
        n_pos, heads = len(given[0]), len(W_O)
        v, z = (t.reshape(n_pos, -1, W_O.shape[1]) for t in (v, z))
        written = torch.einsum("he,hed->d", z[peak], W_O)
        by_heads = out[peak] if bias is None else out[peak] - bias
        if (written - by_heads).norm() > _AGREEMENT * by_heads.norm():
            yield (), ()
            continue
        v = v.repeat_interleave(heads // v.shape[1], dim=1)  # heads of a group share their values
        read = torch.einsum("hed,d->he", W_O, reads.to(W_O))
        amounts = torch.einsum("hk,khe,he->hk", pattern[:, peak], v, read)
        yield _by_head(amounts, sign), _by_token(model, given[0], amounts, peak, sign)


def _by_head(amounts: Float[Tensor, "heads pos"], sign: float) -> tuple[Source, ...]:
    return tuple(Source(f"head {head}", n) for head, n in _strongest(amounts.sum(1), sign))


def _by_token(
    model: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    amounts: Float[Tensor, "heads pos"],
    peak: int,
    sign: float,
) -> tuple[Source, ...]:
    """The source tokens, each with its place before the peak."""
    assert model.tokenizer is not None
    return tuple(
        Source(f"{model.tokenizer.decode([int(tokens[at])])} ({at - peak})", amount)
        for at, amount in _strongest(amounts.sum(0), sign)
    )


def _strongest(amounts: Float[Tensor, " n"], sign: float) -> list[tuple[int, float]]:
    """Up to three places that write the most of a peak of this sign; none that writes against it,
    and none that cannot write, as a later token."""
    found = (sign * amounts).topk(min(3, len(amounts)))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [(at, sign * amount) for at, amount in pairs if amount > 0]


def _feature_html(view: FeatureView) -> str:
    strongest = max((abs(p.snippet.activations[p.snippet.peak]) for p in view.peaks), default=0.0)
    lines = "".join(
        snippet_html(peak.snippet, strongest)
        + _named("written by heads", peak.heads)
        + _named("written by tokens", peak.tokens)
        for peak in view.peaks
    )
    about = (
        _named("raises", view.raises) + _named("lowers", view.lowers) + _named("near", view.near)
    )
    title = f"feature {view.feature}, fires on {100 * view.density:.2g} % of tokens"
    body = _histogram(view) + lines + about if view.peaks else "silent in this text" + about
    return f"<details><summary>{title}</summary>{body}</details>"


def _named(what: str, sources: Sequence[Source]) -> str:
    if not sources:
        return ""
    # A name by itself: one that is read from the right would turn the others around.
    told = ", ".join(
        f"<bdi>{html.escape(repr(s.name)[1:-1])}</bdi> {s.amount:+.2f}" for s in sources
    )
    style = "color:#555;font-size:0.9em;overflow-wrap:anywhere"
    return f"<div style='{style}'>{what}: {told}</div>"


def _histogram(view: FeatureView) -> str:
    """Bars of the activations' counts, on a logarithmic scale."""
    most = max(view.counts)
    heights = [30 * (n + 1).bit_length() / (most + 1).bit_length() if n else 0 for n in view.counts]
    bars = "".join(
        f"<rect x='{10 * i}' y='{30 - h:.0f}' width='8' height='{h:.0f}' fill='#0072B2'/>"
        for i, h in enumerate(heights)
    )
    told = f"{sum(view.counts)} activations from 0 to {view.largest:.2g}, bars logarithmic"
    return (
        f"<svg role='img' aria-label='{told}' width='{10 * _BINS}' height='30'>"
        f"<title>{told}</title>{bars}</svg>"
    )
