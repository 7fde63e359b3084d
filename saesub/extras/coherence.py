"""How alike the texts are in which a feature fires most, by a sentence encoder.

A feature that stands for one thing fires most in texts that are alike, so a sentence encoder gives
them similar vectors. `feature_coherence` does it all for one SAE. Where many SAEs are judged on the
same text, call the parts: `snippet_spans` and `embed` once, then `Peaks` and `coherence` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from saesub.activations.checks import require_finite
from saesub.activations.tokens import kept_positions
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_reads, contexts_of, hook_of, site_activations
from saesub.evaluation.top_activations import feature_indices
from saesub.extras.encoders import load_encoder
from saesub.loading.models import Model, context_tokens, load_model
from saesub.progress import bar
from saesub.topk.encode import encoder_of

Encoder: TypeAlias = str | Callable[[list[str]], Float[Tensor, "n d"]]
ENCODER = "all-minilm-l6-v2"


class Coherence(NamedTuple):
    """Mean cosine between the snippets of each feature.

    Both are NaN for a feature that fires in fewer contexts than there are snippets. `shuffled` is
    the same after the features have exchanged their snippets at random, which is chance.
    """

    by_feature: Float[Tensor, " features"]
    shuffled: Float[Tensor, " features"]

    @property
    def above_chance(self) -> float:
        """Mean over the features, less the mean of the shuffled; NaN if no feature counts."""
        return (self.by_feature.nanmean() - self.shuffled.nanmean()).item()


@torch.no_grad()
def feature_coherence(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    features: Sequence[int] | None = None,
    *,
    n_snippets: int = 8,
    n_around: int = 16,
    encoder: Encoder = ENCODER,
    batch_size: int = 8,
    skip_first: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Coherence:
    """Coherence of the `n_snippets` contexts in which each feature peaks highest.

    A snippet is the text around the peak. Special tokens and the first `skip_first` positions are
    left out, as in training. Warns of an SAE of a model of another name.

    Args:
        sae: with its input scaling folded in; its metadata name the hook point.
        tokens: contexts to look through, as `pack_contexts` cuts them.
        features: indices of the features, which exchange their snippets for chance; None is all.
        n_snippets: of each feature, at most one from a context.
        n_around: tokens on either side of the peak, within its document.
        encoder: a name that `load_encoder` knows, or a function from texts to vectors (n, d).
        seed: of the exchange.

    Raises:
        SaesubError: tokens that are no contexts of this model, a feature outside the SAE, metadata
            without a hook point, an SAE of one head, one whose scaling is not folded in, or one
            that `saesub.topk.encode.encoder_of` refuses; an unknown encoder, fewer than two
            snippets, or no feature that fires in so many contexts.
    """
    bridge, hook_name, encode = load_model(model), hook_of(sae), encoder_of(sae)
    tokens, batch_size = contexts_of(bridge, tokens).cpu(), whole_number(batch_size, "batch_size")
    chosen = None if features is None else feature_indices(features, sae)
    check_reads(sae, bridge, hook_name)
    spans, span_of = snippet_spans(bridge, tokens, n_around=n_around, skip_first=skip_first)
    peaks = Peaks(sae.cfg.d_sae, n_snippets)
    contexts = torch.arange(len(tokens)).unsqueeze(1).expand_as(tokens)
    parts = (t.split(batch_size) for t in (tokens, span_of, contexts))
    for batch, numbers, context in bar(
        list(zip(*parts, strict=True)), unit="batch", progress=progress
    ):
        kept = numbers >= 0
        x = site_activations(bridge, batch, hook_name)[kept.to(bridge.cfg.device)]
        require_finite(x)
        peaks.add(encode(x), context[kept], numbers[kept])
    places = peaks.places() if chosen is None else peaks.places()[chosen]
    used, places = _renumbered(places)
    vectors = embed(snippet_texts(bridge, tokens, spans[used]), encoder, progress=progress)
    return coherence(vectors, places, seed=seed)


def _renumbered(
    places: Int[Tensor, "features n"],
) -> tuple[Int[Tensor, " used"], Int[Tensor, "features n"]]:
    """The snippets that are used, and the places as numbers of these; -1 stays."""
    used, numbers = places.unique(return_inverse=True)
    n_missing = int((used < 0).sum())
    return used[n_missing:], numbers - n_missing


def snippet_spans(
    model: Model,
    tokens: Int[Tensor, "contexts pos"],
    *,
    n_around: int = 16,
    stride: int = 1,
    skip_first: int = 1,
) -> tuple[Int[Tensor, "snippets 3"], Int[Tensor, "contexts pos"]]:
    """The tokens around each position, within its document.

    With a stride, so many neighbouring positions of a document share the snippet around the middle
    one of them, so that there are fewer to encode.

    Returns:
        (context, start, stop) of each snippet, and the number of each position's snippet: -1 at
        special tokens and the first `skip_first` positions.
    """
    bridge = load_model(model)
    n_around, stride = whole_number(n_around, "n_around", 0), whole_number(stride, "stride")
    kept = kept_positions(bridge, tokens, skip_first)
    special = torch.isin(tokens, torch.tensor(context_tokens(bridge).special_ids))
    numbers = torch.full(tokens.shape, -1)
    spans: list[tuple[int, int, int]] = []
    for context, of_context in enumerate(special):
        ends = [*of_context.nonzero().flatten().tolist(), tokens.shape[1]]
        for start, stop in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            for first in range(start, stop, stride):
                group = slice(first, min(first + stride, stop))
                if not kept[context, group].any():
                    continue
                middle = min(first + stride // 2, stop - 1)
                numbers[context, group][kept[context, group]] = len(spans)
                span = max(start, middle - n_around), min(stop, middle + n_around + 1)
                spans.append((context, *span))
    return torch.tensor(spans).reshape(-1, 3), numbers


def snippet_texts(
    model: Model, tokens: Int[Tensor, "contexts pos"], spans: Int[Tensor, "snippets 3"]
) -> list[str]:
    """The text of each snippet."""
    tokenizer: Any = load_model(model).tokenizer
    ids = [tokens[context, start:stop].tolist() for context, start, stop in spans.tolist()]
    return tokenizer.batch_decode(ids) if ids else []


@torch.no_grad()
def embed(
    texts: Sequence[str],
    encoder: Encoder = ENCODER,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Float[Tensor, "n d"]:
    """A unit vector for each text: the mean of the encoder's last hidden states. float32, on the
    CPU. Equal texts are encoded once."""
    of = dict.fromkeys(texts)
    different = sorted(of, key=len)  # texts of one batch are of about one length
    found: list[Tensor] = []
    read = _sentence_vectors(encoder) if isinstance(encoder, str) else encoder
    with bar(total=len(different), unit="text", desc="embedding", progress=progress) as shown:
        for first in range(0, len(different), batch_size):
            batch = different[first : first + batch_size]
            found.append(normalize(read(batch).float().cpu(), dim=1))
            shown.update(len(batch))
    if not found:
        return torch.empty(0, 1)
    number = {text: i for i, text in enumerate(different)}
    return torch.cat(found)[[number[text] for text in texts]]


def _sentence_vectors(name: str) -> Callable[[list[str]], Float[Tensor, "n d"]]:
    model, tokenizer = load_encoder(name)

    def read(texts: list[str]) -> Float[Tensor, "n d"]:
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(model.device)
        states, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(2)
        return (states * real).sum(1) / real.sum(1)

    return read


class Peaks:
    """Where each feature is strongest, one place from a context, from features given in parts.

    Args:
        d_sae: number of features.
        n: places kept of each.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self._n = whole_number(n, "a number of snippets", 2)
        self._sizes = torch.zeros(d_sae, self._n)
        self._places = torch.full((d_sae, self._n), -1)

    def add(
        self,
        features: Float[Tensor, "n d_sae"],
        contexts: Int[Tensor, " n"],
        places: Int[Tensor, " n"],
    ) -> None:
        """Add features of whole contexts, dense or sparse; the context and the place of each row
        are on the CPU."""
        sizes = features.to_dense().float().abs()  # an AbsTopK SAE's have either sign
        lengths = contexts.unique_consecutive(return_counts=True)[1].tolist()
        for own, at in zip(sizes.split(lengths), places.split(lengths), strict=True):
            size, row = (t.cpu().unsqueeze(1) for t in own.max(0))
            self._sizes, kept = torch.cat([self._sizes, size], 1).topk(self._n, dim=1)
            self._places = torch.cat([self._places, at[row]], 1).gather(1, kept)

    def places(self) -> Int[Tensor, "d_sae n"]:
        """The strongest places of each feature, strongest first; -1 where it fires in fewer."""
        return torch.where(self._sizes > 0, self._places, -1)


def coherence(
    vectors: Float[Tensor, "snippets d"], places: Int[Tensor, "features n"], *, seed: int = 0
) -> Coherence:
    """Mean cosine between the n snippets of each feature, and of as many snippets of others.

    Args:
        vectors: unit vectors, as `embed` gives them.
        places: the snippets of each feature; a feature with a -1 among them does not count.
        seed: of the exchange, in which the strongest snippets go to strongest, and so on.

    Raises SaesubError if no feature counts.
    """
    whole = (places >= 0).all(1)
    if not whole.any():
        raise SaesubError(
            f"no feature fires in {places.shape[1]} contexts: give more contexts, or ask for fewer "
            "snippets"
        )
    own = places[whole]
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(own.shape, generator=generator).argsort(0)
    found = []
    for chosen in (own, own.gather(0, order)):
        values = torch.full((len(places),), torch.nan)
        values[whole] = torch.cat([_mean_cosine(vectors[part]) for part in chosen.split(1024)])
        found.append(values)
    return Coherence(*found)


def _mean_cosine(vectors: Float[Tensor, "features n d"]) -> Float[Tensor, " features"]:
    """Mean cosine over the pairs of n unit vectors, from the length of their sum."""
    n = vectors.shape[1]
    return (vectors.float().sum(1).square().sum(1) - n) / (n * (n - 1))
