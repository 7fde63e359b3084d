"""Active Subspace Initialization for Lorsa: its heads start inside the active subspace."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.extras.lorsa.model import Lorsa, dense_lorsa
from saesub.init.subspace import choose_d_init
from saesub.loading.models import Model


@torch.no_grad()
def initialize_lorsa(
    lorsa: Lorsa,
    model: Model,
    z_spectrum: Spectrum,
    d_init: int | float | str = "auto",
    *,
    per_head: bool = True,
    seed: int = 0,
) -> tuple[int, ...]:
    """Re-draw the rank-one heads inside the active subspace, in place; returns its dimension for
    each query-key circuit.

    Every w_o is a random unit vector in the subspace, and w_v = W_V W_O w_o with the weights of the
    model's head h whose circuit it shares: z is then the part of that head's own output along w_o,
    as the pre-activation of a tied autoencoder is (the tie is that of the authors' library).

    Args:
        lorsa: from `Lorsa.from_attention` on this model.
        z_spectrum: of the layer's `hook_z`, heads concatenated, (n_query_heads * d_head,). What the
            heads write is linear in z, so it holds the spectrum of every head's output, and of
            their sum.
        d_init: as for `choose_d_init`, of the space it is taken in.
        per_head: the principal directions of z_h W_O, head h's own output, at most d_head of them;
            else those of the whole attention output, for all heads alike. There `d_init=d_model`
            leaves w_o isotropic and keeps the tie: a baseline that differs in the subspace alone.
        seed: of the random directions.

    Raises:
        SaesubError: the spectrum is of another width, or `d_init` is out of range.
    """
    own = dense_lorsa(model, lorsa.cfg.layer)
    if z_spectrum.d != own.cfg.n_heads:
        raise SaesubError(
            f"z_spectrum is {z_spectrum.d} wide but the heads of layer {own.cfg.layer} are "
            f"{own.cfg.n_heads} together: measure it at blocks.{own.cfg.layer}.attn.hook_z"
        )
    generator = torch.Generator().manual_seed(seed)
    W_V, W_O = (w.unflatten(0, (own.cfg.n_qk, -1)).cpu() for w in (own.W_V, own.W_O))
    z_heads = torch.arange(z_spectrum.d).view(own.cfg.n_qk, -1)
    if per_head:
        bases = [_output_basis(z_spectrum, z, w, d_init) for z, w in zip(z_heads, W_O, strict=True)]
    else:
        bases = [_output_basis(z_spectrum, z_heads.flatten(), W_O.flatten(0, 1), d_init)]
        bases *= own.cfg.n_qk
    repeats, size = lorsa.cfg.n_qk // own.cfg.n_qk, lorsa.cfg.n_heads // lorsa.cfg.n_qk
    ranks = tuple(basis.shape[1] for basis in bases for _ in range(repeats))
    for circuit, rank in enumerate(ranks):
        head, rows = circuit // repeats, slice(circuit * size, (circuit + 1) * size)
        coordinates = F.normalize(torch.randn(size, rank, generator=generator), dim=-1)
        w_o = coordinates @ bases[head].T
        lorsa.W_O[rows] = w_o.to(lorsa.W_O)
        lorsa.W_V[rows] = (w_o @ W_O[head].T @ W_V[head]).to(lorsa.W_V)
    return ranks


def _output_basis(
    z: Spectrum, columns: Int[Tensor, " n"], W_O: Float[Tensor, "n d"], d_init: int | float | str
) -> Float[Tensor, "d r"]:
    """Principal directions of z[columns] @ W_O, `d_init` of them, from the statistics of z."""
    # In an orthonormal basis of W_O's row space, so that a rank is counted within that space.
    Q, R = torch.linalg.qr(W_O.double().T)
    output = Spectrum(
        z.n_tokens,
        R @ z.mean[columns],
        R @ z.covariance[columns][:, columns] @ R.T,
        mean_norm=float("nan"),  # not to be had from moments, and not used here
    )
    return Q.float() @ output.basis(choose_d_init(output, d_init))
