"""The studies: what they set up is what they say, and their records say which run made each row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import saesub
from saesub.errors import SaesubError
from saesub.reproduce import studies

STUDIES = Path(__file__).resolve().parent.parent / "data" / "results" / "studies"
SETTINGS = (
    "model",
    "hook_name",
    "spectrum_of",
    "d_sae",
    "n_train",
    "d_init",
    "beta1",
    "lr",
    "seed",
)
WINDOWS = [2**power for power in range(13, 18)]  # of a record, besides the longest


STUDIES_OF_SAES = [
    "cure",
    "causes",
    "sites",
    "subspace_size",
    "width",
    "mitigations",
    "baselines",
    "recipe",
    "refitted",
    "offset",
    "rivals",
    "longer",
]


@pytest.mark.parametrize("name", STUDIES_OF_SAES)
def test_a_record_is_whole(name):
    record = json.loads((STUDIES / f"{name}.json").read_text())
    rows = record["rows"]
    assert {row["run"] for row in rows} <= set(range(len(record["runs"])))
    assert all(len(run["commit"]) == 40 for run in record["runs"])
    named = [(r["start"], r["optimizer"], r.get("condition"), r.get("n_read")) for r in rows]
    trials = [(*(row[k] for k in SETTINGS), *name) for row, name in zip(rows, named, strict=True)]
    assert len(set(trials)) == len(rows)
    assert all(row["dead_share"] == row["silent"][str(row["n_judged"])] for row in rows)
    # Features of each power of two of their firings, the dead among them, are all features.
    assert all(sum(row["density"].values()) == row["d_sae"] for row in rows)
    assert all(row["density"].get("-1", 0) == row["dead_share"] * row["d_sae"] for row in rows)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_has_one_line_for_each_row(protocol, path):
    text = path.read_text()
    record = json.loads(text)
    assert protocol.record_text(record) == text
    assert {json.dumps(row) for row in record["rows"]} <= {
        line.removesuffix(",") for line in text.splitlines()
    }


def test_the_record_of_the_features_quality_is_whole_and_agrees_with_itself():
    """Its rows are of several kinds; a pair has the living features of the SAEs that it matches."""
    rows = json.loads((STUDIES / "quality.json").read_text())["rows"]
    parts = {
        part: [row for row in rows if row["part"] == part] for part in {r["part"] for r in rows}
    }
    sizes = {"quality": 12, "untrained": 2, "costly": 24, "half": 12, "pair": 6, "loss": 3}
    assert {part: len(of) for part, of in parts.items()} == sizes | {"ablation": 1, "probing": 1}
    for row in (*parts["quality"], *parts["costly"], *parts["half"]):
        assert sum(row["density"].values()) == row["d_sae"]
        assert row["density"].get("-1", 0) == row["dead_share"] * row["d_sae"]
    living = {
        (row["start"], row["half"], row["seed"]): row["d_sae"] - row["density"].get("-1", 0)
        for row in parts["half"]
    }
    for row in parts["pair"]:
        seeds = ((1, row["seed"]), (2, row["seed"] + 3))
        assert row["living"] == [living[(row["start"], *half)] for half in seeds]
        assert row["matched"] == min(row["living"])
        assert sum(n for n, _ in row["shared_by_density"].values()) == row["matched"]


def test_all_widths_are_judged_on_the_tokens_of_the_widest(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "notebooks" / "studies"))
    import cure
    import width

    widest = cure.four()[0]
    for trial in (*width.CONDITIONS, *width.LONG, width.STILL):
        assert (trial.n_stored, trial.n_judged) == (widest.n_stored, widest.n_judged)
    assert {trial.n_train for trial in width.LONG} == {widest.n_train}
    for trial in (*width.CONDITIONS, width.STILL):
        assert trial.n_train / trial.d_sae == widest.n_train / widest.d_sae
        firings = [n * trial.k / trial.d_sae for n in WINDOWS]
        assert min(abs(n - 1000) for n in firings) < 50


@pytest.fixture
def protocol(monkeypatch, tmp_path):
    """The studies' shared module on small stores in memory, of two made-up sites."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "notebooks" / "studies"))
    import protocol

    generator = torch.Generator().manual_seed(0)

    def rows(decay: float) -> torch.Tensor:
        turned = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
        lengths = decay ** torch.arange(24.0)
        return torch.randn(12_288, 24, generator=generator) * lengths @ turned + 0.5

    made = {"uneven": rows(0.75), "even": rows(0.95)}

    def stores(model, corpus, hook_names, n_tokens):
        return {h: saesub.ActivationStore.of(made[h][:n_tokens], h) for h in hook_names}

    monkeypatch.setattr(protocol.saesub, "harvest", stores)
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(protocol, "N_VALIDATION", 1024)
    monkeypatch.setattr(protocol, "N_SPECTRUM", 8192)
    protocol.site.cache_clear()
    yield protocol
    protocol.site.cache_clear()


def _trial(protocol, **settings):
    usual = {"hook_name": "uneven", "start": "random", "d_sae": 64, "k": 4}
    return protocol.Trial(**usual | {"n_train": 8192, "n_judged": 3072} | settings)


def test_an_exchanged_spectrum_is_the_others_and_the_rest_stays(protocol):
    own = protocol.site_of(_trial(protocol))
    other = protocol.site_of(_trial(protocol, hook_name="even"))
    changed = protocol.site_of(_trial(protocol, spectrum_of="even"))
    shares = [s.spectrum.eigenvalues / s.spectrum.eigenvalues.sum() for s in (changed, other)]
    assert torch.allclose(*shares, atol=2e-4)
    # The total variance, the mean and the principal directions are its own.
    variance = own.spectrum.eigenvalues.sum()
    assert torch.isclose(changed.spectrum.eigenvalues.sum(), variance, rtol=1e-4)
    assert torch.allclose(changed.spectrum.mean, own.spectrum.mean, atol=1e-4)
    overlap = own.spectrum.basis(4).T @ changed.spectrum.basis(4)
    assert torch.linalg.svdvals(overlap.double()).min() > 0.999


def test_a_mixed_start_has_one_half_in_the_subspace(protocol):
    trial = _trial(protocol, start="mixed")
    at = protocol.site_of(trial)
    sae = protocol.untrained(trial, at)
    basis = at.spectrum.basis(saesub.choose_d_init(at.spectrum))
    inside = saesub.overlap(sae.W_dec.detach(), basis)
    assert inside[32:].min() > 0.999
    assert inside[:32].max() < 0.99
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, norms.mean().expand(64), rtol=1e-4)


def test_all_starts_have_the_fitted_norm_and_the_bias_at_the_mean(protocol):
    for start in ("random", "subspace", "whitened_data"):
        trial = _trial(protocol, start=start)
        at = protocol.site_of(trial)
        sae = protocol.untrained(trial, at)
        scale = at.spectrum.d**0.5 / at.spectrum.mean_norm
        assert torch.allclose(sae.b_dec.double(), at.spectrum.mean * scale, atol=1e-3)
        before = sae.W_dec.detach().norm(dim=1).mean()
        saesub.fit_norm(sae, at.spectrum, activations=at.seen(at.store.rows(0, 4096)))
        assert torch.isclose(sae.W_dec.norm(dim=1).mean(), before, rtol=1e-2)


def test_parts_of_a_store_do_not_overlap_and_a_row_judges_the_last(protocol):
    trial = _trial(protocol)
    row = protocol.outcome(trial)
    assert protocol.trial_of(json.loads(json.dumps(row))) == trial
    at = protocol.site_of(trial)
    sae = protocol.untrained(trial, at)
    protocol.train(trial, sae, at)
    last = at.store.rows(8192 + 1024, 8192 + 1024 + 3072)
    assert row["fvu"] == pytest.approx(saesub.reconstruction(sae, last.split(512)).fvu, rel=1e-5)
    dead = saesub.dead_features(sae, last, n_tokens=3072)
    assert row["dead_share"] == dead.double().mean().item()
    assert sum(row["density"].values()) == 64
    assert row["density"].get(-1, 0) == int(dead.sum())
    assert row["firings"] == pytest.approx(3072 * 4 / 64)


def test_a_study_continues_and_a_sweep_ends_at_an_interior_rate(protocol, monkeypatch):
    trained = []

    def outcome(trial):
        """FVU is best at 0.004 on the validation part, which chooses."""
        trained.append(trial)
        fvu = abs(torch.tensor(trial.lr / 0.004).log2().item())
        return protocol.asdict(trial) | {
            "validation_fvu": fvu, "fvu": 1 / (1 + fvu), "dead_share": trial.lr
        }  # fmt: skip

    class Here:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, trial):
            done = protocol.Future()
            done.set_result(function(trial))
            return done

    monkeypatch.setattr(protocol, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(protocol, "harvest", lambda trials: None)
    condition = _trial(protocol)
    best = protocol.sweep("tiny", [condition], (5e-4, 1e-3), outcome=outcome)
    assert best == {replace(condition, lr=0.0): 0.004}
    assert sorted(t.lr for t in trained if t.seed == 0) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert [(t.seed, t.lr) for t in trained if t.seed] == [(1, 0.004), (2, 0.004)]
    assert len(trained) == 7
    n = len(trained)
    assert protocol.sweep("tiny", [condition], (5e-4, 1e-3), outcome=outcome) == best
    assert len(trained) == n  # nothing is trained twice
    record = json.loads((protocol.RESULTS / "tiny.json").read_text())
    assert len(record["rows"]) == n
    assert {row["run"] for row in record["rows"]} == {0}
    assert len(record["runs"]) == 1
    # Another command at the same commit is another run.
    monkeypatch.setattr(protocol.sys, "argv", ["another.py"])
    protocol.run("tiny", [replace(condition, lr=1.0)], outcome)
    record = json.loads((protocol.RESULTS / "tiny.json").read_text())
    assert [run["command"] for run in record["runs"]][1:] == ["python another.py"]
    assert record["rows"][-1]["run"] == 1


def test_a_sweep_gives_seeds_to_all_rates_that_fit_as_well(protocol, monkeypatch):
    """The first seed fits best at 0.002, the mean at 0.001, half a per cent apart."""
    fvu = {(0, 1e-3): 0.201, (0, 2e-3): 0.200, (1, 2e-3): 0.21, (2, 2e-3): 0.21, (0, 4e-3): 0.2025}
    rows = []

    def run(name, trials, outcome):
        for trial in dict.fromkeys(trials):
            if trial in [protocol.trial_of(row) for row in rows]:
                continue
            found = fvu.get((trial.seed, trial.lr), 0.201 if trial.lr == 1e-3 else 0.3)
            rows.append(
                protocol.asdict(trial) | {"validation_fvu": found, "fvu": found, "dead_share": 0}
            )

    monkeypatch.setattr(protocol, "run", run)
    monkeypatch.setattr(protocol, "recorded", lambda name: rows)
    condition, other = _trial(protocol), _trial(protocol, start="subspace")
    best = protocol.sweep("near", [condition, other])
    assert best == {replace(c, lr=0.0): 1e-3 for c in (condition, other)}
    seeds = [(row["lr"], row["seed"]) for row in rows if row["start"] == "subspace"]
    # 0.004 comes near only once the seeds have raised the best mean; then they are worse there.
    assert sorted(s for s in seeds if s[1]) == [
        (lr, s) for lr in (1e-3, 2e-3, 4e-3) for s in (1, 2)
    ]


def test_a_sweep_goes_on_where_all_seeds_fit_best_at_an_edge(protocol, monkeypatch):
    """The first seed fits best inside, at 0.002; all seeds at the highest rate, 0.004."""
    fvu = {(0, 2e-3): 0.200, (0, 4e-3): 0.201, (1, 4e-3): 0.19, (2, 4e-3): 0.19}
    rows = []

    def run(name, trials, outcome):
        for trial in dict.fromkeys(trials):
            if trial not in [protocol.trial_of(row) for row in rows]:
                found = fvu.get((trial.seed, trial.lr), 0.2 if trial.lr == 2e-3 else 0.3)
                measured = {"validation_fvu": found, "fvu": found, "dead_share": 0}
                rows.append(protocol.asdict(trial) | measured)

    monkeypatch.setattr(protocol, "run", run)
    monkeypatch.setattr(protocol, "recorded", lambda name: rows)
    condition = _trial(protocol)
    assert protocol.sweep("edge", [condition]) == {replace(condition, lr=0.0): 4e-3}
    assert max(row["lr"] for row in rows) == 8e-3


def test_a_record_names_the_commit_of_the_oldest_of_the_rows_asked_for():
    rows = pd.DataFrame({"run": [0, 1, 2, 1]})
    study = studies.Study("x", rows, [{"commit": c * 40} for c in "abc"])
    assert study.commit == "a" * 9
    assert study.commit_of(rows[rows["run"] > 0]) == "b" * 9


def test_a_record_that_is_not_there_says_how_to_make_it():
    with pytest.raises(SaesubError, match=r"record nothing\.json .* run the script"):
        studies.recorded("nothing")


def test_the_best_rate_is_chosen_by_the_validation_part_over_all_seeds():
    columns = ["condition", "seed", "lr", "validation_fvu", "fvu", "dead_share"]
    rows = pd.DataFrame(
        [
            ("random", 0, 1e-3, 0.20, 0.30, 0.1),  # the best of this seed
            ("random", 0, 2e-3, 0.21, 0.50, 0.2),
            ("random", 1, 1e-3, 0.30, 0.10, 0.1),
            ("random", 1, 2e-3, 0.10, 0.50, 0.1),
            ("ASI", 0, 1e-3, 0.30, 0.30, 0.0),
            ("ASI", 0, 2e-3, 0.20, 0.30, 0.0),
        ],
        columns=columns,
        index=[0, 1, 2, 3, 0, 1],  # as after pd.concat
    )
    found = studies.with_best(rows, ["condition"])
    assert found["best"].tolist() == [False, True, False, True, False, True]
    sweep = studies.sweep_of(rows[rows["condition"] == "random"])
    assert sweep.rates == (1e-3, 2e-3)
    assert sweep.best == 1
    assert sweep.validation_fvu == pytest.approx((0.25, 0.155))
    assert sweep.fvu == pytest.approx((0.2, 0.5))
    assert sweep.dead == pytest.approx((0.1, 0.15))


def test_several_records_are_joined_at_one_place_and_size():
    first, cure = studies.recorded("mitigations"), studies.recorded("cure")
    rows = studies.joined(first, cure)
    sizes = ["hook_name", "d_sae", "n_train", "model", "corpus"]
    assert (rows[sizes] == first.rows.iloc[0][sizes]).all(axis=None)
    assert {"random", "ASI", "AuxK", "ASI + SparseAdam", "data start"} <= {*rows["condition"]}
    assert not rows.duplicated(["condition", "lr", "seed"]).any()
    random = rows[rows["condition"] == "random"]
    assert set(random["study"]) == {"cure"}  # mitigations.json has some of these SAEs too
    assert set(studies.joined(cure, first)["d_sae"]) == {8192}

    found = studies.over_rates(rows)
    assert not found.duplicated(["condition", "lr"]).any()
    assert (found.groupby("condition")["best"].sum() == 1).all()
    for column in ("dead_share", "fvu"):
        one = found[(found["condition"] == "random") & (found["lr"] == 2e-3)][column]
        assert one.item() == pytest.approx(random[random["lr"] == 2e-3][column].mean())


@pytest.fixture
def quality(protocol):
    """The study of feature quality, on the same small stores."""
    import quality

    quality._second_half.cache_clear()
    yield quality
    quality._second_half.cache_clear()


def test_the_halves_of_the_documents_share_no_training_tokens(quality, protocol, monkeypatch):
    monkeypatch.setattr(protocol, "N_SPECTRUM", 4096)
    sizes = {"d_sae": 64, "k": 4, "n_train": 4096, "n_judged": 1024}
    first = quality.Part("uneven", "random", part="half", half=1, **sizes)
    second = replace(first, half=2)
    assert first.n_stored == second.n_stored == 2 * 4096 + 1024 + 2 * 1024
    whole, rest = quality.seen_by(first).store, quality.seen_by(second).store
    assert torch.equal(rest.rows(0, 4096), whole.rows(4096, 8192))
    last = [store.rows(store.n_tokens - 1024, store.n_tokens) for store in (whole, rest)]
    assert torch.equal(*last)
    own = saesub.Spectrum.from_activations(rest.rows(0, 4096))
    assert torch.allclose(quality.seen_by(second).spectrum.mean, own.mean)
    assert not torch.allclose(quality.seen_by(first).spectrum.mean, own.mean)


def test_quality_takes_each_conditions_own_rate(quality, protocol):
    condition = quality.Part("uneven", "subspace", "sparse_adam", d_sae=64, k=4, half=1)
    assert quality.best_rate(condition) == 1e-3  # there is no record yet
    best = {"random": 5e-4, "subspace": 2e-3}
    rows = [
        protocol.asdict(protocol.Trial("uneven", start, "sparse_adam", lr, d_sae=64, k=4))
        | {"validation_fvu": abs(lr - best[start]), "fvu": 0.5, "dead_share": 0.1}
        for start in best
        for lr in (5e-4, 1e-3, 2e-3, 4e-3)
    ]
    (protocol.RESULTS / "cure.json").write_text(json.dumps({"rows": rows}))
    assert quality.best_rate(condition) == 2e-3
    assert quality.best_rate(replace(condition, start="random", seed=2)) == 5e-4
    assert quality.best_rate(replace(condition, d_sae=128)) == 1e-3


def test_starts_at_data_are_of_all_training_documents_and_of_no_other(protocol):
    trial = _trial(protocol, start="whitened_data", d_sae=128)
    at = protocol.site_of(trial)
    x = protocol.sample_for(trial, at)
    assert x.shape == (8 * 128, 24)
    rows = at.store.rows(0, at.store.n_tokens)
    found = torch.cdist(x.double(), rows.double()).argmin(1)
    assert torch.equal(rows[found], x)
    assert found.max() < trial.n_train
    eighths = torch.bincount(found // (trial.n_train // 8), minlength=8)
    assert len(eighths) == 8
    assert (eighths > 128 / 2).all()
    assert torch.equal(protocol.sample_for(_trial(protocol), at), rows[:4096])


def test_saes_that_a_gpu_trained_are_those_of_all_records(tmp_path, monkeypatch):
    """The oldest first; what is no SAE, or was left out, is no row."""
    arm = {"start": "random", "optimizer": "adam", "d_sae": 8, "lr": 0.5, "tokens": 4, "fvu": 0.25}
    arm |= {"mean_fires_in_training": 2.0, "silent_held_out": {"2": 0.75, "4": 0.5}}
    refitted = arm | {"after_refit": {"fvu": 0.125}}
    rest = {"backend": "triton", "activations": {"tokens": 4}, "late": {"left out": "no time"}}
    for name, date, arms in [
        ("b", "2026-01-02", {"first": arm}),
        ("a", "2026-01-03", {"second": refitted}),
        ("c", "2026-01-01", None),
    ]:
        record = {"facts": {"card": "NVIDIA A", "date": date}, "commit": "0123456789ab"}
        record |= {} if arms is None else {"headline": rest | arms}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(studies, "data_file", lambda name: tmp_path)
    found = studies.trained_on_gpu()
    assert found["name"].tolist() == ["first", "second"]
    assert found["condition"].tolist() == ["random", "random"]
    assert set(found["commit"]) == {"012345678"}
    assert (
        found[["window", "dead_share", "fvu", "firings"]].values.tolist() == [[4, 0.5, 0.25, 2]] * 2
    )
    assert found["refitted_fvu"].isna().tolist() == [True, False]
    assert found["refitted_fvu"].iloc[1] == 0.125


def test_without_a_record_of_a_gpu_it_says_what_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "data_file", lambda name: tmp_path)
    with pytest.raises(SaesubError, match="run the kit in benchmarks/gpu"):
        studies.trained_on_gpu()
