"""`saesub diagnose`: saved SAEs, the activations that each of them reads, and what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE
from torch import Tensor

from saesub.activations.collect import harvest
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.diagnosis import SAEDiagnosis, diagnose, ranking
from saesub.evaluation.passes import hook_of
from saesub.loading.saes import find_saes, load_activations, load_sae

_TOKENS = 100_000  # where the user names no window
_BLOCK = 8192


def diagnose_saved(
    path: str,
    *,
    file: str | None,
    model: str | None,
    corpus: str,
    hook_name: str | None,
    n_tokens: int | None,
) -> dict[str, SAEDiagnosis]:
    """The diagnosis of each SAE in a folder, over one window, loaded one after the other.

    Activations are those of a file, or of the model and hook point that are named or that the SAE's
    metadata name. Raises SaesubError where an SAE names no model or hook point and none is given,
    and as `load_sae`, `load_activations`, `harvest` and `diagnose`.
    """
    folders = find_saes(path)
    if n_tokens is not None:
        n_tokens = whole_number(n_tokens, "--tokens")
    if file is not None:
        if model or hook_name:
            raise SaesubError("--activations come from a file: leave out --model and --hook")
        x = load_activations(file)
        n = n_tokens or len(x)
        return {name: diagnose(load_sae(at), x, n_tokens=n) for name, at in folders.items()}
    n = n_tokens or _TOKENS
    sources = {name: _source(load_sae(at), name, model, hook_name) for name, at in folders.items()}
    stores = {}
    for of in dict.fromkeys(of for of, _ in sources.values()):
        hooks = list(dict.fromkeys(hook for by, hook in sources.values() if by == of))
        for hook, store in harvest(of, corpus, hooks, n_tokens=n).items():
            stores[of, hook] = store
    return {
        name: diagnose(load_sae(at), _rows(stores[sources[name]], n), n_tokens=n)
        for name, at in folders.items()
    }


def _source(sae: SAE[Any], name: str, model: str | None, hook_name: str | None) -> tuple[str, str]:
    """The model and the hook point of an SAE."""
    model = model or sae.cfg.metadata.model_name
    if not model:
        raise SaesubError(f"the SAE {name} does not name its model: pass --model or --activations")
    return model, hook_name or hook_of(sae)


def _rows(store: Any, n: int) -> Iterator[Tensor]:
    return (store.rows(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK))


def written(
    reports: Mapping[str, SAEDiagnosis], *, table: str | None = None, figure: str | None = None
) -> str:
    """The text of one diagnosis, whose table and figure are saved, or the ranking of several and
    the advice for each.

    Raises SaesubError for a table or figure of several, or one that cannot be written.
    """
    if len(reports) > 1:
        if table or figure:
            raise SaesubError("--table and --figure are of one SAE: give its own folder")
        advice = (f"{name}: {report.advice}" for name, report in reports.items())
        return "\n\n".join((ranking(reports), *advice))
    (report,) = reports.values()
    for target, save in ((table, _save_table), (figure, _save_figure)):
        if target:
            try:
                save(report, Path(target))
            except (OSError, ValueError) as error:
                raise SaesubError(
                    f"{target} cannot be written ({error}): give another path"
                ) from error
    return str(report)


def _save_table(report: SAEDiagnosis, path: Path) -> None:
    report.table().to_csv(path, index_label="feature")


def _save_figure(report: SAEDiagnosis, path: Path) -> None:
    from saesub.reproduce.plots import diagnosis

    diagnosis(report).savefig(path)
