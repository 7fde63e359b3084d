"""Time every contender, each run in a process of its own, in turn; one record file a cell.

    python benchmarks/run.py --widths 4608 16384 --batches 2048 --rounds 2

A cell is one (batch, width). Interrupted, the same command goes on where it stopped; runs that
failed are tried again. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from environments import CONTENDERS, FOLDER, Contender, python

from saesub.files import write_atomically
from saesub.reproduce.report import processor

ACTIVATIONS = FOLDER / ".cache" / "activations.npy"
TIMEOUT = 3600  # seconds for one process
MEMORY_SHARE = 0.9  # of the machine's, beyond which a contender fails


def main() -> None:
    args = _arguments()
    contenders = [c for c in CONTENDERS if c.name in args.only]
    pythons = {c.environment: python(c.environment) for c in contenders}
    if not ACTIVATIONS.exists():
        make = [sys.executable, FOLDER / "activations.py", ACTIVATIONS]
        subprocess.run(make, check=True)
    for batch in args.batches:
        for d_sae in args.widths:
            cell = Cell(args, batch, d_sae)
            for round_ in range(args.rounds):
                for contender in contenders:
                    cell.run(contender, pythons[contender.environment], round_)


def _arguments() -> argparse.Namespace:
    names = [c.name for c in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4608, 16384, 36864, 73728])
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 4096], help="tokens")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender a cell")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    return parser.parse_args()


class Cell:
    """The record file of one batch (tokens) and width, and the runs that fill it."""

    def __init__(self, args: argparse.Namespace, batch: int, d_sae: int) -> None:
        self.batch, self.d_sae, self.rounds = batch, d_sae, args.rounds
        self.path = args.results / f"b{batch}-d{d_sae}.json"
        settings = {"batch": batch, "d_sae": d_sae}
        settings |= {name: getattr(args, name) for name in ("warm_up", "steps", "threads")}
        self.record: dict[str, Any] = {"settings": settings, "machine": machine(), "runs": []}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if (found["settings"], found["machine"]) != (settings, self.record["machine"]):
                raise SystemExit(
                    f"{self.path} is of other settings or another machine: pass other --results."
                )
            self.record = found

    def run(self, contender: Contender, interpreter: Path, round_: int) -> None:
        """One process, unless it has succeeded before; its record is written at once."""
        earlier = self._find(contender.name, round_)
        if earlier is not None and "error" not in earlier:
            return
        if earlier is not None:
            self.record["runs"].remove(earlier)
        start = time.monotonic()
        outcome = self._measure(contender, interpreter)
        self.record["runs"].append({"contender": contender.name, "round": round_, **outcome})
        self._write()
        self._report(contender.name, round_, outcome, time.monotonic() - start)

    def _find(self, name: str, round_: int) -> dict[str, Any] | None:
        runs = self.record["runs"]
        return next((r for r in runs if (r["contender"], r["round"]) == (name, round_)), None)

    def _measure(self, contender: Contender, interpreter: Path) -> dict[str, Any]:
        settings = self.record["settings"]
        arguments = [_shown(FOLDER / "contenders" / contender.script), *contender.arguments]
        arguments += ["--activations", _shown(ACTIVATIONS)]
        for option in ("d_sae", "batch", "warm_up", "steps", "threads"):
            arguments += [f"--{option.replace('_', '-')}", str(settings[option])]
        arguments += ["--memory-bytes", str(int(MEMORY_SHARE * memory_bytes()))]
        provenance = {
            "command": shlex.join(["python", *arguments]),
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return {**provenance, **_process([str(interpreter), *arguments], settings["threads"])}

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.record, indent=1) + "\n")

    def _report(self, name: str, round_: int, outcome: dict[str, Any], wall: float) -> None:
        where = f"batch {self.batch}  d_sae {self.d_sae}  round {round_ + 1}/{self.rounds}"
        if "error" in outcome:
            what = f"FAILED: {outcome['error']}"
        else:
            steps = " ".join(f"{s:.3f}" for s in outcome["seconds"])
            what = f"{steps} s/step  peak {outcome['peak_bytes'] / 1e9:.2f} GB"
        print(f"{where}  {name:25} {what}  ({wall:.0f} s)", flush=True)


def _process(command: list[str], threads: int) -> dict[str, Any]:
    """A contender's JSON line, or {"error": its last word}."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    try:
        done = subprocess.run(
            command,
            cwd=FOLDER.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {TIMEOUT} s"}
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}"}
    if done.returncode > 0:
        return {"error": _last_word(done.stderr).replace(f"{FOLDER.parent}{os.sep}", "")}
    return json.loads(done.stdout.splitlines()[-1])


def _last_word(stderr: str) -> str:
    """The exception's line, or the last: a progress bar may close after the traceback."""
    lines = stderr.strip().splitlines() or ["no message"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
    return (raised or lines)[-1]


def _shown(path: Path) -> str:
    """`path` from the repository's root, where the contenders run."""
    return path.relative_to(FOLDER.parent).as_posix()


def memory_bytes() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> dict[str, Any]:
    """What decides the times, but for what else the machine is doing."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes() / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The checked-out commit, `-dirty` if tracked files differ from it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    done = subprocess.run(describe, cwd=FOLDER, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
