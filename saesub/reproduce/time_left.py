"""How far a run of the notebooks is, and how long the rest takes by a committed run of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from saesub.paths import data_file
from saesub.reproduce.report import Outcome

# Recorded seconds that count as seen here at the record's own speed: a first notebook, which may
# fetch a model meanwhile, says little about the others.
_EXPECTED_BEFORE = 120.0


def recorded_seconds(profile: str) -> dict[str, float]:
    """The seconds that each notebook took in the committed run of a profile; empty without one."""
    file = data_file(f"results/{profile}/run.json")
    if not file.is_file():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    return {name: recorded["seconds"] for name, recorded in record.items()}


def seconds_left(
    expected: Mapping[str, float], taken: Mapping[str, float], to_run: Sequence[str]
) -> float | None:
    """Seconds that the notebooks `to_run` will take, by what they took elsewhere (`expected`).

    Args:
        taken: seconds that finished notebooks took here, against which `expected` is scaled.

    Returns None where a notebook to run has no expected time: the sum would be too small.
    """
    if not expected.keys() >= set(to_run):
        return None
    known = expected.keys() & taken.keys()
    elsewhere = _EXPECTED_BEFORE + sum(expected[name] for name in known)
    here = _EXPECTED_BEFORE + sum(taken[name] for name in known)
    return here / elsewhere * sum(expected[name] for name in to_run)


def progress(
    names: Sequence[str], ended: Mapping[str, Outcome], expected: Mapping[str, float]
) -> str:
    """How far the run of the notebooks `names` is: "3 of 13 done, 1 failed, about 28 min left".

    A notebook that failed took less than a whole run of it, so it scales nothing.
    """
    taken = {name: outcome.seconds for name, outcome in ended.items() if not outcome.error}
    failed, to_run = len(ended) - len(taken), [name for name in names if name not in ended]
    left = seconds_left(expected, taken, to_run)
    told = [f"{len(taken)} of {len(names)} done"]
    told += [f"{failed} failed"] if failed else []
    told += [f"about {_in_words(left)} left"] if to_run and left is not None else []
    return ", ".join(told)


def _in_words(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
