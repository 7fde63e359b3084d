"""What saesub does with every training architecture of SAELens, and with its own transcoders.

Each cell of the table in docs/architectures.md is tried here: a mark where the check passes, else
what the code itself says. With `SAESUB_ARCHITECTURES` set to a file, what was found is written
there, for `notebooks/publish.py` to put into the page:

    SAESUB_ARCHITECTURES=data/results/architectures.json pytest tests/test_architectures.py
    python notebooks/publish.py --pages
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.evaluation.dead_features import overlap
from saesub.extras.transcoders import (
    TrainingSkipTranscoder,
    TrainingSkipTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
)
from saesub.init.biases import center_at
from saesub.loading.models import context_tokens
from saesub.topk import cpu_library

RECORD = Path(__file__).resolve().parent.parent / "data" / "results" / "architectures.json"
HOOK = "blocks.4.hook_attn_out"
PASSES = "✔"
D_IN, D_OUT, D_SAE, BATCH, STEPS = 16, 12, 48, 8, 30
OF_SAESUB = {
    "transcoder": (TrainingTranscoder, TrainingTranscoderConfig),
    "skip_transcoder": (TrainingSkipTranscoder, TrainingSkipTranscoderConfig),
}
# Where an architecture's config has such a field.
SETTINGS = {
    **{"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "k": 4, "decoder_init_norm": 1.0},
    **{"matryoshka_widths": [16, D_SAE], "max_iterations": 4, "l1_coefficient": 0.1},
}


def architectures() -> dict[str, tuple[Any, Any]]:
    """Name -> class and config class, SAELens' registry first."""
    return {**SAE_TRAINING_CLASS_REGISTRY, **OF_SAESUB}


def make(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    sae_class, cfg_class = architectures()[name]
    known = {field.name for field in fields(cfg_class)}
    given = {key: value for key, value in (SETTINGS | more).items() if key in known}
    return sae_class(cfg_class(**given))


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, d_in) and (n, d_out) activations of rank 6 and some noise, with a mean."""
    of_all = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, D_IN + D_OUT, generator=of_all)
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(n, 6, generator=generator) @ mixing + 1
    both += 0.05 * torch.randn(n, D_IN + D_OUT, generator=generator)
    return both[:, :D_IN], both[:, D_IN:]


def batches(sae: Any, start: int = 0) -> Iterator[Tensor]:
    for step in itertools.count(start):
        x, y = data(BATCH, 1000 + step)
        yield torch.cat([x, y], 1) if is_transcoder(sae) else x


def is_transcoder(sae: Any) -> bool:
    return hasattr(sae.cfg, "d_out")


def target(sae: Any, x: Tensor, y: Tensor) -> Tensor:
    return y if is_transcoder(sae) else x


def initialised(name: str) -> tuple[Any, Any]:
    sae, (x, y) = make(name), data(1000, 1)
    read, written = (saesub.Spectrum.from_activations(part) for part in (x, y))
    if is_transcoder(sae):
        given = {"input_spectrum": read, "input_activations": x, "activations": y}
        return sae, saesub.initialize_in_subspace(sae, written, **given)
    return sae, saesub.initialize_in_subspace(sae, read, activations=x)


def trainer(sae: Any, start: int = 0, **more: Any) -> Any:
    cfg = SAETrainerConfig(STEPS * BATCH, BATCH, lr=1e-2, lr_warm_up_steps=3, lr_decay_steps=5)
    return saesub.SubspaceSAETrainer(cfg, sae, batches(sae, start), **more)


def take(trained: Any, steps: int) -> list[Any]:
    outputs = []
    for x in itertools.islice(trained.data_provider, steps):
        outputs.append(trained.step(x))
        trained.n_training_steps += 1
    return outputs


def by_feature(sae: Any) -> dict[str, Tensor]:
    """Every parameter with one row per feature."""
    return {
        name: value.detach().movedim(value.shape.index(D_SAE), 0).clone()
        for name, value in sae.named_parameters()
        if D_SAE in value.shape
    }


# --- the columns: each a check that fails, is refused, or passes ---------------------------------


def initialises(name: str, _: Any) -> None:
    """Directions, tie, biases and the best norm are what `initialize_in_subspace` promises."""
    sae, report = initialised(name)
    x, y = data(1000, 1)
    goal = target(sae, x, y)
    rows, columns = sae.W_dec.detach(), sae.W_enc.detach().T
    of_goal, of_x = (saesub.Spectrum.from_activations(part) for part in (goal, x))
    one = torch.ones(D_SAE)
    torch.testing.assert_close(overlap(rows, of_goal.basis(report.d_init)), one)
    if is_transcoder(sae):
        torch.testing.assert_close(overlap(columns, of_x.basis(report.input_d_init)), one)
    else:
        torch.testing.assert_close(cosine_similarity(rows, columns), one)
    torch.testing.assert_close(rows.norm(dim=1), one * report.norm)
    torch.testing.assert_close(sae.b_dec.detach(), goal.mean(0))
    errors = []
    with torch.no_grad():
        for factor in (1.0, 0.7, 1 / 0.7**2):
            for parameter_name, parameter in sae.named_parameters():
                if D_SAE in parameter.shape and parameter_name not in ("threshold", "r_mag"):
                    parameter *= factor
            errors.append(float((sae(x) - goal).square().sum()))
    assert errors[0] == min(errors)


def steps_sparsely(name: str, _: Any) -> None:
    """The sparse class is given, its pass is SAELens' dense one, and a trainer fuses the step."""
    sae = make(name, dtype="float64")
    dense, before = copy.deepcopy(sae), type(sae)
    try:
        saesub.use_sparse_step(sae)
    except saesub.SaesubError:
        assert type(sae) is before
        raise
    x, _ = data(64, 1)
    dead = torch.arange(D_SAE) % 3 == 0
    for each in (sae, dense):
        step_input = TrainStepInput(x.double(), {}, dead, 0, is_logging_step=False)
        each.training_forward_pass(step_input).loss.backward()
    for ours, theirs in zip(sae.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    fused = trainer(make(name))
    assert (fused.native_step.rows(fused) is None) == (cpu_library.library() is None)


def trains(name: str, _: Any) -> None:
    """With SparseAdam the loss falls, and a feature that goes silent stays where it is."""
    sae = make(name)
    trained, losses, n_silent = trainer(sae), [], 0
    assert type(trained.optimizer) is saesub.SparseAdam
    for step in range(STEPS):
        if step == STEPS // 3:
            silence(sae)
        before = by_feature(sae)
        (output,) = take(trained, 1)
        losses.append(output.losses["mse_loss"].item())
        silent = (output.feature_acts.to_dense() == 0).all(0)
        if not counts_features(sae):  # others are moved by thresholds that they nearly reach
            silent &= (torch.arange(D_SAE) < D_SAE // 4) & (step >= STEPS // 3)
        n_silent += int(silent.sum())
        for parameter_name, after in by_feature(sae).items():
            assert torch.equal(after[silent], before[parameter_name][silent]), parameter_name
    assert n_silent > 2 * STEPS
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def counts_features(sae: Any) -> bool:
    return hasattr(sae.cfg, "k") or hasattr(sae.cfg, "max_iterations")


def silence(sae: Any) -> None:
    """Where sparsity comes of thresholds, a quarter of the features never fires from here on."""
    for name, bias in sae.named_parameters():
        if name in ("b_enc", "b_gate", "b_mag") and not counts_features(sae):
            bias.data[: D_SAE // 4] = -100.0


def resumes(name: str, folder: Path) -> None:
    """Half a run, saved and resumed in a new trainer, ends with the bits of a whole run."""
    whole, first = trainer(make(name)), trainer(make(name))
    take(whole, STEPS)
    take(first, STEPS // 2)
    first.save_checkpoint("half", folder)
    second = trainer(make(name), start=STEPS // 2)
    second.load_trainer_state(folder / "half")
    second.sae.load_weights_from_checkpoint(folder / "half")
    take(second, STEPS - STEPS // 2)
    for ours, theirs in zip(second.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(second.tokens_since_fired, whole.tokens_since_fired)


def saves(name: str, folder: Path) -> None:
    """The weights that are written are those of the SAE, under an architecture of SAELens."""
    sae = saved(name, folder)
    written = load_file(folder / "training" / "sae_weights.safetensors")
    assert written.keys() == sae.state_dict().keys()
    assert all(torch.equal(value, written[key]) for key, value in sae.state_dict().items())
    kind = json.loads((folder / "inference" / "cfg.json").read_text())["architecture"]
    assert kind in SAE_CLASS_REGISTRY


def saved(name: str, folder: Path) -> Any:
    """An SAE of a short run, in `folder`/training and `folder`/inference."""
    sae = trainer(initialised(name)[0]).fit()
    sae.save_model(folder / "training")
    if is_transcoder(sae):  # which has one form
        sae.save_model(folder / "inference")
    else:
        sae.save_inference_model(folder / "inference")
    return sae


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Per architecture the SAE, and what a process without saesub loads of its two forms: the
    class and the output for `data(100, 2)`, or SAELens' error."""
    folder = tmp_path_factory.mktemp("saved")
    saes = {name: saved(name, folder / name) for name in architectures()}
    save_file({"x": data(100, 2)[0].contiguous()}, folder / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: {"sae": sae, "folder": folder / name, **found[name]} for name, sae in saes.items()
    }


LOADING = """
import json, sys
from pathlib import Path
sys.modules["saesub"] = None
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file
folder, found = Path(sys.argv[1]), {}
x = load_file(folder / "x.safetensors")["x"]
for path in sorted(folder.glob("*/*/cfg.json")):
    form, name = path.parent.name, path.parent.parent.name
    of_name = found.setdefault(name, {})
    try:
        sae = (TrainingSAE if form == "training" else SAE).load_from_disk(path.parent)
        save_file({"out": sae(x).detach().contiguous()}, path.parent / "out.safetensors")
        of_name[form] = {"class": type(sae).__name__}
    except Exception as error:
        of_name[form] = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(found))
"""


def loads_to_train(name: str, loaded: Any) -> str | None:
    """SAELens' class reconstructs as the SAE that was saved."""
    of_name = loaded[name]
    if "error" in of_name["training"]:
        return of_name["training"]["error"]
    assert of_name["training"]["class"] == architectures()[name][0].__name__
    out = load_file(of_name["folder"] / "training" / "out.safetensors")["out"]
    torch.testing.assert_close(out, of_name["sae"](data(100, 2)[0]).detach())
    return None


def loads_to_infer(name: str, loaded: Any) -> str | None:
    """So does SAELens' inference class; of a BatchTopK SAE it is a JumpReLU at its threshold."""
    of_name, (x, _) = loaded[name], data(100, 2)
    if "error" in of_name["inference"]:
        return of_name["inference"]["error"]
    sae, out = of_name["sae"], load_file(of_name["folder"] / "inference" / "out.safetensors")["out"]
    expected = sae(x)
    if hasattr(sae, "topk_threshold"):
        assert of_name["inference"]["class"] == "JumpReLUSAE"
        _, pre = sae.encode_with_hidden_pre(x)
        expected = sae.decode(pre * (pre > sae.topk_threshold))
    torch.testing.assert_close(out, expected.detach())
    return None


def finds_dead(name: str, _: Any) -> None:
    """Dead are those that SAELens' own encoder gives no activation."""
    sae, (x, _y) = initialised(name)[0], data(24, 2)
    silence(sae)
    dead = saesub.dead_features(sae, x, n_tokens=24, progress=False)
    assert torch.equal(dead, (sae.encode(x).to_dense() == 0).all(0))
    assert 0 < int(dead.sum()) < D_SAE


def measures_loss(name: str, given: Any) -> None:
    """The loss is that of the model with the reconstruction put in by hand."""
    model, spectrum = given
    sae = make(name, d_in=576, d_out=576, d_sae=128, matryoshka_widths=[16, 128])
    of_input = {"input_spectrum": spectrum} if is_transcoder(sae) else {}
    saesub.initialize_in_subspace(sae, spectrum, **of_input)
    sae.cfg.metadata.hook_name = HOOK
    tokens = model.tokenizer(TEXT, return_tensors="pt").input_ids[:, :32]
    measured = saesub.sae_loss(model, sae, tokens)
    # An attention sink, which is left as it is, not counted, and takes no share of a BatchTopK's k.
    tokens[:, 0] = context_tokens(model).separator_id

    def put_in(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([x[:, :1], sae.decode(sae.encode(x[:, 1:]))], 1)

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, put_in)])[0, 1:-1]
    expected = cross_entropy(logits, tokens[0, 2:]).item()
    assert measured.with_sae == pytest.approx(expected, abs=1e-4)
    assert 0 < measured.kl_with_sae < measured.kl_zero_ablated


TEXT = (
    "The river rises in the hills above the old town and runs west for ninety miles to the sea. "
    "Its valley was settled early, and the bridges that cross it are among the oldest in the land."
)


@pytest.fixture
def nothing() -> None:
    return None


@pytest.fixture(scope="module")
def model_and_spectrum(model: TransformerBridge, activations: Tensor) -> tuple[Any, Any]:
    return model, saesub.Spectrum.from_activations(activations)


# Heading -> the check, and the fixture that it is given.
COLUMNS: dict[str, tuple[Callable[[str, Any], str | None], str]] = {
    "initialisation": (initialises, "nothing"),
    "sparse step": (steps_sparsely, "nothing"),
    "SparseAdam": (trains, "nothing"),
    "resume": (resumes, "tmp_path"),
    "save": (saves, "tmp_path"),
    "load to train": (loads_to_train, "loaded"),
    "load for inference": (loads_to_infer, "loaded"),
    "dead features": (finds_dead, "nothing"),
    "loss with SAE": (measures_loss, "model_and_spectrum"),
}
OF_SAESUB_WARNINGS = "SAELens' dense step|torch's autograd"


def cell(check: Callable[[str, Any], str | None], name: str, given: Any) -> str:
    """A mark, or why not: the first clause of what was raised or warned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", OF_SAESUB_WARNINGS, UserWarning)
        if check is not steps_sparsely:  # in whose column a dense step is to show
            warnings.filterwarnings("ignore", "SAELens' dense step")
        try:
            said = check(name, given)
        except (saesub.SaesubError, NotImplementedError, UserWarning) as error:
            said = str(error).partition(": ")[0]
    return PASSES if said is None else " ".join(said.split()).replace("|", "\\|").rstrip(".")


RECORDING = os.environ.get("SAESUB_ARCHITECTURES")
FOUND: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def _record(request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if RECORDING and request.session.testsfailed == failed:
        text = json.dumps(FOUND, indent=1, ensure_ascii=False)
        Path(RECORDING).write_text(text + "\n", encoding="utf-8")


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "column",
    [pytest.param(c, marks=[pytest.mark.model] * (c == "loss with SAE")) for c in COLUMNS],
)
@pytest.mark.parametrize("name", architectures())
def test_the_page_says_what_is_found(
    name: str, column: str, request: pytest.FixtureRequest
) -> None:
    check, fixture = COLUMNS[column]
    found = cell(check, name, request.getfixturevalue(fixture))
    FOUND.setdefault(name, {})[column] = found
    if not RECORDING:
        assert recorded().get(name, {}).get(column) == found, __doc__


@pytest.mark.skipif(bool(RECORDING), reason="the record is being written")
def test_the_page_has_a_row_for_every_architecture_and_no_other() -> None:
    assert [*recorded()] == [*architectures()], __doc__
    assert {tuple(row) for row in recorded().values()} == {tuple(COLUMNS)}


def test_a_matching_pursuit_without_a_bias_is_not_centred() -> None:
    """SAELens adds its decoder bias only where it subtracts it: one would be set in vain."""
    x, _ = data(1000, 1)
    spectrum = saesub.Spectrum.from_activations(x)
    sae = make("matching_pursuit", apply_b_dec_to_input=False)
    before = copy.deepcopy(sae.state_dict())
    for call in (
        lambda: saesub.initialize_in_subspace(sae, spectrum),
        lambda: saesub.center_biases(sae, spectrum),
        lambda: center_at(sae, spectrum.mean),
    ):
        with pytest.raises(saesub.SaesubError, match="adds its decoder bias nowhere"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


def test_an_architecture_that_saelens_adds_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, "of_tomorrow", architectures()["standard"])
    assert "of_tomorrow" in architectures()
