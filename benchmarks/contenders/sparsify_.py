"""EleutherAI's sparsify: its whole `Trainer.fit`, on a stand-in model that replays activations."""

from __future__ import annotations

import os

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU

from collections.abc import Iterator

import harness
import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset


class Replay(nn.Module):
    """Stands in for a language model: its one submodule puts out `now`, (1, tokens, d_in)."""

    device = torch.device("cpu")

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.now = torch.zeros(1, 1, d_in)

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.now)


class Feed(Dataset[dict[str, Tensor]]):
    """Token numbers (batch,), all zero; fetching them sets what the model replays."""

    def __init__(self, model: Replay, n_steps: int) -> None:
        self.model, self.n_steps = model, n_steps
        self.batches: Iterator[Tensor] = iter(())

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = next(self.batches)
        self.model.now = x[None]
        return {"input_ids": torch.zeros(len(x), dtype=torch.long)}


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """One round of the training loop on x (batch, d_in), `Adam` in place of its default signum."""
    model = Replay(d_in)
    feed = Feed(model, 1_000_000_000 // batch)
    config = TrainConfig(
        SparseCoderConfig(num_latents=d_sae, k=k),
        batch_size=1,
        optimizer="adam",
        hookpoints=["site"],
        init_seeds=[seed],
        log_to_wandb=False,
    )
    trainer = Trainer(config, feed, model)

    def fit(batches: Iterator[Tensor]) -> None:
        feed.batches = batches
        trainer.fit()

    return harness.stepwise(fit)


if __name__ == "__main__":
    harness.main("sparsify", make, package="eai-sparsify")
