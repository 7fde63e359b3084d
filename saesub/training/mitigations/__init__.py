"""Known mitigations against dead features, which combine with one another and any initialisation.

`SubspaceSAETrainer(mitigations=[...])` takes `Resampling`, `GhostGradients` and `KAnnealing`. The
others are settings of the SAE or the trainer: AuxK is SAELens' `aux_loss_coefficient`, whitening
its `normalize_activations="covariance_whitening"`, masked Adam `optimizer="sparse_adam"`.
Initialisations are in `saesub.init`.
"""

from saesub.training.mitigations.ghost_gradients import GhostGradients
from saesub.training.mitigations.k_annealing import KAnnealing
from saesub.training.mitigations.mitigation import Mitigation
from saesub.training.mitigations.resampling import Resampling

__all__ = ["GhostGradients", "KAnnealing", "Mitigation", "Resampling"]
