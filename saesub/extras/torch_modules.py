"""Spectra of any torch model, at the inputs and outputs of its own modules.

`saesub.measure_spectra` reads language models by hook point. Here the site is a module and a side,
so that encoders, speech models and whatever else transformers loads can be measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.errors import SaesubError, near_names
from saesub.progress import bar

Batch = tuple[Mapping[str, Any], Bool[Tensor, "batch pos"]]
"""Keyword arguments of the model's forward pass, and the positions that statistics are taken at."""


@dataclass(frozen=True)
class Site:
    """The first input or the output of a module, named by its path inside the model."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class _Layout:
    """Where a family keeps its blocks, and inside a block the matrices that write."""

    blocks: str
    attention: str
    mlp: str
    cross: str = ""


_LAYOUTS = {
    ("bert", "encoder"): _Layout("encoder.layer", "attention.output.dense", "output.dense"),
    ("mpnet", "encoder"): _Layout("encoder.layer", "attention.attn.o", "output.dense"),
    ("whisper", "encoder"): _Layout("model.encoder.layers", "self_attn.out_proj", "fc2"),
    ("whisper", "decoder"): _Layout(
        "model.decoder.layers", "self_attn.out_proj", "fc2", "encoder_attn.out_proj"
    ),
    ("gpt2", "decoder"): _Layout("transformer.h", "attn.c_proj", "mlp.c_proj"),
}


def block_sites(model: nn.Module, stack: str = "encoder") -> dict[tuple[int, str], Site]:
    """The four kinds of site in every block of a model, by (layer, kind).

    "attn_out" and "mlp_out" are the outputs of the last matrix of attention and MLP, before they
    are added to the residual stream; in post-norm models (BERT, MPNet) that is before the LayerNorm
    too. "resid_post" is the block's output: after its last LayerNorm in post-norm models, the bare
    sum in pre-norm ones. "z" is the heads' concatenated output, the input of the output projection.
    A decoder that attends to an encoder has "cross_out" and "cross_z" besides.

    Raises SaesubError for a family whose modules are not known here, or that lacks the stack.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    layout = _LAYOUTS.get((family, stack))
    if layout is None:
        known = ", ".join(f"{f} ({s})" for f, s in _LAYOUTS)
        raise SaesubError(
            f"the sites of the {stack} of {family!r} are not listed (known: {known}): name them "
            "yourself, as Site(module, side)."
        )
    sites = {}
    for layer in range(len(model.get_submodule(layout.blocks))):  # pyright: ignore[reportArgumentType]
        block = f"{layout.blocks}.{layer}"
        sites[layer, "attn_out"] = Site(f"{block}.{layout.attention}", "output")
        sites[layer, "mlp_out"] = Site(f"{block}.{layout.mlp}", "output")
        sites[layer, "resid_post"] = Site(block, "output")
        sites[layer, "z"] = Site(f"{block}.{layout.attention}", "input")
        if layout.cross:
            sites[layer, "cross_out"] = Site(f"{block}.{layout.cross}", "output")
            sites[layer, "cross_z"] = Site(f"{block}.{layout.cross}", "input")
    return sites


def measure_module_spectra(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Mapping[Any, Site],
    *,
    forward: Callable[..., Any] | None = None,
    progress: bool = True,
) -> dict[Any, Spectrum]:
    """Mean and covariance at several sites from one pass over the batches; nothing is stored.

    Args:
        model: any torch module in eval mode.
        batches: what to feed it, and which positions count: `keep` has shape (batch, pos), and
            every site must give a tensor (batch, pos, d) or a tuple that begins with one.
        sites: the modules to listen to, by names of your own.
        forward: what to call with each batch's arguments; by default the model itself. A part of
            the model will do, such as one without the output layer.
        progress: show a bar, with the time left where `batches` is a list.

    Raises:
        SaesubError: no batches or no kept position, a module that the model lacks or that did not
            run, a model in training mode, a tensor of another shape, NaN or infinite activations.
    """
    if model.training:
        raise SaesubError("the model is in training mode, with dropout: call model.eval() first.")
    modules = {name: _module(model, site) for name, site in sites.items()}
    totals: dict[Any, SpectrumAccumulator] = {}
    with ExitStack() as stack, torch.no_grad():
        current: list[Tensor] = []

        def listener(name: Any) -> Callable[..., None]:
            def listen(_module: nn.Module, args: Any, output: Any = None) -> None:
                value = args if output is None else output
                x = value[0] if isinstance(value, (tuple, list)) else value
                rows = _kept_rows(name, x, current[0])
                if name not in totals:
                    totals[name] = SpectrumAccumulator(rows.shape[1])
                try:
                    totals[name].update(rows)
                except SaesubError as error:
                    raise SaesubError(f"{name}: {error}") from error

            return listen

        for name, site in sites.items():
            module, hook = modules[name], listener(name)
            before = site.side == "input"
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook).remove)
        for inputs, keep in bar(batches, unit="batch", progress=progress):
            current[:] = [keep]
            (forward or model)(**inputs)
    if silent := [name for name in sites if name not in totals]:
        raise SaesubError(f"no activations came from {silent[:3]}: check the batches and modules.")
    return {name: totals[name].finish({"hook_name": str(name)}) for name in sites}


def _module(model: nn.Module, site: Site) -> nn.Module:
    if site.side not in ("input", "output"):
        raise SaesubError(f"a site's side is 'input' or 'output', not {site.side!r}.")
    try:
        return model.get_submodule(site.module)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise SaesubError(
            f"the model has no module {site.module!r}: {near_names(site.module, known)}"
        ) from error


def _kept_rows(name: Any, x: Any, keep: Tensor) -> Float[Tensor, "n d"]:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != keep.shape:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SaesubError(
            f"{name} gives {shape}, not (batch, pos, d) with (batch, pos) = {tuple(keep.shape)}: "
            "choose another module."
        )
    return x[keep.to(x.device)]


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

    Raises SaesubError if the corpus ends before `n_tokens`.
    """
    missing = float("inf") if n_tokens is None else n_tokens
    for start in range(0, len(corpus), batch_size):
        if missing < 1:
            return
        inputs = tokenizer(
            corpus[start : start + batch_size]["text"],
            truncation=True,
            max_length=context_size,
            padding=True,
            return_special_tokens_mask=True,  # padding is marked too
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        text = ~inputs["special_tokens_mask"].bool()
        keep = text & (text.cumsum(1) > skip_first)
        keep &= keep.flatten().cumsum(0).view_as(keep) <= missing
        missing -= int(keep.sum())
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, keep
    if n_tokens is not None and missing > 0:
        raise SaesubError(
            f"the corpus has {missing} tokens fewer than n_tokens={n_tokens}: ask for fewer."
        )
