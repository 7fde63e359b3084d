"""One TopK SAE whose features are dealt out to several ranks, none of which holds it all.

A rank has its slice of the encoder's columns, the decoder's rows and the optimizer's moments. In a
step every rank ranks its own features on all rows of the batch, and what travels is:

1. the rows of the batch, n × d_in, each from the rank that read it;
2. every rank's k best scores of each token, n × k numbers, of which all ranks pick the same k;
3. the sum over ranks of the partial reconstructions, n × d_in;
4. the gradient's norm and the encoder's share in `b_dec`'s gradient, d_in + 1 numbers.

Weights, their gradients and moments never travel. AuxK sends 2 and 3 once more for dead features,
with d_in / 2 for k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from saesub.errors import SaesubError
from saesub.topk.backend import RowBackend
from saesub.topk.step import (
    AuxK,
    clip_factor,
    entries_output,
    feature_scale,
    input_bias,
    search_of,
    update_rows,
)
from saesub.training.distributed.feature_parallel_step import (
    Entries,
    Part,
    decode_over_ranks,
    select_over_ranks,
)
from saesub.training.distributed.processes import Ranks
from saesub.training.distributed.trainer import Batches, RanksTrainer, whole_sae
from saesub.training.trainer import Backend, OptimizerName

_ROWS_PER_NORM = 1024


def _squared_norm(gradient: Tensor) -> Tensor:
    """Summed in float64 by blocks, since torch copies to float64 what it is given."""
    rows = gradient.split(_ROWS_PER_NORM)
    return (
        torch.stack([torch.linalg.vector_norm(r, dtype=torch.float64) for r in rows]).square().sum()
    )


def take_features(sae: TopKTrainingSAE, features: range) -> TopKTrainingSAE:
    """An SAE of some features of `sae`, copied; `features` is contiguous.

    With `ranks.share(d_sae)` it is what `ShardedSAETrainer` takes. Where the whole SAE has no room
    in a rank's memory, build each slice by itself: an SAE with `d_sae=len(ranks.share(d_sae))`.
    """
    part = slice(features.start, features.stop)
    made = TopKTrainingSAE(replace(sae.cfg, d_sae=len(features)))
    made.load_state_dict(
        {
            "W_enc": sae.W_enc.detach()[:, part],
            "W_dec": sae.W_dec.detach()[part],
            "b_enc": sae.b_enc.detach()[part],
            "b_dec": sae.b_dec.detach(),
        }
    )
    return made.to(sae.W_enc.device)


class ShardedSAETrainer(RanksTrainer):
    """`SubspaceSAETrainer` on several ranks, each with a slice of the features.

    The weights are those of one process with all features and rows: the k active features of a
    token are the k best of all ranks'.

    Args:
        ranks: from `saesub.training.distributed.join`.
        cfg: as `SAETrainer` takes it; `train_batch_size_samples` is that of all ranks together.
        sae: this rank's slice, of `len(ranks.share(d_sae))` features and at least k. `b_dec` is
            taken from rank 0.
        batches: called with a step's number, gives this rank's rows (n_here, d_in) of that step
            and the following; n_here may differ between ranks and steps, and be 0.
        optimizer, backend, dead_window_tokens: as `SubspaceSAETrainer` takes them.

    Attributes:
        tokens_since_fired: (features of this rank,) int64.

    Raises:
        SaesubError: the SAE is not a plain TopK SAE, the ranks were given different settings, a
            damaged state, or what `SubspaceSAETrainer` raises.
    """

    def __init__(
        self,
        ranks: Ranks,
        cfg: SAETrainerConfig,
        sae: TopKTrainingSAE,
        batches: Batches,
        *,
        optimizer: OptimizerName = "sparse_adam",
        backend: Backend = "auto",
        dead_window_tokens: int | None = None,
    ) -> None:
        super().__init__(
            ranks,
            cfg,
            sae,
            batches,
            optimizer=optimizer,
            backend="torch" if backend == "dense" else backend,
            dead_window_tokens=dead_window_tokens,
        )

    def _share_start(self) -> None:
        sizes = self.ranks.objects(self.sae.cfg.d_sae)
        self.n_features = sum(sizes)
        if sizes[self.ranks.rank] != len(self.ranks.share(self.n_features)):
            raise SaesubError(
                f"The ranks hold {sizes} features, not the parts that ranks.share gives out: make "
                "each slice of len(ranks.share(d_sae)) features."
            )
        self.ranks.broadcast_(self.sae.b_dec.data)

    def _as_part(self, rows: Tensor) -> Tensor:
        mesh = init_device_mesh(rows.device.type, (self.ranks.world,))
        shape = torch.Size([self.n_features, *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=stride)

    def _total(self, here: float) -> float:
        return float(self.ranks.sum_(torch.tensor(here, dtype=torch.float64)))

    def gather(self) -> TopKTrainingSAE | None:
        """The whole SAE on the CPU of rank 0, to be saved as any SAELens SAE; None elsewhere."""
        rows = [self.ranks.rows_at_first(t) for t in (self.sae.W_enc.T, self.sae.W_dec)]
        bias = self.ranks.rows_at_first(self.sae.b_enc)
        if bias is None:
            return None
        W_enc, W_dec = rows
        b_dec = self.sae.b_dec.detach().cpu()
        return whole_sae(
            self.sae,
            {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": bias, "b_dec": b_dec},  # pyright: ignore
        )

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on all ranks' rows; this rank's are `batch` (n_here, d_in); collective."""
        self._check_batch(batch)
        rows = self.ranks.gather_rows(batch.to(self.sae.device, self.sae.dtype))
        self._require_rows(len(rows))
        return super().step(rows)

    @torch.no_grad()
    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        rows = self.step_choice.row_backend(sae)
        search = search_of(rows, self.backend == "exact_search")
        x = sae_in.to(sae.dtype).contiguous()
        b_in, scale = input_bias(sae), feature_scale(sae)
        centred = x if b_in is None else x - b_in
        chosen = select_over_ranks(self.ranks, sae, centred, scale, sae.cfg.k, search=search)
        parts = [decode_over_ranks(self.ranks, sae, chosen, x, 1 / len(x))]
        dead = self.dead_neurons
        aux = self._aux(sae, dead)
        if aux is not None:
            chosen = select_over_ranks(
                self.ranks, sae, centred, scale, aux.k, among=dead, search=search
            )
            residual, weight = x - parts[0].x_hat, aux.weight / len(x)
            parts.append(
                decode_over_ranks(self.ranks, sae, chosen, residual, weight, auxiliary=True)
            )
        self._descend(sae, parts, centred, rows)
        self.lr_scheduler.step()
        main, losses = parts[0], [part.loss for part in parts] + [x.new_zeros(())]
        self._count_firing(main.selected.times_fired(), len(x))
        return entries_output(sae, x, main.x_hat, main.selected, scale, *losses[:2]).output

    def _aux(self, sae: Any, dead: Bool[Tensor, " d_here"]) -> AuxK | None:
        """What AuxK asks for, by the dead features of all ranks."""
        if not sae.cfg.aux_loss_coefficient:
            return None
        n_dead = int(self._total(float(dead.sum())))
        return AuxK.of(sae, n_dead) if n_dead else None

    def _descend(
        self,
        sae: Any,
        parts: list[Part],
        centred: Float[Tensor, "n d_in"],
        rows: RowBackend | None,
    ) -> None:
        """One step of the optimizer along the gradients of all parts, clipped over all ranks."""
        entries, g_b_dec = Entries.of(parts, centred), parts[0].g_out.sum(0)
        gradients = None if rows is None else entries.row_gradients(rows)
        if gradients is None:
            entries.set_gradients(sae)
            own = (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad)
            squared_norm = torch.stack([_squared_norm(g) for g in own]).sum()
            through_encoder = sae.W_enc @ sae.b_enc.grad
        else:
            squared_norm, through_encoder = gradients.norms(sae.W_enc)
        totals = torch.cat([squared_norm.double().view(1), through_encoder.double()])
        self.ranks.sum_(totals)
        if input_bias(sae) is not None:
            g_b_dec = g_b_dec - totals[1:].to(g_b_dec.dtype)
        clip = clip_factor(totals[0] + g_b_dec.double().square().sum())
        if gradients is not None:
            update_rows(sae, self.optimizer, gradients, g_b_dec, clip)
            return
        sae.b_dec.grad = g_b_dec
        for parameter in sae.parameters():
            parameter.grad *= clip.to(g_b_dec.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()
