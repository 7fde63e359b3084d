"""Bad data: readers given anything at all, odd corpora, degenerate activations, one bad token."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from faults import Faults, count_faults  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.collect import harvest, measure_spectra, measure_spectrum
from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import StoreWriter
from saesub.errors import SaesubError
from saesub.init.biases import geometric_median
from saesub.init.subspace import choose_d_init, initialize_in_subspace
from saesub.loading.corpora import load_corpus
from saesub.loading.registry import read_registry, tomllib
from saesub.paths import data_file
from saesub.reproduce import claims, claims_table
from saesub.training.checkpoint import STATE_FILENAME, read_checkpoint_state
from saesub.training.trainer import SubspaceSAETrainer

HOOK = "blocks.0.hook_attn_out"
REGISTRY = tomllib.loads(data_file("registry.toml").read_text())
MEASURED = claims.compare(
    [
        claims.Measurement("F1.attn_rank", 0.515, (0.49, 0.54), "30 layers"),
        claims.Measurement("F6.fvu", None),
    ],
    "01",
).rows
fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)


json_values = st.recursive(scalars, nested, max_leaves=8)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside nested lists and dicts."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in children:
        found.append((*path, key))
        if isinstance(child, (dict, list)):
            found += places(child, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> Any:
    """A copy with one value, anywhere, dropped or replaced by another one."""
    changed = copy.deepcopy(good)
    *path, last = draw(st.sampled_from(places(good)))
    holder = changed
    for key in path:
        holder = holder[key]
    if draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = draw(json_values)
    return changed


def refused_or(read: Callable[[], Any], check: Callable[[Any], object]) -> None:
    """Either a sentence of ours, or what passes the check; never another error."""
    with suppress(SaesubError):
        check(read())


# --- readers -------------------------------------------------------------------------------------


def as_toml(value: Any) -> str:
    """Inline TOML, as JSON but for its keys' separator; what TOML lacks stays as it is in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value)


def check_registry(registry: Any) -> None:
    for name, entry in registry.items():
        assert entry.name == name
        assert isinstance(entry.digest, str)
        assert all(isinstance(t, str) for t in (entry.description, entry.licence, entry.source))
        for file in entry.files:
            assert Path(file.name).name == file.name
            assert all(part.member is None or isinstance(part.member, str) for part in file.parts)


@fuzz
@given(data=mutated(REGISTRY) | json_values)
def test_a_registry_of_any_content(data: Any, tmp_path: Path, faults: Faults) -> None:
    lines = [as_toml(data)]
    if isinstance(data, dict):
        lines = [f"{json.dumps(key)} = {as_toml(value)}" for key, value in data.items()]
    path = tmp_path / "registry.toml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    refused_or(lambda: read_registry(path), check_registry)
    faults.survived("registry of random or mutated content")


@fuzz
@given(data=mutated(MEASURED) | json_values)
def test_claims_of_any_content(data: Any, tmp_path: Path, faults: Faults) -> None:
    (tmp_path / "claims_01.json").write_text(json.dumps(data))

    def read() -> claims_table.ClaimsTable:
        return claims.scorecard(claims.collect(tmp_path))

    def check(table: claims_table.ClaimsTable) -> None:
        assert all([table.markdown(), table._repr_html_(), str(table)])

    refused_or(read, check)
    faults.survived("claims of random or mutated content")


@fuzz
@given(data=st.binary(max_size=300), suffix=st.sampled_from(["h.json", "h.bin"]))
def test_files_of_random_bytes(data: bytes, suffix: str, tmp_path: Path, faults: Faults) -> None:
    for name in ("spectrum", STATE_FILENAME, "claims_01.json", "registry.toml", suffix):
        (tmp_path / name).write_bytes(data)
    for read in (
        lambda: Spectrum.load(tmp_path / "spectrum"),
        lambda: read_checkpoint_state(tmp_path),
        lambda: ActivationStore.open(tmp_path, "h"),
    ):
        with pytest.raises(SaesubError):
            read()
    refused_or(lambda: claims.scorecard(claims.collect(tmp_path)), lambda table: str(table))
    refused_or(lambda: read_registry(tmp_path / "registry.toml"), check_registry)
    faults.survived("file of random bytes, given to every reader", 5)


@fuzz
@given(header=json_values, rest=st.binary(max_size=64))
def test_safetensors_of_any_header(
    header: Any, rest: bytes, tmp_path: Path, faults: Faults
) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + rest
    for name, read in (("spectrum", Spectrum.load), (STATE_FILENAME, read_checkpoint_state)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SaesubError):
            read(tmp_path / name if name == "spectrum" else tmp_path)  # pyright: ignore
    faults.survived("safetensors file of a random header", 2)


# --- corpora -------------------------------------------------------------------------------------

TEXT = "The town lies on the river, and its market is older than its walls. "


CORPORA = {
    "empty": ["", " \n", TEXT * 40, "\t"],
    "huge": [TEXT * 20_000],
    "control": [TEXT * 10 + "\x00\x01\x1b[31m\x7f\ud800\ufeff" + TEXT * 10],
    "repeated": [TEXT] * 500,
    "special tokens": [TEXT * 3 + "<|endoftext|><|im_start|>" + TEXT * 3] * 9,
    "scripts": ["日本語のテキスト。🙂" * 60, "ا" * 500, "x" * 5000],
}


@pytest.fixture(scope="module")
def model(two_layers: TransformerBridge) -> TransformerBridge:
    return two_layers


@pytest.mark.model
@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_odd_documents_are_read(
    model: TransformerBridge, corpus: list[str], request: pytest.FixtureRequest, faults: Faults
) -> None:
    found = load_corpus(corpus)
    assert all(text.strip() and "\x00" not in text for text in found["text"])
    spectrum = measure_spectrum(
        model, corpus, HOOK, n_tokens=200, context_size=32, batch_size=4, progress=False
    )
    assert spectrum.n_tokens == 200
    assert bool(spectrum.covariance.isfinite().all())
    faults.survived(f"corpus: {request.node.callspec.id} documents")


@fuzz
@given(data=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_text_files_of_random_bytes(data: list[bytes], tmp_path: Path, faults: Faults) -> None:
    for i, content in enumerate(data):
        (tmp_path / f"{i}.txt").write_bytes(content)

    def check(corpus: Dataset) -> None:
        assert all(text.strip() and "\x00" not in text for text in corpus["text"])

    refused_or(lambda: load_corpus(tmp_path), check)
    faults.survived("corpus: text files of random bytes")


# --- activations ---------------------------------------------------------------------------------


def topk(d_in: int, d_sae: int) -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=4))


def all_finite(sae: TopKTrainingSAE) -> bool:
    return all(bool(p.isfinite().all()) for p in sae.parameters())


RULES = ("flat", "spectrum", "data", "whitened_data")
N, D = 400, 24


def degenerate() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(N, 1, generator=generator) @ torch.randn(1, D, generator=generator)
    return {
        "rank-1": line,
        "rank-1 and offset": line + 100,
        "two values": line.sign() * 3,
        "mostly zero": line * (torch.arange(N) % 50 == 0).unsqueeze(1),
        "one wild token": torch.eye(N, D) * 1e4,
    }


FEW_TOKENS = ("two values", "mostly zero", "one wild token")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", degenerate())
def test_degenerate_activations_start_finite_features(kind: str, rule: Any, faults: Faults) -> None:
    x = degenerate()[kind]
    spectrum = Spectrum.from_activations(x)
    assert 1 <= choose_d_init(spectrum) <= D
    given = x if rule in ("data", "whitened_data") else None
    if given is not None and kind in FEW_TOKENS:
        with pytest.raises(SaesubError, match="tokens drawn for 31 features differ"):
            initialize_in_subspace(topk(D, 31), spectrum, directions=rule, activations=given)
        return
    for d_init in ("auto", 1, D, 0.9):
        sae = topk(D, 31)
        initialize_in_subspace(sae, spectrum, d_init, directions=rule, activations=given)
        assert all_finite(sae)
        faults.survived("rank-1 and other degenerate activations: a start is finite")
    assert bool(geometric_median(x).isfinite().all())


@pytest.mark.parametrize("rule", ["data", "whitened_data"])
def test_tokens_without_a_direction_in_the_subspace_are_refused(rule: Any, faults: Faults) -> None:
    line = degenerate()["rank-1"]
    across = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    along = torch.nn.functional.normalize(line[:1], dim=1)
    across = across - (across @ along.T) * along
    across = across * line.norm(dim=1).mean() / across.norm(dim=1).mean()
    spectrum = Spectrum.from_activations(line)
    across += spectrum.mean.float()
    sae = topk(D, 31)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(SaesubError, match="pass other activations or a larger d_init"):
        initialize_in_subspace(sae, spectrum, 1, directions=rule, activations=across)
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    faults.survived("tokens without a direction in the subspace: refused, weights as they were")


@pytest.mark.parametrize("rule", RULES)
def test_constant_activations_are_refused_before_any_weight_moves(
    rule: Any, faults: Faults
) -> None:
    x = torch.full((N, D), 3.7)
    spectrum = Spectrum.from_activations(x)
    for d_init in ("auto", 1, D, 0.9):
        sae = topk(D, 31)
        before = copy.deepcopy(sae.state_dict())
        given = x if rule in ("data", "whitened_data") else None
        with pytest.raises(SaesubError, match="constant"):
            initialize_in_subspace(sae, spectrum, d_init, directions=rule, activations=given)
        assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    with pytest.raises(SaesubError, match="constant"):
        choose_d_init(spectrum)
    assert torch.allclose(geometric_median(x), x[0])
    faults.survived("constant activations: refused, weights as they were", 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_bad_value_in_a_million_tokens(
    bad: float, dtype: torch.dtype, tmp_path: Path, faults: Faults
) -> None:
    x = torch.ones(1_000_000, 4, dtype=dtype)
    x[765_432, 2] = bad
    sentence = r"NaN or infinite values, first .* in row \d+, column 2"
    of_all = sentence.replace(r"\d+", "765432")
    accumulator = SpectrumAccumulator(4)
    with pytest.raises(SaesubError, match=of_all):
        accumulator.update(x)
    with pytest.raises(SaesubError, match=of_all):
        Spectrum.from_activations(x)

    def store() -> None:
        with StoreWriter(tmp_path, "h", dtype, {}) as writer:
            for block in x.split(2**16):
                writer.write(block)

    with pytest.raises(SaesubError, match=sentence):
        store()
    assert list(tmp_path.iterdir()) == []
    faults.survived("NaN or infinity in one token of a million", 3)


@pytest.mark.model
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_late_in_a_pass_is_named(
    model: TransformerBridge, corpus: Dataset, tmp_path: Path, bad: float, faults: Faults
) -> None:
    seen = []

    def poison(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(hook)
        if len(seen) % 7 == 0:
            tensor = tensor.clone()
            tensor[0, 9, 5] = bad
        return tensor

    run = {"n_tokens": 1000, "context_size": 32, "batch_size": 2, "progress": False}
    where = rf"{HOOK}, batch 6: .*NaN or infinite values, first {bad} in row \d+, column 5"
    model.hook_dict[HOOK].add_hook(poison, level=77)
    try:
        with pytest.raises(SaesubError, match=where):
            measure_spectra(model, corpus, [HOOK], checkpoint=tmp_path / "state", **run)
        with pytest.raises(SaesubError, match=where):
            harvest(model, corpus, [HOOK], tmp_path, **run)
    finally:
        model.hook_dict[HOOK].remove_hooks("fwd", level=77)
    faults.survived("NaN or infinity in one batch of a pass: hook point and batch named", 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("d_in", "d_sae"), [(23, 101), (31, 257)])
def test_dtypes_and_prime_widths(dtype: torch.dtype, d_in: int, d_sae: int, faults: Faults) -> None:
    x = torch.randn(600, d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    spectrum = Spectrum.from_activations(x)
    whole = Spectrum.from_activations(x.double())
    torch.testing.assert_close(spectrum.covariance, whole.covariance, rtol=1e-4, atol=1e-5)
    for rule in RULES:
        sae = topk(d_in, d_sae)
        given = x if rule in ("data", "whitened_data") else None
        initialize_in_subspace(sae, spectrum, directions=rule, activations=given)
        assert all_finite(sae)
        for optimizer in ("adam", "sparse_adam"):
            cfg = SAETrainerConfig(total_training_samples=96, train_batch_size_samples=32, lr=1e-3)
            trainer = SubspaceSAETrainer(cfg, copy.deepcopy(sae), iter(()), optimizer=optimizer)
            for batch in x[:96].split(32):
                trainer.step(batch)
            assert all_finite(trainer.sae)
            faults.survived("activations in another dtype, widths prime")


def test_a_device_without_data_is_refused(faults: Faults) -> None:
    x = torch.empty(50, 4, device="meta")
    with pytest.raises(SaesubError, match="meta"):
        Spectrum.from_activations(x)
    faults.survived("activations on the meta device: refused")
