"""Models outside language: they compute what their own releases compute, on data that is what it
says, and the study measures the sites that it names."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.extras import samples
from saesub.extras.encoders import load_encoder
from saesub.extras.fracast import CONTEXT, phases
from saesub.extras.onnx_weights import onnx_weights
from saesub.extras.torch_modules import block_sites, text_batches

STUDIES = Path(__file__).parents[1] / "notebooks" / "studies"
RECORD = Path(__file__).parents[1] / "data" / "results" / "studies" / "elsewhere.json"


@pytest.fixture(scope="module")
def vision():
    return load_encoder("dinov2-small-saliency", device="cpu")


@pytest.fixture(scope="module")
def protein():
    return load_encoder("antiberty", device="cpu")


@pytest.fixture(scope="module")
def fracast():
    return load_encoder("fracast-0", device="cpu")[0]


@pytest.fixture(scope="module")
def pictures():
    return samples.load_pictures()


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import elsewhere

    return elsewhere


def captured(model: nn.Module, sites: dict, inputs: dict) -> dict:
    """The tensors at the sites, by hooks of the test's own."""
    found: dict = {}

    def keep(name, value):
        found[name] = value[0] if isinstance(value, tuple) else value

    handles = []
    for name, site in sites.items():
        module = model.get_submodule(site.module)
        if site.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, x, n=name: keep(n, x)))
        else:
            handles.append(module.register_forward_hook(lambda _, __, y, n=name: keep(n, y)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


# --- each model computes what its release does ----------------------------------------------------

# By onnxruntime 1.32 from the released file, on the same pixels: at rows and columns below.
SALIENCY = {
    "astronaut": (0.104130, 0.990553, 0.720963, 0.469650, 0.407718),
    "flower": (0.287034, 0.957819, 0.988877, 0.953156, 0.262732),
}
ROWS, COLUMNS = (20, 60, 112, 150, 200), (20, 100, 112, 60, 200)


@pytest.mark.parametrize("name", SALIENCY)
def test_saliency_is_that_of_the_released_model(name, vision, pictures):
    model, decoder = vision
    ((inputs, keep),) = samples.picture_batches([pictures[name]])
    with torch.no_grad():
        (found,) = decoder(model(**inputs).last_hidden_state)
    assert found.shape == (224, 224)
    torch.testing.assert_close(
        found[ROWS, COLUMNS], torch.tensor(SALIENCY[name]), atol=2e-4, rtol=0
    )
    assert keep.sum() == 256
    assert not keep[0, 0]  # the class token


def test_what_matters_in_a_picture_is_its_flower(vision, pictures):
    model, decoder = vision
    ((inputs, _),) = samples.picture_batches([pictures["flower"]])
    with torch.no_grad():
        (found,) = decoder(model(**inputs).last_hidden_state)
    assert found[90:130, 90:130].mean() > 0.9
    assert found[:20].mean() < 0.5


def test_masked_amino_acids_are_found_again(protein):
    """Chance is 16 %, the share of the commonest; wrongly named weights come no higher."""
    model, tokenizer = protein
    ((inputs, keep),) = text_batches(
        tokenizer, samples.load_antibodies().select(range(16)), context_size=160
    )
    ids, generator = inputs["input_ids"], torch.Generator().manual_seed(0)
    hidden = keep & (torch.rand(ids.shape, generator=generator) < 0.15)
    given = ids.masked_fill(hidden, tokenizer.mask_token_id)
    with torch.no_grad():
        logits = model(given, attention_mask=inputs["attention_mask"]).logits
    assert hidden.sum() > 200
    assert (logits.argmax(-1) == ids)[hidden].double().mean() > 0.5


# By the released package (fracast 0.1.0, float32) on the same windows: the last state of each
# series' first window, its first four coordinates.
STATES = {
    "sea": (0.525895, 0.152566, -0.085834, 0.276994),
    "glucose": (0.135598, 0.300221, -0.273036, 0.626016),
    "co2": (-0.021378, 0.110851, -0.172321, 0.835398),
    "sunspots": (-0.348355, -0.106527, 0.077190, 0.401245),
}


def test_series_are_encoded_as_by_the_released_model(fracast):
    for name, values in samples.load_series().items():
        ((inputs, keep),) = samples.series_batches({name: values})
        with torch.no_grad():
            found = fracast(inputs["values"][:1], inputs["observed"][:1])
        assert found.shape == (1, CONTEXT, 64)
        expected = torch.tensor(STATES[name])
        torch.testing.assert_close(found[0, -1, :4], expected, atol=1e-4, rtol=0)
        assert int(keep.sum()) == np.isfinite(values).sum()


def test_a_period_is_found_and_noise_has_none():
    position = torch.arange(CONTEXT)
    wave = (2 * torch.pi * position / 64).sin()[None]
    noise = torch.rand(1, CONTEXT, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, CONTEXT, dtype=torch.bool)
    found = phases(wave, everything)[0]
    torch.testing.assert_close(found[:, 0], wave[0], atol=1e-4, rtol=0)
    assert not found[:, 2:].any()
    assert not phases(noise, everything).any()


# --- the sites add up -----------------------------------------------------------------------------


def test_vision_blocks_add_up_after_their_scales(study, vision, pictures):
    model = vision[0]
    ((inputs, _),) = samples.picture_batches([pictures["coffee"]])
    stack = study.Stack("dinov2-small-saliency")
    got = captured(model, study.sites_of(stack, model), inputs)
    total = got[4, "resid_post"] + got[5, "attn_scaled"] + got[5, "mlp_scaled"]
    torch.testing.assert_close(total, got[5, "resid_post"])
    block = model.encoder.layer[5]
    torch.testing.assert_close(block.attention.o_proj(got[5, "z"]), got[5, "attn_out"])
    torch.testing.assert_close(block.layer_scale1(got[5, "attn_out"]), got[5, "attn_scaled"])
    assert not torch.allclose(got[5, "attn_out"], got[5, "attn_scaled"])


def test_the_time_series_models_stages_add_up(fracast):
    ((inputs, _),) = samples.series_batches({"co2": samples.load_series()["co2"]})
    got = captured(fracast, block_sites(fracast), inputs)
    stage = fracast.stages[3]
    middle = stage.norm1(scaled(stage, got[2, "resid_post"]) + got[3, "attn_out"])
    torch.testing.assert_close(stage.norm2(middle + got[3, "mlp_out"]), got[3, "resid_post"])
    torch.testing.assert_close(stage.pw(got[3, "z"]), got[3, "attn_out"])


def scaled(stage, x):
    """The stage's input after the scale and shift of dilation 8."""
    angle = torch.tensor([3.0, 1.5, 0.75, 0.375]) * torch.pi
    scale, shift = stage.to_gb(torch.cat([angle.sin(), angle.cos()])).chunk(2)
    return x * (1 + scale) + shift


def test_a_stage_sees_only_the_past(fracast):
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 40] += 1
    with torch.no_grad():
        apart = (fracast.stages[2](x) != fracast.stages[2](changed)).any(-1)[0]
    assert apart.nonzero().flatten().tolist() == [40, 44, 48]  # three taps, four apart


# --- the data -------------------------------------------------------------------------------------


def test_pictures_and_their_views(pictures):
    assert len(pictures) == 16
    assert pictures["astronaut"].shape == (512, 512, 3)
    some = [pictures["coffee"], pictures["camera"]]
    batches, again, other = (list(samples.picture_batches(some, 3, seed=s)) for s in (0, 0, 1))
    for (inputs, keep), (same, _), (others, _) in zip(batches, again, other, strict=True):
        x = inputs["pixel_values"]
        assert x.shape == (3, 3, 224, 224)
        assert keep.shape == (3, 257)
        assert torch.equal(x, same["pixel_values"])
        assert torch.equal(x[0], others["pixel_values"][0])  # the middle
        assert not torch.equal(x[1], others["pixel_values"][1])
    grey = batches[1][0]["pixel_values"][0]
    middle = pictures["camera"][244:268, 244:268, 0].mean() / 255
    assert grey[0, 107:117, 107:117].mean() * 0.229 + 0.485 == pytest.approx(middle, abs=0.02)


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8)]
)
def test_what_is_no_picture_in_rgb_is_refused(wrong):
    with pytest.raises(SaesubError, match="not in RGB with a byte for each colour: convert it"):
        list(samples.picture_batches([wrong]))


def test_antibodies_are_translated():
    """10E8's heavy chain, as published (Huang et al. 2012), begins so."""
    data = samples.load_antibodies()
    first = data[0]["text"].replace(" ", "")
    assert first.startswith("EVQLVESGGGLVKPGGSLRLSCSASGFDFDNAWMTWVRQPPGKGLEWVGRI")
    assert first.endswith("WGRGTLVTVSS")
    assert len(set(data["text"])) == len(data) == 969
    assert set("".join(data["text"])) == set(" ACDEFGHIKLMNPQRSTVWY")
    assert set(data["source"]) == {"hiv_heavy.fasta", "hiv_light.fasta", "reads_heavy.fasta"}


def test_windows_of_series_end_with_the_latest_value():
    values = np.concatenate([np.arange(3000.0), [np.nan, 1500.0]])
    ((inputs, keep),) = samples.series_batches({"s": values})
    assert keep.shape == (2, CONTEXT)
    assert int(keep.sum()) == 3001
    assert keep[0, -954:].all()
    assert not keep[0, :-954].any()
    assert inputs["values"][0, -954:].tolist() == pytest.approx(np.linspace(0, 1, 954).tolist())
    assert inputs["values"][1, -1] == pytest.approx((1500 - 954) / (2999 - 954))
    assert inputs["values"][1, -2] == 0
    assert not keep[1, -2]
    with pytest.raises(SaesubError, match="series 'flat' is constant: leave it out"):
        list(samples.series_batches({"flat": np.ones(5)}))
    with pytest.raises(SaesubError, match="series 'missing' is constant"):
        list(samples.series_batches({"missing": np.full(5, np.nan)}))


# --- ONNX files -----------------------------------------------------------------------------------


def message(*fields: tuple[int, bytes | int]) -> bytes:
    """A protocol buffer of fields under 16,384 bytes and numbers under 128."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            size = [len(value) & 127 | 128, len(value) >> 7]
            parts.append(bytes([number << 3 | 2, *size]) + value)
    return b"".join(parts)


def tensor(name: bytes, shape: tuple[int, ...], values: list[float], kind: int = 1) -> bytes:
    data = struct.pack(f"<{len(values)}f", *values)
    return message(*((1, size) for size in shape), (2, kind), (8, name), (9, data))


def onnx(path: Path, *tensors: bytes, nodes: tuple[bytes, ...] = ()) -> Path:
    graph = message(*((1, node) for node in nodes), *((5, t) for t in tensors))
    path.write_bytes(message((1, 8), (7, graph)))
    return path


def test_onnx_weights_have_the_torch_models_names(tmp_path):
    nodes = (
        message((1, b"x"), (1, b"onnx::MatMul_7"), (2, b"y"), (3, b"/block/fc/MatMul")),
        message((1, b"onnx::Concat_8"), (2, b"w"), (3, b"/block/Concat_1")),
    )
    path = onnx(
        tmp_path / "m.onnx",
        tensor(b"fc.bias", (2,), [1.0, -2.5]),
        tensor(b"onnx::MatMul_7", (2, 3), [1, 2, 3, 4, 5, 6]),
        tensor(b"onnx::Concat_8", (1,), [9]),
        tensor(b"shape", (1,), [0], kind=7),  # whole numbers
        nodes=nodes,
    )
    found = onnx_weights(path)
    assert {name: value.tolist() for name, value in found.items()} == {
        "fc.bias": [1.0, -2.5],
        "block.fc.weight": [[1, 4], [2, 5], [3, 6]],
        "block.Concat_1": [9],
    }


def test_other_files_than_onnx_are_refused(tmp_path):
    whole = onnx(tmp_path / "m.onnx", tensor(b"w", (2,), [1, 2])).read_bytes()
    for data in (b"", b"not a model", whole[:-3], whole[:4]):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(
            SaesubError, match=r"no ONNX model, or damaged .*: delete it and fetch it again"
        ):
            onnx_weights(tmp_path / "m.onnx")
    onnx(tmp_path / "m.onnx", tensor(b"w", (2,), [1, 2], kind=3))
    with pytest.raises(SaesubError, match="no float32 weights: give an export without"):
        onnx_weights(tmp_path / "m.onnx")


# --- the study ------------------------------------------------------------------------------------


def test_controls_change_the_projection_alone(study):
    """An orthogonal matrix keeps z's rank; one of rank 3 leaves three directions at most."""
    generator = torch.Generator().manual_seed(0)
    z = Spectrum.from_activations(
        torch.randn(400, 32, generator=generator) * 0.95 ** torch.arange(32)
    )
    rank = z.rank_at(0.99) / 32
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    found = study.controls(turn, z)
    assert found["projected"] == found["turned"] == rank
    assert found["gaussian"] < rank
    low = study.controls(turn[:, :3] @ turn[:3], z)
    assert low["projected"] <= 3 / 32
    assert low["turned"] <= 3 / 32
    assert low["gaussian"] == found["gaussian"]


def test_untrained_models_have_other_weights_of_the_same_shape(study, fracast, vision):
    for model in (fracast, vision[0]):
        fresh, again = study.untrained(model, 0), study.untrained(model, 0)
        assert not any(module.training for module in fresh.modules())
        for (name, ours), theirs in zip(fresh.named_parameters(), model.parameters(), strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, again.get_parameter(name))
        name = [n for n, p in fresh.named_parameters() if p.ndim == 2][-1]
        assert not torch.equal(fresh.get_parameter(name), model.get_parameter(name))


def test_a_row_of_the_study(study):
    """The time-series model's, which takes seconds: the record has what the code measures."""
    row = study.outcome(study.Stack("fracast-0"))
    kept = [r for r in json.loads(RECORD.read_text())["rows"] if r["model"] == "fracast-0"]
    (recorded,) = (r for r in kept if r["seed"] is None)
    assert len(row["sites"]) == len(recorded["sites"]) == 40
    for ours, theirs in zip(row["sites"], recorded["sites"], strict=True):
        assert (ours["layer"], ours["kind"], ours["n"]) == tuple(
            theirs[k] for k in ("layer", "kind", "n")
        )
        assert ours["rank"] == pytest.approx(theirs["rank"], abs=1 / 64)


def test_the_record_is_whole(study):
    record = json.loads(RECORD.read_text())
    rows = record["rows"]
    assert {row["run"] for row in rows} <= set(range(len(record["runs"])))
    wanted = {(s.model, s.part, seed) for s in study.STACKS for seed in (None, 0)}
    assert {(r["model"], r["part"], r["seed"]) for r in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        for site in row["sites"]:
            assert 0 < site["rank"] <= 1
            assert site["n"] > 6 * site["d"]  # Whisper's speech is the least there is
            if site["massive"] == 0:
                assert site["with_massive"] == site["rank"]
            if site["kind"] == "attn_out" and site["massive"] == 0:
                assert site["projected"] == pytest.approx(site["rank"], abs=0.02)
