"""The table of claims: one set of texts for each row, shown as HTML, text or Markdown."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

from saesub.errors import SaesubError, near_names
from saesub.reproduce.paper_claims import DIRECTION, FAILS, HOLDS, MIXED, UNTESTED, load_claims

# Okabe-Ito colours darkened for text, each with its own symbol.
_LOOK = {
    HOLDS: ("✔", "#005f8f"),
    DIRECTION: ("↗", "#8a5a00"),
    MIXED: ("≈", "#8a3d6b"),
    FAILS: ("✘", "#b33c00"),
    UNTESTED: ("–", "#666666"),
}
VERDICTS = tuple(_LOOK)
SYMBOLS = {verdict: symbol for verdict, (symbol, _) in _LOOK.items()}
SHORT = 9  # digits of a commit that a table shows
_HEAD = ("Claim", "Paper", "Here", "Verdict")
_STYLE = "text-align:left;vertical-align:top;white-space:normal"


class ClaimsTable:
    """Rows of claim, paper's figure, value here and verdict; shows itself as HTML or text.

    A row may also have `bound`, the commit that set its claim's bounds, and `bound_is_younger`,
    whether the record's commit lacks it.

    Raises `SaesubError` for a verdict that does not exist.
    """

    def __init__(self, rows: Sequence[dict]) -> None:
        self.rows = list(rows)
        if bad := [row["verdict"] for row in rows if row["verdict"] not in VERDICTS]:
            raise SaesubError(f"no verdict {bad[0]!r}; {near_names(bad[0], VERDICTS)}")

    def counts(self) -> dict[str, int]:
        """How many rows have each verdict."""
        return {v: sum(row["verdict"] == v for row in self.rows) for v in VERDICTS}

    def __str__(self) -> str:
        counts = self.counts().items()
        totals = "   ".join(f"{_LOOK[v][0]} {n} {v}" for v, n in counts if n)
        return "\n".join([totals, *(_text(_texts(row)) for row in self.rows)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{h}</th>" for h in _HEAD)
        body = "".join(map(html_row, self.rows))
        return (
            "<div style='overflow-x:auto'><table class='saesub-claims'>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def markdown(self) -> str:
        """A Markdown table, one line per row, with the notebook."""
        lines = ["| " + " | ".join((*_HEAD, "Notebook")) + " |", "|---" * 5 + "|"]
        for row in self.rows:
            t = {key: markdown_text(text) for key, text in _texts(row).items()}
            cells = (
                f"**{t['id']}** {t['claim']}",
                t["paper"],
                _lines(t["here"], _small(t["regime"]), _small(t["n"])),
                _lines(_judged(t), _small(t["own_note"]), _small(t["commits"])),
                t["notebook"],
            )
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def regime_row(row: dict) -> str:
    """A row of a Markdown table of one claim: regime, value, verdict and commits."""
    t = {key: markdown_text(text) for key, text in _texts(row).items()}
    cells = (
        _lines(t["regime"], _small(t["n"])),
        t["here"],
        _lines(_judged(t), _small(t["own_note"])),
        _small(t["commits"]),
    )
    return f"| {' | '.join(cells)} |"


def _judged(t: dict[str, str]) -> str:
    return f"{t['symbol']} {t['verdict']}" + f" ({t['doubt']})" * bool(t["doubt"])


def _texts(row: dict) -> dict[str, str]:
    """What every form of the table shows of a row."""
    symbol, colour = _LOOK[row["verdict"]]
    texts = {key: row[key] for key in ("id", "claim", "verdict", "n", "notebook")}
    texts |= {key: row.get(key, "") for key in ("regime", "doubt")}  # not in older records
    notes = dict.fromkeys(filter(None, [row["note"], texts["doubt"]]))
    return texts | {
        "symbol": symbol,
        "colour": colour,
        "paper": row["paper"] or "none given",
        "here": _here(row),
        "note": "; ".join(notes),
        "own_note": row["note"] if row["note"] != texts["doubt"] else "",
        "commits": _commits(row),
    }


def _commits(row: dict) -> str:
    """The commits of the bounds and of the record, as far as the row has them."""
    bound, record = row.get("bound", ""), row.get("record", "")[:SHORT]
    commits = [f"bound {bound}" * bool(bound), f"record {record}" * bool(record)]
    told = ", ".join(filter(None, commits))
    return told + "; bound set after the record" * row.get("bound_is_younger", False)


def _text(t: dict[str, str]) -> str:
    figures = f"paper {t['paper']} · here {t['here']}"
    lines = [f"\n{t['symbol']} {t['id']}: {t['verdict']}"]
    about = [figures, t["regime"], t["n"], t["note"], t["commits"]]
    for text in (t["claim"], " · ".join(filter(None, about))):
        lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def html_row(row: dict) -> str:
    """A row of the HTML table, every text escaped."""
    t = {key: html.escape(text) for key, text in _texts(row).items()}
    regime, n, note, commits = (_small(t[key]) for key in ("regime", "n", "note", "commits"))
    cells = (
        f"<b>{t['id']}</b><br>{t['claim']}",
        t["paper"],
        _lines(t["here"], regime, n),
        f"<b style='color:{t['colour']}'>{t['symbol']} {t['verdict']}</b><br>"
        + _lines(note, commits),
    )
    return "<tr>" + "".join(f"<td style='{_STYLE}'>{cell}</td>" for cell in cells) + "</tr>"


def markdown_text(text: str) -> str:
    """The text as a cell of a Markdown table shows it: on one line, with markup, bars and links
    escaped."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("|", "\\|").replace("](", "]\\(")


def _small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""


def _lines(*texts: str) -> str:
    return "<br>".join(filter(None, texts))


def _here(row: dict) -> str:
    if row["value"] is None:
        return "not measured"
    interval = [number(row, end, with_unit=False) for end in row["interval"] or ()]
    return number(row, row["value"]) + f" [{', '.join(interval)}]" * bool(interval)


def number(row: dict, value: float, *, with_unit: bool = True) -> str:
    """A value of the row's claim as tables write it: a share in per cent, a difference of two
    shares in points; a plain number where the list of claims no longer has it."""
    claim = load_claims().get(row["id"])
    if claim is None or not claim.shown_in:
        return f"{value:.3g}"
    digits = 1 if abs(value) >= 0.01 or value == 0 else 2
    told = f"{round(100 * value, digits) + 0.0:.{digits}f}"  # no minus before a zero
    return f"{told} {claim.shown_in}" if with_unit else told
