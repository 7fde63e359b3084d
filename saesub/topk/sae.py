"""SAELens' TopK and BatchTopK training SAEs with a sparse training pass, for any SAELens trainer.

    sae = saesub.SparseTopKTrainingSAE(TopKTrainingSAEConfig(...))
    LanguageModelSAETrainingRunner(cfg, override_sae=sae).run()

or, for an SAE that is there already, `saesub.use_sparse_step(sae)`. Config, weights, losses and all
that is saved are SAELens' own; loss and gradients equal those of its dense pass.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, get_args

import torch
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from saesub.errors import SaesubError, near_names
from saesub.topk.eligibility import PARAMETERS, why_dense
from saesub.topk.sae_search import search_for
from saesub.topk.step import autograd_pass

SearchName = Literal["auto", "exact_search", "torch"]
DENSE_STEP = "SAELens' dense step trains this SAE, several times slower than the sparse one: {}."
SAE = TypeVar("SAE", bound=TopKTrainingSAE)


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens' `TopKTrainingSAE`; its training pass computes active entries only.

    In SAELens' `SAETrainer`, `MultiSAETrainer` and `LanguageModelSAETrainingRunner` it trains as
    `TopKTrainingSAE` does, faster. What is saved is a plain SAELens SAE. The pass returns
    `feature_acts` as a sparse COO tensor. Where the pass would not equal SAELens' (another
    activation function, hooks, autocast, bfloat16, a replaced method), SAELens' own runs, and one
    warning says why.

    Attributes:
        search_name: how a pass finds the active entries. "auto": on a CPU by compiled code with an
            8-bit candidate search, if there is a C++ compiler, else by torch operators; elsewhere
            by the whole product. "torch": torch operators alone. "exact_search": the whole product.
        in_subspace: whether the search may find candidates by the coordinates in the active
            subspace of the tokens, where that costs less. It finds the same features.
    """

    search_name: SearchName = "auto"
    in_subspace: bool = True
    _said: frozenset[str] = frozenset()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' pass through active entries; `feature_acts` is a sparse COO tensor."""
        reason = why_dense(self) or _other_batch(step_input.sae_in)
        if reason is not None:
            self._say_why_dense(reason)
            return super().training_forward_pass(step_input)
        return self._sparse_pass(step_input)  # pyright: ignore

    @torch.compiler.disable
    def _sparse_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        dead = step_input.dead_neuron_mask if self.cfg.aux_loss_coefficient else None
        search = search_for(self, in_subspace=self.in_subspace)
        return autograd_pass(self, step_input.sae_in, dead, search=search)

    def _say_why_dense(self, reason: str) -> None:
        if reason not in self._said:
            self._said |= {reason}
            warnings.warn(DENSE_STEP.format(reason), stacklevel=3)

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        """So that `load_from_disk` and `from_dict` give sparse classes."""
        found = _SPARSE.get(architecture, cls)
        if issubclass(found, cls) and found is not cls:
            return found
        batch = issubclass(cls, BatchTopKTrainingSAE)
        if architecture == ("batchtopk" if batch else "topk"):
            return cls
        return super().get_sae_class_for_architecture(architecture)  # which refuses it

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """SAELens'; and contiguous weights, also where a trainer lays them out by feature."""
        super().process_state_dict_for_saving(state_dict)
        for name in PARAMETERS:
            state_dict[name] = state_dict[name].contiguous()


class SparseBatchTopKTrainingSAE(SparseTopKTrainingSAE, BatchTopKTrainingSAE):
    """`SparseTopKTrainingSAE` of SAELens' `BatchTopKTrainingSAE`."""


def _other_batch(x: Tensor) -> str | None:
    if x.ndim != 2:
        return f"its input has {x.ndim} dimensions, not (n_tokens, d_in)"
    return "its input asks for a gradient" if x.requires_grad else None


_SPARSE: dict[str, type[SparseTopKTrainingSAE]] = {
    "topk": SparseTopKTrainingSAE,
    "batchtopk": SparseBatchTopKTrainingSAE,
}


def use_sparse_step(sae: SAE, *, search: SearchName = "auto", in_subspace: bool = True) -> SAE:
    """Give a TopK or BatchTopK SAE of SAELens the sparse training pass, in place.

    The object becomes a `SparseTopKTrainingSAE` or `SparseBatchTopKTrainingSAE`; its config,
    weights and hooks stay. It is returned, too.

    Args:
        sae: SAELens' `TopKTrainingSAE` or `BatchTopKTrainingSAE`.
        search, in_subspace: see the attributes `search_name` and `in_subspace` of
            `SparseTopKTrainingSAE`.

    Raises:
        SaesubError: another architecture, a class with a pass of its own, a pass that was replaced,
            as by `torch.compile`, or an unknown search.
    """
    sparse = isinstance(sae, SparseTopKTrainingSAE)
    if not (sparse or type(sae) in (TopKTrainingSAE, BatchTopKTrainingSAE)):
        raise SaesubError(
            f"{type(sae).__name__} has no sparse step: pass a TopKTrainingSAE or "
            "BatchTopKTrainingSAE of SAELens, or a class that derives from "
            "saesub.SparseTopKTrainingSAE."
        )
    if "training_forward_pass" in vars(sae):
        raise SaesubError(
            "training_forward_pass of this SAE was replaced, perhaps compiled, and would not "
            "become sparse: call use_sparse_step before."
        )
    if search not in get_args(SearchName):
        raise SaesubError(f"Unknown search {search!r}: {near_names(search, get_args(SearchName))}")
    if not sparse:
        batch = type(sae) is BatchTopKTrainingSAE
        sae.__class__ = SparseBatchTopKTrainingSAE if batch else SparseTopKTrainingSAE
    sae.search_name, sae.in_subspace = search, in_subspace  # pyright: ignore
    return sae
