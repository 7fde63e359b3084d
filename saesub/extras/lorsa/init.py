"""Active Subspace Initialization for Lorsa: draws the heads inside the active subspace."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_model, check_site
from saesub.extras.lorsa.model import Lorsa, dense_lorsa
from saesub.init.subspace import choose_d_init
from saesub.loading.models import Model, load_model, model_name


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
    """Draw the rank-one heads anew inside the active subspace, in place; returns its dimension for
    each query-key circuit.

    Every w_o is a random unit vector in the subspace, and w_v = W_V W_O w_o with the weights of the
    model's head h whose circuit it shares. Then z is the part of that head's own output along w_o,
    like the pre-activation of a tied autoencoder (the authors' library ties in the same way).

    Args:
        lorsa: from `Lorsa.from_attention` on this model.
        z_spectrum: of the layer's `hook_z`, heads concatenated, (n_query_heads * d_head,). What the
            heads write is linear in z, so this gives the spectrum of every head's output, and of
            their sum.
        d_init: as for `choose_d_init`, of the space that the directions are taken from.
        per_head: whether the directions are the principal ones of z_h W_O, head h's own output (at
            most d_head of them), or those of the whole attention output, the same for all heads.
            With False and `d_init=d_model`, w_o is isotropic and w_v still tied: a baseline that
            differs in the subspace alone.
        seed: of the random directions.

    Raises:
        SaesubError: a Lorsa of another shape than the model's, a spectrum of another hook point or
            width, or `d_init` is out of range.

    Warns of a Lorsa or a spectrum of a model of another name.
    """
    bridge = load_model(model)
    own = dense_lorsa(bridge, lorsa.cfg.layer)
    hook_z = f"blocks.{own.cfg.layer}.attn.hook_z"
    check_site("z_spectrum", z_spectrum.metadata.get("hook_name"), hook_z, bridge)
    check_model("z_spectrum", z_spectrum.metadata.get("model"), model_name(bridge))
    check_model("this Lorsa", lorsa.cfg.model, model_name(bridge))
    n_query, repeats = own.cfg.n_qk, lorsa.cfg.n_qk // own.cfg.n_qk
    if lorsa.cfg.d_model != own.cfg.d_model or lorsa.cfg.n_qk != repeats * n_query:
        raise SaesubError(
            f"this Lorsa has {lorsa.cfg.n_qk} circuits and width {lorsa.cfg.d_model}, but the "
            f"model has {n_query} heads and width {own.cfg.d_model}: make it by from_attention."
        )
    if z_spectrum.d != own.cfg.n_heads:
        raise SaesubError(
            f"z_spectrum is {z_spectrum.d} wide but the heads of layer {own.cfg.layer} are "
            f"{own.cfg.n_heads} together: measure it at {hook_z}."
        )
    generator = torch.Generator().manual_seed(seed)
    W_V, W_O = (w.unflatten(0, (n_query, -1)).cpu() for w in (own.W_V, own.W_O))
    z_of_head = torch.arange(z_spectrum.d).view(n_query, -1)
    if per_head:
        bases = [
            _output_basis(z_spectrum, z, w, d_init) for z, w in zip(z_of_head, W_O, strict=True)
        ]
    else:
        bases = [_output_basis(z_spectrum, z_of_head.flatten(), W_O.flatten(0, 1), d_init)]
        bases *= n_query
    size = lorsa.cfg.n_heads // lorsa.cfg.n_qk
    for circuit in range(lorsa.cfg.n_qk):
        head, heads = circuit // repeats, slice(circuit * size, (circuit + 1) * size)
        shape = size, bases[head].shape[1]
        w_o = F.normalize(torch.randn(shape, generator=generator), dim=-1) @ bases[head].T
        lorsa.W_O[heads] = w_o.to(lorsa.W_O)
        lorsa.W_V[heads] = (w_o @ W_O[head].T @ W_V[head]).to(lorsa.W_V)
    return tuple(basis.shape[1] for basis in bases for _ in range(repeats))


def _output_basis(
    z: Spectrum, columns: Int[Tensor, " n"], W_O: Float[Tensor, "n d"], d_init: int | float | str
) -> Float[Tensor, "d r"]:
    """The top `d_init` principal directions of z[columns] @ W_O, from the statistics of z."""
    # In an orthonormal basis of W_O's row space, so that d_init counts within that space.
    Q, R = torch.linalg.qr(W_O.double().T)
    covariance = R @ z.covariance[columns][:, columns] @ R.T
    # The mean norm does not follow from moments, and is not used here.
    output = Spectrum(z.n_tokens, R @ z.mean[columns], covariance, mean_norm=float("nan"))
    return Q.float() @ output.basis(choose_d_init(output, d_init))
