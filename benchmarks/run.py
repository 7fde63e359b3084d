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
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX",
    "asimd": "NEON",
    "asimddp": "NEON dot products",
}
"""What the kernel calls an instruction set, and what its maker does."""
HELD_TO = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "SAESUB_NATIVE_ISA": "avx2",
    }
}
"""What keeps torch, its libraries and saesub from using newer instruction sets."""


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
    parser.add_argument("--hold-to", choices=HELD_TO, help="use no newer instruction set")
    parser.add_argument("--results", type=Path, help="by default results/, or its folder avx2/")
    args = parser.parse_args()
    args.results = args.results or FOLDER / "results" / (args.hold_to or "")
    return args


class Record:
    """A file of the runs of one job (`settings`) on one machine; it is written after each run.

    Raises SystemExit where the file is of another job or machine.
    """

    def __init__(self, path: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self._record: dict[str, Any] = {"settings": settings, "machine": about, "runs": []}
        if path.exists():
            found = json.loads(path.read_text())
            # Older records do not name the instruction sets.
            named = {k: v for k, v in about.items() if k in {*found["machine"], "held_to"}}
            if (found["settings"], found["machine"]) != (settings, named):
                raise SystemExit(
                    f"{path} is of other settings or another machine: pass other --results."
                )
            self._record = found

    def has(self, contender: str, round_: int = 0) -> bool:
        """Whether this run has succeeded before."""
        earlier = self._find(contender, round_)
        return earlier is not None and "error" not in earlier

    def put(self, contender: str, round_: int, outcome: dict[str, Any]) -> None:
        """Keep a run, in place of an earlier one that failed."""
        earlier = self._find(contender, round_)
        if earlier is not None:
            self._record["runs"].remove(earlier)
        self._record["runs"].append({"contender": contender, "round": round_, **outcome})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self._record, indent=1) + "\n")

    def _find(self, name: str, round_: int) -> dict[str, Any] | None:
        runs = self._record["runs"]
        return next((r for r in runs if (r["contender"], r["round"]) == (name, round_)), None)


class Cell:
    """The record of one batch (tokens) and width, and the runs that fill it."""

    def __init__(self, args: argparse.Namespace, batch: int, d_sae: int) -> None:
        self.batch, self.d_sae, self.rounds = batch, d_sae, args.rounds
        self.hold_to = args.hold_to
        settings = {"batch": batch, "d_sae": d_sae}
        settings |= {name: getattr(args, name) for name in ("warm_up", "steps", "threads")}
        path = args.results / f"b{batch}-d{d_sae}.json"
        self.record = Record(path, settings, machine(args.hold_to))

    def run(self, contender: Contender, interpreter: Path, round_: int) -> None:
        """One process, unless it has succeeded before; its record is written at once."""
        if self.record.has(contender.name, round_):
            return
        start = time.monotonic()
        outcome = self._measure(contender, interpreter)
        self.record.put(contender.name, round_, outcome)
        self._report(contender.name, round_, outcome, time.monotonic() - start)

    def _measure(self, contender: Contender, interpreter: Path) -> dict[str, Any]:
        settings = self.record.settings
        arguments = ["--activations", shown(ACTIVATIONS)]
        warm_up = min(settings["warm_up"], 2) if contender.steady else settings["warm_up"]
        for option, value in (settings | {"warm_up": warm_up}).items():
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        arguments += ["--memory-bytes", str(int(MEMORY_SHARE * memory_bytes()))]
        return process(contender, interpreter, arguments, settings["threads"], self.hold_to)

    def _report(self, name: str, round_: int, outcome: dict[str, Any], wall: float) -> None:
        where = f"batch {self.batch}  d_sae {self.d_sae}  round {round_ + 1}/{self.rounds}"
        if "error" in outcome:
            what = f"FAILED: {outcome['error']}"
        else:
            steps = " ".join(f"{s:.3f}" for s in outcome["seconds"])
            what = f"{steps} s/step  peak {outcome['peak_bytes'] / 1e9:.2f} GB"
        print(f"{where}  {name:25} {what}  ({wall:.0f} s)", flush=True)


def process(
    contender: Contender,
    interpreter: Path,
    arguments: list[str],
    threads: int,
    hold_to: str | None = None,
    clock: bool = False,
) -> dict[str, Any]:
    """Command, commit, date, and a contender's JSON line or {"error": its last word}.

    With `clock` the contender is told when it was started, by `time.monotonic`.
    """
    command = [shown(FOLDER / "contenders" / contender.script), *contender.arguments, *arguments]
    provenance = {
        "command": shlex.join(["python", *command]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    started = ["--started", str(time.monotonic())] if clock else []
    outcome = _outcome([str(interpreter), *command, *started], threads, hold_to)
    if hold_to is not None and outcome.get("cpu_capability") != hold_to.upper():
        used = outcome.get("cpu_capability")
        outcome = {"error": outcome.get("error", f"torch used {used} though held to {hold_to}")}
    return {**provenance, **outcome}


def _outcome(command: list[str], threads: int, hold_to: str | None) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    if hold_to is not None:
        environment |= HELD_TO[hold_to]
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


def shown(path: Path) -> str:
    """`path` from the repository's root, where the contenders run."""
    inside = path.is_relative_to(FOLDER.parent)
    return (path.relative_to(FOLDER.parent) if inside else path).as_posix()


def memory_bytes() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine(hold_to: str | None = None) -> dict[str, Any]:
    """What decides the times, but for what else the machine is doing."""
    about = {
        "processor": processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes() / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return about if hold_to is None else about | {"held_to": hold_to}


def instructions() -> list[str]:
    """The processor's instruction sets, of those that decide a step's time."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        found = set(flags[1].split() if flags else [])
    else:
        found = {"asimd"} if platform.machine() == "arm64" else set()
    return [name for flag, name in INSTRUCTIONS.items() if flag in found]


def commit() -> str:
    """The checked-out commit, `-dirty` if tracked files differ from it; other records may."""
    others = [":/", ":(top,exclude)benchmarks/results"]
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", "--", *others])
    told = (
        subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True).stdout.strip()
        for command in commands
    )
    head, changed = told
    return (head or "unknown") + "-dirty" * bool(changed)


if __name__ == "__main__":
    main()
