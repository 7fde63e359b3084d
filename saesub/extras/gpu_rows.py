"""Checks of a `RowBackend`, method by method, against float64 on the same device.

Each check returns what it found, or raises `CheckError`. Gradients are read off Adam's first
moment, so nothing is assumed of how a backend stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.backend import AdamSettings, RowBackend
from saesub.topk.ops import Selected
from saesub.topk.triton_backend import TritonBackend, is_hopper

MOST_DIFFERENCE = 1e-4  # relative to the number and to the root mean square of its tensor
LEAST_RECALL = 0.999
_ADAM = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8)
_CLIP, _WEIGHT, _STEPS = 0.5, 0.5, 3


class CheckError(Exception):
    """A check found a wrong result; the message says which."""


class LeftOutError(Exception):
    """A check does not apply here; the message says why."""


@dataclass(frozen=True)
class Size:
    """How large a problem is.

    Attributes:
        n: tokens.
        d: width of inputs and outputs.
        near: features that the tokens use.
        k: features of a token.
        offset: features before those, which no token uses.
    """

    n: int
    d: int
    near: int
    k: int
    offset: int = 0

    @property
    def d_sae(self) -> int:
        """All features."""
        return self.offset + self.near

    def __str__(self) -> str:
        return f"{self.n:,} tokens, {self.d:,} x {self.d_sae:,}"


@dataclass(frozen=True)
class Entries:
    """A batch's active entries, with random inputs and gradients.

    Attributes:
        selected: unequally many a token; some tokens have none, some values are zero, and one
            feature is active on nearly all tokens.
        x, g_out: (n, d) inputs, and gradients of the outputs.
        g_pre: (m,) gradients of the pre-activations.
    """

    selected: Selected
    x: Float[Tensor, "n d"]
    g_out: Float[Tensor, "n d"]
    g_pre: Float[Tensor, " m"]

    @property
    def values(self) -> Float[Tensor, " m"]:
        """The activations."""
        return self.selected.pre.relu()


class Problem:
    """Random inputs and weights of one size, the same on every machine."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        self.size, self.device = size, device
        self._generator = torch.Generator().manual_seed(seed)
        n, d, near = size.n, size.d, size.near
        self.x = self.normal(n, d) * (1 + torch.arange(d, device=device)).rsqrt() + 0.1
        self.enc, self.dec = self.normal(near, d) / d**0.5, self.normal(near, d) / d**0.5
        self.b_enc, self.b_dec = self.normal(near) / 8, self.normal(d)
        self.scale = self.normal(near).abs() + 0.5

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(*shape, generator=self._generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1 on the device."""
        return torch.rand(*shape, generator=self._generator).to(self.device)

    def whole(self, near: Tensor, fill: float = 0.0) -> Tensor:
        """A table of all features from that of the near ones."""
        if not self.size.offset:
            return near.clone()
        table = near.new_full((self.size.d_sae, *near.shape[1:]), fill)
        table[self.size.offset :] = near
        return table

    def entries(self) -> Entries:
        """Active entries, others at every call."""
        n, near, k = self.size.n, self.size.near, self.size.k
        chance = self.uniform(n, near)
        chance[:, 0] += 1  # on all tokens, so that its gradient is a long sum
        chance[:, near - near // 8 :] -= 1  # and the last ones on none, if there are enough others
        features = chance.topk(k, sorted=False).indices.flatten() + self.size.offset
        kept = (self.uniform(n * k) < 2 / 3) & (self.uniform(n) < 7 / 8).repeat_interleave(k)
        counts = kept.view(n, k).sum(1)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        pre = self.normal(int(counts.sum())) + 0.5
        chosen = Selected(features[kept], offsets, pre, self.size.d_sae)
        g_pre = torch.where(pre > 0, self.normal(len(pre)), 0)
        return Entries(chosen, self.normal(n, self.size.d), self.normal(n, self.size.d), g_pre)


class _Differences:
    """The largest difference so far, and of which result."""

    def __init__(self) -> None:
        self.largest, self.where = 0.0, "nothing"

    def add(self, name: str, ours: Tensor, exact: Tensor) -> None:
        """Raises CheckError for another shape, and above `MOST_DIFFERENCE`."""
        if ours.shape != exact.shape:
            raise CheckError(f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}")
        if not exact.numel():
            return
        nonzero = (exact != 0).sum().clamp(min=1)
        usual = (exact.double().square().sum() / nonzero).sqrt()
        allowed = (exact.double().abs() + usual).clamp(min=1e-30)
        found = float(((ours.double() - exact.double()).abs() / allowed).max())
        if not found <= MOST_DIFFERENCE:  # NaN too
            raise CheckError(f"{name} differs from float64 by {found:.1e} of its size")
        if found >= self.largest:
            self.largest, self.where = found, name

    def __str__(self) -> str:
        return f"largest difference {self.largest:.0e} ({self.where})"


def check_search(backend: RowBackend, problem: Problem) -> str:
    """The exact search, and the recall of the other one, with and without a scale of features."""
    size, found = problem.size, _Differences()
    W_enc, b_enc = problem.whole(problem.enc).T, problem.whole(problem.b_enc, -1e3)
    exact = problem.x.double() @ problem.enc.double().T + problem.b_enc.double()
    worst = 1.0
    for scale in (None, problem.scale):
        whole = None if scale is None else problem.whole(scale, 1.0)
        ranked = exact if scale is None else exact * scale
        best = ranked.topk(size.k).indices
        for precise in (True, False):
            features, pre = backend.search(problem.x, W_enc, b_enc, size.k, whole, exact=precise)
            near = _near(features, problem)
            found.add("the search's pre-activations", pre, exact.gather(1, near))
            recall = _recall(near, best, size.near)
            # Two features may be as good as one another in float32.
            least = ranked.gather(1, near).sort(1, descending=True).values
            if precise:
                found.add("the exact search", least, ranked.gather(1, best))
            elif recall < LEAST_RECALL:
                raise CheckError(f"the search finds {recall:.4f} of the top {size.k}")
            else:
                worst = min(worst, recall)
    return f"recall {worst:.5f}, {found}"


def check_shadow(backend: RowBackend, problem: Problem) -> str:
    """The recall of the search by the encoder in few bits, as a step takes it: in 16 bits, and in 8
    where wide dictionaries take these."""
    W_enc, W_dec = problem.whole(problem.enc).T, problem.whole(problem.dec)
    b_enc, k = problem.whole(problem.b_enc, -1e3), problem.size.k
    config = SimpleNamespace(rescale_acts_by_decoder_norm=True, k=k)
    sae = SimpleNamespace(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, cfg=config)
    backends: list[RowBackend] = [backend]
    if isinstance(backend, TritonBackend) and is_hopper(W_enc.device):
        backends = [TritonBackend(eight_bits=eight_bits) for eight_bits in (False, True)]
    exact = problem.x.double() @ problem.enc.double().T + problem.b_enc.double()
    best = (exact * problem.dec.double().norm(dim=1)).topk(k).indices
    recalls, found = [], _Differences()
    for each in backends:
        shadow = each.shadow(sae, None, in_subspace=False)
        if shadow is None:
            raise LeftOutError("this backend searches by the weights themselves")
        features, pre = shadow.search(problem.x, W_enc, b_enc, k, shadow.norms)
        near = _near(features, problem)
        found.add("the search's pre-activations", pre, exact.gather(1, near))
        recalls.append(_recall(near, best, problem.size.near))
    if min(recalls) < LEAST_RECALL:
        raise CheckError(f"the search finds {min(recalls):.4f} of the top {k}")
    return f"recall {min(recalls):.5f}, {found}"


def check_decode(backend: RowBackend, problem: Problem) -> str:
    """Reconstruction, its error, and the gradients that go back through it."""
    entries, found = problem.entries(), _Differences()
    chosen, values = entries.selected, entries.values
    W_dec, target = problem.whole(problem.dec), entries.x
    near, rows = chosen.features - problem.size.offset, problem.dec.double()
    weighted = values.double()[:, None] * rows[near]
    for b_dec in (problem.b_dec, None):
        ours = backend.decode(chosen, values, W_dec, b_dec, target, _WEIGHT)
        x_hat = torch.zeros_like(target, dtype=torch.float64).index_add_(0, chosen.tokens, weighted)
        x_hat = x_hat if b_dec is None else x_hat + b_dec.double()
        residual = x_hat - target.double()
        g_out = 2 * _WEIGHT * residual
        g_pre = (g_out[chosen.tokens] * rows[near]).sum(1) * (values != 0)
        found.add("x_hat", ours.x_hat, x_hat)
        found.add("g_out", ours.g_out, g_out)
        found.add("g_pre", ours.g_pre, g_pre)
        found.add("g_bias", ours.g_bias, g_out.sum(0))
        found.add("squared_error", ours.squared_error, residual.square().sum())
    return str(found)


def check_norms(backend: RowBackend, problem: Problem) -> str:
    """The norm of all gradients, and the bias's gradient through the encoder."""
    entries, found = problem.entries(), _Differences()
    enc, dec, bias = _gradients(entries, problem)
    W_enc = problem.whole(problem.enc).T
    squared, through = _row_gradients(backend, entries).norms(W_enc)
    total = enc.square().sum() + dec.square().sum() + bias.square().sum()
    found.add("the squared norm", squared, total)
    assert through is not None  # it was asked for
    found.add("the bias through the encoder", through, problem.enc.double().T @ bias)
    return str(found)


def check_adam(backend: RowBackend, problem: Problem, *, lazy: bool) -> str:
    """Three updates by Adam, or with `lazy` by SparseAdam."""
    found, near = _Differences(), slice(problem.size.offset, None)
    names = ("W_enc", "W_dec", "b_enc")
    weights = [problem.whole(t) for t in (problem.enc, problem.dec, problem.b_enc)]
    tables = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
    zeros = [torch.zeros_like(p[near], dtype=torch.float64) for p in weights]
    exact = [(zero, zero) for zero in zeros]
    device, d_sae = problem.device, problem.size.d_sae
    moved = torch.zeros(d_sae, dtype=torch.int64, device=device) if lazy else None
    for step in range(1, _STEPS + 1):
        entries = problem.entries()
        before = [p[near].clone() for p in weights]
        passed = [torch.tensor(float(t), device=device) for t in (step, _CLIP)]
        tensors = [t for table in tables for t in table]
        _row_gradients(backend, entries).adam(_ADAM, *passed, *tensors, moved=moved)
        moves = _touched(entries, problem) | (not lazy)
        for at, gradient in enumerate(_gradients(entries, problem)):
            exact[at] = _decayed(exact[at], _CLIP * gradient)
            p, m, v = (t[near] for t in tables[at])
            name = f"{names[at]} after update {step}"
            found.add(f"the first moment of {name}", m[moves], exact[at][0][moves])
            found.add(f"the second moment of {name}", v[moves], exact[at][1][moves])
            wanted = before[at].double()
            wanted[moves] -= _change(m[moves].double(), v[moves].double(), step)
            found.add(name, p, wanted)
            if not torch.equal(p[~moves], before[at][~moves]):
                raise CheckError(f"{name} moved where no token used the feature")
        if moved is not None and not torch.equal(moved[near] == step, moves):
            raise CheckError(f"update {step} notes other features as moved than it moved")
    if any(bool(p[: near.start].any()) for p in weights):
        raise CheckError("a feature that no token used has changed")
    return str(found)


def _recall(features: Tensor, best: Tensor, d_sae: int) -> float:
    """Share of `best` (n, k) that is in `features` (n, k). Raises CheckError for doubles."""
    hits = torch.zeros(len(best), d_sae, dtype=torch.int32, device=best.device)
    hits.scatter_add_(1, features, torch.ones_like(features, dtype=torch.int32))
    if int(hits.max()) > 1:
        raise CheckError("the search gives a token the same feature twice")
    return float(hits.gather(1, best).double().mean())


def _near(features: Int[Tensor, "n k"], problem: Problem) -> Int[Tensor, "n k"]:
    """The features counted from the first near one. Raises CheckError for any other."""
    near = features - problem.size.offset
    if bool((near < 0).any()) or bool((near >= problem.size.near).any()):
        raise CheckError("the search gives features that are far from the best, or not there")
    return near


def _row_gradients(backend: RowBackend, e: Entries):
    chosen = e.selected
    given = (chosen.features, chosen.tokens, e.values, e.g_pre, e.x, e.g_out)
    return backend.row_gradients(*given, chosen.d_sae)


def _gradients(e: Entries, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 gradients of the near rows of W_enc (transposed) and W_dec, and of b_enc."""
    near, token = e.selected.features - problem.size.offset, e.selected.tokens
    counted = e.values != 0
    of_enc, of_dec = (e.g_pre * counted).double(), e.values.double()
    zeros = e.x.new_zeros(problem.size.near, problem.size.d, dtype=torch.float64)
    enc = zeros.index_add(0, near, of_enc[:, None] * e.x.double()[token])
    dec = zeros.index_add(0, near, of_dec[:, None] * e.g_out.double()[token])
    return enc, dec, zeros[:, 0].index_add(0, near, of_enc)


def _touched(e: Entries, problem: Problem) -> Tensor:
    """(near,) bool: the features with an entry that is not zero."""
    near = (e.selected.features - problem.size.offset)[e.values != 0]
    touched = torch.zeros(problem.size.near, dtype=torch.bool, device=near.device)
    touched[near] = True
    return touched


def _decayed(moments: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    m, v = moments
    m = _ADAM.beta1 * m + (1 - _ADAM.beta1) * gradient
    return m, _ADAM.beta2 * v + (1 - _ADAM.beta2) * gradient.square()


def _change(m: Tensor, v: Tensor, step: int) -> Tensor:
    root = (v / (1 - _ADAM.beta2**step)).sqrt() + _ADAM.eps
    return _ADAM.lr * m / (1 - _ADAM.beta1**step) / root
