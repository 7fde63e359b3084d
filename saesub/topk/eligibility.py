"""Which SAEs take the sparse TopK step, and how many features of one a device can hold."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.config import SAETrainerConfig

from saesub.errors import SaesubError


def takes_sparse_step(sae: Any, cfg: SAETrainerConfig) -> bool:
    """Whether `saesub.topk.step` computes exactly what this SAE's own training pass would."""
    if not is_topk(sae) or cfg.autocast or sae.W_enc.device.type == "mps":
        return False
    plain_input = sae.cfg.normalize_activations in ("none", "expected_average_only_in")
    exact_dtype = sae.W_enc.dtype in (torch.float32, torch.float64)
    return plain_input and exact_dtype and not is_hooked(sae)


def is_hooked(sae: Any) -> bool:
    """Whether a hook point of the SAE has a hook, which must see all pre-activations."""
    return any(hook.fwd_hooks or hook.bwd_hooks for hook in sae.hook_dict.values())


def is_topk(sae: Any) -> bool:
    """A TopK or BatchTopK training SAE, and not a subclass with a loss of its own."""
    return type(sae) in (TopKTrainingSAE, BatchTopKTrainingSAE)


def check_sae(sae: Any) -> None:
    """Refuse an SAE without a loss, k outside 1..d_sae and weights in float16.

    Raises SaesubError.
    """
    if not hasattr(sae, "training_forward_pass"):
        raise SaesubError(
            f"{type(sae).__name__} has no loss to train by: make SAELens' training class of it (of "
            "a transcoder a TrainingTranscoder or TrainingSkipTranscoder of "
            "saesub.extras.transcoders) and load_state_dict the weights."
        )
    k, d_sae = getattr(sae.cfg, "k", 1), sae.cfg.d_sae
    if not 0 < k <= d_sae:
        raise SaesubError(f"k must lie in 1..{d_sae} (d_sae), not {k}: set it in the SAE's config.")
    if any(parameter.dtype == torch.float16 for parameter in sae.parameters()):
        raise SaesubError(
            "Weights in float16 lose Adam's small updates: make the SAE with dtype='float32'."
        )


def lay_out_by_feature(sae: Any) -> None:
    """Put each feature's encoder weights together in memory, as its decoder weights are.

    Only strides change. States are still saved contiguous, as safetensors requires.
    """
    sae.W_dec.data = sae.W_dec.data.contiguous()
    if sae.W_enc.T.is_contiguous():
        return
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    sae.register_state_dict_post_hook(_make_contiguous)


def _make_contiguous(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        state[name] = value.contiguous()


def features_that_fit(total_bytes: int, d_in: int, d_out: int, batch_size: int, copies: int) -> int:
    """How many features' float32 weights, in so many copies, fit on a device beside a batch.

    Weights and two Adam moments make three copies; autograd adds gradients and a working copy. The
    batch counts as ten tensors of its own size, and the scores of the search as a GB.
    """
    of_batch = 10 * 4 * batch_size * max(d_in, d_out) + 10**9
    return max(0, (total_bytes - of_batch) // (copies * 4 * (d_in + d_out + 1)))


def memory_advice(sae: Any, batch_size: int, copies: int) -> str:
    """The message for a GPU that ran out of memory."""
    total = torch.cuda.get_device_properties(sae.device).total_memory
    d_in, d_out, d_sae = sae.cfg.d_in, sae.W_dec.shape[1], sae.cfg.d_sae
    fit = features_that_fit(total, d_in, d_out, batch_size, copies)
    advice = "train fewer features" if d_sae > fit else "free the GPU of other work"
    return (
        f"The GPU ran out of memory with d_sae={d_sae:,}: in its {total / 1e9:.0f} GB about "
        f"{fit:,} features fit beside a batch of {batch_size:,} tokens; {advice}, or train on "
        "smaller batches."
    )
