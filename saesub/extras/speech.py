"""Recorded speech, and the batches that measure Whisper on it: frames for its encoder, text for
its decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from saesub.arguments import whole_number
from saesub.errors import SaesubError, near_names
from saesub.extras.torch_modules import Batch
from saesub.loading.download import fetch
from saesub.loading.registry import packaged, packaged_names

RATE = 16_000
"""Samples a second that Whisper expects."""
_WINDOW = 30 * RATE
_LOUDEST = 2.0  # resampling overshoots a little
_FRAME = 320  # samples behind one position of Whisper's encoder: 20 ms


def load_recordings(name: str = "speech-en") -> list[Float[np.ndarray, " samples"]]:
    """Packaged recordings as mono float32 in [-1, 1] at 16 kHz, in the registry's order.

    Raises SaesubError for an unknown name, or if they cannot be fetched.
    """
    known = packaged_names("recordings")
    if name not in known:
        raise SaesubError(f"no recordings are packaged under {name!r}: {near_names(name, known)}")
    folder = fetch(name)
    return [_read_wav(folder / file.name) for file in packaged()[name].files]


def _read_wav(path: Path) -> Float[np.ndarray, " samples"]:
    with warnings.catch_warnings():  # of chunks that hold no samples
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        rate, samples = wavfile.read(path)
    if samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind == "u":  # of 8 bits, whose silence is 128
        samples = samples / 128.0 - 1
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    return resample_poly(samples, RATE, rate).astype(np.float32)


def speech_frames(
    samples: Float[np.ndarray, " samples"], n_frames: int = _WINDOW // _FRAME
) -> Bool[Tensor, " n_frames"]:
    """Which 20 ms frames hold sound: within 40 dB of the loud ones (95th percentile of the RMS).

    Pauses are False, and so is the silence that fills up a window of `n_frames`.

    Raises SaesubError for what is no mono recording of numbers in about [-1, 1], or one shorter
    than one frame.
    """
    samples, n_frames = _mono(samples), whole_number(n_frames, "n_frames")
    used = min(n_frames, len(samples) // _FRAME)
    if used == 0:
        raise SaesubError(
            f"a recording of {len(samples)} samples is shorter than one 20 ms frame: leave it out."
        )
    frames = samples[: used * _FRAME].astype(np.float64).reshape(used, _FRAME)
    power = (frames**2).mean(axis=1)
    loud = power > 1e-4 * np.quantile(power, 0.95)
    return torch.nn.functional.pad(torch.from_numpy(loud), (0, n_frames - used))


def _mono(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """A recording. Raises SaesubError for what is none, or not scaled to about [-1, 1], of which
    Whisper's features would be those of another sound."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
        given = (
            f"{samples.dtype} of shape {samples.shape}" if hasattr(samples, "dtype") else samples
        )
        raise SaesubError(
            f"a recording is an array (samples,) of floating-point numbers in [-1, 1], not {given}"
        )
    if not (np.abs(samples) <= _LOUDEST).all():
        raise SaesubError(
            "a recording holds NaN, or values far beyond [-1, 1]: divide samples of 16 bits by "
            "32,768"
        )
    return samples


def _require_still(model: Any) -> None:
    if any(module.training for module in model.modules()):
        raise SaesubError("the model is in training mode, with dropout: call model.eval() first.")


def speech_batches(
    processor: Any,
    recordings: Sequence[Float[np.ndarray, " samples"]],
    *,
    skip_first: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Recordings cut into equal windows of at most 30 s, one a batch: `input_features`, and the
    frames of Whisper's encoder (1, 1500) that hold sound, without the first `skip_first`.

    Raises SaesubError for what is no mono recording of numbers in about [-1, 1], or one shorter
    than one frame.
    """
    skip_first = whole_number(skip_first, "skip_first", 0)
    for samples in map(_mono, recordings):
        for window in np.array_split(samples, max(1, ceil(len(samples) / _WINDOW))):
            keep = speech_frames(window)[None]
            keep[:, :skip_first] = False
            features = processor.feature_extractor(window, sampling_rate=RATE, return_tensors="pt")
            yield {"input_features": features.input_features.to(device)}, keep


def transcribe(model: Any, inputs: Any) -> Int[Tensor, "1 n"]:
    """Whisper's own greedy English transcription of one window, as ids of text alone.

    `inputs` are those of a batch of `speech_batches`. The tokens before the text (start, language,
    task) and the one that ends it are left out.

    Raises SaesubError for a model in training mode, or a batch of several windows.
    """
    _require_still(model)
    if len(inputs["input_features"]) != 1:
        raise SaesubError(
            f"{len(inputs['input_features'])} windows cannot be transcribed at once: give one."
        )
    ids = model.generate(
        inputs["input_features"], language="en", task="transcribe", do_sample=False, num_beams=1
    )
    first_special = model.generation_config.eos_token_id
    return ids[:, ids[0] < first_special]


def decoder_batches(model: Any, speech: Iterable[Batch], text: Iterable[Batch]) -> Iterator[Batch]:
    """Teacher-forced batches for Whisper's decoder: each text batch with the next window of speech.

    The windows are encoded once and then taken in turn. Feed the batches to `model.model`, which
    leaves out the output layer.

    Raises SaesubError where there is no speech, or for a model in training mode.
    """
    windows = [inputs for inputs, _ in speech]
    if not windows:
        raise SaesubError("a decoder needs at least one window of speech to attend to.")
    _require_still(model)
    with torch.no_grad():
        heard = [model.model.encoder(**inputs).last_hidden_state for inputs in windows]
    for i, (inputs, keep) in enumerate(text):
        ids = inputs["input_ids"]
        yield (
            {
                "decoder_input_ids": ids,
                "decoder_attention_mask": inputs["attention_mask"],
                "encoder_outputs": (heard[i % len(heard)].expand(len(ids), -1, -1),),
                "use_cache": False,
            },
            keep,
        )
