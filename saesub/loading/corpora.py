"""A text corpus by name, file or live object, as a `datasets.Dataset` with one column, "text"."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

from saesub.errors import SaesubError, near_names
from saesub.loading.corpus_parsers import PARSERS, PARSERS_VERSION, decode
from saesub.loading.download import fetch, hub_is_reachable
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
    if n_documents is not None and n_documents < 1:
        raise SaesubError(f"n_documents must be at least 1, not {n_documents}.")
    dataset = _find(corpus, n_documents, seed)
    if n_documents is None:
        return dataset
    if n_documents > len(dataset):
        raise SaesubError(
            f"n_documents={n_documents} is more than the {len(dataset)} documents of the corpus: "
            "ask for fewer, or give None for all."
        )
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:n_documents]
    return dataset.select(chosen, keep_in_memory=True)


def _find(corpus: Corpus, n_documents: int | None, seed: int) -> Dataset:
    if isinstance(corpus, str) and corpus in packaged_names("corpora"):
        return _packaged_corpus(packaged()[corpus], seed)
    return _without_empty(_find_given(corpus, n_documents, seed))


def _find_given(corpus: Corpus, n_documents: int | None, seed: int) -> Dataset:
    if isinstance(corpus, Dataset):
        return _text_only(corpus, "the dataset")
    if isinstance(corpus, list):
        return _from_texts(corpus)
    if not isinstance(corpus, (str, Path)):
        raise SaesubError(
            "a corpus is a name, a path, a list of texts or a datasets.Dataset, "
            f"not {type(corpus).__name__}."
        )
    path = Path(corpus).expanduser()
    if path.exists():
        return _from_path(path)
    if isinstance(corpus, Path) or corpus.startswith(("/", ".", "~")) or path.suffix in _TABLES:
        raise SaesubError(f"there is no file or folder {corpus}: check the path.")
    return _from_hub(corpus, n_documents, seed)


def _text_only(dataset: Any, what: str) -> Dataset:
    columns = dataset.column_names or []
    if "text" not in columns:
        raise SaesubError(
            f'{what} has no column "text" (it has {", ".join(map(repr, columns)) or "none"}): '
            'rename one with rename_column(…, "text").'
        )
    return dataset.select_columns("text")


def _without_empty(dataset: Dataset) -> Dataset:
    dtype = getattr(dataset.features["text"], "dtype", "a nested type")
    if len(dataset) and dtype not in ("string", "large_string"):
        raise SaesubError(f'the column "text" must hold strings, not {dtype}.')
    texts = (text for batch in dataset.iter(_AT_ONCE) for text in batch["text"])  # pyright: ignore
    kept = [i for i, text in enumerate(texts) if text and text.strip()]
    if not kept:
        raise SaesubError("the corpus holds no text: every document is empty.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept, keep_in_memory=True)


def _from_texts(texts: Iterable[str]) -> Dataset:
    texts = list(texts)
    if any(not isinstance(text, str) for text in texts):
        raise SaesubError("a list of texts must hold strings only.")
    return Dataset.from_dict({"text": [_clean(text) for text in texts]})


def _clean(text: str) -> str:
    """Without control characters, and with anything that is not Unicode text replaced."""
    return text.translate(_CONTROL).encode("utf-8", errors="replace").decode()


# --- the user's own files and the hub ------------------------------------------------------------


def _from_path(path: Path) -> Dataset:
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return _text_only(load_from_disk(str(path)), str(path))
    if path.is_dir() or path.suffix == ".txt":
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise SaesubError(f"the folder {path} holds no .txt file and is no saved dataset.")
        return _from_texts(decode(file.read_bytes()) for file in files)
    if path.suffix not in _TABLES:
        raise SaesubError(f"{path} must end in .txt, {', '.join(_TABLES)}, or be a folder.")
    form = _TABLES[path.suffix]
    lenient: dict[str, Any] = {} if form == "parquet" else {"encoding_errors": "replace"}
    try:
        dataset = load_dataset(form, data_files=str(path), split="train", **lenient)
    except Exception as error:  # datasets raises what each reader raises
        reason = str(error.__cause__ or error).split("\n")[0]
        raise SaesubError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error
    return _text_only(dataset, str(path))


def _from_hub(name: str, n_documents: int | None, seed: int) -> Dataset:
    try:
        if not hub_is_reachable():
            raise ConnectionError("it cannot be reached")
        if n_documents is None:
            return _text_only(load_dataset(name, split="train"), name)
        stream = load_dataset(name, split="train", streaming=True)
        buffer = min(10_000, 10 * n_documents)
        rows = list(stream.shuffle(seed=seed, buffer_size=buffer).take(n_documents))
        return _text_only(Dataset.from_list(rows), name)
    except (OSError, ValueError) as error:
        if isinstance(error, SaesubError):
            raise
        offline = packaged_names("corpora")
        raise SaesubError(
            f"no corpus loads under {name!r}, which is neither packaged nor a local path, and the "
            f"hub did not give it: {near_names(name, offline)} Without the hub, these load: "
            f"{', '.join(offline)}. (The hub: {str(error).splitlines()[0]})"
        ) from error


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
