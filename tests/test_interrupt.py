"""Ctrl-C in a notebook: a real kernel, interrupted as the stop button does it, keeps what is there
and continues to the same bits.

The kernel counts its steps in a file, and an interrupt comes after a random number of them. It
never comes before the cell runs or after its work, however busy the machine is: the last step waits
while there is a file "gate".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pytest
from faults import Faults, count_faults  # noqa: F401
from jupyter_client.manager import KernelManager

pytestmark = pytest.mark.model

INTERRUPTS, STEPS = 3, 300
SETUP = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_faults
import torch
from short_model import first_layers
from test_faults import HOOKS, PASS, rows_of, train
from saesub.activations import forward_pass
from saesub.activations.collect import harvest
from saesub.activations.store_file import StoreWriter
from saesub.loading.corpora import load_corpus
from saesub.training.comparison import StoreBatches

folder = Path({folder!r})
model, few = first_layers(2), load_corpus("wiki-en").select(range(200))
LONG = PASS | {{"n_tokens": 3000}}
forward_pass.KEEP_EVERY = 0.0
capture, finish, batches = forward_pass.capture, StoreWriter.finish, test_faults.joint_batches
steps = (folder / "steps").open("ab", buffering=0)

def wait():
    (folder / "waiting").touch()
    while (folder / "gate").exists():
        time.sleep(0.001)

def counted_capture(*args):
    steps.write(b".")
    capture(*args)

def gated_finish(*args, **settings):
    wait()
    finish(*args, **settings)

def counted_batches(*args, start_step, **settings):
    stream = batches(*args, start_step=start_step, **settings)

    def counted():
        for step, batch in enumerate(stream, start_step):
            steps.write(b".")
            if step == {steps} - 1:
                wait()
            yield batch

    return StoreBatches(counted(), stream.identity)

forward_pass.capture, StoreWriter.finish = counted_capture, gated_finish
test_faults.joint_batches = counted_batches
stores = harvest(model, few, HOOKS, folder / "whole", **LONG)
"""


class Notebook:
    """Cells run in a kernel of their own, which counts its steps under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=300)

    def run(self, code: str) -> int:
        """Runs a cell that must succeed, and returns how many steps it took."""
        before, deadline = self._steps(), time.monotonic() + 600
        reply = {"status": "aborted"}
        # For a moment after an error the kernel drops, unrun, what is sent to it next.
        while reply["status"] == "aborted" and time.monotonic() < deadline:
            reply = self._reply(self.client.execute(code), 600) or {"status": "no answer"}
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", [reply["status"]]))
        return self._steps() - before

    def interrupt(self, code: str, n_steps: int, delay: float) -> int:
        """Runs a cell, interrupts it so many steps and seconds later, and returns its steps."""
        gate, waiting = self.folder / "gate", self.folder / "waiting"
        gate.touch()
        waiting.unlink(missing_ok=True)
        before, deadline = self._steps(), time.monotonic() + 600
        cell = self.client.execute(code)
        while self._steps() < before + n_steps and not waiting.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        reply = None
        while reply is None:  # Python drops an exception that is raised in a destructor
            assert time.monotonic() < deadline
            self.manager.interrupt_kernel()
            reply = self._reply(cell, 60)
        assert reply.get("ename") == "KeyboardInterrupt"
        gate.unlink()
        return self._steps() - before

    def _steps(self) -> int:
        steps = self.folder / "steps"
        return steps.stat().st_size if steps.exists() else 0

    def _reply(self, cell: str, timeout: float) -> dict[str, Any] | None:
        try:
            while True:
                message = self.client.get_shell_msg(timeout=timeout)
                if message["parent_header"]["msg_id"] == cell:
                    return message["content"]
        except Empty:
            return None

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder, tests = tmp_path_factory.mktemp("interrupt"), Path(__file__).parent
    notebook = Notebook(folder)
    try:
        places = {"root": str(tests.parent), "tests": str(tests), "folder": str(folder)}
        notebook.run(SETUP.format(**places, steps=STEPS))
        yield notebook
    finally:
        notebook.stop()


def test_an_interrupted_harvest_goes_on(notebook: Notebook, faults: Faults) -> None:
    rng = np.random.default_rng(0)
    alone = notebook.run('harvest(model, few, HOOKS, folder / "alone", **LONG)')
    harvest = 'again = harvest(model, few, HOOKS, folder / "stores", **LONG)'
    taken = 0
    for _ in range(INTERRUPTS):
        taken += notebook.interrupt(harvest, rng.integers(1, alone // 4), rng.uniform(0, 0.03))
        notebook.run("assert not any(point.fwd_hooks for point in model.hook_dict.values())")
    taken += notebook.run(harvest)
    assert alone <= taken <= alone + 2 * INTERRUPTS
    notebook.run("assert torch.equal(rows_of(again), rows_of(stores))")
    faults.survived("Ctrl-C in a notebook during harvest, next cell goes on", INTERRUPTS)


def test_interrupted_training_goes_on(notebook: Notebook, faults: Faults) -> None:
    """Each interrupt comes after at least one more checkpoint, so that the next cell has less to
    do."""
    rng = np.random.default_rng(1)
    train = f'again = train(stores, folder / "runs", steps={STEPS})'
    spacing = STEPS // 4
    for _ in range(INTERRUPTS):
        notebook.interrupt(train, rng.integers(spacing + 5, 1.4 * spacing), rng.uniform(0, 0.03))
        notebook.run("assert 1 + 1 == 2")
    assert notebook.run(train) < 2 * spacing
    notebook.run(f"assert torch.equal(again, train(stores, None, steps={STEPS}))")
    faults.survived("Ctrl-C in a notebook during train_together, next cell goes on", INTERRUPTS)
