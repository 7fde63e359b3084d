"""One TopK SAE whose features are dealt out to several processes, none of which holds it all.

A process has its slice of the encoder's columns, the decoder's rows and the optimizer's moments,
and scores its own features on all tokens of the batch. In a step it sends:

1. its tokens of the batch: n × d_in numbers over all processes;
2. the k best scores of each token, n × k numbers, of which all processes pick the same k;
3. its part of the reconstructions, n × d_in, to be summed;
4. the squared norm of its gradients and its encoder's part of the gradient of `b_dec`, d_in + 1.

It sends no weights, gradients of weights or moments. AuxK sends 2 and 3 once more for dead
features, with d_in / 2 for k.
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from saesub.activations.spectrum import Spectrum
from saesub.arguments import batch_of, matrix_of, whole_number
from saesub.errors import SaesubError
from saesub.init import biases, norm
from saesub.topk.ops import decode_at
from saesub.topk.step import input_bias
from saesub.training.distributed.processes import Processes
from saesub.training.distributed.sliced import SlicedDictionary, select_over_processes
from saesub.training.distributed.trainer import MultiProcessTrainer, check_suits, sae_with


def take_features(sae: TopKTrainingSAE, features: range) -> TopKTrainingSAE:
    """An SAE of some features of `sae`, copied; `features` is contiguous.

    With `processes.share(d_sae)` it is what `FeatureParallelSAETrainer` takes. Where the whole SAE
    does not fit into a process's memory, build each slice by itself, with
    `d_sae=len(processes.share(d_sae))`, and fit its norm by `fit_norm` of this module.
    """
    part = slice(features.start, features.stop)
    weights = {
        "W_enc": sae.W_enc[:, part],
        "W_dec": sae.W_dec[part],
        "b_enc": sae.b_enc[part],
        "b_dec": sae.b_dec,
    }
    return sae_with(sae, weights).to(sae.W_enc.device)


@torch.no_grad()
def fit_norm(
    processes: Processes,
    sae: TopKTrainingSAE,
    spectrum: Spectrum,
    *,
    activations: Float[Tensor, "n d_in"] | None = None,
    seed: int = 0,
) -> float:
    """`saesub.fit_norm` of the whole SAE, of which `sae` is this process's slice; collective.

    A slice by itself would get a norm that is too large: `saesub.fit_norm` and
    `saesub.initialize_in_subspace` reconstruct from its features alone. So give each slice its
    directions with `norm="keep"` and a seed of its own, and then call this.

    Args:
        sae: a TopK SAE of `len(processes.share(d_sae))` features.
        spectrum, activations, seed: as `saesub.fit_norm` takes them, equal on all processes.

    Raises:
        SaesubError: what `saesub.fit_norm` raises, an SAE that `FeatureParallelSAETrainer` does not
            train, or processes that were given different activations. The SAE is then left as it
            was.
    """
    check_suits(sae)
    biases.check_fits(sae, spectrum)
    norm.check_unhooked(sae)
    seed = whole_number(seed, "seed", 0)
    if activations is not None:
        activations = matrix_of(activations, "activations")
        norm.check_activations(sae, activations, "fit_norm")
        norm.check_same_scale(activations, spectrum)
    x = norm.sample_of(spectrum, activations, seed)
    x = x[norm.counted(spectrum, x)]
    processes.check_same("sample of activations", (len(x), float(x.sum(dtype=torch.float64))))

    def written(x: Tensor) -> Tensor:
        b_in, k = input_bias(sae), int(sae.cfg.k)
        centred = x if b_in is None else x - b_in
        chosen = select_over_processes(processes, centred, sae.W_enc, sae.b_enc, k)
        return processes.sum_(decode_at(chosen, chosen.pre.relu(), sae.W_dec))

    with biases.unchanged_on_error(sae):
        norm.set_unit_norms(sae)
        blocks = (x.to(sae.W_dec) for x in x.split(norm.TOKENS_PER_BLOCK))
        found = sqrt(norm.least_squares_factor((x - sae.b_dec, written(x)) for x in blocks))
        norm.scale_features(sae, found)
    sae.cfg.metadata.norm_fitted_to_d_sae = sum(processes.objects(sae.cfg.d_sae))
    return found


class FeatureParallelSAETrainer(MultiProcessTrainer):
    """`SubspaceSAETrainer` on several processes, each with a slice of the features.

    The weights are those of one process with all features and tokens: the k active features of a
    token are the k best of all processes'.

    Args:
        processes: from `saesub.training.distributed.join`.
        cfg: as `SAETrainer` takes it; `train_batch_size_samples` is that of all processes together.
        sae: this process's slice, of `len(processes.share(d_sae))` features and at least k. `b_dec`
            is taken from the first process.
        batches: called with a step's number, gives this process's tokens (n_here, d_in) of that
            step and the following; n_here may differ between processes and steps, and be 0.
        optimizer, backend, dead_window_tokens: as `SubspaceSAETrainer` takes them.

    Attributes:
        tokens_since_fired: (features of this process,) int64.

    Raises:
        SaesubError: the SAE is not a plain TopK SAE, its norm was fitted to this slice alone, the
            processes were given different settings, a damaged state, or what `SubspaceSAETrainer`
            raises.
    """

    def _agree(self) -> None:
        self.dictionary = SlicedDictionary(self.processes)
        fitted = self.sae.cfg.metadata.norm_fitted_to_d_sae
        slices = self.processes.objects((self.sae.cfg.d_sae, fitted))
        sizes = [size for size, _ in slices]
        self.n_features = sum(sizes)
        if sizes[self.processes.index] != len(self.processes.share(self.n_features)):
            raise SaesubError(
                f"The processes hold {sizes} features, not the parts that processes.share gives "
                "out: make each slice of len(processes.share(d_sae)) features."
            )
        for _, of in slices:
            if of not in (None, self.n_features):
                raise SaesubError(
                    f"The norm of a slice was fitted to {of} features, not to the "
                    f"{self.n_features} of all processes: initialise slices with norm='keep' and "
                    "then call saesub.training.distributed.fit_norm."
                )
        self.processes.broadcast_(self.sae.b_dec.data)

    def _as_part(self, rows: Tensor) -> Tensor:
        mesh = init_device_mesh(rows.device.type, (self.processes.count,))
        shape = torch.Size([self.n_features, *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=stride)

    def _total(self, here: float) -> float:
        return float(self.processes.sum_(torch.tensor(here, dtype=torch.float64)))

    def gather(self) -> TopKTrainingSAE | None:
        """The whole SAE, on the CPU of the first process; None elsewhere; collective."""
        sae = self.sae
        rows = (sae.W_enc.T, sae.W_dec, sae.b_enc)
        W_enc, W_dec, b_enc = (self.processes.rows_at_first(part) for part in rows)
        if W_enc is None:
            return None
        weights = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": sae.b_dec}
        return sae_with(sae, weights)

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on the tokens of all processes, of which `batch` (n_here, d_in) are this one's;
        collective."""
        batch = batch_of(batch)
        self.check_batch(batch)
        rows = self.processes.gather_rows(batch.to(self.sae.device, self.sae.dtype))
        self._require_tokens(len(rows))
        return super().step(rows)
