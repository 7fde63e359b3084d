"""Low-rank sparse attention (Lorsa), by one name: what it is, its starts, its data, its training.

`saesub.lorsa_module` says what it computes.
"""

from saesub.attention_sequences import AttentionSequences, attention_sequences
from saesub.lorsa_module import ActiveHeads, Lorsa, LorsaConfig, dense_lorsa
from saesub.lorsa_start import initialize_lorsa
from saesub.lorsa_training import LorsaReport, calibrate_lorsa, evaluate_lorsa, train_lorsa

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
