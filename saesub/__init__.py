"""saesub: attention outputs are low-rank, which kills SAE features, and how to keep them alive.

The names below are what a user needs. Each is imported when it is first used. The rest is in the
subpackages `loading`, `topk`, `activations`, `init`, `evaluation`, `training`, `extras` and
`reproduce`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time `_MODULES` says the same
    from saesub.activations.collect import (
        harvest,
        measure_spectra,
        measure_spectrum,
        stream_activations,
    )
    from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
    from saesub.activations.store import ActivationStore
    from saesub.activations.tokens import pack_contexts
    from saesub.errors import SaesubError
    from saesub.evaluation.dead_features import (
        OverlapTest,
        dead_features,
        overlap,
        overlap_test,
    )
    from saesub.evaluation.diagnosis import SAEDiagnosis, diagnose
    from saesub.evaluation.held_out import Judgement, judge
    from saesub.evaluation.language_model_loss import sae_loss, subspace_loss_recovered
    from saesub.evaluation.reconstruction import reconstruction
    from saesub.init.biases import center_at, center_biases, geometric_median
    from saesub.init.encoder_scale import fit_encoder_scale, scale_encoder
    from saesub.init.norm import fit_norm
    from saesub.init.subspace import SubspaceInit, choose_d_init, initialize_in_subspace
    from saesub.loading.corpora import load_corpus
    from saesub.loading.download import fetch
    from saesub.loading.models import load_model
    from saesub.paths import cache_dir, data_file
    from saesub.reproduce.model_card import model_card
    from saesub.topk.optim import SparseAdam, parameter_groups
    from saesub.topk.sae import (
        SparseBatchTopKTrainingSAE,
        SparseTopKTrainingSAE,
        use_sparse_step,
    )
    from saesub.training.comparison import ComparisonTrainer, joint_batches, train_together
    from saesub.training.mitigations import GhostGradients, KAnnealing, Resampling
    from saesub.training.recipe import Recipe, recommend
    from saesub.training.refit import DecoderRefit, refit_decoder
    from saesub.training.trainer import SubspaceSAETrainer

__version__ = "0.1.0"

__all__ = [
    "ActivationStore", "GhostGradients", "KAnnealing", "Resampling", "SaesubError", "SparseAdam",
    "SparseBatchTopKTrainingSAE", "SparseTopKTrainingSAE", "Spectrum", "SubspaceSAETrainer",
    "center_biases", "choose_d_init", "dead_features", "diagnose", "fit_norm", "harvest",
    "initialize_in_subspace", "judge", "load_corpus", "load_model", "measure_spectra",
    "measure_spectrum", "recommend", "reconstruction", "refit_decoder", "sae_loss",
    "subspace_loss_recovered", "train_together", "use_sparse_step",
]  # fmt: skip

_MODULES = {
    "activations.collect": "harvest measure_spectra measure_spectrum stream_activations",
    "activations.spectrum": "Spectrum SpectrumAccumulator",
    "activations.store": "ActivationStore",
    "activations.tokens": "pack_contexts",
    "errors": "SaesubError",
    "evaluation.dead_features": "OverlapTest dead_features overlap overlap_test",
    "evaluation.diagnosis": "SAEDiagnosis diagnose",
    "evaluation.held_out": "Judgement judge",
    "evaluation.language_model_loss": "sae_loss subspace_loss_recovered",
    "evaluation.reconstruction": "reconstruction",
    "init.biases": "center_at center_biases geometric_median",
    "init.encoder_scale": "fit_encoder_scale scale_encoder",
    "init.norm": "fit_norm",
    "init.subspace": "SubspaceInit choose_d_init initialize_in_subspace",
    "loading.corpora": "load_corpus",
    "loading.download": "fetch",
    "loading.models": "load_model",
    "paths": "cache_dir data_file",
    "reproduce.model_card": "model_card",
    "topk.optim": "SparseAdam parameter_groups",
    "topk.sae": "SparseBatchTopKTrainingSAE SparseTopKTrainingSAE use_sparse_step",
    "training.comparison": "ComparisonTrainer joint_batches train_together",
    "training.mitigations": "GhostGradients KAnnealing Resampling",
    "training.recipe": "Recipe recommend",
    "training.refit": "DecoderRefit refit_decoder",
    "training.trainer": "SubspaceSAETrainer",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saesub' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"saesub.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
