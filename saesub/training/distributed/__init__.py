"""Spectra and training on several processes that torchrun starts.

A script joins the job; started without torchrun, it is a job of one process:

    # torchrun --standalone --nproc-per-node 8 script.py
    with distributed.join() as processes:
        spectra = distributed.measure_spectra(processes, model, corpus, hooks, n_tokens=10**7)

`FeatureParallelSAETrainer` and `DataParallelSAETrainer` train with the same `processes`.
"""

from saesub.training.distributed.data_parallel import DataParallelSAETrainer
from saesub.training.distributed.feature_parallel import (
    FeatureParallelSAETrainer,
    fit_norm,
    take_features,
)
from saesub.training.distributed.processes import Processes, join
from saesub.training.distributed.spectra import measure_spectra, merge_spectra

__all__ = [
    "DataParallelSAETrainer",
    "FeatureParallelSAETrainer",
    "Processes",
    "fit_norm",
    "join",
    "measure_spectra",
    "merge_spectra",
    "take_features",
]
