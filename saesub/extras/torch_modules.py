"""Spectra of any torch model, measured at the inputs and outputs of its own modules.

`saesub.measure_spectra` reads language models by hook point. Here a site is a module and a side, so
that encoders, speech models and whatever else transformers loads can be measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from jaxtyping import Bool
from torch import Tensor, nn

from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.arguments import whole_number
from saesub.errors import SaesubError, near_names
from saesub.progress import bar

Side = Literal["input", "output"]
Batch = tuple[Mapping[str, Any], Bool[Tensor, "batch pos"]]
"""Keyword arguments of the model's forward pass, and the positions that statistics are taken at."""

# By family and stack: the list of blocks, and inside a block the last matrix of the attention, of
# the MLP, and of the attention to an encoder where there is one.
_LAYOUTS = {
    ("bert", "encoder"): ("encoder.layer", "attention.output.dense", "output.dense"),
    ("mpnet", "encoder"): ("encoder.layer", "attention.attn.o", "output.dense"),
    ("whisper", "encoder"): ("encoder.layers", "self_attn.out_proj", "fc2"),
    ("whisper", "decoder"): (
        "decoder.layers", "self_attn.out_proj", "fc2", "encoder_attn.out_proj",
    ),
    ("gpt2", "decoder"): ("h", "attn.c_proj", "mlp.c_proj"),
    ("dinov2", "encoder"): ("encoder.layer", "attention.o_proj", "mlp.fc2"),
    ("Fracast", "encoder"): ("stages", "pw", "down"),  # a convolution instead of attention
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """The first input or the output of a module, named by its path inside the model."""

    module: str
    side: Side


def block_sites(model: nn.Module, stack: str = "encoder") -> dict[tuple[int, str], Site]:
    """The four kinds of site in every block of a model, by (layer, kind).

    "attn_out" and "mlp_out" are the outputs of the last matrix of attention and MLP, before they
    are added to the residual stream; in post-norm models (BERT, MPNet) that is before the LayerNorm
    too. "resid_post" is the block's output: after its last LayerNorm in post-norm models, the bare
    sum in pre-norm ones. "z" is the heads' concatenated output, the input of the output projection.
    A decoder that attends to an encoder also has "cross_out" and "cross_z".

    Raises SaesubError for a family whose modules are not known here, or that lacks the stack.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    layout = _LAYOUTS.get((family, stack), ("", "", ""))
    blocks, attention, mlp, *cross = layout
    found = [(name, m) for name, m in model.named_modules() if f".{name}".endswith(f".{blocks}")]
    if not blocks or not found:
        known = ", ".join(f"{f} ({s})" for f, s in _LAYOUTS)
        raise SaesubError(
            f"the sites of the {stack} of {family!r} are not listed (known: {known}): name them "
            "yourself, as Site(module, side)."
        )
    path, modules = found[0]
    kinds: dict[str, tuple[str, Side]] = {
        "attn_out": (f".{attention}", "output"),
        "mlp_out": (f".{mlp}", "output"),
        "resid_post": ("", "output"),
        "z": (f".{attention}", "input"),
    }
    for matrix in cross:
        kinds |= {"cross_out": (f".{matrix}", "output"), "cross_z": (f".{matrix}", "input")}
    return {
        (int(layer), kind): Site(f"{path}.{layer}{part}", side)
        for layer, _ in modules.named_children()
        for kind, (part, side) in kinds.items()
    }


def measure_module_spectra(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Mapping[Any, Site],
    *,
    forward: Callable[..., Any] | None = None,
    keep_massive: bool = False,
    progress: bool = True,
) -> dict[Any, Spectrum]:
    """Mean and covariance at several sites from one pass over the batches; nothing is stored.

    The model is left as it was: the hooks are removed at the end, also after an error.

    Args:
        model: any torch module in eval mode.
        batches: what to feed it, and which positions count: `keep` has shape (batch, pos), and
            every site must give a tensor (batch, pos, d) or a tuple that begins with one.
        sites: the modules to listen to, by names of your own.
        forward: what to call with each batch's arguments; by default the model itself. It may be a
            part of the model, such as one without the output layer.
        keep_massive: as in `saesub.measure_spectra`.
        progress: show a bar, with the time left where `batches` is a list.

    Raises:
        SaesubError: no batches or no kept position, one that is not boolean, a module that the
            model lacks, that did not run or that ran several times in one pass, a model in training
            mode, a tensor of another shape, NaN or infinite activations.
    """
    if any(module.training for module in model.modules()):
        raise SaesubError("the model is in training mode, with dropout: call model.eval() first.")
    totals: dict[Any, SpectrumAccumulator] = {}
    current: list[Tensor] = []  # `keep` of the batch that runs
    heard: set[Any] = set()  # the sites that it passed

    def listener(name: Any) -> Callable[..., None]:
        def listen(_module: nn.Module, args: Any, output: Any = None) -> None:
            (keep,) = current
            value = args if output is None else output
            x = value[0] if isinstance(value, (tuple, list)) else value
            if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != keep.shape:
                given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise SaesubError(
                    f"{name} gives {given}, not (batch, pos, d) with (batch, pos) = "
                    f"{tuple(keep.shape)}: choose another module."
                )
            if name in heard:
                raise SaesubError(
                    f"{name} runs several times in one pass, so its activations are not one vector "
                    "for each token: choose a module that runs once."
                )
            heard.add(name)
            if name not in totals:
                totals[name] = SpectrumAccumulator(x.shape[2], keep_massive=keep_massive)
            try:
                totals[name].update(x[keep.to(x.device)])
            except SaesubError as error:
                raise SaesubError(f"{name}: {error}") from error

        return listen

    with ExitStack() as stack, torch.no_grad():
        for name, site in sites.items():
            stack.callback(_hooked(model, site, listener(name)).remove)
        for inputs, keep in bar(batches, unit="batch", progress=progress):
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
                raise SaesubError(
                    "which positions count must be a boolean tensor (batch, pos): pass "
                    "attention_mask.bool()"
                )
            current[:] = [keep]
            heard.clear()
            (forward or model)(**inputs)
    if silent := [name for name in sites if name not in totals]:
        raise SaesubError(f"no activations came from {silent[:3]}: check the batches and modules.")
    return {name: totals[name].finish({"hook_name": str(name)}) for name in sites}


def _hooked(model: nn.Module, site: Site, listen: Callable[..., None]) -> Any:
    """The handle of a hook at the site. Raises SaesubError for a site that is not there."""
    try:
        module = model.get_submodule(site.module)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise SaesubError(
            f"the model has no module {site.module!r}: {near_names(site.module, known)}"
        ) from error
    if site.side == "input":
        return module.register_forward_pre_hook(listen)
    if site.side == "output":
        return module.register_forward_hook(listen)
    raise SaesubError(f"a site's side is 'input' or 'output', not {site.side!r}.")


def text_batches(
    tokenizer: Any,
    corpus: Dataset,
    *,
    n_tokens: int | None = None,
    context_size: int = 128,
    batch_size: int = 16,
    skip_first: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Documents one to a row, each between the tokenizer's special tokens, cut and padded.

    Gives `input_ids` and `attention_mask`, until `n_tokens` positions were kept, or of the whole
    corpus where that is None. Left out are special tokens, padding and the first `skip_first`
    tokens of each text.

    Raises SaesubError if the corpus ends before `n_tokens`, or the tokenizer cannot pad.
    """
    if tokenizer.pad_token is None:
        raise SaesubError("the tokenizer has no padding token: set its pad_token to its eos_token.")
    missing = float("inf") if n_tokens is None else whole_number(n_tokens, "n_tokens")
    batch_size = whole_number(batch_size, "batch_size")
    context_size = whole_number(context_size, "context_size")
    skip_first = whole_number(skip_first, "skip_first", 0)
    for start in range(0, len(corpus), batch_size):
        if missing < 1:
            return
        inputs = tokenizer(
            corpus[start : start + batch_size]["text"],
            truncation=True,
            max_length=context_size,
            padding=True,
            padding_side="right",  # models count positions from the first column, padding or not
            return_special_tokens_mask=True,  # padding is marked too
            return_tensors="pt",
        ).to(device)
        text = ~inputs.pop("special_tokens_mask").bool()
        keep = text & (text.cumsum(1) > skip_first)
        keep &= keep.flatten().cumsum(0).view_as(keep) <= missing
        missing -= int(keep.sum())
        yield {key: inputs[key] for key in ("input_ids", "attention_mask")}, keep
    if n_tokens is not None and missing > 0:
        raise SaesubError(
            f"the corpus has {missing} tokens fewer than n_tokens={n_tokens}: ask for fewer."
        )
