"""The card as the hub's own library reads it, beside the files that SAELens' upload sends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig, upload_saes_to_huggingface

import saesub
from saesub.errors import SaesubError
from saesub.reproduce import claims

METADATA = {"model": "smollm2-135m", "hook_name": "blocks.4.hook_attn_out", "corpus": "wiki-en"}


def spectrum_of(model: str | None = "smollm2-135m", d: int = 12) -> saesub.Spectrum:
    x = torch.randn(400, d, generator=torch.Generator().manual_seed(0)) * torch.arange(1, d + 1)
    return saesub.Spectrum.from_activations(x, METADATA | {"model": model} if model else {})


@pytest.fixture
def sae() -> TopKTrainingSAE:
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=12, d_sae=30, k=4))


def test_it_carries_start_spectrum_claims_and_licence(sae: TopKTrainingSAE) -> None:
    spectrum = spectrum_of()
    start = saesub.initialize_in_subspace(sae, spectrum, d_init=7, seed=3)
    sae.cfg.metadata.num_dead_features = 5
    table = claims.compare([claims.Measurement("F6.asi_dead", 0.004)], "05")
    card = ModelCard(saesub.model_card(sae, spectrum, claims=table))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.library_name == "saelens"
    assert f"- variance_share: {start.variance_share}" in card.text
    assert "- d_init: 7\n" in card.text
    assert "- seed: 3\n" in card.text
    assert f"- rank at 99 % of variance: {spectrum.rank_at(0.99)} (" in card.text
    assert f"{spectrum.effective_rank('singular_values'):.1f}\n" in card.text
    assert "- hook_name: blocks.4.hook_attn_out\n" in card.text
    assert "- num_dead_features: 5" in card.text
    assert table.markdown() in card.text
    assert "0.40 %" in card.text
    assert "whose licence is: Apache-2.0." in card.text


def test_a_random_start_and_no_claims_are_said_to_be_so(sae: TopKTrainingSAE) -> None:
    text = saesub.model_card(sae, spectrum_of())
    assert "SAELens' own random ones" in text
    assert "d_init" not in text
    assert "Not measured." in text


@pytest.mark.parametrize(
    ("model", "licence", "shown"),
    [
        ("gemma3-270m", None, ("other", "gemma-terms-of-use-ai.google.dev-gemma-terms")),
        ("openai-community/gpt2", "MIT", ("mit", None)),
    ],
)
def test_the_licence_is_the_source_models(
    sae: TopKTrainingSAE, model: str, licence: str | None, shown: tuple[str, str | None]
) -> None:
    card = ModelCard(saesub.model_card(sae, spectrum_of(model), licence=licence))
    assert (card.data.license, card.data.license_name) == shown


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (spectrum_of("openai-community/gpt2"), "pass licence="),
        (spectrum_of(None), "does not name its model"),
        (spectrum_of(d=13), "13 wide, the SAE writes 12"),
    ],
)
def test_what_a_card_cannot_say(
    sae: TopKTrainingSAE, spectrum: saesub.Spectrum, message: str
) -> None:
    with pytest.raises(SaesubError, match=message):
        saesub.model_card(sae, spectrum)


def test_what_saelens_uploads_loads_and_tells_its_start(
    sae: TopKTrainingSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the client's last call, which sends a folder, is caught; what it would send is kept."""

    def send(_: HfApi, *, folder_path: Path, path_in_repo: str, allow_patterns: list[str], **__):
        files = [p.name for p in Path(folder_path).iterdir()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = tmp_path / path_in_repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target)

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", send)
    spectrum = spectrum_of()
    saesub.initialize_in_subspace(sae, spectrum)
    upload_saes_to_huggingface({"layer4": sae}, "someone/saes", add_default_readme=False)
    sent = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert sent == {"layer4/cfg.json", "layer4/sae_weights.safetensors"}
    loaded = SAE.load_from_disk(tmp_path / "layer4")
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert saesub.model_card(loaded, spectrum) == saesub.model_card(sae, spectrum)
