"""What trained features are like: how often they fire, how alike they are, how far seeds agree.

For any SAELens SAE. Its share of the language model's loss is measured by SAELens itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations import hook_points
from saesub.dead import blocks_of, flat_heads, times_fired
from saesub.encode import encoder_of
from saesub.errors import SaesubError
from saesub.models import Model, context_tokens, load_model

_ROWS_PER_BLOCK = 1024  # bounds the (rows, d_sae) block of cosines


@torch.no_grad()
def feature_density(
    sae: SAE[Any], activations: Tensor | Iterable[Tensor], *, n_tokens: int
) -> Float[Tensor, " d_sae"]:
    """Share of `n_tokens` tokens on which each feature fires; 0 is a feature dead over them.

    Args:
        sae: any SAELens SAE or transcoder, in training or inference form.
        activations: (n, d_in), or an iterator of such blocks; the first `n_tokens` rows are used.

    Raises:
        SaesubError: fewer than `n_tokens` rows came.
    """
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
    encode = encoder_of(sae)
    with flat_heads(sae):
        for block in blocks_of(activations, n_tokens):
            counts += times_fired(encode(block.to(sae.device)))
    return counts / n_tokens


@torch.no_grad()
def nearest_cosine(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The largest cosine of each row to any other row; near 1 is a feature learned twice.

    SAEBench reports it in its core evaluation. Raises SaesubError if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise SaesubError(f"a nearest neighbour needs at least 2 rows, not {len(rows)}")
    unit = normalize(rows.detach().float(), dim=-1)
    nearest = []
    for start in range(0, len(unit), _ROWS_PER_BLOCK):
        cosines = unit[start : start + _ROWS_PER_BLOCK] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)  # a row is not its own neighbour
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)


class Matching(NamedTuple):
    """A one-to-one matching: rows `of_a` and `of_b` are partners, `cosine` is theirs, (pairs,)."""

    of_a: Int[Tensor, " pairs"]
    of_b: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


@torch.no_grad()
def match_features(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Matching:
    """Partners the features of two SAEs, so that the summed cosine is the largest possible.

    The Hungarian assignment by which Paulo & Belrose (2025, arXiv 2501.16615) compare seeds; give
    the decoder rows of living features only. Where one side has more, some of it stay single. It
    holds all n_a × n_b cosines and takes seconds at 5,000 features, growing with their cube.

    Raises:
        SaesubError: an empty side, or rows of different widths.
    """
    if a.shape[-1] != b.shape[-1] or not len(a) or not len(b):
        raise SaesubError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be matched: give two non-empty "
            "sets of rows of one width"
        )
    unit_a, unit_b = (normalize(rows.detach().float(), dim=-1) for rows in (a, b))
    cosines = unit_a @ unit_b.T
    pairs = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    of_a, of_b = (torch.from_numpy(index).to(a.device) for index in pairs)
    return Matching(of_a, of_b, cosines[of_a, of_b])


class LossWithSae(NamedTuple):
    """What an SAE in place of its hook point does to the language model, in nats a token.

    `clean`, `with_sae` and `zero_ablated` are cross-entropies; `kl_with_sae` and `kl_zero_ablated`
    the divergence of the model's predictions from its own clean ones.
    """

    clean: float
    with_sae: float
    zero_ablated: float
    kl_with_sae: float
    kl_zero_ablated: float

    @property
    def recovered(self) -> float:
        """(zero_ablated - with_sae) / (zero_ablated - clean). Noisy where ablation costs little."""
        return (self.zero_ablated - self.with_sae) / (self.zero_ablated - self.clean)

    @property
    def kl_recovered(self) -> float:
        """1 - kl_with_sae / kl_zero_ablated: the same for predictions, and steadier, since chance
        cannot make a distorted prediction look better than the clean one."""
        return 1 - self.kl_with_sae / self.kl_zero_ablated


def loss_with_sae(
    model: Model,
    sae: SAE[Any],
    tokens: Int[Tensor, "contexts pos"],
    *,
    batch_size: int = 8,
) -> LossWithSae:
    """The language model's loss when the SAE's reconstruction replaces its hook point.

    Measured by `sae_lens.evals.run_evals`, zero ablation being its baseline. Special tokens are
    left as they are and not counted. In a model without BOS the first token of every context is
    made the separator of documents, and so left out too: its activations are an attention sink's,
    which no SAE trained by this package has seen.

    Args:
        sae: with its input scaling folded in, as SAELens leaves it after training; the hook point
            is the one its metadata name.
        tokens: contexts that the SAE was not trained on; a number divisible by `batch_size`.

    Raises:
        SaesubError: metadata without a hook point, or contexts that do not fill the batches.
    """
    bridge = load_model(model)
    hook_points(bridge, [hook_of(sae)])
    if len(tokens) == 0 or len(tokens) % batch_size:
        raise SaesubError(
            f"{len(tokens)} contexts do not fill batches of {batch_size}: give a multiple of it"
        )
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=len(tokens) // batch_size,
        compute_ce_loss=True,
        compute_kl=True,
    )
    store = _token_store(bridge, sae, tokens, batch_size)
    lm = cast(Any, bridge)  # SAELens annotates it more narrowly than what it takes
    specials = context_tokens(bridge).special_ids
    with warnings.catch_warnings():  # one for every context, about the store's own copying
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        metrics, _ = run_evals(
            sae, store, lm, ActivationScaler(), config, exclude_special_tokens=specials
        )
    ce, kl = metrics["model_performance_preservation"], metrics["model_behavior_preservation"]
    return LossWithSae(
        *(ce[f"ce_loss_{name}"] for name in ("without_sae", "with_sae", "with_ablation")),
        *(kl[f"kl_div_{name}"] for name in ("with_sae", "with_ablation")),
    )


def hook_of(sae: SAE[Any]) -> str:
    """The hook point that an SAE's metadata name. Raises SaesubError if they name none."""
    if not sae.cfg.metadata.hook_name:
        raise SaesubError(
            "the SAE does not say which hook point it reads: set sae.cfg.metadata.hook_name"
        )
    return sae.cfg.metadata.hook_name


def _token_store(
    model: TransformerBridge, sae: SAE[Any], tokens: Tensor, batch_size: int
) -> ActivationsStore:
    specials, tokens = context_tokens(model), tokens.cpu()
    if specials.bos_id is None and specials.separator_id is not None:
        tokens = tokens.index_fill(1, torch.tensor([0]), specials.separator_id)
    if sae.cfg.metadata.prepend_bos is None:  # SAELens asks, though the tokens have decided it
        sae.cfg.metadata.prepend_bos = specials.bos_id is not None
    return ActivationsStore.from_sae(
        cast(Any, model),
        sae,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        context_size=tokens.shape[1],
        store_batch_size_prompts=batch_size,
        total_tokens=len(tokens),  # it warns where samples are fewer than tokens
        device=str(model.cfg.device),
    )


@torch.no_grad()
def site_activations(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    """Activations at one hook point for given tokens, heads concatenated; every position."""
    hook_points(model, [hook_name])
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
    )
    return cache[hook_name].flatten(2)
