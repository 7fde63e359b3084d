"""Corpora: the packaged ones' contents, and every way of giving one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from saesub.errors import SaesubError
from saesub.loading import corpora, corpus_parsers
from saesub.loading.corpora import load_corpus

TEXTS = ["first text", "second text", "third text"]


def test_wiki_en_is_english(corpus: Dataset) -> None:
    assert corpus.column_names == ["text"]
    assert len(corpus) > 1000
    assert sum(" the " in text for text in corpus["text"]) > 0.9 * len(corpus)


def test_second_load_parses_nothing(corpus: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "fetch", lambda _: pytest.fail("fetched again"))
    assert len(load_corpus("wiki-en")) == len(corpus)


def test_a_changed_parser_parses_again(
    corpus: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parsed = []

    def documents(parser: str, _: Path) -> list[str]:
        parsed.append(parser)
        return TEXTS

    monkeypatch.setattr(corpora, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(corpora, "fetch", lambda _: tmp_path)
    monkeypatch.setattr(corpora, "documents", documents)
    for code in ("old", "old", "new"):
        monkeypatch.setattr(corpora, "source_digest", lambda part, code=code: f"{code} {part}")
        assert sorted(load_corpus("wiki-en")["text"]) == sorted(TEXTS)
    assert parsed == ["wiki", "wiki"]


def test_packaged_documents_come_shuffled_by_seed(corpus: Dataset) -> None:
    """The package lists them by topic, and a sample of one topic is no sample of the corpus."""
    same, other = (load_corpus("wiki-en", seed=seed)["text"] for seed in (0, 1))
    assert list(same) == list(corpus["text"])
    assert list(same) != list(other)
    assert sorted(same) == sorted(other)


def test_sample_is_seeded(corpus: Dataset) -> None:
    once, again = (load_corpus("wiki-en", n_documents=20, seed=3)["text"] for _ in range(2))
    assert list(once) == list(again)
    assert len(set(once)) == 20
    assert set(once) <= set(corpus["text"])
    assert list(once) != list(load_corpus("wiki-en", n_documents=20, seed=4)["text"])


def test_standard_library_leaves_out_tests() -> None:
    texts = load_corpus("code-python")["text"]
    assert len(texts) > 300
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("class TestLongMessage" in text for text in texts)


def test_texts_are_taken_as_they_are() -> None:
    assert list(load_corpus(TEXTS)["text"]) == TEXTS


def test_empty_documents_and_control_characters_go() -> None:
    found = load_corpus(["a\x00b\tc\n", "", "  \n", "\ud800d"])["text"]
    assert list(found) == ["ab\tc\n", "?d"]


def test_live_dataset_keeps_only_text() -> None:
    given = Dataset.from_dict({"text": ["a", None, "b"], "id": [1, 2, 3]})
    found = load_corpus(given)
    assert found.column_names == ["text"]
    assert list(found["text"]) == ["a", "b"]


def test_text_files_in_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    assert list(load_corpus(tmp_path)["text"]) == ["plain", "caf\N{REPLACEMENT CHARACTER}"]
    assert list(load_corpus(str(tmp_path / "a.txt"))["text"]) == ["plain"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "saved"])
def test_tables_and_saved_datasets(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    rows = Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "json":
        path.write_text(json.dumps(list(rows)))
    elif ending == "saved":
        rows.save_to_disk(path)
    else:
        (rows.to_csv if ending == "csv" else rows.to_parquet)(path)
    found = load_corpus(path)
    assert found.column_names == ["text"]
    assert list(found["text"]) == TEXTS


def test_front_matter_is_dropped(tmp_path: Path) -> None:
    import zipfile

    body = "You may copy this. " * 30
    with zipfile.ZipFile(tmp_path / "licensedcode.whl", "w") as archive:
        archive.writestr("licensedcode/data/licenses/x.LICENSE", f"---\nkey: x\n---\n\n{body}")
        archive.writestr("licensedcode/data/rules/x.RULE", body)
    (text,) = corpus_parsers.PARSERS["licences"](tmp_path)
    assert text.strip() == body.strip()


def test_tags_are_stripped() -> None:
    markup = "<p>Sets <code>A &lt; B</code>.</p> <ul> <li>x</li><li>y</li></ul>"
    assert corpus_parsers._without_tags(markup) == "Sets A < B.\nx\ny"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "no text"),
        (["", " \n"], "no text"),
        ([1, 2], "strings only"),
        (3, "not int"),
        (Dataset.from_dict({"body": ["a"]}), "no column \"text\".*'body'"),
        (Dataset.from_dict({"text": [1]}), "must hold strings"),
        ("./absent.jsonl", "no file or folder"),
        (Path("absent"), "no file or folder"),
    ],
)
def test_mistakes_are_named(corpus: corpora.Corpus, message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        load_corpus(corpus)


@pytest.mark.parametrize("content", ["", "{broken", '{"body": "a"}'])
def test_a_broken_table_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(SaesubError, match=r"data\.jsonl"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_documents": 0}, "at least 1"),
        ({"n_documents": 1.5}, r"at least 1, not 1\.5"),
        ({"n_documents": "3"}, "at least 1, not '3'"),
        ({"n_documents": 4}, "more than the 3"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": None}, "seed must be a whole number"),
    ],
)
def test_wrong_numbers(settings: dict, message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        load_corpus(TEXTS, **settings)


def test_a_damaged_saved_dataset_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(SaesubError, match="saved cannot be read"):
        load_corpus(tmp_path / "saved")


def test_unknown_name_offline_gets_a_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "hub_is_reachable", lambda: False)
    with pytest.raises(SaesubError, match=r"did you mean 'wiki-en'.*recipes-en.*cannot be reached"):
        load_corpus("wiki-eng")


def test_a_file_of_the_same_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"  # datasets' cache goes by path and time
    for text in ("the first text", "another text"):
        path.write_text(json.dumps({"text": text}) + "\n")
        os.utime(path, (1_000_000_000, 1_000_000_000))  # as files of an archive may all have
        assert load_corpus(path)["text"] == [text]


def test_a_dataset_with_a_transform_is_refused() -> None:
    shown = Dataset.from_dict({"text": ["one", "two"]})
    shown.set_transform(lambda rows: {"text": [text.upper() for text in rows["text"]]})
    with pytest.raises(SaesubError, match="apply it with map"):
        load_corpus(shown)
