"""Ctrl-C in a notebook: a real kernel, interrupted as the stop button does it, keeps what is there
and goes on to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Faults, count_faults  # noqa: F401
from jupyter_client.manager import KernelManager

pytestmark = pytest.mark.model

SETUP = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
from test_faults import HOOKS, PASS, rows_of, train
from saesub.activations import forward_pass
from saesub.activations.collect import harvest
from saesub.loading.corpora import load_corpus
from saesub.loading.models import load_model

folder = Path({folder!r})
model, few = load_model("smollm2-135m", device="cpu"), load_corpus("wiki-en").select(range(200))
LONG = PASS | {{"n_tokens": 3000}}
forward_pass.KEEP_EVERY = 0.0
passes, capture = [], forward_pass._capture

def counted(*args):
    passes.append(1)
    capture(*args)

forward_pass._capture = counted
stores = harvest(model, few, HOOKS, folder / "whole", **LONG)
n_passes = len(passes)
"""
INTERRUPTS = 3


class Notebook:
    """Cells run in a kernel of their own."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run(self, code: str) -> None:
        """Runs a cell that must succeed."""
        reply = self._reply(self.client.execute(code))
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", []))

    def interrupt(self, code: str, ready: Callable[[], bool], delay: float) -> None:
        """Runs a cell and interrupts it so many seconds after it is `ready`."""
        cell, deadline = self.client.execute(code), time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        self.manager.interrupt_kernel()
        assert self._reply(cell).get("ename") == "KeyboardInterrupt"

    def _reply(self, cell: str) -> dict[str, Any]:
        while True:
            message = self.client.get_shell_msg(timeout=300)
            if message["parent_header"]["msg_id"] == cell:
                return message["content"]

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupt")


@pytest.fixture(scope="module")
def notebook(folder: Path) -> Iterator[Notebook]:
    notebook = Notebook()
    tests = Path(__file__).parent
    try:
        notebook.run(SETUP.format(root=str(tests.parent), tests=str(tests), folder=str(folder)))
        yield notebook
    finally:
        notebook.stop()


def test_an_interrupted_harvest_goes_on(notebook: Notebook, folder: Path, faults: Faults) -> None:
    rng = np.random.default_rng(0)
    progress = folder / "stores" / "blocks.0.hook_mlp_out.partial.json"
    harvest = 'again = harvest(model, few, HOOKS, folder / "stores", **LONG)'
    notebook.run("passes.clear()")
    for _ in range(INTERRUPTS):
        kept = progress.read_bytes() if progress.exists() else b""
        notebook.interrupt(
            harvest,
            lambda kept=kept: progress.exists() and progress.read_bytes() != kept,
            rng.uniform(0, 0.1),
        )
        notebook.run("assert not any(point.fwd_hooks for point in model.hook_dict.values())")
    notebook.run(harvest)
    notebook.run("assert torch.equal(rows_of(again), rows_of(stores))")
    notebook.run(f"assert n_passes <= len(passes) <= n_passes + {2 * INTERRUPTS}, len(passes)")
    faults.survived("Ctrl-C in a notebook during harvest, next cell goes on", INTERRUPTS)


def test_interrupted_training_goes_on(notebook: Notebook, folder: Path, faults: Faults) -> None:
    rng = np.random.default_rng(1)
    for n in range(INTERRUPTS):
        notebook.interrupt(
            'train(stores, folder / "runs", steps=1500)',
            lambda n=n: len(list(folder.glob("runs/*/*/complete"))) > n,
            rng.uniform(0, 0.2),
        )
        notebook.run("assert 1 + 1 == 2")
    notebook.run('again = train(stores, folder / "runs", steps=1500)')
    notebook.run("assert torch.equal(again, train(stores, None, steps=1500))")
    faults.survived("Ctrl-C in a notebook during train_together, next cell goes on", INTERRUPTS)
