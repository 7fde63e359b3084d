"""Time each library from text to a trained and judged SAE, each in a process of its own.

    python benchmarks/end_to_end.py           # one cell: saesub, SAELens' runner once and twice
    python benchmarks/end_to_end.py --all     # every cell and contender, some hours
    python benchmarks/end_to_end.py --models smollm2-135m --widths 4608 --steps 24

A cell is one (model, width, steps), with one record file, written after each run. Interrupted, the
same command goes on where it stopped; runs that failed are tried again. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import FOLDER, Contender, python
from run import Record, machine, process, shown

import saesub
from saesub.activations.collect import stream_activations
from saesub.loading.models import context_tokens
from saesub.topk import cpu_library

RESULTS = FOLDER / "results" / "end-to-end"
PREPARED = FOLDER / ".cache" / "end-to-end"
RECIPE = {
    "layer": 12,
    "k": 32,
    "batch": 2048,  # tokens of a step
    "context": 256,
    "held_out": 20_480,  # tokens
    "lr": 2e-3,
    "threads": 2,
}
PLAUSIBLE_FVU = (0.01, 0.9)  # an untrained SAE has 1 or more

CONTENDERS = (
    Contender("saesub", "whole_saesub.py"),
    Contender("saesub-two", "whole_saesub.py", ("--initialisations", "random", "asi")),
    Contender("sae-lens", "whole_saelens.py"),
    Contender("sae-lens-fast", "whole_saelens.py", ("--fast",)),
    Contender("sparsify", "whole_sparsify.py", environment="sparsify"),
    Contender(
        "dictionary-learning", "whole_dictionary_learning.py", environment="dictionary_learning"
    ),
    Contender("sae-lens-two", "whole_saelens.py", ("--runs", "2")),
)
SITES = {"gemma3-270m": "post_attention_layernorm"}  # what blocks.*.hook_attn_out is of a layer
OTHER_SITE = "self_attn.o_proj"
FIRST = ("saesub", "saesub-two", "sae-lens", "sae-lens-two")  # of CONTENDERS, without --all
CELLS = (  # model, d_sae, steps
    ("smollm2-135m", 36864, 98),
    ("smollm2-135m", 36864, 24),
    ("smollm2-135m", 16384, 24),
    ("smollm2-135m", 4608, 24),
    ("gemma3-270m", 4608, 24),
)


def main() -> None:
    args = _arguments()
    contenders = [c for c in CONTENDERS if c.name in args.only]
    pythons = {c.environment: python(c.environment) for c in contenders}
    cpu_library.library()  # compiled once on a machine, before anything is timed
    for model in dict.fromkeys(model for model, _, _ in args.cells):
        texts = PREPARED / Path(model).name
        given = prepare(model, args.corpus, texts, args.recipe)
        for d_sae, steps in [cell[1:] for cell in args.cells if cell[0] == model]:
            settings = args.recipe | {"model": Path(model).name, "d_sae": d_sae, "steps": steps}
            path = args.results / f"{Path(model).name}-d{d_sae}-s{steps}.json"
            record = Record(path, settings, machine())
            for contender in contenders:
                run(record, contender, pythons[contender.environment], given)


def _arguments() -> argparse.Namespace:
    names = [c.name for c in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every cell and contender")
    parser.add_argument("--models", nargs="+", help="packaged names, or folders")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", help="of 2,048 tokens")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--corpus", default="wiki-en")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name, value in RECIPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    args.recipe = {name: getattr(args, name) for name in RECIPE}
    chosen = (args.models, args.widths, args.steps)
    args.cells = _cells(chosen) if any(chosen) else CELLS if args.all else CELLS[:1]
    args.only = args.only or (names if args.all else FIRST)
    return args


def _cells(chosen: Iterable[list[Any] | None]) -> list[tuple[str, int, int]]:
    """Every combination of what was named; what was not is as in the first cell."""
    models, widths, steps = (
        named or [first] for named, first in zip(chosen, CELLS[0], strict=True)
    )
    return [(m, w, s) for m in models for w in widths for s in steps]


def prepare(model: str, corpus: str, folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Write what all contenders read, outside their time; returns their arguments.

    `train.jsonl` and `held_out.jsonl` are the documents of a corpus in two parts; `held_out.npy`
    (held_out, d_in) float32 are activations of the second part, which judge all contenders alike.
    `model` leads to the folder of the model's weights in float32, which are made if need be.
    """
    bridge, documents = saesub.load_model(model), saesub.load_corpus(corpus)["text"][:]
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(documents) * 9 // 10
    for name, part in {"train": documents[:cut], "held_out": documents[cut:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    hook, n = f"blocks.{recipe['layer']}.hook_attn_out", recipe["held_out"]
    settings = {"n_tokens": n, "context_size": recipe["context"], "progress": False}
    blocks = stream_activations(bridge, documents[cut:], [hook], **settings)
    held_out = torch.cat([block[hook] for block in blocks])
    np.save(folder / "held_out.npy", held_out.numpy())
    link, specials = folder / "model", context_tokens(bridge)
    link.unlink(missing_ok=True)
    link.symlink_to(bridge.original_model.config.name_or_path, target_is_directory=True)
    given = {
        "model": model,
        "texts": shown(folder),
        "site": SITES.get(model, OTHER_SITE),
        "d_in": held_out.shape[1],
        "bos": specials.bos_id,
        "separator": specials.separator_id,
    }
    return _flags(given)


def _flags(given: dict[str, Any]) -> list[str]:
    """Options of a command line, of all that is not None."""
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in given.items() if v is not None]
    return [word for pair in pairs for word in pair]


def run(record: Record, contender: Contender, interpreter: Path, given: list[str]) -> None:
    """One process, unless it has succeeded before."""
    if record.has(contender.name):
        return
    settings = {k: v for k, v in record.settings.items() if k != "model"}
    arguments = [*given, *_flags(settings)]
    outcome = process(contender, interpreter, arguments, settings["threads"], clock=True)
    if fault := implausible(outcome, settings["steps"] * settings["batch"]):
        outcome = {k: outcome[k] for k in ("command", "commit", "date")} | {"error": fault}
    record.put(contender.name, 0, outcome)
    print(f"{record.path.stem}  {contender.name:20} {_told(outcome)}", flush=True)


def implausible(outcome: dict[str, Any], n_tokens: int) -> str:
    """What shows that a contender did not do the job; empty if nothing does.

    `n_tokens` are those that each SAE was to be trained on.
    """
    if "error" in outcome:
        return ""
    saes = outcome["same_tokens"]
    if outcome["tokens_trained"] != n_tokens * len(saes):
        return f"trained on {outcome['tokens_trained']:,} tokens, not {n_tokens:,} for each SAE"
    low, high = PLAUSIBLE_FVU
    wrong = [sae["fvu"] for sae in saes if not low < sae["fvu"] < high]
    return f"an FVU of {wrong[0]:.3g} is not of a trained SAE" if wrong else ""


def _told(outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return f"FAILED: {outcome['error']}"
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in outcome["parts"].items())
    fvu = " ".join(f"{sae['fvu']:.3f}" for sae in outcome["same_tokens"])
    dead = " ".join(f"{sae['dead_share']:.3f}" for sae in outcome["same_tokens"])
    return f"{outcome['seconds']:.1f} s ({parts}); FVU {fvu}, dead {dead}"


if __name__ == "__main__":
    main()
