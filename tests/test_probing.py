"""Sparse probes against their definition; texts in two languages told apart on the real model."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.errors import SaesubError
from saesub.evaluation.passes import site_activations
from saesub.evaluation.probing import RAW, mean_features, probe_tasks, sparse_probe

HOOK = "blocks.2.hook_attn_out"
TEXTS = ["The river rises in the hills and flows south to the sea.", "Two words more, then done."]


@pytest.fixture(scope="module")
def sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=800, k=8))


@pytest.mark.model
def test_features_are_means_over_each_texts_own_tokens(
    model: TransformerBridge, sae: TopKTrainingSAE
) -> None:
    got = mean_features(model, TEXTS, HOOK, {"sae": sae}, progress=False)
    assert got[RAW].shape == (2, 576)
    assert got["sae"].shape == (2, 800)
    for i, text in enumerate(TEXTS):  # alone, unpadded: nothing leaks from the other text
        ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        x = site_activations(model, ids, HOOK)[0, 1:]
        torch.testing.assert_close(got[RAW][i], x.mean(0), atol=1e-4, rtol=1e-3)
        expected = sae.encode(x).detach().mean(0)
        torch.testing.assert_close(got["sae"][i], expected, atol=1e-3, rtol=1e-2)


@pytest.mark.model
def test_only_the_first_tokens_of_a_text_are_read(model: TransformerBridge) -> None:
    long = TEXTS[0] + " And a good deal more is said after that."
    short, cut = mean_features(model, [TEXTS[0], long], HOOK, {}, max_tokens=8, progress=False)[RAW]
    torch.testing.assert_close(short, cut)


@pytest.mark.model
def test_unusable_texts_and_names_are_refused(
    model: TransformerBridge, sae: TopKTrainingSAE
) -> None:
    with pytest.raises(SaesubError, match="text 1 holds no token"):
        mean_features(model, ["a few words", ""], HOOK, {}, progress=False)
    with pytest.raises(SaesubError, match="raw"):
        mean_features(model, TEXTS, HOOK, {RAW: sae}, progress=False)
    with pytest.raises(SaesubError, match="at least one text"):
        mean_features(model, [], HOOK, {}, progress=False)


def _planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature 3 rises by 2 in the positive class, feature 5 falls by 1; the rest is noise."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)) * 0.5
    positive = torch.arange(n) % 2 == 0
    x[positive, 3] += 2
    x[positive, 5] -= 1
    return x, positive


def test_the_probe_reads_the_k_features_whose_means_differ_most() -> None:
    train, y = _planted(400, 0)
    test, z = _planted(400, 1)
    blind_3, blind_both = test.clone(), test.clone()
    blind_3[:, 3] = 0
    blind_both[:, [3, 5]] = 0
    assert sparse_probe(train, y, test, z, 1) > 0.95
    assert sparse_probe(train, y, test, z, 2) >= sparse_probe(train, y, test, z, 1)
    others = torch.randn(400, 12, generator=torch.Generator().manual_seed(2))
    others[:, [3, 5]] = test[:, [3, 5]]  # what a probe of two features reads is left
    assert sparse_probe(train, y, others, z, 2) == sparse_probe(train, y, test, z, 2)
    assert sparse_probe(train, y, others, z, None) != sparse_probe(train, y, test, z, None)
    assert sparse_probe(train, y, blind_both, z, 2) == pytest.approx(0.5)


def test_the_scale_of_the_site_does_not_matter() -> None:
    train, y = _planted(300, 0)
    test, z = _planted(300, 1)
    tiny = sparse_probe(train * 1e-4, y, test * 1e-4, z, 2)
    assert tiny == sparse_probe(train, y, test, z, 2) > 0.95


def test_probe_input_is_checked() -> None:
    x, y = _planted(20, 0)
    for k in (0, 13):
        with pytest.raises(SaesubError, match=r"k must lie in 1\.\.12"):
            sparse_probe(x, y, x, y, k)
    for train, labels in ((x[:, :9], y), (x, y[:9])):
        with pytest.raises(SaesubError, match="of one width, and a class for each text"):
            sparse_probe(train, labels, x, y, 1)
    with pytest.raises(SaesubError, match="both classes"):
        sparse_probe(x, torch.ones(20, dtype=torch.bool), x, y, 1)


def test_tasks_are_balanced_and_tested_on_texts_held_out() -> None:
    x, positive = _planted(400, 0)
    classes = {"a": x[positive], "b": x[~positive][:100]}
    classes["a"][75:100, 3] -= 2  # the texts that the test is on look like the other class
    table = probe_tasks(classes, {"a or b": ("a", "b")}, (1, None))
    assert table.columns.tolist() == ["task", "k", "accuracy"]
    assert table["k"].tolist() == [1, 0]
    assert table["accuracy"][0] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(SaesubError, match="no class 'c'"):
        probe_tasks(classes, {"odd": ("a", "c")})
    with pytest.raises(SaesubError, match="give more texts"):
        probe_tasks({"a": x[:1], "b": x[:1]}, {"few": ("a", "b")})


@pytest.mark.model
def test_random_features_of_real_text_tell_french_from_english(
    model: TransformerBridge, sae: TopKTrainingSAE, corpus: Dataset
) -> None:
    french = [
        "La rivière prend sa source dans les collines et se jette dans la mer.",
        "Il fut le premier roi de la dynastie et régna pendant vingt ans.",
        "Cette ville est le chef-lieu du département et compte deux gares.",
        "Les oiseaux de cette espèce vivent dans les forêts du nord.",
        "Le roman raconte la vie d'une famille pauvre pendant la guerre.",
        "On trouve cette plante au bord des chemins et dans les jardins.",
    ] * 2
    english = corpus["text"][:12]
    features = mean_features(
        model, french + english, HOOK, {"sae": sae}, max_tokens=12, progress=False
    )
    classes = {"fr": features["sae"][:12], "en": features["sae"][12:]}
    table = probe_tasks(classes, {"language": ("fr", "en")}, (5,), test_share=0.5)
    assert table["accuracy"][0] > 0.8
