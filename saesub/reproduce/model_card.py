"""Writes an SAE's model card: its initialisation, spectrum, measured claims and licence.

SAELens uploads the SAE (`sae_lens.upload_saes_to_huggingface`); its own card only names the files.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCardData
from sae_lens import SAE, Transcoder

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_model, check_site
from saesub.loading.registry import packaged
from saesub.reproduce.claims_table import ClaimsTable

_PAPER = "arXiv 2508.16929, *Attention Layers Add Into Low-Dimensional Residual Subspaces*"
_USE = """## Use

```python
from sae_lens import SAE, Transcoder

sae = SAE.from_pretrained("<this repository>", "<its folder>")
```"""
_TRAINING = (
    *("l0", "num_dead_features", "dead_share", "dead_window_tokens"),
    *("optimizer", "mitigations"),
)


def model_card(
    sae: SAE[Any],
    spectrum: Spectrum,
    *,
    claims: ClaimsTable | None = None,
    licence: str | None = None,
) -> str:
    """A model card in the hub's format: YAML front matter and Markdown.

    Args:
        sae: trained; its metadata hold its initialisation and what was counted in training.
        spectrum: of the activations that it reconstructs; its metadata name the model.
        claims: what was measured on it, from `saesub.reproduce.claims.compare`.
        licence: of the model it was trained on, an identifier of the hub ("apache-2.0", "gemma")
            or words; packaged models bring theirs.

    Warns of an SAE of a model of another name.

    Raises:
        SaesubError: the spectrum names no model, is of another hook point or width, or the model's
            licence is not known.
    """
    name = spectrum.metadata.get("model")
    if name is None:
        raise SaesubError(
            "the spectrum does not name its model: measure it with saesub.measure_spectrum"
        )
    if spectrum.d != sae.W_dec.shape[1]:
        raise SaesubError(
            f"the spectrum is {spectrum.d} wide, the SAE writes {sae.W_dec.shape[1]}: "
            "give the spectrum of the activations that it reconstructs"
        )
    metadata = sae.cfg.metadata
    written_at = metadata.hook_name_out if isinstance(sae, Transcoder) else metadata.hook_name
    measured_at = spectrum.metadata.get("hook_name")
    if written_at is not None:
        check_site("the spectrum", measured_at, written_at)
    check_model("the SAE", metadata.model_name, name)
    source, licence = _source(name, licence)
    sections = [
        f"# {sae.cfg.architecture()} SAE, {sae.cfg.d_sae:,} features, for {name}",
        _list("Where it reads", spectrum.metadata),
        _list("The spectrum there", _summary(spectrum)),
        _list("How it was initialised", _initialisation(sae)),
        _list("How it was trained", _training(sae)),
        f"## Claims of {_PAPER}\n\n" + (claims.markdown() if claims else "Not measured."),
        f"## Licence\n\nTrained on activations of {source}, whose licence is: {licence}.",
        _USE,
    ]
    front = _front_matter(source, licence).to_yaml()
    return f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n"


def _source(name: str, licence: str | None) -> tuple[str, str]:
    """The hub's name of the model, and its licence."""
    entry = packaged().get(name)
    licence = licence or (entry.licence if entry else None)
    if licence is None:
        raise SaesubError(
            f"the licence of {name} is not known here: pass licence=…, as the model's own page says"
        )
    return (entry.source.split(",")[0] if entry else name), licence


def _front_matter(source: str, licence: str) -> ModelCardData:
    tags = ["sparse-autoencoder", "mechanistic-interpretability", "saesub"]
    data: dict[str, Any] = {"base_model": source, "library_name": "saelens", "tags": tags}
    identifier = licence.lower()
    if re.fullmatch(r"[a-z0-9.-]+", identifier):
        return ModelCardData(license=identifier, **data)
    words = re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-")
    return ModelCardData(license="other", license_name=words, **data)


def _summary(spectrum: Spectrum) -> dict[str, Any]:
    rank, d = spectrum.rank_at(0.99), spectrum.d
    return {
        "width": d,
        "tokens": f"{spectrum.n_tokens:,}",
        "rank at 99 % of variance": f"{rank} ({100 * rank / d:.1f} % of the width)",
        "effective rank of singular values": f"{spectrum.effective_rank('singular_values'):.1f}",
        "effective rank of variances": f"{spectrum.effective_rank('variance'):.1f}",
    }


def _initialisation(sae: SAE[Any]) -> dict[str, Any]:
    return sae.cfg.metadata.subspace_init or {"directions": "SAELens' own random ones"}


def _training(sae: SAE[Any]) -> dict[str, Any]:
    kept = {name: sae.cfg.metadata[name] for name in _TRAINING if name in sae.cfg.metadata}
    return kept or {"training": "nothing was recorded"}


def _list(title: str, facts: dict[str, Any]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items())
