"""A page of features: what it says is what the weights and the activations say."""

from __future__ import annotations

import re

import pytest
import torch
from sae_lens import (
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer

from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.passes import site_activations
from saesub.evaluation.top_activations import Snippet
from saesub.extras.feature_pages import FeaturePage, FeatureView, Peak, Source, feature_page
from saesub.loading.models import load_model

pytestmark = pytest.mark.model
HOOK = "blocks.1.hook_attn_out"


@pytest.fixture(scope="module")
def sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=300, k=8))
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture(scope="module")
def tokens(model, corpus) -> torch.Tensor:
    return pack_contexts(model, corpus.select(range(60)), n_contexts=4, context_size=32)


@pytest.fixture(scope="module")
def page(model, sae, tokens) -> FeaturePage:
    fires = (sae.encode(site_activations(model, tokens, HOOK)[:, 1:]) > 0).flatten(0, 1).sum(0)
    often, silent = int(fires.argmax()), int((fires == 0).nonzero()[0])
    return feature_page(model, sae, tokens, {"living": [often], "dead": [silent]})


def test_heads_and_tokens_add_up_to_what_the_feature_reads(model, sae, tokens, page):
    (view,) = page.groups["living"]
    every = feature_page(model, sae, tokens, {"one": [view.feature]}, n_snippets=1).groups["one"]
    peak = every[0].peaks[0]
    acts = sae.encode(site_activations(model, tokens, HOOK))[..., view.feature]
    acts[:, 0] = 0
    context, at = divmod(int(acts.argmax()), tokens.shape[1])
    x = site_activations(model, tokens, HOOK)[context, at]
    whole = (x @ sae.W_enc[:, view.feature]).item()
    z = site_activations(model, tokens, "blocks.1.attn.hook_z")[context, at].view(9, 64)
    heads = torch.einsum("he,hed,d->h", z, model.W_O[1], sae.W_enc[:, view.feature])
    assert heads.sum().item() == pytest.approx(whole, rel=1e-3)
    named = {source.name: source.amount for source in peak.heads}
    for head, amount in zip(*(t.tolist() for t in heads.topk(3)[::-1]), strict=True):
        assert named[f"head {head}"] == pytest.approx(amount, rel=1e-3)
    assert all(re.fullmatch(r".* \((0|-\d+)\)", source.name, re.S) for source in peak.tokens)


def test_all_source_tokens_together_are_all_heads_together(model, sae, tokens):
    from saesub.extras import feature_pages

    seen = []
    given = feature_pages._by_token

    def watch(model, tokens, amounts, peak, sign):
        seen.append((amounts, peak))
        return given(model, tokens, amounts, peak, sign)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_pages, "_by_token", watch)
        reads = sae.W_enc.detach()[:, 3]
        list(feature_pages._written_by(model, HOOK, tokens, [(2, 17, 1.0)], reads))
    (amounts, peak) = seen[0]
    x = site_activations(model, tokens, HOOK)[2, 17]
    assert amounts.sum().item() == pytest.approx((x @ reads).item(), rel=1e-3)
    assert not amounts[:, peak + 1 :].any()  # nothing comes from later tokens


def _watched(model, sae, tokens, features) -> list[tuple]:
    """Of each peak on a page: its context, place, sign and feature, what each head takes from each
    token there, and the heads and tokens that are named."""
    from saesub.extras import feature_pages

    written_by, by_head, amounts, seen = feature_pages._written_by, feature_pages._by_head, [], []

    def watch_heads(of_peak, sign):
        amounts.append(of_peak)
        return by_head(of_peak, sign)

    def watch(model, hook_name, tokens, peaks, reads):
        (feature,) = (sae.W_enc.detach() == reads[:, None]).all(0).nonzero().flatten().tolist()
        peaks = list(peaks)
        found = written_by(model, hook_name, tokens, peaks, reads)
        for at, written in zip(peaks, found, strict=True):
            seen.append((*at, feature, amounts[-1], *written))
            yield written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_pages, "_by_head", watch_heads)
        patch.setattr(feature_pages, "_written_by", watch)
        feature_page(model, sae, tokens, {"all": features})
    assert len(seen) == len(amounts)
    return seen


def _assert_named(seen) -> None:
    """The heads and tokens named are the three that write most of the peak, by its sign."""
    for _, _, sign, _, amounts, heads, sources in seen:
        for found, by in ((heads, amounts.sum(1)), (sources, amounts.sum(0))):
            most = (sign * by).topk(min(3, len(by))).values
            expected = most[most > 0].tolist()
            assert [sign * source.amount for source in found] == pytest.approx(expected)


def test_a_peak_below_zero_is_written_by_what_lies_below_zero(model, tokens):
    torch.manual_seed(0)
    sae = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=576, d_sae=60, k=8))
    sae.cfg.metadata.hook_name = HOOK
    seen = _watched(model, sae, tokens, list(range(60)))
    assert {sign for _, _, sign, *_ in seen} == {1.0, -1.0}
    _assert_named(seen)


def test_what_wrote_a_peak_has_its_sign_and_is_not_later():
    from saesub.extras.feature_pages import _strongest

    amounts = torch.tensor([0.5, -2.0, 0.1, 3.0, 0.0, 0.0])
    assert [at for at, _ in _strongest(amounts, 1.0)] == [3, 0, 2]
    assert _strongest(amounts, -1.0) == [(1, -2.0)]  # not the zeros of later tokens
    assert _strongest(torch.zeros(4), 1.0) == []


def test_no_source_comes_after_its_peak(page):
    for group in page.groups.values():
        for source in (s for view in group for peak in view.peaks for s in peak.tokens):
            assert source.amount > 0
            assert int(source.name.rsplit("(", 1)[1].rstrip(")")) <= 0


@pytest.mark.parametrize("groups", [[1, 2], None, {1: [3]}])
def test_groups_that_have_no_names_are_refused(model, sae, tokens, groups):
    with pytest.raises(SaesubError, match="groups is a dictionary"):
        feature_page(model, sae, tokens, groups)


def test_no_more_is_named_than_there_is(model, sae, tokens):
    (view,) = feature_page(model, sae, tokens, {"a": [3]}, n_named=10**6).groups["a"]
    assert len(view.raises) == model.cfg.d_vocab
    assert len(view.near) == sae.cfg.d_sae - 1


def test_text_that_turns_others_around_is_shown_by_a_sign():
    snippet = Snippet(("a\u202e", "\x00\r"), (1.0, 0.0))
    shown = FeaturePage({"x": [FeatureView(1, 0.5, (1,) * 12, 1.0, (Peak(snippet),), (), (), ())]})
    assert not set(shown._repr_html_()) & {"\u202e", "\x00", "\r"}
    assert "a�" in shown._repr_html_()


def test_logits_move_as_the_page_says(model, sae, page):
    (view,) = page.groups["living"]
    row = sae.W_dec.detach()[view.feature]
    x = torch.randn(576, generator=torch.Generator().manual_seed(0)).view(1, 1, -1)
    x = x / x.square().mean().sqrt()
    step = 1e-2
    moved = model.ln_final(x + step * row) - model.ln_final(x)
    # The norm also divides by the length, which the row changes: take that out.
    length = (x + step * row).square().mean().sqrt()
    linear = model.ln_final(x + step * row) * length - model.ln_final(x)
    effects = (linear / step) @ model.W_U
    effects = (effects - effects.mean()).flatten()
    assert view.raises[0].amount == pytest.approx(effects.max().item(), rel=1e-2)
    assert view.lowers[0].amount == pytest.approx(effects.min().item(), rel=1e-2)
    assert moved.isfinite().all()


def test_neighbours_counts_and_silence(model, sae, tokens, page):
    (view,), (silent,) = page.groups["living"], page.groups["dead"]
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = rows @ rows[view.feature]
    cosines[view.feature] = -2
    assert view.near[0].name == str(int(cosines.argmax()))
    assert view.near[0].amount == pytest.approx(cosines.max().item())
    acts = sae.encode(site_activations(model, tokens, HOOK))[..., view.feature]
    acts = acts[kept_positions(model, tokens, 1)]
    assert sum(view.counts) == int((acts > 0).sum())
    assert view.largest == pytest.approx(acts.max().item(), rel=1e-4)
    assert silent.density == 0
    assert silent.peaks == ()
    shown = page._repr_html_()
    assert shown.count("<details>") == 2
    assert shown.count("silent in this text") == 1
    assert "<script" not in shown


def test_what_reads_no_attention_output_has_no_heads(model, corpus, tokens):
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=50, k=8))
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    views = feature_page(model, sae, tokens, {"some": list(range(5))}).groups["some"]
    peaks = [peak for view in views for peak in view.peaks]
    assert peaks
    assert not [peak for peak in peaks if peak.heads or peak.tokens]


def test_every_text_is_escaped():
    evil = "<script>alert(1)</script>"
    peak = Peak(Snippet((evil,), (1.0,)), (Source(evil, 1.0),), (Source(evil, 1.0),))
    named = (Source(evil, 1.0),)
    view = FeatureView(1, 0.5, (1,) * 12, 1.0, (peak,), named, named, named)
    shown = FeaturePage({evil: [view]})._repr_html_()
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") == 7


@pytest.mark.parametrize("features", [[], list(range(201)), [300]])
def test_too_few_too_many_or_unknown_features_are_refused(model, sae, tokens, features):
    with pytest.raises(SaesubError, match=r"1 to 200|do not exist"):
        feature_page(model, sae, tokens, {"these": features})


def test_what_is_no_sae_is_refused(model, tokens):
    with pytest.raises(SaesubError, match="An SAE must be one of SAELens' classes"):
        feature_page(model, None, tokens, {"these": [3]})


def test_a_model_with_biases_and_a_layer_norm():
    """GPT-2's attention output has a bias, and its last norm takes the mean away."""
    hf_model = tiny_gpt2()
    with torch.no_grad():
        for name, values in hf_model.named_parameters():
            if name.endswith("bias") or "ln" in name:
                values.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
        hf_model.transformer.ln_f.bias.zero_()  # so that the norm is its gain and no more
    model = load_model((hf_model, tiny_tokenizer()))
    tokens = pack_contexts(model, tiny_texts(), n_contexts=3, context_size=24)
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=40, k=8))
    sae.cfg.metadata.hook_name = HOOK
    seen = _watched(model, sae, tokens, list(range(40)))
    assert len(seen) > 10
    bias, x = model.blocks[1].attn.b_O, site_activations(model, tokens, HOOK)
    for context, peak, _, feature, amounts, *_ in seen:
        read = (x[context, peak] - bias) @ sae.W_enc.detach()[:, feature]
        assert amounts.sum().item() == pytest.approx(read.item(), rel=1e-3, abs=1e-4)
    _assert_named(seen)
    views = feature_page(model, sae, tokens, {"all": list(range(40))}).groups["all"]
    row = sae.W_dec.detach()[views[0].feature]
    x = torch.randn(1, 1, 64)
    spread = [(y - y.mean()).square().mean().sqrt() for y in (x, x + row)]
    linear = model.ln_final(x + row) * spread[1] - model.ln_final(x) * spread[0]
    effects = (linear @ model.W_U).flatten()
    effects = effects - effects.mean()
    assert views[0].raises[0].amount == pytest.approx(effects.max().item(), rel=1e-2)
    assert views[0].lowers[0].amount == pytest.approx(effects.min().item(), rel=1e-2)
