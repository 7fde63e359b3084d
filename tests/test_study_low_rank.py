"""The study of why the rank is low: each control takes away what it says and nothing else."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from saesub.loading.models import context_tokens

N_HEADS, WIDTH, D, N_GROUPS = 6, 8, 48, 3


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "notebooks" / "studies"))
    import low_rank

    return low_rank


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def _covariance() -> torch.Tensor:
    """Of heads that are uneven, of unequal sizes, and correlated, most within a group."""
    n = N_HEADS * WIDTH
    own = _normal(2000, N_HEADS, WIDTH, seed=1) * 0.6 ** torch.arange(WIDTH)
    of_group = _normal(2000, N_GROUPS, WIDTH, seed=2).repeat_interleave(2, dim=1)
    everywhere = _normal(2000, 1, WIDTH, seed=3)
    z = (own + of_group + 0.5 * everywhere) * torch.linspace(1, 3, N_HEADS)[:, None]
    return z.reshape(-1, n).T.cov()


def _projection() -> torch.Tensor:
    shared = torch.cat([_normal(D // 2, D, seed=5) * 3, _normal(D // 2, D, seed=6)])
    return (_normal(N_HEADS, WIDTH, D, seed=4) * 0.7 ** torch.arange(WIDTH)[:, None]) @ shared


@pytest.fixture
def heads(study):
    return study.Heads.of(_covariance(), _projection(), N_GROUPS)


def _output(heads, *levels: str) -> torch.Tensor:
    frame = heads.outputs.flatten(0, 1)
    return frame.T @ heads.written(*levels) @ frame


def test_with_nothing_taken_away_it_is_the_attention_output(heads):
    W = _projection().flatten(0, 1)
    expected = W.T @ _covariance() @ W
    torch.testing.assert_close(_output(heads, "own", "own", "own"), expected)


def test_every_head_writes_as_much_in_every_combination(study, heads):
    at = torch.arange(0, N_HEADS * WIDTH, WIDTH)
    sizes = [
        torch.stack([heads.written(*levels).diagonal()[i : i + WIDTH].sum() for i in at])
        for levels in product(*list(study.LEVELS.values())[:3])
    ]
    assert len(sizes) == 12
    for size in sizes:
        torch.testing.assert_close(size, sizes[-1])
    assert sizes[-1].max() > 2 * sizes[-1].min()


def test_a_head_without_spectrum_and_anisotropy_writes_evenly(heads):
    block = heads.written("white", "own", "flat")[:WIDTH, :WIDTH]
    torch.testing.assert_close(block, torch.eye(WIDTH).double() * block[0, 0])


@pytest.mark.parametrize("level", ["none", "in groups", "own"])
def test_correlations_are_taken_away_between_the_heads_that_the_level_says(heads, level):
    written = heads.written("own", level, "own")
    blocks = written.view(N_HEADS, WIDTH, N_HEADS, WIDTH).abs().amax(dim=(1, 3))
    own = torch.eye(N_HEADS).bool()
    in_group = torch.block_diag(*[torch.ones(2, 2)] * N_GROUPS).bool()
    expected = {"none": own, "in groups": in_group, "own": torch.ones_like(own)}[level]
    assert torch.equal(blocks > 1e-9, expected)


def test_orthogonal_subspaces_give_the_rank_of_heads_side_by_side(study, heads):
    found = study.cells(heads, n_draws=2, seed=0)
    frame = study.rotations(1, D, D, torch.Generator().manual_seed(7))[0].T  # all heads orthogonal
    expected = study.ranks(frame.T @ heads.written("own", "own", "own") @ frame, D)
    assert found["own", "own", "own", "orthogonal"] == [pytest.approx(expected)]
    assert len(found["own", "own", "own", "random"]) == 2


def test_heads_that_do_not_fit_are_never_orthogonal(study):
    heads = study.Heads.of(_covariance(), _projection()[..., :30], N_GROUPS)
    row = study.explained(heads, n_draws=2)
    assert row["levels"]["overlap"] == ["random", "own"]
    assert not any("orthogonal" in cell for cell in row["rank"]["cells"])


def test_turning_the_inputs_of_a_group_keeps_everything_but_their_alignment(study):
    """Where z is white there is no alignment to lose, and the heads of a group are
    turned together."""
    heads = study.Heads.of(torch.eye(N_HEADS * WIDTH).double(), _projection(), N_GROUPS)
    turned = heads.turned(torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        _output(turned, "own", "own", "own"), _output(heads, "own", "own", "own")
    )
    uneven = study.Heads.of(_covariance(), _projection(), N_GROUPS)
    turned = uneven.turned(torch.Generator().manual_seed(0))
    assert not torch.allclose(turned.inputs, uneven.inputs)
    torch.testing.assert_close(turned.inputs[0] @ turned.inputs[1].T, _turned_pair(turned, uneven))
    assert turned.sigma is uneven.sigma
    assert turned.outputs is uneven.outputs


def _turned_pair(turned, heads):
    """U_0 U_1ᵀ of two heads of one group, turned by what turned the first of them."""
    turn = turned.inputs[0] @ heads.inputs[0].T
    return turn @ heads.inputs[0] @ heads.inputs[1].T @ turn.T


def test_shares_add_up_to_the_fall_and_find_a_planted_cause(study):
    levels = {"a": ("off", "on"), "b": ("off", "half", "on"), "c": ("off", "on")}

    def value(chosen):
        a, b, c = ("off", "half", "on").index(chosen[0]) / 2, chosen[1], chosen[2] == "on"
        return 1 - 0.25 * a - {"off": 0, "half": 0.125, "on": 0.375}[b] - 0.25 * (a * c)

    found = study.shares(value, levels)
    # a alone takes a quarter; a and c together another, of which each has a half.
    assert found == {
        "a": [pytest.approx(-0.375)],
        "b": [pytest.approx(-0.125), pytest.approx(-0.25)],
        "c": [pytest.approx(-0.125)],
    }
    assert study.interaction(value, levels, "a", "c") == pytest.approx(-0.25)
    assert study.interaction(value, levels, "a", "b") == pytest.approx(0)


def test_the_shares_of_a_layer_add_up_to_its_fall(study, heads):
    row = study.explained(heads, n_draws=2)
    for of_kind in (row["rank"], row["effective_rank"]):
        cells = of_kind["cells"]
        fall = cells["own / own / own / own"] - cells["white / none / flat / orthogonal"]
        total = sum(step[0] for steps in of_kind["shares"].values() for step in steps)
        assert total == pytest.approx(fall, abs=1e-5)
        assert fall < -0.1
    assert row["rank"]["cells"]["own / own / own / own"] == pytest.approx(
        study.ranks(_projection().flatten(0, 1).T @ _covariance() @ _projection().flatten(0, 1), D)[
            0
        ]
    )


def test_only_a_shared_direction_shows_as_overlap(study):
    """Even heads, uncorrelated and flat: in one subspace all of them, or apart."""
    white = torch.eye(N_HEADS * WIDTH).double()
    apart = study.rotations(1, D, D, torch.Generator().manual_seed(0))[0].view(N_HEADS, WIDTH, D)
    for W_O, overlap in ((apart, 0), (apart[:1].repeat(N_HEADS, 1, 1), 1 / N_HEADS - 1)):
        found = study.explained(study.Heads.of(white, W_O, N_GROUPS), 2)["rank"]["shares"]
        assert sum(step[0] for step in found["overlap"]) == pytest.approx(overlap, abs=1e-6)
        others = [
            step[0] for name in ("spectrum", "correlation", "anisotropy") for step in found[name]
        ]
        assert others == pytest.approx([0] * 4, abs=1e-6)


def test_a_balanced_product_is_tight_and_a_turned_one_is_not(study):
    generator = torch.Generator().manual_seed(0)
    root = torch.diag(0.8 ** torch.arange(16.0)).double()
    left, right = study.rotations(2, 40, 16, generator)
    turn = study.rotations(1, 16, 16, generator)[0]
    found = study.balance(left @ root @ turn, 3 * turn.T @ root @ right.T, 4, generator)
    assert found["tightness"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert found["distance"] == pytest.approx(0, abs=1e-9)
    assert found["size"] == pytest.approx(1 / 9)
    assert found["turned"]["cosine"][2] < 0.5  # the greatest of the draws
    assert found["turned"]["tightness"][2] < 0.95
    assert found["turned"]["product"][1] > found["product"]  # the least


def test_the_effective_rank_of_a_product_is_that_of_the_matrix(study):
    first, second = _normal(40, 8, seed=1), _normal(8, 30, seed=2)
    found = study.balance(first, second, 1, torch.Generator().manual_seed(0))["product"]
    values = torch.linalg.svdvals(first @ second)[:8]
    assert found == pytest.approx(study.effective_rank(values) / 8)


def test_balanced_norms_agree_and_shuffled_ones_do_not(study):
    norms = torch.linspace(1, 5, 64).double()
    found = study.norm_balance(norms, 2 * norms, 3, torch.Generator().manual_seed(0))
    assert found["distance"] == pytest.approx(0)
    assert found["correlation"] == pytest.approx(1)
    assert found["size"] == pytest.approx(0.5)
    assert found["shuffled"]["distance"][1] > 0.05


def test_the_marks_of_a_real_model_are_those_of_its_projections(study, model):
    """Values and outputs of a group as the model's own modules multiply them."""
    found = study.marks(model, 4, n_draws=2)
    attn = model.original_model.model.layers[4].self_attn
    v, o = attn.v_proj.weight.double(), attn.o_proj.weight.double()  # (192, d), (d, 576)
    group = 1
    left = v[64 * group : 64 * (group + 1)].T
    right = o[:, 192 * group : 192 * (group + 1)]
    right = torch.cat([right[:, 64 * h : 64 * (h + 1)].T for h in range(3)], dim=1)
    expected = study.balance(left, right, 1, torch.Generator().manual_seed(0))
    got = found["values_outputs"][group]
    for name in ("distance", "cosine", "tightness", "product", "size"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4)
    assert [len(found[name]) for name in ("values_outputs", "gaussian", "keys_queries")] == [3] * 3


def test_fresh_weights_are_of_the_size_asked_for_and_leave_the_model_alone(study, model):
    before = model.W_O[3].clone()
    made = study.fresh(model, 0.05)
    assert made.W_O.std().item() == pytest.approx(0.05, rel=0.02)
    assert context_tokens(made) == context_tokens(model)
    assert torch.equal(model.W_O[3], before)


def test_every_row_has_settings_of_its_own(study):
    rows = study.parts("smollm2-135m", ("trained", "0.02"), range(3))
    assert len(set(rows)) == len(rows) == 12


def test_the_record_is_whole_and_every_fall_is_shared_out(study):
    record = json.loads((study.run.__globals__["RESULTS"] / "low_rank.json").read_text())
    rows = record["rows"]
    assert {row["run"] for row in rows} <= set(range(len(record["runs"])))
    assert all(len(run["commit"]) == 40 for run in record["runs"])
    settings = [tuple(row[name] for name in ("part", "layer", "state", "model")) for row in rows]
    assert len(set(settings)) == len(rows)
    assert {("factors", i, "trained", "smollm2-135m") for i in range(30)} <= set(settings)
    assert all(row["condition"] == study.CONDITIONS[row["state"]] for row in rows)
    for row in rows:
        if row["part"] == "factors":
            levels = row["levels"].values()
            first, last = (" / ".join(own[at] for own in levels) for at in (0, -1))
            for kind in ("rank", "effective_rank"):
                fall = row[kind]["cells"][last] - row[kind]["cells"][first]
                total = sum(step[0] for steps in row[kind]["shares"].values() for step in steps)
                assert total == pytest.approx(fall, abs=1e-5)
