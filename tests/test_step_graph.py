"""Steps that a recording repeats, in Triton's interpreter; on a card also by a CUDA graph."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from saesub.topk import maxima, shadow, step_graph, triton_backend
from saesub.topk.eligibility import lay_out_by_feature
from saesub.topk.ops import Selected
from saesub.topk.optim import make_optimizer
from saesub.topk.step import Computed, _fixed_in_a_graph, row_step
from saesub.topk.step_graph import StepGraph

BACKEND = triton_backend.BACKEND
DEVICE = BACKEND.device_type
D, D_SAE, N = 8, 70, 3


@pytest.fixture
def small(monkeypatch):
    """Let the search take small dictionaries, which the interpreter can bear."""
    monkeypatch.setattr(shadow, "width_of", lambda k, _: k + 4)
    monkeypatch.setattr(shadow, "_GROUPS_PER_CHOSEN", 1)
    if DEVICE == "cpu":
        monkeypatch.setattr(maxima, "STRIDE", 16)


class Recorder:
    """Stands in for a CUDA graph: what is recorded changes nothing until it is repeated, and a
    repetition writes to the memory of the first outcome."""

    def __init__(self, sae: TopKTrainingSAE, optimizer: torch.optim.Optimizer) -> None:
        self.sae, self.optimizer, self.recorded = sae, optimizer, 0

    def _tensors(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        return [*(p.data for p in self.sae.parameters()), *(t for s in states for t in s.values())]

    def __call__(self, compute, device) -> Any:
        self.recorded += 1
        before = [t.clone() for t in self._tensors()]
        made = compute()
        for tensor, old in zip(self._tensors(), before, strict=True):
            tensor.copy_(old)
        self.sae.shadow.rebuild(self.sae.W_enc, self.sae.W_dec)

        def repeat() -> None:
            again = compute()
            for name in ("features", "offsets", "pre"):
                getattr(made.selected, name).copy_(getattr(again.selected, name))
            for old, new in zip(made[1:], again[1:], strict=True):
                if old is not None:
                    old.copy_(new)

        return made, repeat


class Run:
    """An SAE, its optimizer and its shadow; `record` makes its graph from a `Recorder`."""

    def __init__(self, *, graph: bool) -> None:
        torch.manual_seed(0)
        cfg = TopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=4)
        self.sae = TopKTrainingSAE(cfg).to(DEVICE)
        lay_out_by_feature(self.sae)
        self.optimizer = make_optimizer("sparse_adam", self.sae, lr=1e-2, betas=(0.9, 0.999))
        self.recorder = Recorder(self.sae, self.optimizer)
        record = None if DEVICE == "cuda" else self.recorder
        self.graph = StepGraph(record) if graph else None
        self.kept = None

    def step(self, x: torch.Tensor, dead: torch.Tensor | None = None, lr: float = 1e-2) -> Any:
        self.optimizer.param_groups[0]["lr"] = lr
        self.kept = BACKEND.shadow(self.sae, self.kept)
        vars(self.sae)["shadow"] = self.kept
        return row_step(
            BACKEND, self.sae, self.optimizer, x, dead, shadow=self.kept, graph=self.graph
        )


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_repeated_steps_are_those_that_are_launched(small, monkeypatch):
    """With other tokens, dead features and rates each time, which are no part of the recording;
    outputs stay what they were when later steps are taken."""
    monkeypatch.setattr(step_graph, "_LAUNCHED_FIRST", 1)
    plain, repeated = (Run(graph=graph) for graph in (False, True))
    torch.manual_seed(1)
    kept = []
    for i in range(3):
        x = torch.randn(N, D, device=DEVICE)
        dead = torch.rand(D_SAE, device=DEVICE) < 0.2
        both = [run.step(x, dead, lr=1e-2 / (i + 1)) for run in (plain, repeated)]
        kept.append((both[1], copy.deepcopy(both[1].sae_out), float(both[1].loss)))
        for name, value in both[0].losses.items():
            torch.testing.assert_close(both[1].losses[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(both[0].times_fired(), both[1].times_fired())
    for output, sae_out, loss in kept:
        assert torch.equal(output.sae_out, sae_out)
        assert float(output.loss) == loss
    for (name, a), b in zip(plain.sae.named_parameters(), repeated.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    if DEVICE == "cpu":
        assert repeated.recorder.recorded == 1


class Adding:
    """A step that adds the rate times a batch's sum to a total, and returns both."""

    def __init__(self) -> None:
        self.total, self.recorded = torch.zeros(()), 0
        self.graph = StepGraph(self.record)

    def compute(self, x: torch.Tensor, dead: torch.Tensor | None, lr: float | torch.Tensor) -> Any:
        n_dead = 0 if dead is None else dead.sum()
        self.total += lr * x.sum()
        empty = torch.zeros(1, dtype=torch.int64)
        found = Selected(empty, empty, x.flatten()[:1] * 1, 1)
        return Computed(found, x * 1, x * 1, x[0] * 1, self.total * 1, self.total * n_dead, None)

    def record(self, compute: Any, device: torch.device) -> Any:
        self.recorded += 1
        before = self.total.clone()
        made = compute()
        self.total.copy_(before)

        def repeat() -> None:
            again = compute()
            made.selected.pre.copy_(again.selected.pre)
            for old, new in zip(made[1:6], again[1:6], strict=True):
                old.copy_(new)

        return made, repeat

    def steps(self, times: int, n: int = 2, fixed: Any = 0, dead: Any = None) -> int:
        """Take steps; how many recordings there were until then."""
        for i in range(times):
            before = self.total.clone()
            x, lr = torch.rand(n, 3), 0.5 + i
            done = self.graph.run(self.compute, (x, dead, lr), fixed)
            torch.testing.assert_close(self.total, before + lr * x.sum())
            torch.testing.assert_close(done.mse_loss, self.total)
            assert torch.equal(done.x_hat, x)
            torch.testing.assert_close(done.selected.pre, x[0, :1])
            if dead is not None:
                torch.testing.assert_close(done.aux_loss, self.total * dead.sum())
        return self.recorded


def test_what_is_fixed_in_a_recording_makes_a_new_one():
    """Another number of tokens, or anything else that is fixed; the rate and the batch are not.

    Before each recording twice as many steps are launched as before the last.
    """
    adding, first = Adding(), step_graph._LAUNCHED_FIRST
    assert adding.steps(first) == 0
    assert adding.steps(3) == 1
    repeat = adding.graph._repeat
    assert adding.steps(1, n=3) == 1  # a last batch that is shorter is launched as it is,
    assert adding.steps(1) == 1
    assert adding.graph._repeat is repeat  # and the recording is still there
    assert adding.steps(2 * first, n=3) == 1
    assert adding.steps(2, n=3) == 2
    assert adding.steps(4 * first, fixed=1) == 2
    assert adding.graph._repeat is None
    assert adding.steps(2, fixed=1) == 3
    assert adding.steps(8 * first + 1, fixed=1, dead=torch.ones(4, dtype=torch.bool)) == 4
    assert adding.steps(2, fixed=1, dead=torch.arange(4) > 1) == 4


@pytest.mark.parametrize("kind", ["adam", "sparse_adam"])
def test_what_a_step_depends_on_is_fixed(kind):
    """Where weights, moments and a shadow lie, and the settings; not the rate, nor the weights'
    values."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=4))
    optimizer = make_optimizer(kind, sae, lr=1e-2, betas=(0.9, 0.999))

    held: list[Any] = [torch.zeros(3), None, torch.zeros(1), 1.0]
    copy_in_few_bits: Any = SimpleNamespace(given=lambda: held, shape=lambda: {"WIDTH": 8})

    def now() -> Any:
        return _fixed_in_a_graph(sae, optimizer, copy_in_few_bits)

    seen = [now()]
    optimizer.param_groups[0]["lr"] = 1e-3
    sae.W_dec.data.mul_(2)
    assert now() == seen[0]
    for change in (
        lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda: optimizer.param_groups[0].update(betas=(0.8, 0.99)),
        lambda: vars(sae.cfg).update(aux_loss_coefficient=0.5),
        lambda: vars(sae.cfg).update(apply_b_dec_to_input=not sae.cfg.apply_b_dec_to_input),
        lambda: setattr(sae.b_dec, "data", sae.b_dec.data.clone()),
        lambda: setattr(sae.activation_fn, "k", 5),
        lambda: held.__setitem__(0, torch.zeros(3)),
        lambda: held.__setitem__(3, 2.0),
    ):
        change()
        assert now() not in seen
        seen.append(now())


def test_a_step_that_cannot_be_recorded_is_taken_with_one_warning():
    adding = Adding()

    def refuse(compute, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    adding.graph = StepGraph(refuse)
    adding.steps(step_graph._LAUNCHED_FIRST)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        adding.steps(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adding.steps(2)
