"""Features of given activations, exactly as SAELens' own encoder ranks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from sae_lens import (
    SAE,
    JumpReLUTrainingSAE,
    TemporalSAE,
    TopKSAE,
    TopKTrainingSAE,
    Transcoder,
)
from torch import Tensor

from saesub.arguments import require_sae
from saesub.errors import SaesubError
from saesub.precision import reading_waits, without_autocast
from saesub.topk import cuda_search
from saesub.topk.backend import RowBackend
from saesub.topk.eligibility import other_activation
from saesub.topk.ops import TOKENS_PER_BLOCK, Selected
from saesub.topk.sae import SparseTopKTrainingSAE
from saesub.topk.step import feature_scale, row_backend, sparse_activations
from saesub.topk.triton_backend import TritonBackend

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]
Read = TypeVar("Read")
_TOPK = (TopKSAE, TopKTrainingSAE, SparseTopKTrainingSAE)


def encoder_of(sae: Any) -> Encode:
    """The function from activations to features, without gradients, which leaves the SAE as it is.

    It takes activations (n, d_in) on any device; a hook_z SAE also takes (n, heads, d_head). A TopK
    SAE gives sparse COO tensors and never holds a value of every feature for more than a block of
    tokens, except on MPS, where torch lacks operators on sparse tensors. The features are those
    that SAELens' `encode` ranks highest, by the whole product in the SAE's own precision; on a GPU
    whose Triton kernels have passed `saesub check-gpu`, by the search of the training step.

    Raises SaesubError for what is no SAE, one on the meta device or with NaN or infinite weights,
    weights in another dtype than the SAE's own, and a temporal SAE, whose features depend on the
    tokens before. The function raises it for activations of another shape, and where the SAE's
    dtype cannot hold the features.
    """
    return _leaving(sae, _encode_of(sae))


def autoencoder_of(sae: Any) -> Callable[[Float[Tensor, "n d_in"]], tuple[Tensor, Tensor]]:
    """As `encoder_of`, the function from activations to features and reconstructions (n, d_in)."""
    encode = _encode_of(sae)

    def encode_and_decode(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        features = encode(x)
        return features, sae.decode(features)

    return _leaving(sae, encode_and_decode)


def predictor_of(
    transcoder: Transcoder,
) -> Callable[[Float[Tensor, "n d_in"]], tuple[Tensor, Tensor]]:
    """As `encoder_of`, the function from activations to a transcoder's features and predictions
    (n, d_out), to which a skip connection adds."""

    def encode_and_predict(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        # The skip connection takes x as it is, without the conversion that `encode` makes.
        predicted, features = transcoder.forward_with_activations(x.to(transcoder.dtype))
        return _finite(features), predicted

    return _leaving(transcoder, encode_and_predict)


def _leaving(
    sae: Any, read: Callable[[Float[Tensor, "n d_in"]], Read]
) -> Callable[[Float[Tensor, "n d_in"]], Read]:
    """`read` of checked activations with heads concatenated; the SAE stays as it is."""
    _check_readable(sae)

    @torch.no_grad()
    @without_autocast()
    def checked(x: Float[Tensor, "n d_in"]) -> Read:
        if x.ndim < 2 or x.shape[1:].numel() != sae.cfg.d_in:
            raise SaesubError(
                f"The SAE reads activations of shape (n, {sae.cfg.d_in}), not {tuple(x.shape)}: "
                "give those of its own hook point, a row for each token."
            )
        with flat_heads(sae):
            return read(x.to(sae.device).flatten(1))

    return checked


def _check_readable(sae: Any) -> None:
    require_sae(sae)
    if isinstance(sae, TemporalSAE):
        raise SaesubError(
            "A temporal SAE predicts each token from those before it, so a row of activations has "
            "no features of its own: judge it by sae(x) on whole contexts."
        )
    k = getattr(sae.cfg, "k", 1)
    if not 0 < k <= sae.cfg.d_sae:
        raise SaesubError(
            f"k must lie in 1..{sae.cfg.d_sae} (d_sae), not {k}: set it in the SAE's config."
        )
    for name, weight in sae.named_parameters():
        if weight.is_meta:
            raise SaesubError("The SAE is on the meta device, without values: load its weights.")
        of_its_own = isinstance(sae, JumpReLUTrainingSAE) and name == "threshold"  # float32
        if weight.dtype != sae.dtype and not of_its_own:
            raise SaesubError(
                f"{name} of the SAE is {weight.dtype} and the SAE says {sae.dtype}: convert it by "
                "sae.to(dtype=...), which tells it so."
            )
        # A bias or a threshold may be infinite, which silences its feature.
        usable = weight.isfinite() if weight.ndim > 1 else ~weight.isnan()
        if not usable.all():
            raise SaesubError(
                f"{name} of the SAE holds NaN or infinite values, so none of its features can be "
                "judged: take a checkpoint from before they came up."
            )


def _finite(features: Tensor) -> Tensor:
    if reading_waits(features) and features.dtype in (torch.float32, torch.float64):
        return features  # of finite weights and activations they are in range
    values = features.coalesce().values() if features.is_sparse else features
    if not values.isfinite().all():
        raise SaesubError(
            f"The SAE's features of these activations are not finite in {values.dtype}: convert "
            "the SAE by sae.to(dtype=torch.float32)."
        )
    return features


def _encode_of(sae: Any) -> Encode:
    """`sae.encode`, for a TopK SAE block by block into sparse entries."""

    kept: dict[str, Any] = {}  # what a GPU's search keeps from call to call

    def encode(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        # All is asked anew: the SAE may be trained on, or given hooks, between two calls.
        if not _is_plain_topk(sae):
            return _finite(sae.encode(x))
        on_gpu = sae.W_enc.device.type == "cuda"
        best = _searched(sae, kept) if on_gpu else _by_whole_product(sae)
        found = [best(rows) for rows in sae.process_sae_in(x).split(TOKENS_PER_BLOCK)]
        features, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        selected = Selected.equally(features, values, sae.cfg.d_sae)
        return _finite(sparse_activations(selected, selected.pre.relu(), len(x)))

    return encode


# From the inputs of a TopK SAE's encoder to each token's k best features and their values, (n, k).
Best = Callable[[Float[Tensor, "n d_in"]], tuple[Tensor, Tensor]]


def _by_whole_product(sae: Any) -> Best:
    scale = feature_scale(sae)

    def best(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        scores = x @ sae.W_enc + sae.b_enc
        if scale is not None:
            scores *= scale
        values, features = scores.topk(sae.activation_fn.k, sorted=False)
        return features, values

    return best


def _searched(sae: Any, kept: dict[str, Any]) -> Best:
    """Without the scores of all features, which would fill a GPU."""
    version = tuple(n for w in (sae.W_enc, sae.W_dec) for n in (w.data_ptr(), w._version))
    if kept.get("version") != version:
        rows = row_backend(sae.W_enc.device) if sae.W_enc.dtype == torch.float32 else None
        kept.clear()
        kept.update(_search_of(sae, rows), version=version)
    W_enc, shadow, scale = kept["W_enc"], kept["shadow"], feature_scale(sae)
    search = partial(cuda_search.search, exact=True)
    if shadow is not None:
        shadow.keep_up(W_enc, kept["W_dec"])
        search, scale = shadow.search, shadow.norms

    def best(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        features, pre = search(x.contiguous(), W_enc, sae.b_enc, sae.activation_fn.k, scale)
        return features, pre if scale is None else pre * scale[features]

    return best


def _search_of(sae: Any, rows: RowBackend | None) -> dict[str, Any]:
    """An SAE's weights, feature by feature in memory, and the shadow of a backend that has one."""
    W_enc, W_dec = sae.W_enc.detach().T.contiguous().T, sae.W_dec.detach().contiguous()
    shadow = None
    if isinstance(rows, TritonBackend):
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        shadow = rows.shadow_of(W_enc, W_dec, scaled=scaled)
    return {"W_enc": W_enc, "W_dec": W_dec, "shadow": shadow}


def _is_plain_topk(sae: Any) -> bool:
    if type(sae) not in _TOPK or vars(sae).keys() & {"encode", "encode_with_hidden_pre"}:
        return False
    return other_activation(sae) is None and sae.W_enc.device.type != "mps"


def times_fired(features: Float[Tensor, "n d_sae"]) -> Int[Tensor, " d_sae"]:
    """On how many of the n tokens each feature fires; features may be dense or sparse."""
    if features.is_sparse:
        entries = features.coalesce()
        fired = (entries.values() != 0).long()  # a selection of them would wait for a GPU
        return fired.new_zeros(features.shape[-1]).index_add_(0, entries.indices()[-1], fired)
    return (features != 0).sum(0)


@contextmanager
def flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Let a hook_z SAE read and write concatenated heads, (n, heads × d_head), inside the block.

    Afterwards the SAE has the attributes it had before. SAELens notes there the shape of heads and
    the scale of each input, by which it decodes.
    """
    before = dict(vars(sae))
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name in vars(sae).keys() - before:
            delattr(sae, name)
        vars(sae).update(before)
