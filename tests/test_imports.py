"""An import of saesub, whichever module, leaves the rest of the process as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saesub.topk import ops

ROOT = Path(__file__).resolve().parent.parent

# Imports first what saesub imports of others, and so has their effects before it looks.
SCRIPT = """
import ast, importlib, json, locale, logging, os, random, signal, socket, sys, threading
import warnings
from contextlib import suppress
from pathlib import Path

folder = Path(sys.argv[1])
files = sorted(folder.rglob("*.py"))
for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if "saesub" not in ast.unparse(node) and "__future__" not in ast.unparse(node):
                with suppress(ImportError):
                    exec(ast.unparse(node))

import datasets, matplotlib, numpy, torch, transformers

def state():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    loggers = dict(logging.root.manager.loggerDict) | {"": logging.root}
    return {
        "warnings": [*map(repr, warnings.filters), repr(warnings.showwarning)],
        "logging": {
            name: (logger.level, repr(logger.handlers), logger.disabled, logger.propagate)
            for name, logger in loggers.items() if isinstance(logger, logging.Logger)
        } | {"disabled": logging.root.manager.disable, "class": repr(logging.getLoggerClass())},
        "verbosity": (transformers.logging.get_verbosity(), datasets.logging.get_verbosity()),
        "environment": dict(os.environ),
        "matplotlib": {k: repr(v) for k, v in dict.items(matplotlib.rcParams)},
        "numpy": repr((numpy.geterr(), numpy.get_printoptions(), numpy.random.get_state()[1:])),
        "python": repr((
            random.getstate(), sys.path, sys.flags, sys.getrecursionlimit(), sys.excepthook,
            sys.displayhook, sys.unraisablehook, sys.getswitchinterval(), threading.excepthook,
            sys.meta_path, sys.path_hooks, sys.warnoptions, socket.getdefaulttimeout(),
            locale.setlocale(locale.LC_ALL), [signal.getsignal(s) for s in signal.valid_signals()],
            os.getcwd(), sys.stdout, sys.stderr,
        )),
        "torch": repr((
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.get_default_device(), torch.is_grad_enabled(), torch.is_warn_always_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.is_anomaly_enabled(), cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark,
            cudnn.deterministic, cudnn.enabled, torch.get_rng_state().tolist(),
            torch.multiprocessing.get_sharing_strategy(),
            torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        )),
    }

assert "saesub" not in sys.modules
before, imported = state(), []
for path in files:
    name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
    name = name.removesuffix(".__init__")
    if name.endswith(("_kernels", ".notebook_memory")):
        continue  # these import only with Triton and in a kernel
    importlib.import_module(name)
    imported.append(name)
after = state()
changed = {k: (before[k], after[k]) for k in before if before[k] != after[k]}
new = {k: v for k, v in after["logging"].items() if k not in before["logging"]}
if "logging" in changed and all(v == (0, "[]", False, True) for v in new.values()):
    if all(after["logging"][k] == v for k, v in before["logging"].items()):
        del changed["logging"]  # loggers that leave everything to the root
print(json.dumps({"imported": imported, "changed": changed}, default=repr))
"""


def test_an_import_changes_nothing_global():
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "saesub")]
    # Not what the imports of this process may have added to its environment.
    kept = ("HOME", "PATH", "PYTHONPATH", "SYSTEMROOT", "USERPROFILE")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["changed"] == {}
    assert len(found["imported"]) == len([*(ROOT / "saesub").rglob("*.py")]) - 3


@pytest.mark.parametrize("first_use", ["alone", "after a filter of the user's"])
def test_sparse_rows_do_not_warn_and_leave_the_filters(first_use):
    """In a process of its own, since torch warns once in each."""
    code = f"""
import warnings, torch
from saesub.topk import ops
if {first_use == "alone"}:
    warnings.resetwarnings()
else:
    warnings.simplefilter("error")
filters = list(warnings.filters)
selected = ops.Selected.equally(torch.tensor([[1], [0]]), torch.zeros(2, 1), 3)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    ops.row_products(torch.randn(2, 4), selected, torch.randn(3, 4))
assert warnings.filters == filters
print([str(warning.message) for warning in heard])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_filters_are_touched_at_the_first_use_alone(monkeypatch):
    selected = ops.Selected.equally(torch.tensor([[1], [0]]), torch.zeros(2, 1), 3)
    rows, table = torch.randn(2, 4), torch.randn(3, 4)
    ops.row_products(rows, selected, table)

    def refuse(*given, **more):
        raise AssertionError("the filters belong to all threads")

    monkeypatch.setattr("warnings.catch_warnings", refuse)
    ops.row_products(rows, selected, table)
