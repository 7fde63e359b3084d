"""Totals of spectra in the cache, which grow when more tokens are asked for.

`<hook>-<n>.safetensors` holds the totals of the first n tokens, and the rows that follow in the
same context, so that a longer pass begins at the next one. No such file is ever changed. What a
pass keeps on its way is `<hook>-<n>.part.safetensors`, and an interrupted one continues from there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from saesub.activations.cache import cached_folder
from saesub.activations.forward_pass import ModelPass
from saesub.activations.growth import grow
from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.activations.store_file import ReadSoFar, lock_of
from saesub.errors import SaesubError
from saesub.files import Form, read_checksummed, write_checksummed
from saesub.paths import cache_errors

_FORM = Form(
    format="saesub-cached-spectrum-1",
    key="about",
    what="cached spectrum",
    missing="measure it",
    damaged="delete it and measure again",
)
_END, _PART = ".safetensors", ".part.safetensors"


def cached_spectra(run: ModelPass, *, keep_massive: bool) -> dict[str, Spectrum]:
    """The spectra of the first `run.n_tokens` tokens at the run's hook points. The model runs on
    those alone that the cache lacks.

    Raises SaesubError for a model with hooks, a cache that cannot be written, and what a pass
    raises.
    """
    settings = run.settings() | {"keep_massive": str(keep_massive)}
    del settings["n_tokens"]
    folder = cached_folder("spectra", settings, run.whole_text())

    def kept() -> dict[str, _Totals]:
        return {name: _Totals(folder, name, run.n_tokens, keep_massive) for name in run.points}

    found = kept()
    if any(totals.is_short for totals in found.values()):
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_of(folder):
                found = kept()  # whoever held the lock before may have measured some
                if short := {name: totals for name, totals in found.items() if totals.is_short}:
                    grow(run, short, folder)
    return {name: totals.finish(run.source) for name, totals in found.items()}


class _Totals:
    """The totals at one hook point: from the folder, the longest of at most `n_tokens` tokens."""

    def __init__(self, folder: Path, name: str, n_tokens: int, keep_massive: bool) -> None:
        self.n_rows = self.n_contexts = 0
        self._folder, self._name, self._n_tokens = folder, name, n_tokens
        self._keep_massive, self._epochs = keep_massive, 0.0
        self._total: SpectrumAccumulator | None = None
        self._n_taken = 0  # tokens in the total; the others of the `n_rows` are in `_rest`
        self._rest = torch.empty(0, 0)
        for n, path in sorted(self._kept(), reverse=True):
            if n <= n_tokens and self._load(path):
                break

    @property
    def is_short(self) -> bool:
        return self._n_taken < self._n_tokens

    def write(self, x: Tensor) -> None:
        self.n_rows += len(x)
        self._take(x)

    def missing_bytes(self, n_tokens: int) -> int:
        return 0 if self._total is None else 8 * self._total.d**2

    def keep(self, read: ReadSoFar) -> None:
        assert self._total is not None
        self.n_contexts, self._epochs = read.n_contexts, read.epochs
        end = _PART if self.is_short else _END
        path = self._folder / f"{self._name}-{self._n_taken}{end}"
        about = json.dumps([self._name, self._n_taken, self.n_contexts, self._epochs])
        write_checksummed(path, _FORM, self._total.state() | {"rest": self._rest}, about)
        for n_tokens, other in self._kept():
            if other.name.endswith(_PART) and other != path and n_tokens <= self._n_taken:
                other.unlink(missing_ok=True)

    def finish(self, source: dict[str, str]) -> Spectrum:
        assert self._total is not None
        about = {"hook_name": self._name, **source, "epochs": f"{self._epochs:.3g}"}
        return self._total.finish(about)

    def _take(self, x: Tensor) -> None:
        """Add to the total what is missing of it; the rest waits for a longer one."""
        if self._total is None:
            self._total = SpectrumAccumulator(x.shape[1], keep_massive=self._keep_massive)
        n = min(len(x), self._n_tokens - self._n_taken)
        self._total.update(x[:n])
        self._n_taken, self._rest = self._n_taken + n, x[n:]

    def _kept(self) -> list[tuple[int, Path]]:
        """The files of this hook point, and of how many tokens they are."""
        found = []
        for path in self._folder.glob(f"*{_END}"):
            number = path.name.removesuffix(_PART).removesuffix(_END)
            if (number := number.removeprefix(f"{self._name}-")).isdecimal():
                found.append((int(number), path))
        return found

    def _load(self, path: Path) -> bool:
        """Whether the file was whole; another is measured again."""
        try:
            state, about = read_checksummed(path, _FORM)
        except SaesubError:
            return False
        name, n_taken, n_contexts, epochs = json.loads(about)
        if name != self._name:  # someone renamed it
            return False
        self._n_taken, self.n_contexts, self._epochs = n_taken, n_contexts, epochs
        rest = state.pop("rest")
        self._total = SpectrumAccumulator.from_state(state)
        self.n_rows = self._n_taken + len(rest)
        self._take(rest)
        return True
