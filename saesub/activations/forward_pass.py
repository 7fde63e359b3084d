"""One pass of a language model over a corpus, which listens at several hook points."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saesub.activations.identity import DocumentsDigest, model_settings
from saesub.activations.linear import Linear, linear_layers
from saesub.activations.plain_model import PlainModel, may_run_plain
from saesub.activations.store_file import ReadSoFar
from saesub.activations.tokens import ContextStream, kept_positions
from saesub.arguments import whole_number
from saesub.errors import SaesubError, near_names
from saesub.loading.corpora import Corpus, load_corpus
from saesub.loading.models import (
    Model,
    context_tokens,
    in_eval_mode,
    load_model,
    model_name,
    n_embeddings,
)
from saesub.precision import where_float64, without_autocast
from saesub.progress import bar

_AGREEMENT = 1e-5  # of float32; bfloat16 rounds a thousand times as coarsely, and never agrees
KEEP_EVERY = 60.0
"""Seconds between the states of a long pass that survive a kill."""

Receive = Callable[[str, Float[Tensor, "n d"]], None]


class TokenStream(TypedDict, total=False):
    """How a corpus is read; every function that reads one takes these keywords.

    Attributes:
        context_size: tokens in a context, with its BOS; 256 by default.
        batch_size: contexts in one forward pass; 16 by default.
        skip_first: positions after the BOS to leave out, because their massive activations would
            dominate a covariance; 1 by default.
        progress: show a bar; True by default.
    """

    context_size: int
    batch_size: int
    skip_first: int
    progress: bool


def hook_points(model: TransformerBridge, names: Sequence[str]) -> dict[str, HookPoint]:
    """The model's hook points of these names. Raises SaesubError, with what may be meant, if it
    lacks one."""
    known = model.hook_dict
    for name in names:
        if name not in known:
            raise SaesubError(
                f"{model_name(model)} has no hook point {name!r}: {_meant(model, name)}"
            )
    return {name: known[name] for name in names}


def _meant(model: TransformerBridge, name: str) -> str:
    """Where `name` is a Hugging Face module's, the hook points of its output; else near names."""
    modules = model.original_model.named_modules(remove_duplicate=False)
    named = {path.replace("._original_component", ""): module for path, module in modules}
    outputs = {
        id(getattr(component, "hook_out", None))
        for component in model.modules()
        if name in named and getattr(component, "original_component", None) is named[name]
    }
    same = [repr(hook) for hook, point in model.hook_dict.items() if id(point) in outputs]
    if same:
        return f"that is a module; its output has the hook point {' or '.join(same)}"
    return f"{near_names(name, model.hook_dict)} (model.hook_dict has all {len(model.hook_dict)})"


def capture(
    model: TransformerBridge | PlainModel,
    tokens: Tensor,
    points: dict[str, HookPoint],
    receive: Receive,
) -> None:
    """Run the model until the last of the points has fired, and no further."""
    if waiting := _listen(model, tokens, points, receive):
        raise SaesubError(
            f"{', '.join(sorted(waiting))} never fired in a forward pass: choose other hook points"
        )


def _listen(
    model: TransformerBridge | PlainModel,
    tokens: Tensor,
    points: dict[str, HookPoint],
    receive: Receive,
) -> set[str]:
    """As `capture`; the names of the points that did not fire."""
    waiting = set(points)

    def hear(name: str, tensor: Tensor) -> None:
        receive(name, tensor)
        waiting.discard(name)
        if not waiting:
            raise StopAtLayerException(tensor)

    # Not inference_mode, which is no faster here: its tensors break the gradients of whoever gets
    # them.
    with torch.no_grad(), suppress(StopAtLayerException):
        if isinstance(model, PlainModel):
            with without_autocast():
                model.run(tokens, hear)
        else:
            _run_bridge(model, tokens, points, hear)
    return waiting


def _run_bridge(
    model: TransformerBridge, tokens: Tensor, points: dict[str, HookPoint], hear: Receive
) -> None:
    """`stop_at_layer` would finish the block, and for the last layer compute the logits; the hooks
    are set on the points themselves because `run_with_hooks` rebuilds its name table for each of
    them."""
    level = model.context_level + 1
    with ExitStack() as stack, in_eval_mode(model):
        for name, point in points.items():
            stack.callback(point.remove_hooks, "fwd", level=level)
            point.add_hook(partial(_heard, name, hear), level=level)
        model(tokens, return_type=None)


def _heard(name: str, hear: Receive, tensor: Tensor, hook: HookPoint) -> None:
    hear(name, tensor)


def same_without_bridge(
    model: TransformerBridge, points: dict[str, HookPoint], context_size: int, linear: Linear
) -> bool:
    """Whether the plain model with such linear layers gives each point the activations of the
    bridge, to 1e-5 of a token's norm (root mean square): tried on one context of tokens drawn at
    random, always the same.

    So no list of architectures is trusted, and a result does not depend on the text.
    """
    if not may_run_plain(model):
        return False
    draw = torch.Generator().manual_seed(0)
    shape = (1, context_size)
    tokens = torch.randint(n_embeddings(model), shape, generator=draw, device="cpu")
    tokens = tokens.to(model.cfg.device)
    found: list[dict[str, Tensor]] = [{}, {}]
    try:
        for run, rows in zip((PlainModel(model, points, linear), model), found, strict=True):
            if _listen(run, tokens, points, rows.__setitem__):
                return False
        return all(
            _agree(*(vectors(rows[name], tokens, name) for rows in found)) for name in points
        )
    except Exception:  # a model raises what it likes where it cannot run so
        return False


def _agree(plain: Float[Tensor, "1 pos d"], true: Float[Tensor, "1 pos d"]) -> bool:
    off, norms = (
        (x.double().norm(dim=-1)) for x in (where_float64(plain - true), where_float64(true))
    )
    return bool((off / norms).square().mean().sqrt() <= _AGREEMENT)


def vectors(
    tensor: Tensor, tokens: Int[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    """What a hook point gives, heads concatenated. Raises SaesubError if that is not one vector
    for each token."""
    if tensor.ndim < 3 or tensor.shape[:2] != tokens.shape:
        raise SaesubError(
            f"{hook_name} gives a tensor of shape {tuple(tensor.shape)}, not one vector for each "
            "token: choose another hook point"
        )
    return tensor.flatten(2)


class ModelPass:
    """A pass over the first `n_tokens` kept tokens of a corpus, batch by batch.

    Args:
        hook_names: one name or several; repeated names count once.
        share: with (i, n) the model runs on the batches i, i + n, ... alone.
        whole_contexts: give also the tokens that follow the last one in its context.
        **stream: see `TokenStream`.

    Raises SaesubError for settings that leave nothing to read, an unknown hook point, or whatever
    `load_model` and `load_corpus` refuse.
    """

    def __init__(
        self,
        model: Model,
        corpus: Corpus,
        hook_names: str | Sequence[str],
        *,
        n_tokens: int,
        context_size: int = 256,
        batch_size: int = 16,
        skip_first: int = 1,
        progress: bool = True,
        share: tuple[int, int] = (0, 1),
        whole_contexts: bool = False,
    ) -> None:
        n_tokens = whole_number(n_tokens, "n_tokens")
        batch_size = whole_number(batch_size, "batch_size")
        context_size = whole_number(context_size, "context_size", 2)
        skip_first = whole_number(skip_first, "skip_first", 0)
        pair = isinstance(share, Sequence) and [*map(type, share)] == [int, int]
        if not pair or not 0 <= share[0] < share[1]:
            raise SaesubError(f"a share is (i, n) with 0 <= i < n, not {share}")
        self.model = load_model(model)
        names = [hook_names] if isinstance(hook_names, str) else hook_names
        names = [*names] if isinstance(names, Iterable) else [names]
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise SaesubError(f"the name of a hook point is a text, not {wrong[0]!r}")
        names = list(dict.fromkeys(names))
        if not names:
            raise SaesubError("no hook point was named: name at least one")
        self.points = self._all_points = hook_points(self.model, names)
        self.contexts = ContextStream(self.model, load_corpus(corpus), context_size)
        if skip_first + (context_tokens(self.model).bos_id is not None) >= context_size:
            raise SaesubError(
                f"skip_first={skip_first} leaves nothing of {context_size} positions: lower it, or "
                "raise context_size"
            )
        self.n_tokens, self.batch_size, self.skip_first = n_tokens, batch_size, skip_first
        self.context_size, self.whole_contexts = context_size, whole_contexts
        self.progress, self.share = progress, share
        self._n_contexts = 0
        self._text_hash = DocumentsDigest(self.contexts.corpus)
        named = isinstance(corpus, (str, Path))
        self.source = {
            "model": model_name(self.model),
            "corpus": str(corpus) if named else f"{len(corpus)} live documents",
            "context_size": str(context_size),
            "skip_first": str(skip_first),
        }
        """Where the activations come from, for records."""

    def settings(self) -> dict[str, str]:
        """What decides the activations, but for the text: `source`, the number of tokens, and
        hashes of the whole model. See `saesub.activations.identity`."""
        return self.source | {"n_tokens": str(self.n_tokens)} | model_settings(self.model)

    @cached_property
    def linear(self) -> Linear | None:
        """The fastest linear layers with which the plain model within the bridge gives the bridge's
        activations. Without any, all batches go through the bridge; each one that finds hooks on
        it does all the same."""
        given = (self.model, self._all_points, self.context_size)
        tried = linear_layers(next(self.model.original_model.parameters()))
        return next((each for each in tried if same_without_bridge(*given, each)), None)

    def whole_text(self) -> str:
        """A hash of all documents of the corpus."""
        return self._text_hash.of(len(self.contexts.corpus))

    def text_read(self) -> dict[str, str]:
        """The number of documents read so far, and a hash of them."""
        return self._text(self.contexts.n_read)

    def read_so_far(self) -> ReadSoFar:
        """How far the pass has come."""
        return ReadSoFar(self._n_contexts, self.text_read(), self.contexts.epochs)

    def same_text(self, kept: Mapping[str, str]) -> dict[str, str]:
        """What `text_read` would say here of as many documents as a kept result was made from."""
        n = kept.get("documents", "")
        return self._text(int(n)) if n.isdecimal() else {"documents": "unknown"}

    def _text(self, n: int) -> dict[str, str]:
        return {"documents": str(n), "text": self._text_hash.of(n)}

    def batches(self, receive: Receive, first: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the numbers of contexts and of kept tokens so far after each batch, when `receive`
        had its activations at every hook point. The text begins anew in each call. The model does
        not run on contexts before `first`.

        Raises what `receive` raises, and SaesubError for a hook point without one vector a token.
        """
        done = self._n_contexts = 0
        self.contexts = ContextStream(self.model, self.contexts.corpus, self.context_size)
        with bar(total=self.n_tokens, unit="tok", progress=self.progress) as shown:
            while done < self.n_tokens:
                batch, within = divmod(self._n_contexts, self.batch_size)
                runs = self._n_contexts >= first and batch % self.share[1] == self.share[0]
                # Batches begin where they do in a pass from the start, but for that at `first`.
                n = self.batch_size - within
                n = n if self._n_contexts >= first else min(n, first - self._n_contexts)
                tokens = self.contexts.take(n).to(self.model.cfg.device)
                index = self._kept(tokens, self.n_tokens - done)
                done += len(index)
                if done >= self.n_tokens:  # cut after the last context that was asked for
                    tokens = tokens[: int(index[-1]) // tokens.shape[1] + 1]
                if runs and len(index):
                    self._run(batch, tokens, index, receive)
                self._n_contexts += len(tokens)
                shown.update(min(len(index), self.n_tokens - shown.n))
                yield self._n_contexts, done

    def _kept(self, tokens: Int[Tensor, "batch pos"], n_left: int) -> Int[Tensor, " n"]:
        """The places, in the flattened batch, of the kept tokens that are asked for."""
        index = kept_positions(self.model, tokens, self.skip_first).flatten().nonzero().squeeze(1)
        if len(index) == 0 and len(tokens) == self.batch_size:
            raise SaesubError("every position is left out: raise context_size")
        if self.whole_contexts and len(index) > n_left:
            end = (int(index[n_left - 1]) // tokens.shape[1] + 1) * tokens.shape[1]
            return index[index < end]
        return index[:n_left]

    def run(
        self, receive: Receive, after: Callable[[int, int, bool], None], first: int = 0
    ) -> None:
        """Go through all batches. After each call `after` with the numbers of contexts and of kept
        tokens so far, and whether it is time to keep a state: every minute and at the end."""
        last = time.monotonic()
        for n_contexts, n_rows in self.batches(receive, first):
            due = time.monotonic() - last >= KEEP_EVERY or n_rows >= self.n_tokens
            due = due and n_contexts > first
            after(n_contexts, n_rows, due)
            last = time.monotonic() if due else last

    def _run(self, batch: int, tokens: Tensor, index: Tensor, receive: Receive) -> None:
        def select(name: str, tensor: Tensor) -> None:
            rows = vectors(tensor, tokens, name).flatten(0, 1)[index]
            try:
                receive(name, rows)
            except SaesubError as error:
                raise SaesubError(f"{name}, batch {batch}: {error}") from error

        linear = self.linear if may_run_plain(self.model) else None
        model = self.model if linear is None else PlainModel(self.model, self.points, linear)
        capture(model, tokens, self.points, select)
