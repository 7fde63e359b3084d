"""The tables of docs/gpu.md, from the records in data/results/gpu/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from saesub.reproduce import studies
from saesub.topk.triton_backend import LEAST_FOR_EIGHT_BITS as EIGHT_BITS_FROM

BATCH, D_IN = 4096, 576
_STEPS = re.compile(r"\d+ steps at (\d+) features, (.+) (adam|sparse_adam)")
_OPTIMIZERS = {"adam": "Adam", "sparse_adam": "SparseAdam"}
_CONTENDERS = {
    "sae-lens": "SAELens",
    "sparsify": "sparsify",
    "saesub torch": "saesub, torch's operators",
    "saesub triton": "saesub, 16 bits",
    "saesub triton in 8 bits": "saesub, 8 bits",
}


def tables() -> dict[str, str]:
    """Markdown by the names of the page's marks."""
    records = studies.on_gpu()
    return {
        "gpu-checked": _checked(records),
        "gpu-speed": _speed(records),
        "gpu": _in_short(records),
        "gpu-ratios": _ratios(records),
        "gpu-spread": _spread(records),
        "gpu-floor": _floor(records),
        "gpu-recall": _recall(records),
        "gpu-arms": _arms(),
        "gpu-bridge": _bridge(),
    }


def _checked(records: list[dict[str, Any]]) -> str:
    lines = ["| card | date | commit | kernels | public functions |", "|---|---|---|---|---|"]
    for record in records:
        facts, check, api = record["facts"], record.get("check", {}), record.get("api", {})
        outcomes = [row["outcome"] for row in check.values() if "outcome" in _fields(row)]
        passed = "not checked"
        if outcomes:
            n = outcomes.count("passed")
            passed = f"{n} of {len(outcomes)} checks passed"
        ran = "not tried"
        if api:
            n = sum("error" not in _fields(row) for row in api.values())
            ran = f"{n} of {len(api)} calls ran"
        where = f"{facts['card']}, torch {facts['versions']['torch']}"
        date, commit = facts["date"].split()[0], record["commit"][:7]
        lines.append(f"| {where} | {date} | `{commit}` | {passed} | {ran} |")
    return "\n".join(lines)


def _speeds(records: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """By contender, optimizer and features, at `BATCH` tokens; the newest."""
    return dict(_timed(records))


def _timed(records: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str, int], dict[str, Any]]]:
    """Every timing of steps of `BATCH` tokens; those in the table of speeds after the others."""
    for record in records:
        commit = {"commit": record["commit"][:7]}
        for name, row in record.get("check", {}).items():
            if (said := _STEPS.fullmatch(name)) and "ms" in _fields(row):
                yield (f"saesub {said[2]}", _OPTIMIZERS[said[3]], int(said[1])), row | commit
        for row in record.get("speed", {}).values():
            if _fields(row).get("batch") == BATCH and "ms" in row:
                contender, optimizer = _parts(row["name"])
                yield (contender, optimizer, row["d_sae"]), row | commit


def _spread(records: list[dict[str, Any]]) -> str:
    """How far two timings of the same code, made minutes apart, differ."""
    found: dict[Any, list[float]] = {}
    for key, row in _timed(records):
        found.setdefault((key, row["commit"]), []).append(row["ms"])
    ratios = [max(ms) / min(ms) - 1 for ms in found.values() if len(ms) > 1]
    return (
        f"{len(ratios)} of these steps were timed twice by the same code, minutes apart: the two "
        f"differ by {min(ratios):.0%} to {max(ratios):.0%}."
    )


def _parts(name: str) -> tuple[str, str]:
    """Contender and optimizer; the peers have Adam."""
    for key, optimizer in _OPTIMIZERS.items():
        if name.endswith(f" {key}"):
            return name.removesuffix(f" {key}"), optimizer
    return name, "Adam"


def _speed(records: list[dict[str, Any]]) -> str:
    speeds = _speeds(records)
    widths = sorted({width for _, _, width in speeds})
    titles = [f"{width:,} features" for width in widths]
    lines = [f"| | optimizer | {' | '.join(titles)} | commit |"]
    lines.append("|---|---|" + "---:|" * len(widths) + "---|")
    for contender, title in _CONTENDERS.items():
        for optimizer in _OPTIMIZERS.values():
            rows = [speeds.get((contender, optimizer, width)) for width in widths]
            if any(rows):
                cells = " | ".join(_cell(row) for row in rows)
                commit = next(row["commit"] for row in rows if row)
                lines.append(f"| {title} | {optimizer} | {cells} | `{commit}` |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['tokens_per_second'] / 1000:,.0f}, {row['peak_bytes'] / 1e9:.1f} GB"


def _ratios(records: list[dict[str, Any]]) -> str:
    """How many times a peer's tokens a second saesub takes, in its default bits, by width."""
    speeds = _speeds(records)
    widths = sorted({width for _, _, width in speeds})
    titles = [f"{width:,} features" for width in widths]
    lines = [
        f"| saesub's speed as a multiple of | {' | '.join(titles)} |",
        "|---|" + "---:|" * len(widths),
    ]
    for peer in ("sparsify", "sae-lens"):
        for optimizer in _OPTIMIZERS.values():
            cells = []
            for width in widths:
                own = "saesub triton in 8 bits" if width >= EIGHT_BITS_FROM else "saesub triton"
                rows = speeds[own, optimizer, width], speeds[peer, "Adam", width]
                cells.append("{:.1f}".format(rows[1]["ms"] / rows[0]["ms"]))
            lines.append(f"| {_CONTENDERS[peer]}, with {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_short(records: list[dict[str, Any]]) -> str:
    """For the README: the speed with Adam, which the peers have too, at the least and the largest
    width, and as a multiple of theirs."""
    speeds = _speeds(records)
    widths = sorted({width for _, _, width in speeds})
    ends, own = (widths[0], widths[-1]), []
    for width in ends:
        bits = " in 8 bits" if width >= EIGHT_BITS_FROM else ""
        own.append(speeds[f"saesub triton{bits}", "Adam", width]["tokens_per_second"])
    said = [
        f"{own[0] / s:.2g} / {own[1] / b:.2g} × {name}"
        for peer, name in (("sparsify", "sparsify"), ("sae-lens", "float32 SAELens"))
        for s, b in [[speeds[peer, "Adam", w]["tokens_per_second"] for w in ends]]
    ]
    eight = "; the second in 8 bits, timed only" * (ends[1] >= EIGHT_BITS_FROM > ends[0])
    return (
        f"On an [H200](docs/gpu.md), after `saesub check-gpu`: {own[0] / 1e6:.1f}M tok/s at "
        f"2^{ends[0].bit_length() - 1} features, {own[1] / 1e6:.2f}M at "
        f"2^{ends[1].bit_length() - 1} (Adam, no AuxK{eight}); "
        f"{', '.join(said)}."
    )


def _floor(records: list[dict[str, Any]]) -> str:
    """A step at the largest width beside the product that it has to take."""
    speeds = _speeds(records)
    width = max(width for _, _, width in speeds)
    teraflops = next(r["check"]["ceilings"] for r in records if "ceilings" in r.get("check", {}))
    rate = teraflops["float16 TFLOP/s"]
    product = 2 * BATCH * D_IN * width / rate / 1e9
    ms = [speeds[f"saesub triton{b}", "SparseAdam", width]["ms"] for b in ("", " in 8 bits")]
    return (
        f"At {width:,} features the product of tokens and encoder alone would take {product:.1f} "
        f"ms in 16 bits, at the {rate:.0f} TFLOP/s that torch's product of two matrices of side "
        f"8,192 reached at the first of the two commits. The whole step takes {ms[0]:.1f} ms "
        f"with SparseAdam, and {ms[1]:.1f} ms in 8 bits, at the second."
    )


def _recall(records: list[dict[str, Any]]) -> str:
    """The least share of the float32 top 32 that the searches find on trained weights."""
    rows = [_fields(row) for record in records for row in record.get("headline", {}).values()]
    found = [row["recall"] for row in rows if row.get("recall")]
    least = {bits: min(row[bits] for row in found) for bits in ("16 bits", "8 bits")}
    said = " and ".join(f"{share:.3%} in {bits}" for bits, share in least.items())
    return f"The least of {len(found)} SAEs that were trained there: {said}."


def _bridge() -> str:
    """The SAE that was trained on a CPU as well, there and on the card."""
    cpu = studies.recorded("million").rows.iloc[0]
    trained = studies.trained_on_gpu()
    row = trained[trained["name"] == "bridge"].iloc[-1]
    return (
        f"The same SAE, trained on the same rows, has {row['dead_share']:.1%} dead and FVU "
        f"{row['fvu']:.4f} on the card, {cpu['dead_share']:.1%} and {cpu['fvu']:.4f} on a CPU."
    )


def _arms() -> str:
    titles = "features | condition | rate | tokens | firings of a feature | dead | FVU"
    lines = [f"| {titles} | after a refit | commit |", "|---:|---|" + "---:|" * 6 + "---|"]
    trained = (
        studies.trained_on_gpu()
        .query("name != 'bridge'")
        .sort_values("d_sae", ascending=False, kind="stable")
    )
    for row in trained.itertuples():
        refitted = "" if pd.isna(row.refitted_fvu) else f"{row.refitted_fvu:.4f}"
        lines.append(
            f"| {row.d_sae:,} | {row.condition} | {row.lr:g} | {row.tokens:,} | "
            f"{row.firings:.0f} | {row.dead_share:.1%} | {row.fvu:.4f} | {refitted} | "
            f"`{row.commit[:7]}` |"
        )
    return "\n".join(lines)


def _fields(row: Any) -> dict[str, Any]:
    """A result that is a table, or nothing."""
    return row if isinstance(row, dict) else {}
