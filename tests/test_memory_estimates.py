"""Peak memory that no run at `quick` has recorded is estimated from one at `smoke`, and says so."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

ROOT = Path(__file__).resolve().parent.parent
memory = runpy.run_path(str(ROOT / "notebooks" / "memory.py"))
publish = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))


@pytest.mark.parametrize(
    ("name", "tokens", "layers", "features"),
    [
        ("00_tour", 20_000, 3, 1),
        ("05_active_subspace_init", 144_000, 3, 9_216),
        ("06_width_and_sparse_adam", 144_000, 1, 32_768),
        ("09_feature_quality", 144_000, 1, 4_608),
    ],
)
def test_a_profiles_sizes_are_read_from_the_notebook_itself(name, tokens, layers, features):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    values = memory["settings"](notebook, "quick")
    sizes = {"tokens": tokens, "layers": layers, "features": features}
    assert memory["sizes"](values) == sizes


def test_what_a_run_keeps_and_trains_grows_by_its_kind(tmp_path):
    for name, size in {"activations-10/hook.bin": 100, "spectra/hook.safetensors": 10}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    small = {"tokens": 10, "layers": 2, "features": 8}
    large = {"tokens": 20, "layers": 6, "features": 32}
    trained = 4 * 24 * memory["BYTES_OF_A_FEATURE"]
    assert memory["growth"](tmp_path, 4, small, large) == 5 * 100 + 2 * 10 + trained
    assert memory["growth"](tmp_path, 4, small, small) == 0


def test_a_features_bytes_are_those_of_an_sae_and_its_adam(model):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=64, k=4))
    bytes_of_matrices = sum(w.nbytes for w in (sae.W_enc, sae.W_dec))
    assert memory["BYTES_OF_A_FEATURE"] == 3 * bytes_of_matrices / 64


def test_an_estimate_is_called_one_and_gives_way_to_a_measurement():
    recorded = {"run": ["a processor, 2 cores"], "seconds": 720}
    estimated = recorded | {"estimated_memory": {"cpu": 3_140_000_000}}
    before = "Run time at `quick`: 9 s on 2 CPU cores, 4 GB of memory; and more."
    told = publish["with_run_time"](before, estimated)
    assert ", peak memory 3.1 GB by estimate (on a T4 of 16 GB, by estimate" in told
    assert "4 GB of memory" not in told
    assert publish["with_run_time"](told, estimated) == told
    measured = publish["with_run_time"](told, estimated | {"peak_memory": {"cpu": 2 * 10**9}})
    assert ", peak memory 2.0 GB (on a T4" in measured
