"""Runs all tests in two processes side by side: those that are not slow, and the slow ones.

    python tests/halves.py [options of pytest]

Each process has one thread, since torch's threads in two processes fight for the same cores. The
first half is shown as it runs, then what the second one has shown so far, then the rest of that.
On a machine with one core they run one after the other. The status is 0 if both halves passed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
HALVES = ("not slow", "slow")
NO_TESTS = 5  # pytest's status where nothing was collected, as of half of a single file
_EVERY = 0.5  # seconds


def main(arguments: Sequence[str]) -> int:
    """Run both halves; pytest's status of the first that failed."""
    if cores() < 2:
        codes = [_show(half, _start(half, arguments, None), None) for half in HALVES]
    else:
        codes = _side_by_side(arguments)
    for half, code in zip(HALVES, codes, strict=True):
        print(f"{half}: {_in_words(code)}", flush=True)
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return failed[0] if failed else min(codes)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _side_by_side(arguments: Sequence[str]) -> list[int]:
    with tempfile.TemporaryFile() as kept:
        started = [_start(HALVES[1], arguments, kept)]
        try:
            started.insert(0, _start(HALVES[0], arguments, None))
            shown = zip(HALVES, started, (None, kept), strict=True)
            return [_show(half, process, output) for half, process, output in shown]
        except BaseException:
            for process in started:
                process.terminate()
                process.wait()
            raise


def _start(
    half: str, arguments: Sequence[str], output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "pytest", "-m", half, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=output and subprocess.STDOUT
    )


def _show(half: str, process: subprocess.Popen[bytes], output: IO[bytes] | None) -> int:
    """Wait for a half's end and show what it writes to `output`."""
    if output is None:
        return process.wait()
    print(f"\n===== {half} =====", flush=True)
    at = 0
    while True:
        ended = process.poll() is not None  # asked first, so that nothing written before is lost
        text = os.pread(output.fileno(), 1 << 20, at)
        at += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        if ended and not text:
            return process.returncode
        if not text:
            time.sleep(_EVERY)


def _in_words(code: int) -> str:
    return {0: "passed", NO_TESTS: "no tests"}.get(code, f"FAILED (status {code})")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that both halves end too
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
