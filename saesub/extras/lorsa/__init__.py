"""Low-rank sparse attention (Lorsa), by one name: what it is, its starts, its data, its training.

`saesub.extras.lorsa.model` says what it computes.
"""

from saesub.extras.lorsa.init import initialize_lorsa
from saesub.extras.lorsa.model import ActiveHeads, Lorsa, LorsaConfig, dense_lorsa
from saesub.extras.lorsa.sequences import AttentionSequences, attention_sequences
from saesub.extras.lorsa.training import LorsaReport, calibrate_lorsa, evaluate_lorsa, train_lorsa

__all__ = [
    "ActiveHeads",
    "AttentionSequences",
    "Lorsa",
    "LorsaConfig",
    "LorsaReport",
    "attention_sequences",
    "calibrate_lorsa",
    "dense_lorsa",
    "evaluate_lorsa",
    "initialize_lorsa",
    "train_lorsa",
]
