"""More than one process: what the ranks of a torchrun job say to one another.

A script joins the job, and is a job of its own when it was started without torchrun:

    # torchrun --standalone --nproc-per-node 8 script.py
    with distributed.join() as ranks:
        spectra = distributed.measure_spectra(ranks, model, corpus, hooks, n_tokens=10**7)

`ShardedSAETrainer` and `DataParallelSAETrainer` train with the same `ranks`.
"""

from saesub.training.distributed.data_parallel import DataParallelSAETrainer
from saesub.training.distributed.feature_parallel import ShardedSAETrainer, take_features
from saesub.training.distributed.processes import Ranks, join
from saesub.training.distributed.spectra import measure_spectra, merge_spectra

__all__ = [
    "DataParallelSAETrainer",
    "Ranks",
    "ShardedSAETrainer",
    "join",
    "measure_spectra",
    "merge_spectra",
    "take_features",
]
