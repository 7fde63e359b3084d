"""One training pass of SAELens' TopK and BatchTopK dictionaries through their active entries.

`autograd_pass` builds the loss with `saesub.topk.ops`, for any optimizer and device; `row_step`
is the same step without autograd, by the `RowBackend` of the device, which also updates the
parameters and never holds a gradient of the weights. Both equal SAELens' dense pass, AuxK included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.optim import SparseAdam, moments
from saesub.topk import cpu, int8_search, triton_backend
from saesub.topk.backend import AdamSettings, RowBackend, RowGradients
from saesub.topk.ops import (
    Search,
    Selected,
    decode_at,
    dense_search,
    encode_at,
    select_batch_topk,
    select_topk,
)

MAX_NORM = 1.0  # SAELens' trainer clips the norm of all gradients here


@dataclass(frozen=True)
class EntriesOutput:
    """What SAELens' trainer gets from a pass, and the entries behind it."""

    output: TrainStepOutput
    selected: Selected


def autograd_pass(
    sae: TopKTrainingSAE,
    sae_in: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    search: Search = int8_search.search,
) -> EntriesOutput:
    """`training_forward_pass` of a TopK or BatchTopK SAE through its active entries.

    The output's `feature_acts` and `hidden_pre` are sparse COO tensors that hold only these.
    `dead` features, if any, add SAELens' AuxK loss. `search` finds the entries; that of a
    backend (`search_of`) wants `W_enc` feature-major in memory, and float32.
    """
    x = sae_in.to(sae.dtype).contiguous()
    b_in, scale = input_bias(sae), feature_scale(sae)
    selected = _select(sae, x, scale, search)
    pre = encode_at(selected, x, b_in, sae.W_enc, sae.b_enc)
    sae_out = decode_at(selected, pre.relu(), sae.W_dec, sae.b_dec)
    mse_loss = (sae_out - x).square().sum(-1).mean()
    aux_loss = mse_loss.new_zeros(())
    if dead is not None and bool(dead.any()):
        aux = AuxK.of(sae, int(dead.sum()))
        rows = dead.nonzero().squeeze(1)
        W_enc, b_enc = sae.W_enc.index_select(1, rows), sae.b_enc.index_select(0, rows)
        chosen = _select_aux(sae, x, aux, rows, scale, search)
        aux_pre = encode_at(chosen, x, b_in, W_enc, b_enc)
        recons = decode_at(chosen, aux_pre, sae.W_dec.index_select(0, rows))
        residual = (x - sae_out).detach()
        aux_loss = aux.weight * (recons - residual).square().sum(-1).mean()
    return entries_output(sae, x, sae_out, selected, scale, mse_loss, aux_loss)


def row_backend(device: torch.device, *, triton: bool = False) -> RowBackend | None:
    """What searches there and runs `row_step`: on the CPU that takes a C++ compiler, on CUDA
    `triton`."""
    if device.type == "cpu" and not triton and cpu.library() is not None:
        return cpu.BACKEND
    if device.type == "cuda" and triton and triton_backend.available():
        return triton_backend.BACKEND
    return None


def search_of(backend: RowBackend | None, exact: bool) -> Search:
    """How a step finds its entries: by a backend's search, or by torch operators alone."""
    if backend is None:
        return dense_search if exact else int8_search.search
    return partial(backend.search, exact=exact)


@torch.no_grad()
def row_step(
    backend: RowBackend,
    sae: TopKTrainingSAE,
    optimizer: torch.optim.Adam,
    sae_in: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    exact_search: bool = False,
) -> EntriesOutput:
    """Forward, backward, clipping and update in float32, by the loops of `backend`.

    The optimizer is torch's Adam or `SparseAdam`; its state is used and advanced in place. The
    SAE's `W_enc` must lie feature-major in memory.
    """
    search = search_of(backend, exact_search)
    x = sae_in.to(sae.dtype).contiguous()
    b_in, scale = input_bias(sae), feature_scale(sae)
    centred = x if b_in is None else x - b_in
    selected = _select(sae, x, scale, search)
    values = selected.pre.relu()
    decoded = backend.decode(selected, values, sae.W_dec, sae.b_dec, x, 1 / len(x))
    mse_loss, aux_loss = decoded.squared_error / len(x), x.new_zeros(())
    parts = [(selected.features, selected.tokens, values, decoded.g_pre)]
    inputs, outputs = [centred], [decoded.g_out]
    if dead is not None and bool(dead.any()):
        aux, rows = AuxK.of(sae, int(dead.sum())), dead.nonzero().squeeze(1)
        chosen = _select_aux(sae, x, aux, rows, scale, search)
        in_full = Selected(rows[chosen.features], chosen.offsets, chosen.pre, selected.d_sae)
        residual, weight = x - decoded.x_hat, aux.weight / len(x)
        back = backend.decode(in_full, chosen.pre, sae.W_dec, None, residual, weight)
        aux_loss = aux.weight * back.squared_error / len(x)
        # The auxiliary entries join the others as those of a second copy of the batch.
        parts.append((in_full.features, in_full.tokens + len(x), chosen.pre, back.g_pre))
        inputs, outputs = [centred, centred], [decoded.g_out, back.g_out]
    features, tokens, weights, g_pre = (_joined(part) for part in zip(*parts, strict=True))
    x_rows, g_rows = _joined(inputs), _joined(outputs)
    gradients = backend.row_gradients(
        features, tokens, weights, g_pre, x_rows, g_rows, selected.d_sae
    )
    _update(sae, optimizer, gradients, decoded.g_bias)
    return entries_output(sae, x, decoded.x_hat, selected, scale, mse_loss, aux_loss)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which would copy a single part too."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _update(
    sae: TopKTrainingSAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    g_b_dec: Float[Tensor, " d_in"],
) -> None:
    squared_norm, through_encoder = gradients.norms(sae.W_enc)
    if input_bias(sae) is not None:
        g_b_dec = g_b_dec - through_encoder
    clip = clip_factor(squared_norm + g_b_dec.double().square().sum())
    update_rows(sae, optimizer, gradients, g_b_dec, clip)


def clip_factor(squared_norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What SAELens' trainer multiplies all gradients by, given the square of their norm."""
    return (MAX_NORM / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)  # reading it would wait


def update_rows(
    sae: TopKTrainingSAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    g_b_dec: Float[Tensor, " d_in"],
    clip: Float[Tensor, ""],
) -> None:
    """One step of Adam or `SparseAdam` on all parameters, the gradients multiplied by `clip`."""
    group = optimizer.param_groups[0]
    steps, tensors = [], []
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        step, *averages = moments(optimizer, parameter)
        steps.append(step)
        tensors += [t.T if parameter is sae.W_enc else t for t in (parameter.data, *averages)]
    moved = None
    if isinstance(optimizer, SparseAdam):
        counters = [optimizer.moved(sae.W_enc, 1), optimizer.moved(sae.W_dec, 0)]
        counters.append(optimizer.moved(sae.b_enc, 0))
        moved = counters[0]
    for step in steps:
        step += 1
    beta1, beta2 = group["betas"]
    settings = AdamSettings(group["lr"], beta1, beta2, group["eps"])
    gradients.adam(settings, steps[0], clip, *tensors, moved=moved)
    if moved is not None:
        for other in counters[1:]:
            other.copy_(moved)

    sae.b_dec.grad = g_b_dec * clip
    optimizer.step()  # the only parameter with a gradient
    sae.b_dec.grad = None


@dataclass(frozen=True)
class AuxK:
    """How many dead features AuxK asks of each token, and the weight of its loss (SAELens')."""

    k: int
    weight: float

    @classmethod
    def of(cls, sae: TopKTrainingSAE, n_dead: int) -> AuxK:
        """Of an SAE with so many dead features."""
        most = sae.cfg.d_in // 2
        return cls(min(most, n_dead), sae.cfg.aux_loss_coefficient * min(n_dead / most, 1.0))


def _select(sae: TopKTrainingSAE, x: Tensor, scale: Tensor | None, search: Search) -> Selected:
    b_in = input_bias(sae)
    centred = x if b_in is None else x - b_in
    if isinstance(sae, BatchTopKTrainingSAE):
        return select_batch_topk(centred, sae.W_enc, sae.b_enc, sae.cfg.k, scale, search=search)
    return select_topk(centred, sae.W_enc, sae.b_enc, int(sae.cfg.k), scale, search=search)


@torch.no_grad()
def _select_aux(
    sae: TopKTrainingSAE,
    x: Tensor,
    aux: AuxK,
    rows: Tensor,
    scale: Tensor | None,
    search: Search,
) -> Selected:
    """The `aux.k` best of the features `rows` for every token, numbered within `rows`."""
    b_in = input_bias(sae)
    centred = x if b_in is None else x - b_in
    W_enc = sae.W_enc.T.index_select(0, rows).T  # feature-major, as the search wants it
    scale = None if scale is None else scale[rows]
    return select_topk(centred, W_enc, sae.b_enc[rows], aux.k, scale, search=search)


def input_bias(sae: TopKTrainingSAE) -> Tensor | None:
    """(d_in,) what is subtracted from the input before encoding, if anything."""
    return sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def feature_scale(sae: TopKTrainingSAE) -> Tensor | None:
    """(d_sae,) decoder norms, if features are ranked by pre-activation times norm."""
    return sae.W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None


@torch.no_grad()
def entries_output(
    sae: TopKTrainingSAE,
    x: Tensor,
    sae_out: Tensor,
    selected: Selected,
    scale: Tensor | None,
    mse_loss: Tensor,
    aux_loss: Tensor,
) -> EntriesOutput:
    """The output of a pass, `feature_acts` and `hidden_pre` being sparse."""
    ranked = selected.pre if scale is None else selected.pre * scale[selected.features]
    metrics: dict[str, Any] = {}
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.update_topk_threshold(ranked)
        metrics["topk_threshold"] = sae.topk_threshold
    with torch.enable_grad():
        loss = mse_loss + aux_loss
    output = TrainStepOutput(
        sae_in=x,
        sae_out=sae_out,
        feature_acts=sparse_activations(selected, ranked.relu(), len(x)),
        hidden_pre=sparse_activations(selected, ranked, len(x)),
        loss=loss,
        losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
        metrics=metrics,
    )
    return EntriesOutput(output, selected)


def sparse_activations(
    selected: Selected, values: Float[Tensor, " m"], n: int
) -> Float[Tensor, "n d_sae"]:
    """The values at the selected entries of n tokens, as a sparse COO tensor."""
    where, shape = torch.stack([selected.tokens, selected.features]), (n, selected.d_sae)
    # A token's features are distinct, so the tensor is coalesced but for the order in a row.
    return torch.sparse_coo_tensor(where, values, shape, is_coalesced=True, check_invariants=False)
