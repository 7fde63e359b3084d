"""Sparse probing: how much a few features tell about a text, as in SAEBench.

After Gurnee et al. 2023 ("Finding Neurons in a Haystack") and SAEBench (Karvonen et al. 2025,
section on sparse probing): a text is the mean of its tokens' activations, the k features that
differ most between two classes are kept, and a logistic regression reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.checks import require_finite
from saesub.activations.tokens import kept_positions
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError, near_names, needs_extra
from saesub.evaluation.passes import check_reads, site_activations
from saesub.loading.models import Model, context_tokens, load_model, own_settings
from saesub.progress import bar
from saesub.topk.encode import encoder_of

if TYPE_CHECKING:
    import pandas as pd

RAW = "raw"  # the site's own activations, beside the features of SAEs


@torch.no_grad()
def mean_features(
    model: Model,
    texts: Sequence[str],
    hook_name: str,
    saes: Mapping[str, SAE[Any]],
    *,
    max_tokens: int = 64,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
) -> dict[str, Float[Tensor, "texts d"]]:
    """Each text as the mean of its tokens' features, for several SAEs from one pass of the model.

    Args:
        texts: the first `max_tokens` tokens of each are read. Special tokens and the first
            `skip_first` positions are left out of the mean.
        hook_name: the hook point that all the SAEs read.
        saes: name -> SAE with its input scaling folded in; may be empty.

    Returns:
        name -> (texts, d_sae), and under "raw" the mean activations themselves, (texts, d_in);
        float32, on the CPU.

    Warns of an SAE of a model of another name. A BatchTopK SAE in training form shares out its
    features over the texts of a batch.

    Raises:
        SaesubError: unknown hook point; an SAE of another hook point or width, of one head, named
            "raw", whose scaling is not folded in, or that `saesub.topk.encode.encoder_of` refuses;
            one string in place of a list, no texts, or a text without a token.
    """
    bridge = load_model(model)
    texts = _texts(texts)
    max_tokens = whole_number(max_tokens, "max_tokens")
    batch_size = whole_number(batch_size, "batch_size")
    if RAW in saes:
        raise SaesubError(f"no SAE can have the name {RAW!r}: give it another")
    readers: dict[str, Callable[[Tensor], Tensor]] = {RAW: lambda x: x}
    readers |= {name: encoder_of(sae) for name, sae in saes.items()}
    for sae in saes.values():
        check_reads(sae, bridge, hook_name)
    tokens, real = _tokenised(bridge, texts, max_tokens)
    kept = kept_positions(bridge, tokens, skip_first) & real
    if len(empty := (~kept.any(1)).nonzero()):
        raise SaesubError(
            f"text {int(empty[0])} holds no token after the first {skip_first}: leave it out"
        )
    means: dict[str, list[Tensor]] = {name: [] for name in readers}
    with bar(total=len(texts), unit="text", progress=progress) as shown:
        for batch, mask in zip(tokens.split(batch_size), kept.split(batch_size), strict=True):
            x = site_activations(bridge, batch, hook_name)[mask.to(bridge.cfg.device)]
            require_finite(x)
            for name, read in readers.items():
                by_text = read(x).to_dense().float().split(mask.sum(1).tolist())
                means[name] += [values.mean(0).cpu() for values in by_text]
            shown.update(len(batch))
    return {name: torch.stack(of_texts) for name, of_texts in means.items()}


def _texts(texts: Iterable[str]) -> list[str]:
    """Texts as a list. Raises SaesubError for one string, no texts, and what is no text."""
    listed = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise SaesubError("give at least one text, as a list of strings")
    return listed


def _tokenised(
    model: TransformerBridge, texts: Sequence[str], max_tokens: int
) -> tuple[Int[Tensor, "texts pos"], Bool[Tensor, "texts pos"]]:
    """The texts' first tokens, after BOS if the model has one, and which are not padding.

    Padding comes last, so that under causal attention no token of a text sees it.
    """
    bos_id = context_tokens(model).bos_id
    bos = [] if bos_id is None else [bos_id]
    if max_tokens + len(bos) > model.cfg.n_ctx:
        raise SaesubError(
            f"max_tokens={max_tokens} is more than the model's {model.cfg.n_ctx}: lower it"
        )
    assert model.tokenizer is not None  # context_tokens has refused a model without one
    cut = {"truncation": True, "max_length": max_tokens}
    with own_settings(model.tokenizer):
        given = model.tokenizer(list(texts), add_special_tokens=False, **cut).input_ids
    ids = [torch.tensor(bos + of_text, dtype=torch.int64) for of_text in given]
    real = [torch.ones(len(of_text), dtype=torch.bool) for of_text in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(real, batch_first=True)


def sparse_probe(
    train: Float[Tensor, "n d"],
    is_positive: Bool[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_is_positive: Bool[Tensor, " m"],
    k: int | None,
) -> float:
    """Test accuracy of a logistic regression on the k features whose means differ most.

    The difference of the class means is taken over the training texts, without regard to sign;
    k = None reads every feature. The features read are standardised first, which SAEBench does
    not do: otherwise the effect of scikit-learn's L2 penalty depends on the scale of the site.

    Raises:
        SaesubError: k outside 1..d, a class without training texts, classes that are not boolean,
            features that are not finite, or shapes that do not fit.
    """
    with needs_extra("sparse_probe"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    train, test = _features(train), _features(test)
    d, y, z = train.shape[1], _classes(is_positive, train), _classes(test_is_positive, test)
    if test.shape[1] != d:
        raise SaesubError("give train and test features of one width, and a class for each text")
    k = k if k is None else whole_number(k, "k", 0)
    if k is not None and not 1 <= k <= d:
        raise SaesubError(f"k must lie in 1..{d} (the number of features), not {k}")
    if y.all() or not y.any():
        raise SaesubError("a probe needs training texts of both classes")
    if k is not None:
        difference = (train[y].mean(0) - train[~y].mean(0)).abs()
        chosen = difference.topk(k).indices
        train, test = train[:, chosen], test[:, chosen]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(train.numpy(), y.numpy())
    return float(probe.score(test.numpy(), z.numpy()))


def _features(given: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Features of texts, in float32 or wider on the CPU. Raises SaesubError if they are no matrix
    of finite numbers."""
    x = batch_of(given, "features of texts").detach().cpu()
    if x.ndim != 2 or not x.numel():
        raise SaesubError(f"features of texts are of shape (n, d), not {tuple(x.shape)}")
    require_finite(x, "features of texts", "leave those texts out")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _classes(given: Bool[Tensor, " n"], features: Tensor) -> Bool[Tensor, " n"]:
    """Which texts are positive. Raises SaesubError for another number, or what is not boolean."""
    if not isinstance(given, Tensor) or given.dtype != torch.bool or len(given) != len(features):
        raise SaesubError(
            "give train and test features of one width, and a class for each text, in boolean "
            "tensors"
        )
    return given.cpu()


def probe_tasks(
    features: Mapping[str, Float[Tensor, "texts d"]],
    tasks: Mapping[str, tuple[str, str]],
    ks: Sequence[int | None] = (1, 5, 20),
    *,
    test_share: float = 0.25,
) -> pd.DataFrame:
    """Sparse probes for several tasks, each a pair of classes of texts.

    The last texts of every class are for the test; both classes of a task give equally many, so
    that guessing scores one half.

    Args:
        features: class -> (texts, d), its texts in random order; from `mean_features`.
        tasks: name -> (a class, the class it is told from).
        ks: numbers of features read; None reads all of them.

    Returns:
        columns task, k (0 stands for all features) and accuracy.

    Raises:
        SaesubError: unknown class, a task that is no pair of two, or too few texts for a test.
    """
    with needs_extra("probe_tasks"):
        import pandas as pd

    if not isinstance(ks, Iterable):
        raise SaesubError(f"ks is a list of numbers of features, not {ks!r}")
    if not 0 < test_share < 1:
        raise SaesubError(f"test_share must lie between 0 and 1, not {test_share}")
    results = []
    for task, names in tasks.items():
        if isinstance(names, str) or len({*names}) != 2 or len(names) != 2:
            raise SaesubError(f"task {task!r} must name two different classes, not {names!r}")
        for name in names:
            if name not in features:
                raise SaesubError(f"task {task!r}: no class {name!r}; {near_names(name, features)}")
        n = min(len(features[name]) for name in names)
        n_test = round(n * test_share)
        if not 1 <= n_test < n:
            raise SaesubError(
                f"{n} texts of a class and test_share={test_share} leave no text to train or to "
                "test on: give more texts or another share"
            )
        both = [_features(features[name][:n]) for name in names]
        if both[0].shape[1] != both[1].shape[1]:
            raise SaesubError(f"task {task!r}: give features of one width for both classes")
        x, text = torch.cat(both), torch.arange(2 * n)
        positive, test = text < n, text % n >= n - n_test
        split = x[~test], positive[~test], x[test], positive[test]
        results += [(task, k or 0, sparse_probe(*split, k)) for k in ks]
    return pd.DataFrame(results, columns=["task", "k", "accuracy"])
