"""Make the load that travels to a machine with a card and no network: benchmarks/gpu/load/.

    python benchmarks/gpu/pack.py

Runs on any CPU with the project's environment. Parts that are up to date are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import container
import contexts
import numpy as np
import stage
import torch
from model import HOOK, LAYER, MOST_ERROR, AttentionOutput, largest_error

from saesub.activations.tokens import ContextStream, kept_positions
from saesub.evaluation.passes import site_activations
from saesub.loading.corpora import load_corpus
from saesub.loading.download import fetch
from saesub.loading.models import context_tokens, load_model

MODEL, CORPUS = "smollm2-135m", "english-mix"
MOST_BYTES = 63 * 2**20
LOCKED = (
    "sae-lens",
    "transformer-lens",
    "datasets",
    "dill",
    "multiprocess",
    "better-abc",
    "simple-parsing",
    "docstring-parser",
    "platformdirs",
)
"""Packages that saesub imports and the card's machine lacks, at the versions of the lock."""
SPARSIFY = ("natsort==8.4.0", "schedulefree==1.4.1")  # what the pinned eai-sparsify imports
_LOCK = stage.ROOT / "requirements.lock"
_SPARSIFY_PIN = stage.ROOT / "benchmarks" / "contenders" / "sparsify.txt"
_AT_ONCE = 16  # contexts in a batch of `saesub.harvest`: it reads no others
_REFERENCE = (0, 4000)  # contexts, of which every fourth position is kept
_STUB = '''"""Stands in for wandb, of which SAELens needs one name where nothing is logged."""


class Histogram:
    """Never made."""
'''
_LIKE_PARAMETERS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"} | {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"attn_q": 9, "attn_k": 3}


class PackError(Exception):
    """The load cannot be made as it should be."""


def make(folder: Path, corpus: str = CORPUS, n_contexts: int | None = None) -> dict[str, int]:
    """Make the parts that are missing or out of date; returns the bytes of each.

    Args:
        n_contexts: the first so many contexts of the corpus; None takes all of them.

    Raises:
        PackError: the model from the load differs from the package's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = f"{corpus}, {n_contexts} contexts"
    parts: dict[str, Callable[[Path], None]] = {
        "site.tar.xz": _site,
        contexts.FILE: lambda path: _contexts(path, corpus, n_contexts),
        "model.zip": lambda path: _model(path, contexts.read(folder)),
        "reference.npz": lambda path: _reference(path, folder),
    }
    note = folder / "made.json"
    made = json.loads(note.read_text()) if note.is_file() else {}
    key = _key(settings)
    for name, write in parts.items():
        if made.get(name) != key or not (folder / name).is_file():
            print(f"making {name} ...", flush=True)
            write(folder / name)
            made[name] = key
            note.write_text(json.dumps(made))
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _key(settings: str) -> str:
    """Changes with whatever decides the load."""
    digest = hashlib.sha256(settings.encode())
    for path in (
        *(stage.HERE / f"{n}.py" for n in ("pack", "container", "contexts", "model")),
        _LOCK,
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- packages ------------------------------------------------------------------------------------


def pins() -> list[str]:
    """NAME==VERSION of every package of the load."""
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)$", _LOCK.read_text(), re.MULTILINE))
    sparsify = [p for p in _SPARSIFY_PIN.read_text().split() if p.startswith("eai-sparsify")]
    return [*(f"{name}=={lock[name]}" for name in LOCKED), *sparsify, *SPARSIFY]


def _site(path: Path) -> None:
    """The packages as files to import, with a stub of wandb, in one archive."""
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary) / "wheels", Path(temporary) / "site"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        card = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        subprocess.run([*pip, "--no-deps", *card, "-d", str(wheels), *pins()], check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        (site / "wandb.py").write_text(_STUB)
        with tarfile.open(path, "w:xz", preset=9) as archive:
            archive.add(site, ".")


# --- text ----------------------------------------------------------------------------------------


def _contexts(path: Path, corpus: str, n_contexts: int | None) -> None:
    """All whole batches of contexts that `saesub.harvest` reads, in its order."""
    model = load_model(MODEL, device="cpu")
    stream = ContextStream(model, load_corpus(corpus), contexts.SIZE)
    taken, n_kept = [], 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the corpus ends after")
        while n_contexts is None or len(taken) * _AT_ONCE < n_contexts:
            batch = stream.take(_AT_ONCE)
            if stream.epochs > 1:  # some of its text was read before
                break
            n_kept += int(kept_positions(model, batch, contexts.SKIP_FIRST).sum())
            taken.append(batch.numpy())
    contexts.write(path, np.concatenate(taken), context_tokens(model).special_ids, n_kept, corpus)


# --- model ---------------------------------------------------------------------------------------


def _model(path: Path, text: contexts.Contexts) -> None:
    """The blocks of the GGUF file that the attention output of `LAYER` depends on.

    Raises PackError if their weights differ in any bit from those of `saesub.load_model`.
    """
    from gguf import GGUFReader

    reader = GGUFReader(fetch(MODEL) / "model.gguf")
    tensors: dict[str, container.Blocks] = {}
    for tensor in reader.tensors:
        if (name := _name(tensor.name)) is None:
            continue
        data, kind = np.array(tensor.data), tensor.tensor_type.name
        if name == "embed_tokens.weight":
            data = data[text.ids]
        if heads := _HEADS.get(tensor.name.split(".")[-2]):
            # llama.cpp keeps the two halves of each head's rotary pairs side by side.
            data = data.reshape(heads, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        shape = (len(data), *(int(n) for n in reversed(tensor.shape[:-1])))
        if kind != "F32":
            data = data.reshape(-1, data.size * container.BLOCK // int(np.prod(shape)))
        tensors[name] = container.Blocks(kind, shape, data)
    container.write(path, tensors)
    _require_equal(container.read(path), text.ids)


def _name(gguf_name: str) -> str | None:
    """The tensor's name in transformers' LlamaModel, or None if it is not needed."""
    if gguf_name == "token_embd.weight":
        return "embed_tokens.weight"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if found is None:
        return None
    layer, part = int(found[1]), found[2]
    if layer > LAYER or (layer == LAYER and part.startswith("ffn")):
        return None
    return f"layers.{layer}.{_LIKE_PARAMETERS[part]}.weight"


def _require_equal(weights: dict[str, np.ndarray], ids: np.ndarray) -> None:
    hf_model = load_model(MODEL, device="cpu").original_model
    own = {name.replace("_original_component.", ""): w for name, w in hf_model.named_parameters()}
    for name, found in weights.items():
        expected = own[f"model.{name}"].numpy()
        expected = expected[ids] if name == "embed_tokens.weight" else expected
        if not np.array_equal(found, expected):
            raise PackError(f"{name} of the load differs from the package's: see container.py")


def _reference(path: Path, folder: Path) -> None:
    """Activations of two contexts by the package's bridge, every fourth position.

    Raises PackError if the load's model gives others.
    """
    text = contexts.read(folder)
    chosen = [i for i in _REFERENCE if i < len(text.rows)]
    rows = torch.from_numpy(text.rows[chosen].astype(np.int64))
    ids = torch.from_numpy(text.ids.astype(np.int64))[rows]
    expected = site_activations(load_model(MODEL, device="cpu"), ids, HOOK)[:, ::4].numpy()
    np.savez_compressed(path, contexts=np.array(chosen), activations=expected)
    found = AttentionOutput(folder / "model.zip", "cpu")(rows)[:, ::4].numpy()
    error = largest_error(found, expected)
    print(f"the load's model differs from the bridge by {error:.1e}")
    if error > MOST_ERROR:
        raise PackError(f"activations of the load's model are off by {error:.1e}: see model.py")


# --- size ----------------------------------------------------------------------------------------


def repository_bytes() -> int:
    """Bytes of the repository's files, which travel too; not of those that git ignores."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=stage.ROOT, capture_output=True, check=True)
    files = [stage.ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return sum(path.stat().st_size for path in files if path.is_file())


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    sizes = make(stage.LOAD) | {"the repository": repository_bytes()}
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    total = sum(sizes.values())
    print(f"{total:>12,}  in all, {total / 2**20:.1f} MiB")
    if total > MOST_BYTES:
        raise SystemExit(f"the load is above {MOST_BYTES / 2**20:.0f} MiB: leave some text out")


if __name__ == "__main__":
    main()
