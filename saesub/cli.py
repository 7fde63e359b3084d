"""The `saesub` command: packaged files, the notebooks, a check of the GPU, SAEs diagnosed.

A command imports what it needs when it runs, so that help, version and list answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from saesub import __version__
from saesub.errors import SaesubError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 for success, 1 where a notebook, a check or one of several SAEs failed,
    2 for a mistake.

    Where the reader of its output has gone, as in `saesub list | head -1`, it ends without a word
    and returns 141, as the shell's own commands do.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would be written, and fail, once more when Python exits.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SaesubError as error:
        print(f"saesub: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("saesub: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saesub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"saesub {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help="`saesub COMMAND --help` lists its options"
    )
    _command(commands, _list, "list packaged models, encoders, corpora, recordings and samples")

    fetching = _command(commands, _fetch, "download packaged files into the cache, once")
    fetching.add_argument(
        "names", nargs="+", metavar="NAME", help="a name that `saesub list` shows"
    )

    running = _command(commands, _reproduce, "run or continue the notebooks and write the report")
    running.add_argument(
        "--profile",
        default="quick",
        metavar="smoke|quick|full|paper",
        help="how much to run: some minutes, 20, two hours, or a GPU's work (default: quick)",
    )
    running.add_argument(
        "--notebook", nargs="+", action="extend", default=[], metavar="NN", help="only these"
    )
    running.add_argument(
        "--results", default="results", metavar="DIR", help="the output folder (default: results)"
    )
    running.add_argument("--again", action="store_true", help="run finished notebooks again")
    for command in (fetching, running):
        command.add_argument("--quiet", action="store_true", help="show no progress bars")

    scoring = _command(commands, _scorecard, "show the claims measured in a results folder")
    scoring.add_argument("folder", metavar="DIR", help="such as results/quick")

    keeping = _command(commands, _cache, "list the activations and spectra that were kept")
    keeping.add_argument("--clear", action="store_true", help="remove them")

    diagnosing = _command(commands, _diagnose, "tell why features of saved SAEs are dead")
    diagnosing.add_argument("path", metavar="PATH", help="an SAELens SAE, or a folder of several")
    diagnosing.add_argument("--activations", metavar="FILE", help="a .npy or .safetensors file")
    diagnosing.add_argument("--model", help="instead: the model (default: what each SAE names)")
    diagnosing.add_argument("--corpus", default="wiki-en", help="its text (default: wiki-en)")
    diagnosing.add_argument("--hook", help="hook point (default: what each SAE names)")
    diagnosing.add_argument(
        "--tokens", type=int, metavar="N", help="the window (default: 100,000, or all of the file)"
    )
    checking = _command(commands, _check_gpu, "test and time the training step on a GPU")
    checking.add_argument("--json", metavar="FILE", help="write the report as JSON, too")
    return parser


def _command(commands: Any, run: Any, what: str) -> argparse.ArgumentParser:
    name = run.__name__.removeprefix("_").replace("_", "-")
    parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _list(_: argparse.Namespace) -> int:
    from saesub.loading.registry import Kind, packaged, packaged_names

    for kind in get_args(Kind):
        print(f"{kind}:")
        for name in packaged_names(kind):
            print(f"  {name:<22} {packaged()[name].description}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from saesub.loading.download import fetch

    for name in options.names:
        print(f"{name}: {fetch(name, progress=not options.quiet)}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from saesub.reproduce.runner import reproduce

    settings = {"again": options.again, "quiet": options.quiet}
    outcomes = reproduce(options.profile, options.notebook, options.results, **settings)
    failed = [o for o in outcomes if o.error]
    for outcome in failed:
        print(f"saesub: {outcome.name} {outcome.error}", file=sys.stderr)
    return 1 if failed else 0


def _scorecard(options: argparse.Namespace) -> int:
    from saesub.reproduce import claims

    print(claims.scorecard(claims.collect(options.folder)))
    return 0


def _cache(options: argparse.Namespace) -> int:
    from saesub.activations import cache
    from saesub.paths import cache_dir, cache_errors

    if options.clear:
        with cache_errors(cache_dir()):
            removed, left = cache.clear()
        print(f"removed {sum(one.n_bytes for one in removed) / 1e6:,.1f} MB")
        for one in left:
            print(f"left, since a process writes there: {one}")
        return 0
    found = cache.kept()
    for one in found:
        print(one)
    total, free = sum(one.n_bytes for one in found) / 1e6, cache.free_bytes() / 1e6
    what = f"holds {total:,.1f} MB of" if found else "holds no"
    print(f"{cache_dir()} {what} activations and spectra; {free:,.0f} MB of its disk are free")
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    for path in filter(None, (options.path, options.activations)):
        if not os.path.exists(path):  # said at once, where the imports take seconds
            raise SaesubError(f"there is no {path}: give a path that exists")
    from saesub.evaluation.diagnosis import ranking
    from saesub.evaluation.saved import diagnose_saved

    reports, refused = diagnose_saved(
        options.path,
        file=options.activations,
        model=options.model,
        corpus=options.corpus,
        hook_name=options.hook,
        n_tokens=options.tokens,
    )
    if len(reports) > 1:
        print(ranking(reports))
    for name, report in reports.items():
        print(f"\n{name}: {report.advice}" if len(reports) > 1 else report)
    for error in refused:
        print(f"saesub: no diagnosis of {error}", file=sys.stderr)
    return (1 if reports else 2) if refused else 0


def _check_gpu(options: argparse.Namespace) -> int:
    from saesub.extras.gpu_speed import check_gpu

    return check_gpu(options.json)


if __name__ == "__main__":
    sys.exit(main())
