"""The kit for a card: its load, and a rehearsal of its stages with the card's packages alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch

from saesub.activations.collect import harvest
from saesub.loading.models import load_model

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "benchmarks" / "gpu"
HOOK = "blocks.12.hook_attn_out"
N_CONTEXTS, TOKENS = 32, 5_000

# What a machine with a card was seen to have, beside the standard library. Of Hugging Face's hub
# client also what it needs.
CARD = """
    accelerate aiohttp attrs certifi click cloudpickle contourpy cycler einops execnet filelock
    fonttools fsspec h11 h5py hf-xet httpcore huggingface-hub hypothesis idna iniconfig
    jaxtyping jinja2 joblib kiwisolver markdown-it-py markupsafe matplotlib mdurl mpmath
    narwhals networkx numpy packaging pandas pillow pip pluggy protobuf psutil pyarrow pygments
    pyparsing pytest pytest-xdist python-dateutil pyyaml regex requests rich safetensors
    scikit-learn scipy seaborn sentencepiece setuptools shellingham six sortedcontainers sympy
    threadpoolctl tokenizers torch tqdm transformers triton typer typing-extensions urllib3
    wadler-lindig wrapt xxhash anyio httpcore2 httpx httpx2 sniffio truststore
    charset-normalizer
"""

HIDING = """
import importlib.machinery, sys, sysconfig
ALLOWED, FOLDERS = {allowed!r}, {folders!r}
STDLIB = sysconfig.get_paths()["stdlib"]

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        top = name.partition(".")[0]
        if spec is None or path is not None or top in ALLOWED or top in sys.stdlib_module_names:
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        if any(place.startswith(folder) for place in places for folder in FOLDERS):
            return spec
        if all(place.startswith(STDLIB) for place in places) and "-packages" not in str(places):
            return spec
        return None

sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder]
sys.meta_path.append(Hiding)
"""


def _python(code: str, **environment: str) -> str:
    """What code prints that is run beside the kit's modules."""
    paths = os.pathsep.join([str(KIT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Path:
    """A small load, made as the whole one is."""
    folder = tmp_path_factory.mktemp("kit") / "load"
    code = (
        f"import pack, pathlib; pack.make(pathlib.Path({str(folder)!r}), 'wiki-en', {N_CONTEXTS})"
    )
    said = _python(code)
    assert "differs from the bridge by" in said
    return folder


@pytest.fixture(scope="module")
def rehearsal(load) -> Path:
    """What `run.sh A B` writes in a rehearsal, where all but the card's packages are hidden."""
    place = load.parent
    site, hook = place / "site", place / "hook"
    hook.mkdir()
    card = {name.lower() for name in CARD.split()}
    allowed = {
        name
        for name, owners in packages_distributions().items()
        if {owner.lower().replace("_", "-") for owner in owners} & card
    }
    folders = [str(site), str(ROOT)]
    text = HIDING.format(allowed=allowed | {"_distutils_hack", "triton"}, folders=folders)
    (hook / "sitecustomize.py").write_text(text)
    environment = {
        "GPU_REHEARSAL": "1",
        "GPU_LOAD": str(load),
        "GPU_SITE": str(site),
        "GPU_SCRATCH": str(place / "scratch"),
        "OUT": str(place / "out"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(hook),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(KIT / "run.sh"), "A", "B"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return place / "out"


def _results(rehearsal: Path, name: str) -> dict:
    log = (rehearsal / "log.txt").read_text()
    assert "No module named" not in log, log[-4000:]
    return json.loads((rehearsal / f"{name}.json").read_text())["results"]


@pytest.mark.slow
@pytest.mark.model
def test_the_load_has_the_models_own_weights(load):
    """Bit for bit; of the embeddings those of the text's tokens."""
    names = ["layers.0.self_attn.q_proj", "layers.7.mlp.down_proj", "layers.12.input_layernorm"]
    chosen = [f"{name}.weight" for name in (*names, "embed_tokens")]
    out = load / "chosen.npz"
    _python(
        "import container, contexts, numpy, pathlib\n"
        f"folder = pathlib.Path({str(load)!r})\n"
        "weights = container.read(folder / 'model.zip')\n"
        f"kept = {{name: weights[name] for name in {chosen!r}}}\n"
        f"numpy.savez({str(out)!r}, ids=contexts.read(folder).ids, **kept)"
    )
    own = dict(load_model("smollm2-135m", device="cpu").original_model.named_parameters())
    own = {name.replace("_original_component.", ""): w.numpy() for name, w in own.items()}
    with np.load(out) as found:
        for name in chosen:
            expected = own[f"model.{name}"]
            expected = expected[found["ids"]] if name == "embed_tokens.weight" else expected
            assert np.array_equal(found[name], expected)
    out.unlink()


@pytest.mark.slow
@pytest.mark.model
def test_the_kits_rows_are_those_of_the_package(rehearsal, tmp_path):
    """In the order of the package's own store, and without the positions that it leaves out."""
    found = np.load(rehearsal.parent / "scratch" / "activations.npy")
    store = harvest("smollm2-135m", "wiki-en", [HOOK], tmp_path, n_tokens=1_000, progress=False)[
        HOOK
    ]
    expected = store.rows(0, store.n_tokens)
    rows = torch.from_numpy(found[: len(expected)].astype(np.float32))
    assert len(found) == TOKENS
    torch.testing.assert_close(rows, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", ["check", "harvest", "headline", "speed"])
def test_every_result_of_a_rehearsal_is_there(rehearsal, name):
    results = _results(rehearsal, name)
    failed = {key: r for key, r in results.items() if isinstance(r, dict) and "error" in r}
    assert results
    assert "trace" not in str(failed), failed


@pytest.mark.slow
@pytest.mark.model
def test_the_rehearsal_judges_what_it_trained(rehearsal):
    results = _results(rehearsal, "headline")
    arms = ["bridge", "random, Adam", "subspace, Adam", "subspace, SparseAdam"]
    with np.load(rehearsal / "fires.npz") as fires:
        for name in arms:
            row, held_out = results[name], fires[f"{name}, held_out"]
            assert row["l0"] == pytest.approx(held_out.sum() / row["held_out_tokens"])
            assert list(row["silent_held_out"].values())[-1] == (held_out == 0).mean()
            assert fires[f"{name}, training"].mean() == row["mean_fires_in_training"]
            assert (fires[f"{name}, training"] >= fires.get(f"{name}, cooling", 0)).all()
    assert len({results[name]["tokens"] for name in arms[1:]}) == 1
    check = _results(rehearsal, "check")
    assert check["kernels passed"] is True
    assert check["tests"]["exit"] == 0
    assert "sparsify" in str(_results(rehearsal, "speed"))


@pytest.mark.slow
@pytest.mark.model
def test_a_rehearsal_is_no_record(rehearsal):
    found = subprocess.run(
        [sys.executable, str(KIT / "record.py"), str(rehearsal)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert "rehearsal" in found.stderr


def test_a_record_is_of_one_card_and_one_commit(tmp_path):
    """Refused: two cards. Merged: what several calls on one card gave."""
    facts = {"card": "NVIDIA A", "driver": "1", "code": "x", "rehearsal": False, "date": "today"}
    row = {"name": "ours", "d_sae": 8, "batch": 4, "tokens_per_second": 1.0, "peak_bytes": 10**9}
    for i, card in enumerate(["NVIDIA A", "NVIDIA A", "NVIDIA B"]):
        folder = tmp_path / str(i)
        folder.mkdir()
        content = {"facts": facts | {"card": card}, "results": {f"step {i}": row}}
        (folder / "speed.json").write_text(json.dumps(content))
    np.savez(tmp_path / "0" / "fires.npz", arm=np.array([0, 0, 1, 2, 3, 4, 9], np.uint32))
    code = (
        "import record, json, pathlib\n"
        f"folders = [pathlib.Path({str(tmp_path)!r}) / str(i) for i in range(3)]\n"
        "made = record.merged(folders[:2])\n"
        "print(json.dumps([sorted(made['speed']), made['features by fires']]))\n"
        "print(record.tables(made).count('| ours | 8 | 4 | 1 | 1.0 |'))\n"
        "try:\n    record.merged(folders)\n"
        "except record.RecordError as error:\n    print(error)"
    )
    merged, rows, refused = _python(code).splitlines()
    bins = {"0": 2, "1": 1, "2": 2, "4": 1, "8": 1}
    assert json.loads(merged) == [["step 0", "step 1"], {"arm": bins}]
    assert rows == "2"
    assert refused == "the results differ in card: record each by itself"


def test_the_load_fits():
    """Where it was made; with the repository it must stay below 60 MiB."""
    if not (KIT / "load" / "model.zip").is_file():
        pytest.skip("the load is not made here")
    code = (
        "import pack, stage\n"
        "files = sum(p.stat().st_size for p in stage.LOAD.iterdir())\n"
        "print(files + pack.repository_bytes() <= pack.MOST_BYTES)"
    )
    assert _python(code).split()[-1] == "True"
