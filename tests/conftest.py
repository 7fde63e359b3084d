"""The real model and corpus that many tests share, loaded once a session."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from saesub.corpora import load_corpus
from saesub.models import load_model


@pytest.fixture(scope="session")
def model() -> TransformerBridge:
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def corpus() -> Dataset:
    return load_corpus("wiki-en")
