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
    contenders = ROOT / "benchmarks" / "contenders"
    given = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([str(KIT), str(ROOT), str(contenders), given])
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
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
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
@pytest.mark.parametrize("name", ["check", "api", "harvest", "headline", "speed"])
def test_every_result_of_a_rehearsal_is_there(rehearsal, name):
    results = _results(rehearsal, name)
    failed = {key: r for key, r in results.items() if isinstance(r, dict) and "error" in r}
    assert results
    assert "trace" not in str(failed), failed


@pytest.mark.slow
@pytest.mark.model
def test_the_rehearsal_judges_what_it_trained(rehearsal):
    results = _results(rehearsal, "headline")
    arms = ["bridge", "random, Adam", "subspace, Adam", "subspace, SparseAdam", "recipe"]
    with np.load(rehearsal / "fires.npz") as fires:
        for name in arms:
            row, held_out = results[name], fires[f"{name}, held_out"]
            assert row["l0"] == pytest.approx(held_out.sum() / row["held_out_tokens"])
            assert list(row["silent_held_out"].values())[-1] == (held_out == 0).mean()
            assert fires[f"{name}, training"].mean() == row["mean_fires_in_training"]
            assert (fires[f"{name}, training"] >= fires.get(f"{name}, cooling", 0)).all()
    assert len({results[name]["tokens"] for name in arms[1:]}) == 1
    check = _results(rehearsal, "check")
    assert check["kernels passed"] == "left out: rehearsal, the CPU's backend"
    log = (rehearsal / "log.txt").read_text()
    assert "kernels: left out: rehearsal, the CPU's backend" in log
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
    assert f"{rehearsal / 'check.json'} is of a rehearsal" in found.stderr


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


def test_a_records_tables_show_what_failed_and_its_command_what_ran():
    code = """if True:
        import record
        check = {"search": {"outcome": "failed"}, "norms": {"outcome": "passed"}}
        check |= {"kernels passed": False, "tests": {"exit": 0, "said": []}}
        slow = "sparsify, 8 features, batch 4"
        found = {"facts": {"card": "NVIDIA A", "date": "2026-01-02 03:04 UTC"}, "check": check}
        found["facts"]["code"] = "0123456789"
        found["speed"] = {"activations": "random", slow: {"left out": "no time"}}
        arm = {"backend": "torch", "d_sae": 8, "lr": 1e-3, "tokens": 4, "fvu": 0.5}
        arm |= {"silent_held_out": {"4": 0.25}, "never_fired_in_training": 0.125}
        arm |= {"after_refit": {"fvu": 0.25}}
        broken = {"error": "OutOfMemoryError", "message": "", "trace": []}
        found["headline"] = {"bridge": arm, "random, Adam": broken}
        print(record.tables(found))
        print(record.command(found), record.file_name(found["facts"]))
        found["headline"] = {"random, Adam at 0.001": arm, "backend": "triton"}
        del found["speed"], found["check"]
        print(record.command(found))
    """
    said = _python(code).splitlines()
    assert said[1] == "kernels: failed or not checked to the end; tests: passed; failed: search"
    assert "| sparsify, 8 features, batch 4 | | | left out: no time | |" in said
    assert "| bridge | torch | 8 | 0.001 | 4 | 25.00% | 12.50% | 0.5000 | 0.2500 |" in said
    assert "| random, Adam | failed: OutOfMemoryError | | | | | | | |" in said
    assert said[-2:] == [
        "bash benchmarks/gpu/run.sh A B nvidia-a-2026-01-02-0123456.json",
        "bash benchmarks/gpu/run.sh C",
    ]


def test_a_missing_folder_is_named_and_leaves_no_record(tmp_path):
    command = [sys.executable, str(KIT / "record.py"), str(tmp_path / "none")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith(f"{tmp_path / 'none'} is no folder: give those")


@pytest.mark.parametrize("key", ["code", "card", "rehearsal"])
def test_what_another_code_or_card_left_is_deleted(tmp_path, key):
    """Not what the same left, nor the files of other results."""
    for name in ("profile.txt", "fires.npz"):
        (tmp_path / name).write_text("earlier")
    code = (
        "import json, stage\n"
        "def begin():\n"
        "    found = stage.Results('check', ['profile.txt'])\n"
        "    print(sorted(p.name for p in stage.OUT.iterdir()), found.content['results'])\n"
        "    return found\n"
        "facts = stage.facts()\n"
        "stage.facts = lambda: facts\n"
        "found = {'facts': facts, 'results': {'a': 1}}\n"
        "(stage.OUT / 'check.json').write_text(json.dumps(found))\n"
        "begin()\n"
        f"stage.facts = lambda: facts | {{{key!r}: 'another'}}\n"
        "begin()"
    )
    assert _python(code, OUT=str(tmp_path)).splitlines() == [
        "['check.json', 'fires.npz', 'profile.txt'] {'a': 1}",
        "['check.json', 'fires.npz'] {}",
    ]


def test_kernels_that_fail_end_the_stage_with_1(tmp_path):
    """And those of which too few were checked to pass."""
    code = """if True:
        import check, stage, torch
        from saesub.extras import gpu_check
        for outcomes in (["passed", "passed"], ["passed", "failed"], ["left out", "left out"]):
            found = [
                gpu_check.Check(f"check {i}", "kernels", outcome, "", 0.0)
                for i, outcome in enumerate(outcomes)
            ]
            gpu_check.run_checks = lambda device, tell: found
            results = stage.Results("check")
            check.kernels(results, "cpu")
            print(results.content["results"]["kernels passed"], results.status)
    """
    assert _python(code, OUT=str(tmp_path)).splitlines() == [
        "kernels: passed",
        "True 0",
        "kernels: FAILED: check 1",
        "False 1",
        "kernels: FAILED: too few of their checks ran",
        "False 1",
    ]


def test_rows_of_another_load_or_code_are_not_read(tmp_path):
    code = """if True:
        import harvest, torch
        for origin in ("a", "b"):
            harvest._origin = lambda: {"code": origin}
            if origin == "a":
                print(harvest._keep(torch.ones(3, 2).half()))
            print(harvest.kept_rows(1))
    """
    said = _python(code, GPU_SCRATCH=str(tmp_path))
    assert said.splitlines() == ["kept", "tensor([[1., 1.]])", "None"]


def _run_sh(place: Path, *parts: str, ends_with: int = 0) -> subprocess.CompletedProcess[str]:
    """`run.sh` with an interpreter whose tests end so, and all else with 0."""
    python = place / "python"
    python.write_text(f'#!/bin/sh\necho ran "$@"\n[ "$2" != tests ] || exit {ends_with}\n')
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "OUT": str(place / "out"), "GPU_LOAD": str(place)}
    command = ["bash", str(KIT / "run.sh"), *parts]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("ends_with", [0, 1])
def test_run_sh_ends_with_1_if_a_stage_did_and_goes_on(tmp_path, ends_with):
    (tmp_path / "site.tar.xz").touch()
    found = _run_sh(tmp_path, "D", "B", ends_with=ends_with)
    assert found.returncode == ends_with
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"check.py tests ended with {ends_with}" in log
    assert "ran benchmarks/gpu/speed.py sparsify" in log


def test_run_sh_without_a_part_or_a_load_begins_nothing(tmp_path):
    said = [_run_sh(tmp_path, *parts) for parts in ((), ("E",), ("A", "b"), ("A",))]
    assert [run.returncode for run in said] == [2] * 4
    assert [run.stderr for run in said] == [
        "no part: give A, B, C or D\n",
        "unknown part E: give A, B, C or D\n",
        "unknown part b: give A, B, C or D\n",
        f"no load in {tmp_path}: run pack.py first\n",
    ]
    assert not (tmp_path / "out").exists()


def test_the_load_fits():
    """Where it was made; with the repository it must stay below 63 MiB."""
    if not (KIT / "load" / "model.zip").is_file():
        pytest.skip("the load is not made here")
    code = (
        "import pack, stage\n"
        "files = sum(p.stat().st_size for p in stage.LOAD.iterdir())\n"
        "print(files + pack.repository_bytes() <= pack.MOST_BYTES)"
    )
    assert _python(code).split()[-1] == "True"
