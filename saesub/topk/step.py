"""One training pass of SAELens' TopK and BatchTopK dictionaries through their active entries.

`autograd_pass` builds the loss with `saesub.topk.ops`, for any optimizer and device; `row_step`
is the same step without autograd, by the `RowBackend` of the device, which also updates the
parameters and never holds a gradient of the weights. Both equal SAELens' dense pass, AuxK included.
`WholeDictionary` has what differs where each of several processes holds a slice of the features.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from saesub.errors import SaesubError
from saesub.topk import cpu, cpu_library, int8_search, triton_backend
from saesub.topk.backend import AdamSettings, Decoded, RowBackend, RowGradients
from saesub.topk.gpu_record import has_passed
from saesub.topk.ops import (
    Search,
    Selected,
    decode_at,
    dense_search,
    encode_at,
    select_batch_topk,
    select_topk,
)
from saesub.topk.optim import SparseAdam, found_inf, moments

if TYPE_CHECKING:
    from saesub.topk.backend import Shadow
    from saesub.topk.step_graph import StepGraph

MAX_NORM = 1.0  # SAELens' trainer clips the norm of all gradients here


class Entries(NamedTuple):
    """The active entries of so many tokens, and their activations (m,)."""

    selected: Selected
    values: Float[Tensor, " m"]
    n_tokens: int


class SparseStepOutput(TrainStepOutput):
    """A pass's `TrainStepOutput` that holds active entries only.

    Attributes:
        entries: the active entries.
        feature_acts: (n, d_sae) sparse COO, or dense, made when read, if `dense_when_read`.
        hidden_pre: reading it raises SaesubError, since inactive entries were not kept.
        dense_when_read: for users who did not ask for `use_sparse_activations`.
    """

    dense_when_read = False

    @property
    def feature_acts(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._acts is None:
            self._acts = sparse_activations(*self.entries)
        if self.dense_when_read and self._acts.is_sparse:
            self._acts = self._acts.to_dense()
        return self._acts

    @feature_acts.setter
    def feature_acts(self, entries: Entries | Tensor) -> None:
        self._acts = None if isinstance(entries, Entries) else entries
        if isinstance(entries, Entries):
            self.entries = entries

    def times_fired(self) -> Int[Tensor, " d_sae"]:
        """On how many of the tokens each feature is active."""
        selected, values, _ = self.entries
        fired = (values != 0).long()
        return fired.new_zeros(selected.d_sae).index_add_(0, selected.features, fired)

    @property
    def hidden_pre(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise SaesubError(
            "The sparse step keeps no pre-activations of inactive features: compute them by "
            "sae.encode_with_hidden_pre(x)[1], or train SAELens' own class (backend='dense' in "
            "SubspaceSAETrainer)."
        )

    @hidden_pre.setter
    def hidden_pre(self, _: None) -> None: ...

    def __repr__(self) -> str:  # a dataclass's would read all of the above
        return f"{type(self).__name__}(loss={self.loss}, losses={self.losses})"


class WholeDictionary:
    """What a step does in one process, which holds all features.

    A subclass, `SlicedDictionary` in `saesub.training.distributed`, holds some of them.
    """

    def select(self, *arguments: Any, search: Search) -> Selected:
        """`ops.select_topk`; only the entries of features of this process."""
        return select_topk(*arguments, search=search)

    def decode(self, backend: RowBackend, *arguments: Any) -> Decoded:
        """`RowBackend.decode`."""
        return backend.decode(*arguments)

    def sum(self, here: Tensor) -> Tensor:
        """A sum over all features, from that over the features of this process."""
        return here

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that the features of all processes use; its gradient is the sum of theirs."""
        return parameter

    def clip_gradients(self, sae: TopKTrainingSAE) -> None:
        """Scale the gradients of all parameters to a norm of at most `MAX_NORM`."""
        torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)


WHOLE = WholeDictionary()


def autograd_pass(
    sae: TopKTrainingSAE,
    sae_in: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    search: Search = int8_search.search,
    dictionary: WholeDictionary = WHOLE,
) -> SparseStepOutput:
    """`training_forward_pass` of a TopK or BatchTopK SAE through its active entries.

    `dead` features, if any, add SAELens' AuxK loss. `search` finds the entries; that of a
    backend (`search_of`) wants float32. All are fastest where `W_enc` lies feature-major in memory
    (`lay_out_by_feature`).
    """
    x = sae_in.to(sae.dtype).contiguous()
    scale = feature_scale(sae)
    selected, aux = _select(sae, x, dead, scale, search, dictionary)
    entries, inputs = selected, x
    if aux is not None:
        entries, inputs = selected.then(aux.selected), x.repeat(2, 1)
    b_in = input_bias(sae)
    b_in = None if b_in is None else dictionary.shared(b_in)
    pre = encode_at(entries, inputs, b_in, sae.W_enc, sae.b_enc)
    m = len(selected.pre)
    values = torch.cat([pre[:m].relu(), pre[m:]])
    decoded = dictionary.sum(decode_at(entries, values, sae.W_dec))
    sae_out = decoded[: len(x)] + sae.b_dec
    mse_loss = (sae_out - x).square().sum(-1).mean()
    aux_loss = mse_loss.new_zeros(())
    if aux is not None:
        residual = (x - sae_out).detach()
        aux_loss = aux.weight * (decoded[len(x) :] - residual).square().sum(-1).mean()
    acts = values[:m]
    if scale is not None:  # SAELens' activations depend on the norms, which its decoder divides by
        acts = acts * sae.W_dec.norm(dim=-1)[selected.features]
    return entries_output(sae, x, sae_out, selected, acts, mse_loss, aux_loss)


def row_backend(device: torch.device, *, triton: bool = False) -> RowBackend | None:
    """What searches there and runs `row_step`: on the CPU that takes a C++ compiler, on CUDA Triton
    kernels that have passed `saesub check-gpu` there, or are asked for by `triton`."""
    if device.type == "cpu" and not triton and cpu_library.library() is not None:
        return cpu.BACKEND
    if device.type == "cuda" and (triton or has_passed(device)) and triton_backend.runs_on(device):
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
    dictionary: WholeDictionary = WHOLE,
    shadow: Shadow | None = None,
    graph: StepGraph | None = None,
) -> SparseStepOutput:
    """Forward, backward, clipping and update in float32, by the loops of `backend`.

    The optimizer is torch's Adam or `SparseAdam`; its state is used and advanced in place. The
    SAE's `W_enc` must lie feature-major in memory. With a `shadow` the step searches by it, and
    does not wait for the device (a BatchTopK SAE's does, where it cuts the batch's entries); such a
    step may be recorded in a `graph`, which then repeats it.
    """
    x = sae_in.to(sae.dtype).contiguous()
    search = search_of(backend, exact_search) if shadow is None or exact_search else shadow.search
    # Several processes have to agree on a number.
    waits = shadow is None or shadow.waits or dictionary is not WHOLE

    def compute(x: Tensor, dead: Tensor | None, lr: float | Tensor) -> Computed:
        scale = feature_scale(sae) if shadow is None else shadow.norms
        selected, aux = _select(sae, x, dead, scale, search, dictionary, waits=waits)
        return _computed(backend, sae, optimizer, x, selected, aux, scale, dictionary, shadow, lr)

    lr = float(optimizer.param_groups[0]["lr"])
    if graph is None or waits or isinstance(sae, BatchTopKTrainingSAE):
        done = compute(x, dead, lr)
    else:
        fixed = (exact_search, *_fixed_in_a_graph(sae, optimizer, shadow))
        done = graph.run(compute, (x, dead, lr), fixed)
    _note_changes(sae, optimizer, shadow, done)
    losses = done.mse_loss, done.aux_loss
    return entries_output(sae, x, done.x_hat, done.selected, done.acts, *losses, done.skipped)


class Computed(NamedTuple):
    """What the device has computed in a step, which has then updated all features.

    `g_b_dec` is the clipped gradient of the decoder's bias, which is not yet updated. `skipped` is
    1 if the step changes nothing.
    """

    selected: Selected
    acts: Float[Tensor, " m"]
    x_hat: Float[Tensor, "n d_in"]
    g_b_dec: Float[Tensor, " d_in"]
    mse_loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    skipped: Float[Tensor, ""] | None


def _computed(
    backend: RowBackend,
    sae: TopKTrainingSAE,
    optimizer: torch.optim.Adam,
    x: Float[Tensor, "n d_in"],
    selected: Selected,
    aux: AuxEntries | None,
    scale: Float[Tensor, " d_sae"] | None,
    dictionary: WholeDictionary,
    shadow: Shadow | None,
    lr: float | Tensor,
) -> Computed:
    n, b_in = len(x), input_bias(sae)
    entries, values = selected, selected.pre.relu()
    decoded = dictionary.decode(backend, selected, values, sae.W_dec, sae.b_dec, x, 1 / n)
    g_pre, g_out, aux_loss = decoded.g_pre, decoded.g_out, x.new_zeros(())
    inputs = x if b_in is None else x - b_in
    if aux is not None:
        residual, chosen = x - decoded.x_hat, aux.selected
        back = dictionary.decode(backend, chosen, chosen.pre, sae.W_dec, None, residual, 1 / n)
        aux_loss = aux.weight * back.squared_error / n
        entries, values = selected.then(chosen), torch.cat([values, chosen.pre])
        g_pre = torch.cat([g_pre, back.g_pre * aux.weight])
        g_out = torch.cat([g_out, back.g_out * aux.weight])
        inputs = inputs.repeat(2, 1)
    gradients = backend.row_gradients(
        entries.features, entries.tokens, values, g_pre, inputs, g_out, entries.d_sae
    )
    squared_norm, through_encoder = gradients.norms(None if b_in is None else sae.W_enc)
    totals = [squared_norm.double().view(1)]
    totals += [] if through_encoder is None else [through_encoder.double()]
    total = dictionary.sum(torch.cat(totals))
    g_b_dec = decoded.g_bias
    if b_in is not None:
        g_b_dec = g_b_dec - total[1:].to(g_b_dec.dtype)
    acts = selected.pre.relu()  # by the norms before the update, which a shadow's follow
    acts = acts if scale is None else acts * scale[selected.features]
    squared_norm = total[0] + g_b_dec.double().square().sum()
    clip, skipped = clip_factor(squared_norm), None
    if backend.skips_nan:
        finite = squared_norm.isfinite()
        clip, skipped = torch.where(finite, clip, torch.nan), (~finite).float()
    _update_rows(sae, optimizer, gradients, lr, clip, shadow, skipped)
    mse_loss = decoded.squared_error / n
    return Computed(selected, acts, decoded.x_hat, g_b_dec * clip, mse_loss, aux_loss, skipped)


def clip_factor(squared_norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What SAELens' trainer multiplies all gradients by, given the square of their norm."""
    return (MAX_NORM / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)  # reading it would wait


def _update_rows(
    sae: TopKTrainingSAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    lr: float | Tensor,
    clip: Float[Tensor, ""],
    shadow: Shadow | None,
    skipped: Float[Tensor, ""] | None,
) -> None:
    """One step of Adam or `SparseAdam` on all features, the gradients multiplied by `clip`.

    If `skipped` is 1, as where `clip` is NaN, the step changes nothing.
    """
    group = optimizer.param_groups[0]
    steps, tensors = [], []
    for parameter in _by_feature(sae):
        step, *averages = moments(optimizer, parameter)
        steps.append(step)
        tensors += [t.T if parameter is sae.W_enc else t for t in (parameter.data, *averages)]
    moved = None
    if isinstance(optimizer, SparseAdam):
        counters = [optimizer.moved(sae.W_enc, 1), optimizer.moved(sae.W_dec, 0)]
        counters.append(optimizer.moved(sae.b_enc, 0))
        moved = counters[0]
    for step in steps:
        step += 1 if skipped is None else 1 - skipped
    settings = AdamSettings(lr, *(float(v) for v in (*group["betas"], group["eps"])))
    gradients.adam(settings, steps[0], clip, *tensors, moved=moved, shadow=shadow)
    if moved is not None:
        for other in counters[1:]:
            other.copy_(moved)


def _note_changes(
    sae: TopKTrainingSAE, optimizer: torch.optim.Adam, shadow: Shadow | None, done: Computed
) -> None:
    """Update the decoder's bias, and tell torch and the shadow what the device has changed."""
    # The backends write memory, of which torch keeps no count.
    for parameter in _by_feature(sae):
        increment_version(parameter)
    if shadow is not None:
        shadow.written(sae)
    sae.b_dec.grad = done.g_b_dec
    with found_inf(optimizer, done.skipped):
        optimizer.step()  # the only parameter with a gradient
    sae.b_dec.grad = None


def _by_feature(sae: TopKTrainingSAE) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """The parameters of which each feature has its part."""
    return sae.W_enc, sae.W_dec, sae.b_enc


def _fixed_in_a_graph(
    sae: TopKTrainingSAE, optimizer: torch.optim.Adam, shadow: Any
) -> tuple[Any, ...]:
    """What a recorded step has in it: where tensors lie, and numbers that are no tensors.

    `shadow` is an `EncoderShadow`. Another one in the same memory has the rows of its weights.
    """
    group, cfg = optimizer.param_groups[0], sae.cfg
    kept = [t for p in _by_feature(sae) for t in (p, *moments(optimizer, p))]
    if isinstance(optimizer, SparseAdam):
        kept += [optimizer.moved(p, int(p is sae.W_enc)) for p in _by_feature(sae)]
    kept.append(sae.b_dec)
    held = [*shadow.given(), *shadow.shape().values()]
    kept += [t for t in held if isinstance(t, Tensor)]
    numbers = [n for n in held if not isinstance(n, Tensor)]
    numbers += [*group["betas"], group["eps"], sae.activation_fn.k, cfg.aux_loss_coefficient]  # pyright: ignore
    kinds = (type(optimizer), cfg.apply_b_dec_to_input, cfg.rescale_acts_by_decoder_norm)
    return tuple((t.data_ptr(), t.shape) for t in kept), tuple(numbers), kinds


class AuxEntries(NamedTuple):
    """The entries that reconstruct AuxK's residual, and the weight of its loss (SAELens')."""

    selected: Selected
    weight: float | Tensor


@torch.no_grad()
def _select(
    sae: TopKTrainingSAE,
    x: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    scale: Float[Tensor, " d_sae"] | None,
    search: Search,
    dictionary: WholeDictionary,
    *,
    waits: bool = True,
) -> tuple[Selected, AuxEntries | None]:
    """The active entries, and those of dead features if AuxK applies.

    With `waits` the number of dead features is read, and only they are searched; else all are, with
    a bias that leaves the living out.
    """
    b_in = input_bias(sae)
    centred = x if b_in is None else x - b_in
    W_enc, b_enc, k = sae.W_enc.detach(), sae.b_enc, sae.activation_fn.k  # pyright: ignore
    if search is not dense_search:  # which reads features one by one
        W_enc = W_enc.T.contiguous().T
    if isinstance(sae, BatchTopKTrainingSAE):
        selected = select_batch_topk(centred, W_enc, b_enc, k, scale, search=search)
    else:
        selected = dictionary.select(centred, W_enc, b_enc, int(k), scale, search=search)
    if dead is None:
        return selected, None
    most, coefficient = sae.cfg.d_in // 2, sae.cfg.aux_loss_coefficient
    n_dead = dictionary.sum(dead.sum())
    if not waits:
        bias = torch.where(dead, b_enc, -torch.inf)
        k = min(most, len(b_enc))
        found = dictionary.select(centred, W_enc, bias, k, scale, search=search)
        counts = dead[found.features] & (found.pre > -torch.inf)
        found = replace(found, pre=torch.where(counts, found.pre, 0.0))
        return selected, AuxEntries(found, coefficient * (n_dead / most).clamp(max=1.0))
    n_dead = int(n_dead)
    if not n_dead:
        return selected, None
    rows = dead.nonzero().squeeze(1)
    W_enc = W_enc.T.index_select(0, rows).T  # feature-major, as the search wants it
    scale = None if scale is None else scale[rows]
    k = min(most, n_dead)
    found = dictionary.select(centred, W_enc, b_enc[rows], k, scale, search=search)
    found = Selected(rows[found.features], found.offsets, found.pre, selected.d_sae)
    return selected, AuxEntries(found, coefficient * min(n_dead / most, 1.0))


def input_bias(sae: TopKTrainingSAE) -> Tensor | None:
    """(d_in,) what is subtracted from the input before encoding, if anything."""
    return sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def feature_scale(sae: TopKTrainingSAE) -> Tensor | None:
    """(d_sae,) decoder norms, if features are ranked by pre-activation times norm."""
    return sae.W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None


def entries_output(
    sae: TopKTrainingSAE,
    x: Tensor,
    sae_out: Tensor,
    selected: Selected,
    acts: Float[Tensor, " m"],
    mse_loss: Tensor,
    aux_loss: Tensor,
    skipped: Tensor | None = None,
) -> SparseStepOutput:
    """The output of a pass; `acts` are the selected entries' activations. If `skipped` is not 0,
    the SAE's threshold stays."""
    metrics: dict[str, Any] = {}
    if isinstance(sae, BatchTopKTrainingSAE):
        before = sae.topk_threshold
        sae.update_topk_threshold(acts.detach())
        if skipped is not None:
            sae.topk_threshold = torch.where(skipped == 0, sae.topk_threshold, before)
        metrics["topk_threshold"] = sae.topk_threshold
    loss = mse_loss + aux_loss
    return SparseStepOutput(
        sae_in=x,
        sae_out=sae_out,
        feature_acts=Entries(selected, acts, len(x)),  # pyright: ignore[reportArgumentType]
        hidden_pre=None,  # pyright: ignore[reportArgumentType]
        loss=loss,
        losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
        metrics=metrics,
    )


def sparse_activations(
    selected: Selected, values: Float[Tensor, " m"], n: int
) -> Float[Tensor, "n d_sae"]:
    """The values at the selected entries of n tokens, as a sparse COO tensor."""
    # Sorted, as torch takes it for granted of a coalesced tensor, in gradients too.
    order = (selected.tokens * selected.d_sae + selected.features).argsort()
    where = torch.stack([selected.tokens, selected.features])[:, order]
    return torch.sparse_coo_tensor(
        where, values[order], (n, selected.d_sae), is_coalesced=True, check_invariants=False
    )
