"""Known mitigations against dead features, each to be combined with the others and with any start.

`Resampling`, `GhostGradients` and `KAnnealing` are given to `SubspaceSAETrainer(mitigations=[...])`.
The others are settings of the SAE or the trainer: AuxK is SAELens' `aux_loss_coefficient`,
whitening its `normalize_activations="covariance_whitening"`, masked Adam
`optimizer="sparse_adam"`. What is done before training is in `saesub.init`.
"""

from saesub.training.mitigations.ghost_gradients import GhostGradients
from saesub.training.mitigations.k_annealing import KAnnealing
from saesub.training.mitigations.mitigation import Mitigation
from saesub.training.mitigations.resampling import Resampling

__all__ = ["GhostGradients", "KAnnealing", "Mitigation", "Resampling"]
