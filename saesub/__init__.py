"""saesub: attention outputs are low-rank, that kills SAE features, and how to save them.

The names below are those that a user needs. The rest is in rooms: `.loading`, `.topk`,
`.activations`, `.init`, `.evaluation`, `.training`, `.extras` and `.reproduce`.
"""

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
from saesub.evaluation.dead_features import Diagnosis, dead_features, diagnose, overlap
from saesub.evaluation.language_model_loss import sae_loss, subspace_loss_recovered
from saesub.evaluation.reconstruction import reconstruction
from saesub.init.biases import center_at, center_biases, geometric_median
from saesub.init.norm import fit_encoder_scale, fit_norm, scale_encoder
from saesub.init.subspace import SubspaceInit, choose_d_init, initialize_in_subspace
from saesub.loading.corpora import load_corpus
from saesub.loading.download import fetch
from saesub.loading.models import load_model
from saesub.optim import SparseAdam, parameter_groups
from saesub.paths import cache_dir, data_file
from saesub.reproduce.dead_forecast import Forecast, forecast_dead
from saesub.reproduce.model_card import model_card
from saesub.training.comparison import ComparisonTrainer, joint_batches, train_together
from saesub.training.mitigations import GhostGradients, KAnnealing, Resampling
from saesub.training.trainer import SubspaceSAETrainer

__version__ = "0.1.0"

__all__ = [
    "ActivationStore",
    "ComparisonTrainer",
    "Diagnosis",
    "Forecast",
    "GhostGradients",
    "KAnnealing",
    "Resampling",
    "SaesubError",
    "SparseAdam",
    "Spectrum",
    "SpectrumAccumulator",
    "SubspaceInit",
    "SubspaceSAETrainer",
    "cache_dir",
    "center_at",
    "center_biases",
    "choose_d_init",
    "data_file",
    "dead_features",
    "diagnose",
    "fetch",
    "fit_encoder_scale",
    "fit_norm",
    "forecast_dead",
    "geometric_median",
    "harvest",
    "initialize_in_subspace",
    "joint_batches",
    "load_corpus",
    "load_model",
    "measure_spectra",
    "measure_spectrum",
    "model_card",
    "overlap",
    "pack_contexts",
    "parameter_groups",
    "reconstruction",
    "sae_loss",
    "scale_encoder",
    "stream_activations",
    "subspace_loss_recovered",
    "train_together",
]
