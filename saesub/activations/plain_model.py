"""The Hugging Face model within a bridge, run without the bridge: the same activations, sooner.

A bridge computes attention step by step, in matrices of all pairs of tokens, so that hooks can
read them. Where no one does, torch's `scaled_dot_product_attention` gives the same output to
rounding, and linear layers may go to a library that is faster on this processor. So the modules
that the bridge put into the model are left out here, in a copy of the tree of modules that shares
all weights. Hooks are set on that copy alone: nothing of the user's model or of its config is
changed, not even for the time of a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedConfig

from saesub.activations.identity import modules_with_own_code, of_library
from saesub.activations.linear import Linear

Hear = Callable[[str, Tensor], None]
_ENDS = ("hook_in", "hook_out")  # what goes into a module, and what comes out


def may_run_plain(model: TransformerBridge) -> bool:
    """Whether nothing runs within the model but what its libraries put there.

    Hooks, replaced forwards, modules of the user's own and TransformerLens' compatibility mode are
    the bridge's to run. A forward that a library replaced would run the modules that it was bound
    to, with the bridge's in them.
    """
    parts = [*model.modules(), *model.original_model.modules()]
    theirs = all(of_library(type(part)) and "forward" not in vars(part) for part in parts)
    # Also a library's, such as of a cache: the points themselves do not fire.
    at_points = any(part._forward_hooks for part in parts if isinstance(part, HookPoint))
    hooked = at_points or bool(modules_with_own_code(model))
    return theirs and not hooked and not model.compatibility_mode


class PlainModel:
    """A model's body without the bridge, that listens at some of the bridge's hook points.

    An inner hook point, such as a norm's hook_normalized, is reached by leaving the bridge's
    module that fires it where it is. Making one takes some milliseconds.

    Args:
        linear: what its linear layers compute; see `saesub.activations.linear`.
    """

    def __init__(
        self,
        model: TransformerBridge,
        points: Mapping[str, HookPoint],
        linear: Linear = F.linear,
    ) -> None:
        self._linear = linear
        owners = {
            id(point): (part, role)
            for part in model.modules()
            if isinstance(part, GeneralizedComponent)
            for role, point in part.named_children()
        }
        self._places = {name: owners[id(point)] for name, point in points.items()}
        self._left = [part for part, role in self._places.values() if role not in _ENDS]
        self._configs: dict[int, Any] = {}
        self._made: dict[int, nn.Module] = {}
        body: Any = self._of(model.original_model)
        self._body = body.base_model  # without the head, which no logits are asked of

    def modules(self) -> Iterator[nn.Module]:
        """The copies of the body's modules."""
        return self._body.modules()

    def run(self, tokens: Tensor, hear: Hear) -> None:
        """The forward pass; `hear` gets the name and the tensor of each hook point. It may raise
        what ends the pass."""
        for name, (part, role) in self._places.items():
            _listen(self._of(part), role, lambda x, name=name: hear(name, x))
        self._body(tokens, use_cache=False)

    def _of(self, module: nn.Module) -> nn.Module:
        """The copy of a module, or of the one that the bridge put it in the place of."""
        while (inner := self._within(module)) is not None:
            module = inner
        if id(module) in self._made:
            return self._made[id(module)]
        self._made[id(module)] = new = object.__new__(type(module))
        held = vars(new)  # not by setattr, which a bridge's module passes on to the original's
        held |= {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
        held["training"] = False
        if isinstance(module, GeneralizedComponent):
            # The bridge's own, which would keep activations in the user's bridge.
            held["_forward_pre_hooks"].clear()
        if isinstance(held.get("config"), PreTrainedConfig):
            held["config"] = self._with_sdpa(held["config"])
        if type(module) is nn.Linear and self._linear is not F.linear:
            held["forward"] = lambda x: self._linear(x, module.weight, module.bias)
        children = held["_modules"]
        children |= {k: self._of(child) for k, child in children.items() if child is not None}
        return new

    def _within(self, module: nn.Module) -> nn.Module | None:
        """The module that the bridge put this one in the place of, unless it is to stay."""
        if any(module is part for part in self._left):
            return None
        inner: Any = getattr(module, "original_component", None)
        return inner if isinstance(module, GeneralizedComponent) else None

    def _with_sdpa(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy, the same for all modules that share the config. Deep, since a config sets the
        implementation in its sub-configs too."""
        new = copy.deepcopy(config, self._configs)
        new._attn_implementation = "sdpa"
        return new


def _listen(module: nn.Module, role: str, hear: Callable[[Tensor], None]) -> None:
    """Call `hear` with what goes into the module, what comes out, or what an inner point gets."""

    def heard_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hear(args[0] if args else kwargs["hidden_states"])

    def heard_out(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hear(output[0] if isinstance(output, tuple) else output)

    if role == "hook_in":
        module.register_forward_pre_hook(heard_in, with_kwargs=True)
    else:
        place = module if role == "hook_out" else module.get_submodule(role)
        place.register_forward_hook(heard_out)
