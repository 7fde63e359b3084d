"""Low-rank sparse attention (Lorsa): the model, its initialisation, its data and its training."""

from saesub.extras.lorsa.attention import AttentionSequences, attention_sequences
from saesub.extras.lorsa.init import initialize_lorsa
from saesub.extras.lorsa.model import ActiveHeads, Lorsa, LorsaConfig, dense_lorsa
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
