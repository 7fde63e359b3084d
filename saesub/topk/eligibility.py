"""Which SAEs take the sparse TopK step, and how many features of one a device can hold."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import mse_loss
from sae_lens.saes.topk_sae import TopK
from torch import nn

from saesub.errors import SaesubError

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
# What the sparse pass replaces. It does so only where SAELens' own code would have run.
_METHODS = (
    "encode_with_hidden_pre",
    "process_sae_in",
    "decode",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
    "update_topk_threshold",
)
_WRAPPED = ("update_topk_threshold",)  # by SAELens itself, in torch.no_grad
_FUNCTIONS = (
    "reshape_fn_in",
    "reshape_fn_out",
    "run_time_activation_norm_fn_in",
    "run_time_activation_norm_fn_out",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED_CODE = {
    "sae_lens.saes.sae",
    "sae_lens.saes.topk_sae",
    "sae_lens.saes.batchtopk_sae",
    "saesub.topk.sae",
}

_SEARCH_BYTES = 700  # a feature: maxima of 2,048 tokens in groups of 8, two bytes each; counters
_SCORES_BYTES = 10**9  # of all features for a block of tokens


def why_dense(sae: Any) -> str | None:
    """Why the sparse pass would not compute what this SAE's own pass does; None if it would.

    A replaced `training_forward_pass` is not looked at: it runs instead of the sparse pass, or
    calls it.
    """
    for reason in (_other_code, other_activation, _other_parameters, _other_input):
        found = reason(sae)
        if found is not None:
            return found
    return None


def other_pass(sae: Any) -> str | None:
    """Whether something else than SAELens' or the sparse `training_forward_pass` runs first."""
    if "training_forward_pass" in vars(sae):
        return "training_forward_pass of this SAE was replaced"
    own = type(sae).training_forward_pass.__module__ not in _REPLACED_CODE
    return f"{type(sae).__name__} has its own training_forward_pass" if own else None


def is_hooked(sae: Any) -> bool:
    """Whether a hook point of the SAE has a hook, which must see all pre-activations, or is not
    SAELens' own."""
    named = getattr(sae, "hook_dict", {}).items()
    points = [(getattr(sae, name), point) for name, point in named]
    return any(now is not point or _has_hooks(point) for now, point in points)


def _has_hooks(module: nn.Module) -> bool:
    """Whether something is called when a module is, for this one or for all."""
    return any(vars(module)[name] for name in _HOOKS) or any(
        getattr(nn.modules.module, f"_global{name}") for name in _HOOKS
    )


def _other_code(sae: Any) -> str | None:
    if not isinstance(sae, TopKTrainingSAE):
        return f"{type(sae).__name__} is no TopK SAE"
    of_instance = vars(sae)
    for name in _METHODS:
        method = getattr(type(sae), name, None)
        wrapped = hasattr(method, "__wrapped__") and name not in _WRAPPED
        if method is not None and (wrapped or method.__module__ not in _REPLACED_CODE):
            return f"{type(sae).__name__} has its own {name}"
        if name in of_instance:
            return f"{name} of this SAE was replaced"
    for name in _FUNCTIONS:
        if getattr(getattr(sae, name), "__module__", None) not in _REPLACED_CODE:
            return f"{name} of this SAE was replaced"
    return None if sae.mse_loss_fn is mse_loss else "mse_loss_fn of this SAE was replaced"


def other_activation(sae: Any) -> str | None:
    """Why the activations of a TopK or BatchTopK SAE are not those of SAELens' activation function
    and hook points; None if they are."""
    function = sae.activation_fn
    wanted = BatchTopK if isinstance(sae, BatchTopKTrainingSAE) else TopK
    if type(function) is not wanted or "forward" in vars(function):
        return f"its activation function is {type(function).__name__}, not SAELens' own"
    if wanted is TopK and not (function.k >= 1 and function.k == int(function.k)):
        return f"its k is {function.k}"
    if _has_hooks(function):
        return "its activation function has hooks"
    return "its hook points have hooks" if is_hooked(sae) else None


def _other_parameters(sae: Any) -> str | None:
    if not all(isinstance(getattr(sae, name), nn.Parameter) for name in PARAMETERS):
        return "its weights are parametrised"
    device, dtype = sae.W_enc.device.type, sae.W_enc.dtype
    if device == "mps":
        return "its device is 'mps'"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    exact = dtype in (torch.float32, torch.float64)
    return None if exact else f"its weights are in {dtype}, not in float32"


def _other_input(sae: Any) -> str | None:
    if sae.hook_z_reshaping_mode:
        return "it reshapes hook_z itself"
    normalised = sae.cfg.normalize_activations
    if normalised in ("none", "expected_average_only_in", "covariance_whitening"):
        return None  # the trainer scales or whitens the batch before it comes here
    return f"normalize_activations={normalised!r} changes each token by itself"


def check_sae(sae: Any) -> None:
    """Refuse an SAE without a loss, and what `check_weights` refuses. Raises SaesubError."""
    if not hasattr(sae, "training_forward_pass"):
        raise SaesubError(
            f"{type(sae).__name__} has no loss to train by: make SAELens' training class of it (of "
            "a transcoder a TrainingTranscoder or TrainingSkipTranscoder of "
            "saesub.extras.transcoders) and load_state_dict the weights."
        )
    check_weights(sae)
    if sae.cfg.d_in == 1 and isinstance(sae, TopKTrainingSAE) and sae.cfg.aux_loss_coefficient:
        raise SaesubError(
            "AuxK takes d_in // 2 dead features, and d_in is 1: set aux_loss_coefficient=0 in the "
            "SAE's config."
        )
    k = getattr(sae.cfg, "k", None)
    used = getattr(getattr(sae, "activation_fn", None), "k", k)
    if used != k is not None:
        warnings.warn(
            f"The SAE is trained with its activation function's k, {used}, and is saved and loaded "
            f"with that of its cfg, {k}: set both.",
            stacklevel=4,
        )


def check_weights(sae: Any) -> None:
    """Refuse k outside 1..d_sae, and weights that are not finite, hold no values (meta device), are
    coarser than float32 or cannot be changed alone. Raises SaesubError."""
    k, d_sae = getattr(sae.cfg, "k", 1), sae.cfg.d_sae
    if not 0 < k <= d_sae:
        raise SaesubError(f"k must lie in 1..{d_sae} (d_sae), not {k}: set it in the SAE's config.")
    for name, weights in sae.named_parameters():
        if torch.finfo(weights.dtype).eps > torch.finfo(torch.float32).eps:
            raise SaesubError(
                f"{name} is in {weights.dtype}, which rounds most of Adam's updates away: make the "
                "SAE with dtype='float32' (of a Lorsa call .float()), and for products in bfloat16 "
                "set autocast=True in the SAETrainerConfig."
            )
        if weights.is_meta:
            raise SaesubError(
                f"{name} is on the meta device and holds no values: make the SAE on another."
            )
        if not bool(weights.isfinite().all()):
            raise SaesubError(
                f"{name} holds NaN or infinite values: make it anew, or load its weights again."
            )
    check_memory(sae)


def check_memory(sae: Any) -> None:
    """Refuse weights that are the memory of others, or were made in inference mode and can never be
    changed. Raises SaesubError."""
    places: dict[int, str] = {}
    for name, weights in sae.named_parameters():
        if weights.is_inference():
            raise SaesubError(
                f"{name} was made in torch.inference_mode(), and such a tensor cannot be changed: "
                "make or load the SAE outside of it."
            )
        other = places.setdefault(weights.data_ptr(), name)
        if other != name and weights.data_ptr():  # 0 of an empty one
            raise SaesubError(
                f"{name} and {other} are one memory, so that a change of one changes the other: "
                f"copy it, as by sae.{name}.data = sae.{name}.data.clone()."
            )


def lay_out_by_feature(sae: Any) -> None:
    """Put each feature's encoder weights together in memory, as its decoder weights are.

    Only strides change. Adam's moments take the strides of the first step.
    """
    sae.W_dec.data = sae.W_dec.data.contiguous()
    if not sae.W_enc.T.is_contiguous():
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T


def lay_out_contiguous(sae: Any) -> None:
    """Undo `lay_out_by_feature`."""
    sae.W_enc.data = sae.W_enc.data.contiguous()


def features_that_fit(total_bytes: int, d_in: int, d_out: int, batch: int, *, fused: bool) -> int:
    """How many features fit on a GPU beside a batch of so many tokens.

    A feature's float32 weights and two Adam moments make three copies. The fused step adds its
    encoder row in 16 bits, its share of a search's maxima and its counters; autograd adds gradients
    and a working copy. The batch counts as ten tensors of its own size.
    """
    row = 4 * (d_in + d_out + 1)
    per_feature = 3 * row + 2 * d_in + _SEARCH_BYTES if fused else 5 * row
    other = 10 * 4 * batch * max(d_in, d_out) + (0 if fused else _SCORES_BYTES)
    return max(0, (total_bytes - other) // per_feature)


def memory_advice(sae: Any, batch_size: int, *, fused: bool) -> str:
    """The message for a GPU that ran out of memory."""
    total = torch.cuda.get_device_properties(sae.device).total_memory
    d_in, d_out, d_sae = sae.cfg.d_in, sae.W_dec.shape[1], sae.cfg.d_sae
    fit = features_that_fit(total, d_in, d_out, batch_size, fused=fused)
    weights = 12 * d_sae * (d_in + d_out + 1)
    advice = "train fewer features" if d_sae > fit else "free the GPU of other work"
    return (
        f"The GPU ran out of memory with d_sae={d_sae:,}: weights and Adam's moments take "
        f"{weights / 1e9:.2g} GB, and in its {total / 1e9:.0f} GB about {fit:,} features fit "
        f"beside a batch of {batch_size:,} tokens; {advice}, or train on smaller batches."
    )
