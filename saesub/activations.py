"""One pass of a language model, many hook points: to statistics, or to memory-mapped stores.

Left out everywhere: special tokens (BOS, the separator between documents, padding) and the first
`skip_first` positions after the BOS, whose massive activations would dominate a covariance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saesub.contexts import ContextStream, kept_positions, pack_contexts
from saesub.corpora import Corpus, load_corpus
from saesub.errors import SaesubError, near_names
from saesub.models import Model, context_tokens, load_model, model_name
from saesub.spectrum import Spectrum, SpectrumAccumulator
from saesub.store import ActivationStore, StoreWriter, open_or_none

_DOCUMENTS_IN_FINGERPRINT = 1000

__all__ = [
    "ActivationStore",
    "harvest",
    "measure_spectra",
    "measure_spectrum",
    "pack_contexts",
    "stream_activations",
]

Receive = Callable[[str, Float[Tensor, "n d"]], None]


def hook_points(model: TransformerBridge, names: Sequence[str]) -> dict[str, HookPoint]:
    """The model's hook points of these names. Raises SaesubError, with near names, if it lacks
    one."""
    known = model.hook_dict
    for name in names:
        if name not in known:
            raise SaesubError(
                f"{model_name(model)} has no hook point {name!r}: {near_names(name, known)}"
            )
    return {name: known[name] for name in names}


def _capture(
    model: TransformerBridge, tokens: Tensor, points: dict[str, HookPoint], receive: Receive
) -> None:
    """Run the model until the last of the points has fired, and no further.

    `stop_at_layer` would finish the block, and for the last layer compute the logits; the hooks are
    set on the points themselves since `run_with_hooks` rebuilds its name table for each of them.
    """
    waiting = set(points)

    def listener(name: str) -> Callable[..., None]:
        def listen(tensor: Tensor, hook: HookPoint) -> None:
            receive(name, tensor)
            waiting.discard(name)
            if not waiting:
                raise StopAtLayerException(tensor)

        return listen

    level = model.context_level + 1
    with ExitStack() as stack, torch.no_grad():
        for name, point in points.items():
            stack.callback(point.remove_hooks, "fwd", level=level)
            point.add_hook(listener(name), level=level)
        model(tokens, return_type=None)
    if waiting:
        raise SaesubError(f"hook points that never fired in a forward pass: {sorted(waiting)}")


@dataclass
class _Pass:
    """A pass over the corpus that hands rows of activations to a receiver, batch by batch."""

    model: TransformerBridge
    contexts: ContextStream
    points: dict[str, HookPoint]
    n_tokens: int
    batch_size: int
    skip_first: int
    progress: bool
    share: tuple[int, int] = (0, 1)

    def batches(self, receive: Receive) -> Iterator[int]:
        """Yields the number of rows of each batch, after `receive` had them at every hook point.

        With a share (i, n) the model runs on the batches i, i + n, ... alone.
        """
        done = batch = 0
        with tqdm(total=self.n_tokens, unit="tok", disable=not self.progress) as bar:
            while done < self.n_tokens:
                tokens = self.contexts.take(self.batch_size).to(self.model.cfg.device)
                kept = kept_positions(self.model, tokens, self.skip_first)
                index = kept.flatten().nonzero().squeeze(1)[: self.n_tokens - done]
                if len(index) == 0:
                    raise SaesubError("every position is left out: raise context_size")
                if batch % self.share[1] == self.share[0]:
                    self._run(batch, tokens, index, receive)
                done, batch = done + len(index), batch + 1
                bar.update(len(index))
                yield len(index)

    def _run(self, batch: int, tokens: Tensor, index: Tensor, receive: Receive) -> None:
        def select(name: str, tensor: Tensor) -> None:
            if tensor.ndim < 3 or tensor.shape[:2] != tokens.shape:
                raise SaesubError(
                    f"{name} gives a tensor of shape {tuple(tensor.shape)}, not one vector for "
                    "each token: choose another hook point"
                )
            try:
                receive(name, tensor.flatten(2).flatten(0, 1)[index])
            except SaesubError as error:
                raise SaesubError(f"{name}, batch {batch}: {error}") from error

        _capture(self.model, tokens, self.points, select)

    def describe(self) -> dict[str, str]:
        """What decides the activations, for records."""
        return {
            "model": model_name(self.model),
            "context_size": str(self.contexts.context_size),
            "skip_first": str(self.skip_first),
        }


def _make_pass(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    n_tokens: int,
    context_size: int,
    batch_size: int,
    skip_first: int,
    progress: bool,
) -> _Pass:
    if n_tokens < 1 or batch_size < 1 or skip_first < 0:
        raise SaesubError("n_tokens and batch_size must be at least 1, skip_first at least 0")
    bridge = load_model(model)
    names = [hook_names] if isinstance(hook_names, str) else list(dict.fromkeys(hook_names))
    if not names:
        raise SaesubError("no hook point was named")
    points = hook_points(bridge, names)
    contexts = ContextStream(bridge, load_corpus(corpus), context_size)
    if skip_first + (context_tokens(bridge).bos_id is not None) >= context_size:
        raise SaesubError(f"skip_first={skip_first} leaves nothing of {context_size} positions")
    return _Pass(bridge, contexts, points, n_tokens, batch_size, skip_first, progress)


def require_finite(x: Float[Tensor, "n d"]) -> None:
    """Raises SaesubError if `x` holds a NaN or an infinity."""
    if not x.sum(dtype=torch.float32).isfinite():
        raise SaesubError("activations hold NaN or infinite values")


def stream_activations(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
    """Activations at several hook points, batch by batch, `n_tokens` rows in all.

    Rows of different hook points belong to the same tokens; heads are concatenated (hook_z gives
    heads × d_head columns). Raises SaesubError, at the first step or as met: unknown hook point,
    too short a corpus, too long a context, NaN or infinite activations (which hook, which batch).
    """
    run = _make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    rows: dict[str, Tensor] = {}

    def receive(name: str, x: Tensor) -> None:
        require_finite(x)
        rows[name] = x

    for _ in run.batches(receive):
        yield {name: rows[name] for name in run.points}


def measure_spectra(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Spectrum]:
    """Mean and covariance at several hook points from one pass; no activations are stored.

    Each batch is reduced inside the hook, so the memory is one (d, d) float64 matrix for each
    hook point. With a `share` (i, n) only every n-th batch is measured, from batch i on: the
    spectra of the n shares add up to that of the pass, and a share without a batch is {}. Raises
    what `stream_activations` raises.
    """
    run = _make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    run.share = share
    totals: dict[str, SpectrumAccumulator] = {}

    def receive(name: str, x: Tensor) -> None:
        totals.setdefault(name, SpectrumAccumulator(x.shape[1])).update(x)

    for _ in run.batches(receive):
        pass
    record = {
        **run.describe(),
        "corpus": _corpus_name(corpus),
        "epochs": f"{run.contexts.epochs:.3g}",
    }
    return {name: totals[name].finish({"hook_name": name, **record}) for name in totals}


def measure_spectrum(
    model: Model,
    corpus: Corpus,
    hook_name: str,
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
) -> Spectrum:
    """`measure_spectra` at one hook point."""
    return measure_spectra(
        model,
        corpus,
        [hook_name],
        n_tokens=n_tokens,
        context_size=context_size,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
    )[hook_name]


def harvest(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    folder: str | Path,
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
    dtype: torch.dtype = torch.float16,
) -> dict[str, ActivationStore]:
    """Activations at several hook points, written from one pass to `<folder>/<hook>.bin`.

    A finished store of the same model, text and settings is reused; an unfinished or truncated one
    is written again. Raises what `stream_activations` raises, and SaesubError for a store of other
    settings in the folder, too little disk, or values beyond the range of `dtype`.
    """
    run = _make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    settings = {
        **run.describe(),
        "corpus": _corpus_name(corpus),
        "n_tokens": str(n_tokens),
        "dtype": str(dtype).removeprefix("torch."),
        "content": _fingerprint(run.model, load_corpus(corpus)),
    }
    found = {name: open_or_none(folder, name, settings) for name in run.points}
    run.points = {name: point for name, point in run.points.items() if found[name] is None}
    if run.points:
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(StoreWriter(Path(folder), name, n_tokens, dtype))
                for name in run.points
            }
            for _ in run.batches(lambda name, x: writers[name].write(x)):
                pass
            for writer in writers.values():
                writer.finish(settings, epochs=run.contexts.epochs)
    return {name: store or ActivationStore.open(folder, name) for name, store in found.items()}


def _corpus_name(corpus: Corpus) -> str:
    return str(corpus) if isinstance(corpus, (str, Path)) else f"{len(corpus)} live documents"


def _fingerprint(model: TransformerBridge, corpus: Dataset) -> str:
    """A hash of a sample of the model's weights and of the corpus's documents."""
    digest = hashlib.sha256(str(len(corpus)).encode())
    for parameter in model.original_model.parameters():
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    step = max(1, len(corpus) // _DOCUMENTS_IN_FINGERPRINT)
    for text in corpus.select(range(0, len(corpus), step))["text"]:
        digest.update(text.encode())
    return digest.hexdigest()
