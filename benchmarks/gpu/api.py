"""Whether the package's public functions run with an SAE on the card, whatever lies on the CPU.

    python benchmarks/gpu/api.py

Each is called on a small problem; a failure is kept in `$OUT/api.json`, and the next is tried.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import sae_lens
import speed
import stage
import torch
from sae_lens.config import SAETrainerConfig

import saesub
from saesub.init.directions import Directions

D, D_SAE, K, N, STEPS = speed.D_IN, 1024, 32, 8192, 10
_AUTOENCODERS = ("TopK", "BatchTopK", "JumpReLU", "Standard", "Gated", "MatryoshkaBatchTopK")
_TRANSCODERS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder")
_SPARSE = {"k": K}
_MATRYOSHKA = {"matryoshka_widths": [D_SAE // 2, D_SAE]}


class Api:
    """SAEs on the card, activations there and on the CPU, and their spectrum."""

    def __init__(self, device: str) -> None:
        self.device = device
        x, _ = speed.rows(N, device)
        self.x = {"card": x, "CPU": x.cpu()}
        self.spectrum = saesub.Spectrum.from_activations(x)

    def sae(self, kind: str = "TopK") -> Any:
        """An untrained SAE or transcoder of SAELens on the card."""
        more: dict[str, Any] = _SPARSE if "TopK" in kind else {}
        more = more | (_MATRYOSHKA if kind.startswith("Matryoshka") else {})
        name = kind if kind in _TRANSCODERS else f"{kind}TrainingSAE"
        if kind in _TRANSCODERS:
            more = more | {"d_out": D, "apply_b_dec_to_input": False}
        cfg = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=D_SAE, device=self.device, **more)
        return getattr(sae_lens, name)(cfg).to(self.device)

    def trainer(self, sae: Any, **given: Any) -> saesub.SubspaceSAETrainer:
        """One that takes a few steps of batches on the card."""
        batch = N // STEPS
        cfg = SAETrainerConfig(
            total_training_samples=STEPS * batch,
            train_batch_size_samples=batch,
            lr=1e-3,
            lr_end=1e-3,
            n_batches_for_norm_estimate=1,
            device=self.device,
        )
        x = self.x["card"][: STEPS * batch]
        stream = iter([*x[:batch].split(batch), *x.split(batch)])  # the first tells the scale
        return saesub.SubspaceSAETrainer(cfg, sae, stream, dead_window_tokens=2 * batch, **given)

    def start(self, directions: str, where: str | None, kind: str = "TopK") -> None:
        given = {} if where is None else {"activations": self.x[where]}
        saesub.initialize_in_subspace(
            self.sae(kind),
            self.spectrum,
            directions=directions,
            **given,  # pyright: ignore
        )

    def transcoder(self, kind: str, where: str) -> None:
        x = self.x[where]
        given = {"activations": x, "input_activations": x.flip(1)}
        spectrum = saesub.Spectrum.from_activations(x.flip(1))
        saesub.initialize_in_subspace(
            self.sae(kind), self.spectrum, input_spectrum=spectrum, **given
        )

    def trained(self, kind: str, **given: Any) -> None:
        sae = self.sae(kind)
        saesub.initialize_in_subspace(sae, self.spectrum, activations=self.x["card"])
        self.trainer(sae, **given).fit()

    def recipe(self) -> None:
        """From `recommend` to a diagnosis, then through a file."""
        sae = self.sae()
        cfg = self.trainer(sae).cfg
        saesub.recommend(self.spectrum, sae.cfg, 40_000).apply(sae, cfg, self.x["card"])
        trainer = self.trainer(sae)
        trainer.fit()
        saesub.refit_decoder(sae, self.x["CPU"].split(1000), progress=False)
        for x in self.x.values():
            saesub.judge(sae, x, n_tokens=N, progress=False)
            saesub.reconstruction(sae, x, progress=False)
            str(saesub.diagnose(sae, x, progress=False))
        with tempfile.TemporaryDirectory() as folder:
            sae.save_model(folder)
            read = sae_lens.SAE.load_from_disk(folder, device=self.device)
        torch.testing.assert_close(read.W_dec.cpu(), sae.W_dec.detach().cpu())

    def resumed(self, **given: Any) -> None:
        """Two trainers, the second from the first's checkpoint, end at the same weights."""
        sae = self.sae()
        whole, first = self.trainer(sae, **given), self.trainer(copy.deepcopy(sae), **given)
        whole.fit()
        for _ in range(STEPS // 2):
            first.step(next(first.data_provider))
            first.n_training_steps += 1
        second = self.trainer(copy.deepcopy(sae), **given)
        with tempfile.TemporaryDirectory() as folder:
            first.sae.save_model(folder)
            first.save_trainer_state(stage.Path(folder))
            second.load_trainer_state(folder)
        for _ in range(STEPS // 2):
            next(second.data_provider)
        second.fit()
        torch.testing.assert_close(whole.sae.W_dec, second.sae.W_dec, rtol=1e-3, atol=1e-4)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """All that is tried, by name."""
        made: dict[str, Callable[[], Any]] = {}
        for directions in get_args(Directions):
            for where in ("card", "CPU"):
                made[f"{directions} start, {where}"] = partial(self.start, directions, where)
        made["flat start, spectrum alone"] = partial(self.start, "flat", None)
        for kind in _TRANSCODERS:
            made[f"{kind} start"] = partial(self.transcoder, kind, "card")
        made["transcoder start, CPU"] = partial(self.transcoder, "Transcoder", "CPU")
        for kind in _AUTOENCODERS:
            for optimizer in speed.OPTIMIZERS:
                name = f"{kind} trained by {optimizer}"
                made[name] = partial(self.trained, kind, optimizer=optimizer)
        for mitigation in (
            saesub.Resampling(at_tokens=(N // 2,), n_batches=2),
            saesub.GhostGradients(),
        ):
            name = f"TopK trained with {type(mitigation).__name__}"
            made[name] = partial(self.trained, "TopK", mitigations=[mitigation])
        made["recipe"] = self.recipe
        for optimizer in speed.OPTIMIZERS:
            made[f"resumed, {optimizer}"] = partial(self.resumed, optimizer=optimizer)
        return made


def main() -> None:
    stage.part(__doc__, ["all"], default="all")
    device, results = stage.device(), stage.Results("api")
    calls = list(Api(device).calls().items())
    for name, call in calls[:: 4 if stage.REHEARSAL else 1]:
        results.attempt(name, call)
    raise SystemExit(results.status)


if __name__ == "__main__":
    main()
