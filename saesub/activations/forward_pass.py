"""One pass of a language model over a corpus, listening at many hook points."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saesub.activations.tokens import ContextStream, kept_positions
from saesub.errors import SaesubError, near_names
from saesub.loading.corpora import Corpus, load_corpus
from saesub.loading.models import Model, context_tokens, load_model, model_name
from saesub.progress import bar

KEEP_EVERY = 60.0
"""Seconds between the states of a long pass that survive a kill."""

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
class ModelPass:
    """A pass over the corpus that hands rows of activations to a receiver, batch by batch."""

    model: TransformerBridge
    contexts: ContextStream
    points: dict[str, HookPoint]
    n_tokens: int
    batch_size: int
    skip_first: int
    progress: bool
    share: tuple[int, int] = (0, 1)

    def batches(self, receive: Receive, first: int = 0) -> Iterator[int]:
        """Yields the number of rows of each batch, after `receive` had them at every hook point.

        With a share (i, n) the model runs on the batches i, i + n, ... alone, and never on those
        before `first`.
        """
        done = batch = 0
        with bar(total=self.n_tokens, unit="tok", progress=self.progress) as shown:
            while done < self.n_tokens:
                tokens = self.contexts.take(self.batch_size).to(self.model.cfg.device)
                kept = kept_positions(self.model, tokens, self.skip_first)
                index = kept.flatten().nonzero().squeeze(1)[: self.n_tokens - done]
                if len(index) == 0:
                    raise SaesubError("every position is left out: raise context_size")
                # What the last batch has beyond the rows asked for is not run.
                tokens = tokens[: int(index[-1]) // tokens.shape[1] + 1]
                if batch >= first and batch % self.share[1] == self.share[0]:
                    self._run(batch, tokens, index, receive)
                done, batch = done + len(index), batch + 1
                shown.update(len(index))
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


def make_pass(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    n_tokens: int,
    context_size: int,
    batch_size: int,
    skip_first: int,
    progress: bool,
) -> ModelPass:
    """A pass over the first `n_tokens` rows of a corpus. Raises SaesubError for what cannot be."""
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
    return ModelPass(bridge, contexts, points, n_tokens, batch_size, skip_first, progress)


class KeepClock:
    """Says when it is time to keep the state of a pass."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether `KEEP_EVERY` seconds have gone by since it last was, or since the start."""
        if time.monotonic() - self._last < KEEP_EVERY:
            return False
        self._last = time.monotonic()
        return True
