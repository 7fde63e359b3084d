"""saesub: attention outputs are low-rank, that kills SAE features, and how to save them.

The names below are those that a user needs. The rest is in rooms: `.loading`, `.topk`,
`.activations`, `.init`, `.evaluation`, `.training`, `.extras` and `.reproduce`.
"""

from saesub.activations import harvest, measure_spectra, measure_spectrum, stream_activations
from saesub.arms import ArmsTrainer, joint_batches, train_arms
from saesub.biases import center_at, center_biases, geometric_median
from saesub.contexts import pack_contexts
from saesub.corpora import load_corpus
from saesub.dead import Diagnosis, dead_features, diagnose, overlap
from saesub.errors import SaesubError
from saesub.evaluate import loss_recovered, reconstruction
from saesub.fetch import fetch
from saesub.forecast import Forecast, forecast_dead
from saesub.model_card import model_card
from saesub.models import load_model
from saesub.norm import fit_encoder_scale, fit_norm, scale_encoder
from saesub.optim import SparseAdam, parameter_groups
from saesub.quality import loss_with_sae
from saesub.remedies import GhostGradients, KAnnealing, Resampling
from saesub.resources import cache_dir, data_file
from saesub.spectrum import Spectrum, SpectrumAccumulator
from saesub.store import ActivationStore
from saesub.subspace import SubspaceInit, choose_d_init, initialize_in_subspace
from saesub.training import SubspaceSAETrainer

__version__ = "0.1.0"

__all__ = [
    "ActivationStore",
    "ArmsTrainer",
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
    "loss_recovered",
    "loss_with_sae",
    "measure_spectra",
    "measure_spectrum",
    "model_card",
    "overlap",
    "pack_contexts",
    "parameter_groups",
    "reconstruction",
    "scale_encoder",
    "stream_activations",
    "train_arms",
]
