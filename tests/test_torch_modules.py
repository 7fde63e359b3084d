"""Spectra outside language models: the sites are what they say, and only what counts is counted."""

from __future__ import annotations

import copy
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.io import wavfile
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MPNetConfig, MPNetModel

from saesub.activations.collect import measure_spectra
from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.extras import encoders, speech
from saesub.extras.encoders import load_encoder
from saesub.extras.speech import (
    RATE,
    decoder_batches,
    load_recordings,
    speech_batches,
    speech_frames,
    transcribe,
)
from saesub.extras.torch_modules import Site, block_sites, measure_module_spectra, text_batches
from saesub.extras.whisper_weights import whisper_state_dict
from saesub.loading.registry import Packaged, PackagedFile


@pytest.fixture(scope="module")
def minilm():
    return load_encoder("all-minilm-l6-v2", device="cpu")


@pytest.fixture(scope="module")
def whisper():
    return load_encoder("whisper-base", device="cpu")


@pytest.fixture(scope="module")
def window(whisper):
    """The first window of the packaged recordings, as one batch."""
    return list(speech_batches(whisper[1], load_recordings()[:1]))[:1]


def captured(model: nn.Module, sites: dict, inputs: dict, forward=None) -> dict:
    """The tensors at the sites, by hooks of the test's own."""
    found = {}

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
        (forward or model)(**inputs)
    for handle in handles:
        handle.remove()
    return found


# --- against saesub's own way, and against each architecture's own arithmetic ---------------------


def test_the_same_spectra_as_by_hook_point(model, corpus):
    """SmolLM2 measured by hook points and by torch hooks on the same positions."""
    block = "blocks.3"
    hooks = [f"{block}.attn.hook_z", f"{block}.attn.hook_out", f"{block}.hook_resid_post"]
    tokens = pack_contexts(model, corpus, n_contexts=3, context_size=64)
    keep = kept_positions(model, tokens, skip_first=1)
    n_tokens = int(keep.sum())
    expected = measure_spectra(
        model, corpus, hooks, n_tokens=n_tokens, context_size=64, batch_size=3, progress=False
    )
    sites = dict(
        zip(
            hooks,
            [
                Site(f"{block}.attn.o", "input"),
                Site(f"{block}.attn.o", "output"),
                Site(block, "output"),
            ],
            strict=True,
        )
    )
    found = measure_module_spectra(model, [({"input": tokens}, keep)], sites, progress=False)
    for name, spectrum in expected.items():
        assert found[name].n_tokens == n_tokens
        apart = (found[name].covariance - spectrum.covariance).norm()
        # By hook point the model runs without the bridge, which agrees to that.
        assert apart < 1e-5 * spectrum.covariance.norm()


def tiny_mpnet() -> MPNetModel:
    config = MPNetConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    return MPNetModel(config).eval()


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_post_norm_blocks_add_up(family, minilm):
    """LayerNorm(MLP output + LayerNorm(block's input + attention output)) is the block's output."""
    encoder = minilm[0] if family == "bert" else tiny_mpnet()
    inputs = {"input_ids": torch.tensor([[7, 12, 23, 9, 31]])}
    sites = block_sites(encoder)
    got = captured(encoder, sites, inputs)
    layer = encoder.encoder.layer[1]
    first, projection = (
        (layer.attention.output.LayerNorm, layer.attention.output.dense)
        if family == "bert"
        else (layer.attention.LayerNorm, layer.attention.attn.o)
    )
    middle = first(got[0, "resid_post"] + got[1, "attn_out"])
    out = layer.output.LayerNorm(got[1, "mlp_out"] + middle)
    torch.testing.assert_close(out, got[1, "resid_post"])
    torch.testing.assert_close(projection(got[1, "z"]), got[1, "attn_out"])
    states = encoder(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[1, "resid_post"], states[2])


def test_pre_norm_blocks_add_up():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    gpt2 = GPT2LMHeadModel(config).eval()
    got = captured(gpt2, block_sites(gpt2, "decoder"), {"input_ids": torch.tensor([[7, 12, 23]])})
    total = got[0, "resid_post"] + got[1, "attn_out"] + got[1, "mlp_out"]
    torch.testing.assert_close(total, got[1, "resid_post"])


def test_whispers_blocks_add_up(whisper, window, corpus):
    model, processor = whisper
    inputs = window[0][0]
    got = captured(model, block_sites(model), inputs, model.model.encoder)
    total = got[3, "resid_post"] + got[4, "attn_out"] + got[4, "mlp_out"]
    torch.testing.assert_close(total, got[4, "resid_post"])
    text = text_batches(processor.tokenizer, corpus.select(range(1)), context_size=12)
    ((inputs, keep),) = decoder_batches(model, window, text)
    assert int(keep.sum()) == 6  # of 12: four before the text, its first token, the end
    got = captured(model, block_sites(model, "decoder"), inputs, model.model)
    parts = [got[1, part] for part in ("attn_out", "cross_out", "mlp_out")]
    torch.testing.assert_close(sum(parts, got[0, "resid_post"]), got[1, "resid_post"])


# --- what counts ----------------------------------------------------------------------------------


def test_only_text_is_kept(minilm):
    """Against the documents measured one by one, without padding."""
    encoder, tokenizer = minilm
    texts = Dataset.from_dict({"text": ["A short one.", "A rather longer sentence, with a comma."]})
    sites = {"resid": block_sites(encoder)[2, "resid_post"]}
    found = measure_module_spectra(encoder, text_batches(tokenizer, texts), sites, progress=False)[
        "resid"
    ]
    rows = []
    for text in texts["text"]:
        inputs = tokenizer(text, return_tensors="pt")
        rows.append(captured(encoder, sites, inputs)["resid"][0, 2:-1])  # [CLS] first … [SEP]
    rows = torch.cat(rows)
    assert found.n_tokens == len(rows)
    torch.testing.assert_close(found.mean.float(), rows.mean(0), atol=1e-5, rtol=1e-4)


def test_text_batches_stop_at_n_tokens(minilm, corpus):
    batches = list(text_batches(minilm[1], corpus, n_tokens=500, batch_size=4))
    assert sum(int(keep.sum()) for _, keep in batches) == 500
    assert all(keep.any() for _, keep in batches)
    few = corpus.select(range(2))
    with pytest.raises(SaesubError, match="tokens fewer than n_tokens=5000"):
        list(text_batches(minilm[1], few, n_tokens=5000))


def test_pauses_and_padding_are_left_out():
    tone = np.sin(np.arange(RATE) * 0.3).astype(np.float32)
    samples = np.concatenate([tone, np.zeros(RATE, np.float32), 0.001 * tone, 0.05 * tone])
    frames = speech_frames(samples)
    assert frames.shape == (1500,)
    assert frames[:50].all()
    assert not frames[50:150].any()  # silence, then a whisper 60 dB down
    assert frames[150:200].all()  # 26 dB down
    assert not frames[200:].any()  # the padding of the window
    with pytest.raises(SaesubError, match="shorter than one 20 ms frame"):
        speech_frames(tone[:100])


def test_recordings_are_cut_into_equal_windows(whisper):
    recordings = load_recordings()
    batches = list(speech_batches(whisper[1], recordings))
    assert len(recordings) == 2
    assert len(batches) == 3
    for inputs, keep in batches:
        assert inputs["input_features"].shape == (1, 80, 3000)
        assert keep.shape == (1, 1500)
        assert 900 < keep.sum() < 1500
        assert not keep[0, 0]


def test_whisper_hears_what_is_said(whisper, window):
    """Weights renamed wrongly, or features of another kind, would give no such sentence."""
    ids = transcribe(whisper[0], window[0][0])
    heard = whisper[1].tokenizer.decode(ids[0])
    assert heard.strip().startswith("It was the best of times, it was the worst of times.")
    assert "<|" not in heard


def test_similar_sentences_lie_close(minilm):
    encoder, tokenizer = minilm
    texts = ["A man plays the guitar.", "Someone is playing an instrument.", "Shares fell today."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    means = (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    similar = nn.functional.cosine_similarity(means[0], means[1:])
    assert similar[0] > 0.4 > similar[1]


# --- mistakes -------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.twice = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.linear(self.twice(x))).sum(-1)


def measure(x=None, site=("linear", "output"), keep=None, training=False):
    x = torch.randn(2, 3, 4) if x is None else x
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    toy = Toy().train(training)
    try:
        return measure_module_spectra(toy, [({"x": x}, keep)], {"s": Site(*site)}, progress=False)
    finally:
        assert not toy.linear._forward_hooks
        assert not toy.linear._forward_pre_hooks


def test_a_toy_is_measured():
    x = torch.randn(2, 3, 4)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    spectrum = measure(x, ("linear", "input"), keep)["s"]
    assert spectrum.n_tokens == 4
    read = x[keep].relu().T.double()
    torch.testing.assert_close(spectrum.covariance, torch.cov(read, correction=0))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"site": ("liner", "output")}, "no module 'liner'.*'linear'"),
        ({"site": ("linear", "out")}, "'input' or 'output', not 'out'"),
        ({"site": ("unused", "output")}, "no activations came from"),
        ({"site": ("", "output")}, r"gives \(2, 3\), not \(batch, pos, d\)"),
        ({"keep": torch.ones(2, 2, dtype=torch.bool)}, r"\(batch, pos\) = \(2, 2\)"),
        ({"keep": torch.zeros(2, 3, dtype=torch.bool)}, "no activations were given"),
        ({"keep": torch.ones(2, 3, dtype=torch.int64)}, "must be a boolean tensor"),
        ({"site": ("twice", "output")}, "s runs several times in one pass"),
        ({"x": torch.full((2, 3, 4), torch.nan)}, "s: activations hold NaN"),
        ({"training": True}, r"call model\.eval\(\)"),
    ],
)
def test_mistakes_are_named_and_hooks_removed(mistake, message):
    with pytest.raises(SaesubError, match=message):
        measure(**mistake)


def test_unknown_families_and_names():
    with pytest.raises(SaesubError, match=r"encoder of 'Toy' are not listed.*Site\(module, side\)"):
        block_sites(Toy())
    with pytest.raises(SaesubError, match="did you mean 'whisper-base'"):
        load_encoder("whisper-bas")
    with pytest.raises(SaesubError, match=r"no recordings.*'speech-en'"):
        load_recordings("speech")
    with pytest.raises(SaesubError, match="at least one window of speech"):
        next(decoder_batches(None, [], []))


def test_a_wrong_archive_leaves_no_model_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path))
    monkeypatch.setattr(encoders, "fetch", lambda _: tmp_path)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("inside/config.json", "{}")
    entry = Packaged(
        "toy", "encoders", "", "", "", (PackagedFile("model.zip", 1, "00" * 32, ()),),
        details={"format": "archive", "inside": "inside/"},
    )  # fmt: skip
    with pytest.raises(SaesubError, match=r"archive of toy cannot be read.*model\.safetensors"):
        encoders._unpacked(entry)
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


def ctranslate2(path: Path, *, version=6, kind=b"WhisperSpec\0", number=4, cut=None) -> Path:
    """A file with one variable, a (2, 3) matrix of ones."""
    name, data = b"encoder/conv1/weight\0", np.ones((2, 3), np.float16).tobytes()
    head = struct.pack("<IH", version, len(kind)) + kind + struct.pack("<II", 3, 1)
    variable = struct.pack("<H", len(name)) + name + struct.pack("<BII", 2, 2, 3)
    variable += struct.pack("<BI", number, len(data)) + data
    path.write_bytes((head + variable)[:cut])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 5}, "in format 6, found 'WhisperSpec' in format 5"),
        ({"kind": b"TransformerSpec\0"}, "found 'TransformerSpec'"),
        ({"number": 1}, "conv1/weight is quantised"),
        ({"cut": 40}, "damaged"),
        ({"cut": -2}, "damaged"),
        ({}, "damaged"),  # whole, but with no word embeddings
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    with pytest.raises(SaesubError, match=message):
        whisper_state_dict(ctranslate2(tmp_path / "model.bin", **change))


# --- the models stay as they were -----------------------------------------------------------------


def flags(model: nn.Module) -> list[tuple]:
    """What a borrowed model must keep: modes, hooks, and which weights take gradients."""
    return [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]


def test_models_are_as_they_were_after_failures_too(minilm, corpus):
    encoder, tokenizer = minilm
    heard = []
    handle = encoder.encoder.register_forward_hook(lambda *_: heard.append(1))
    encoder.embeddings.requires_grad_(True)
    try:
        before = flags(encoder)
        sites, texts = block_sites(encoder), corpus.select(range(2))
        measure_module_spectra(encoder, text_batches(tokenizer, texts), sites, progress=False)
        assert flags(encoder) == before
        assert heard
        wrong = [({"input_ids": torch.tensor([[7, 12]])}, torch.ones(1, 3, dtype=torch.bool))]
        with pytest.raises(SaesubError, match="choose another module"):
            measure_module_spectra(encoder, wrong, sites, progress=False)
        assert flags(encoder) == before
    finally:
        handle.remove()
        encoder.embeddings.requires_grad_(False)


def test_one_module_in_training_mode_is_enough_to_refuse():
    toy = Toy().eval()
    toy.linear.train()
    batch = {"x": torch.randn(2, 3, 4)}, torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(SaesubError, match=r"call model\.eval\(\)"):
        measure_module_spectra(toy, [batch], {"s": Site("linear", "output")}, progress=False)


def test_sites_of_a_model_inside_another_and_of_a_part_of_one():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    whole = GPT2LMHeadModel(config).eval()
    assert block_sites(whole, "decoder")[1, "z"] == Site("transformer.h.1.attn.c_proj", "input")
    inner = block_sites(whole.transformer, "decoder")
    assert inner[1, "resid_post"] == Site("h.1", "output")
    part = whole.transformer.h[0]
    part.config = config
    with pytest.raises(SaesubError, match=r"decoder of 'gpt2' are not listed.*Site"):
        block_sites(part, "decoder")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_recordings_are_read_from_any_kind_of_samples(kind, tmp_path):
    sound = 0.5 * np.sin(np.arange(RATE) / 20)
    scale, silence = {"u": (128, 128), "i": (-float(np.iinfo(np.int16).min), 0)}.get(
        np.dtype(kind).kind, (1, 0)
    )
    if kind is np.int32:
        scale = 2.0**31
    wavfile.write(tmp_path / "sound.wav", RATE, (sound * scale + silence).astype(kind))
    read = speech._read_wav(tmp_path / "sound.wav")
    np.testing.assert_allclose(read, sound, atol=1 / 64 if kind is np.uint8 else 1e-4)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.ones(4000, np.int16), "floating-point numbers in"),
        (np.ones((4000, 2), np.float32), "floating-point numbers in"),
        ([0.0] * 4000, "floating-point numbers in"),
        (np.full(4000, 3000.0), "divide samples of 16 bits by"),
        (np.full(4000, np.nan), "holds NaN"),
        (np.zeros(100, np.float32), "shorter than one 20 ms frame"),
    ],
)
def test_what_is_no_recording_is_refused(samples, message):
    with pytest.raises(SaesubError, match=message):
        speech_frames(samples)
    with pytest.raises(SaesubError, match=message):
        next(speech_batches(None, [samples]))


def test_whisper_is_read_in_eval_mode_and_one_window_at_once(whisper, window):
    inputs, _ = window[0]
    twice = {"input_features": inputs["input_features"].repeat(2, 1, 1)}
    with pytest.raises(SaesubError, match="2 windows cannot be transcribed at once"):
        transcribe(whisper[0], twice)
    whisper[0].model.encoder.layers[0].train()
    try:
        with pytest.raises(SaesubError, match=r"call model\.eval\(\)"):
            transcribe(whisper[0], inputs)
        with pytest.raises(SaesubError, match=r"call model\.eval\(\)"):
            next(decoder_batches(whisper[0], window, []))
    finally:
        whisper[0].eval()


def test_the_side_of_padding_changes_no_position(minilm):
    """A decoder counts positions from the first column, so padding there would shift them."""
    tokenizer = copy.deepcopy(minilm[1])
    texts = Dataset.from_dict({"text": ["a river", "a much longer text about a river"]})
    (right, kept), tokenizer.padding_side = next(text_batches(tokenizer, texts)), "left"
    left, also_kept = next(text_batches(tokenizer, texts))
    assert torch.equal(left["input_ids"], right["input_ids"])
    assert torch.equal(kept, also_kept)


@pytest.mark.parametrize(
    "setting", [{"n_tokens": 0}, {"batch_size": 0}, {"context_size": 2.5}, {"skip_first": -1}]
)
def test_counts_of_text_are_whole_numbers(setting, minilm, corpus):
    with pytest.raises(SaesubError, match="must be a whole number"):
        next(text_batches(minilm[1], corpus, **setting))
    (_, keep) = next(text_batches(minilm[1], corpus, n_tokens=1e1))
    assert keep.sum() == 10


def test_a_tokenizer_that_cannot_pad(minilm, corpus):
    tokenizer = copy.deepcopy(minilm[1])
    tokenizer.pad_token = None
    with pytest.raises(SaesubError, match="no padding token"):
        next(text_batches(tokenizer, corpus))
