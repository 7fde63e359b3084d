r"""A count of the faults that the tests tried, by kind.

With `SAESUB_FAULTS` set to a file, the counts of the modules that ran, and of no failing one, are
written there, for `notebooks/publish.py` to put into docs/faults.md:

    SAESUB_FAULTS=data/results/faults.json pytest tests/test_kill.py tests/test_faults.py \
        tests/test_interrupt.py tests/test_bad_data.py tests/test_safety.py \
        tests/test_distributed.py
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


class Faults:
    """What was tried in one test module and ended well."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def survived(self, what: str, times: int = 1) -> None:
        """Call it after the assertions: a fault that was not survived is not counted."""
        self.counts[what] += times


@pytest.fixture(name="faults", scope="module")
def count_faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    """Counts of this module, added to the file that `SAESUB_FAULTS` names."""
    found, failed = Faults(), request.session.testsfailed
    yield found
    path = os.environ.get("SAESUB_FAULTS")
    if path and request.session.testsfailed == failed:
        file = Path(path)
        kept = json.loads(file.read_text()) if file.is_file() else {}
        kept[request.module.__name__] = dict(found.counts)
        file.write_text(json.dumps(kept, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
