"""Several processes, over gloo, on real activations: they give what one process gives.

Runs of 100 steps are in float64. In float32 too the weights differ by rounding alone, until at some
step a feature that barely enters a selection in one run misses it in the other, and from there on
by much more; so the compiled step, which has no float64, is held to 40 steps.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path

import parallel_cost
import pytest
import torch
from distributed_worker import BATCH, CASES, D_SAE, HOOKS, MOVED, PASS, TOKENS, WEIGHED, WIDTH, Case
from faults import Faults, count_faults  # noqa: F401
from filelock import FileLock
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore, TCPStore
from torch.profiler import ProfilerActivity, profile

from saesub import measure_spectra
from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.training.distributed import DataParallelSAETrainer, Processes, join
from saesub.training.distributed.checkpoint import newest_state, read_state, write_state
from saesub.training.distributed.sliced import SlicedDictionary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and the kernel's counts"),
]
ROOT = Path(__file__).resolve().parent.parent
WORKER = str(Path(__file__).with_name("distributed_worker.py"))
LIMIT_S = 900  # many times what is needed; a process that is stuck fails the tests
RUNS = [(count, case) for count, cases in CASES.items() for case in cases]


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    return {**os.environ, "PYTHONPATH": path, **quiet, **more}


def _run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=_environment(**more), capture_output=True, text=True, timeout=LIMIT_S
    )


@pytest.fixture(scope="module")
def ran(activations: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one, two, three and four processes have done their work."""
    folder = tmp_path_factory.mktemp("processes")
    save_file({"x": activations[:, :WIDTH].float().contiguous()}, folder / "x.safetensors")
    done = _run([sys.executable, WORKER, str(folder)], TQDM_DISABLE="")
    for output in folder.glob("output-*"):
        assert "Traceback" not in output.read_text(), output.read_text()[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("count", "case"), RUNS, ids=lambda value: str(value))
def test_weights_are_those_of_one_process(ran: Path, count: int, case: Case):
    alone = load_file(ran / f"1-{case}.safetensors")
    together = load_file(ran / f"{count}-{case}.safetensors")
    start = case.sae(load_file(ran / "x.safetensors")["x"].mean(0)).state_dict()
    for name, expected in alone.items():
        if name == "said":  # history, dead share, L0 and number of dead features
            torch.testing.assert_close(
                together[name], expected, rtol=1e-4, atol=1e-4, equal_nan=True
            )
            continue
        assert _relative(together[name], expected) < 1e-5, name
        assert _relative(start[name], expected) > 1e-3, f"{name} hardly moved"
    if case.aux:  # dead features, so that AuxK had something to do
        assert alone["said"][-1] > 0


def test_the_gathered_sae_is_a_plain_saelens_sae(ran: Path):
    case = CASES[4][0]
    sae = SAE.load_from_disk(ran / f"4-{case}")
    weights = load_file(ran / f"4-{case}.safetensors")
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.d_sae == D_SAE
    assert sae.cfg.metadata.dead_share == weights["said"][-1] == weights["said"][-2]
    x = load_file(ran / "x.safetensors")["x"][:100]
    assert ((sae.encode(x) > 0).sum(1) <= case.k).all()
    assert (sae(x) - x).square().sum() < (x - x.mean(0)).square().sum()


@pytest.mark.parametrize("case", MOVED, ids=str)
def test_a_run_continues_in_other_processes_with_the_other_trainer(ran: Path, case: Case):
    alone = load_file(ran / f"1-{case}.safetensors")
    moved = load_file(ran / f"2-{case}.safetensors")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert _relative(moved[name], alone[name]) < 1e-5
    torch.testing.assert_close(moved["said"], alone["said"], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_mistakes_are_named_in_every_process(ran: Path):
    expected = [
        "made with other settings: optimizer 'sparse_adam' (here 'adam')",
        "Process 1 has another set of settings than process 0 ({'total_training_samples': 2624}",
        "The processes hold [200, 201] features, not the parts that processes.share gives out",
        "The norm of a slice was fitted to 258 features, not to the 515 of all processes",
        "Process 1 has another sample of activations than process 0",
        "No process has a token in step 0",
        "No process has a token in step 0",
        "is damaged (shard-",
    ]
    for index in range(2):
        said = (ran / f"refused-{index}").read_text().splitlines()
        assert len(said) == len(expected)
        for sentence, part in zip(said, expected, strict=True):
            assert part in sentence


@pytest.mark.parametrize("count", [2, 4])
def test_spectra_of_uneven_parts_merge_exactly(ran: Path, count: int):
    whole = Spectrum.from_activations(load_file(ran / "x.safetensors")["x"])
    for index in range(count):
        merged = Spectrum.load(ran / f"all-{count}-{index}")
        _same_spectrum(merged, whole)


@pytest.mark.parametrize("name", TOKENS)
def test_spectra_of_a_model_are_those_of_one_process(ran: Path, two_layers, corpus, name: str):
    documents = corpus.select(range(200))
    alone = measure_spectra(two_layers, documents, HOOKS, n_tokens=TOKENS[name], **PASS)
    for count in (2, 4):
        for index in range(count):
            for hook, expected in alone.items():
                found = Spectrum.load(ran / f"{name}-{hook}-{count}-{index}")
                _same_spectrum(found, expected)
                assert found.metadata == expected.metadata
            assert (ran / f"{name}.{index}-of-{count}").exists()


def _same_spectrum(found: Spectrum, expected: Spectrum) -> None:
    assert found.n_tokens == expected.n_tokens
    assert found.mean_norm == pytest.approx(expected.mean_norm, rel=1e-6)
    assert _relative(found.mean, expected.mean) < 1e-6  # blocks of other sizes, in float32
    assert _relative(found.covariance, expected.covariance) < 1e-6


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", WEIGHED, ids=str)
def test_the_plan_counts_what_is_held_and_sent(ran: Path, count: int, case: Case):
    job = parallel_cost.Job(
        WIDTH, D_SAE, case.k, BATCH, count, optimizer=case.optimizer, mode=case.mode
    )
    records = [
        json.loads((ran / f"weighed-{case}-{count}-{index}").read_text()) for index in range(count)
    ]
    held = {what: parallel_cost.memory(job)[what] for what in ("parameters", "moments", "counts")}
    assert records[0]["held"] == held  # the first process is the fullest
    sent = sum(record["sent"] for record in records) / count
    planned = sum(parallel_cost.traffic(job).values())
    assert planned <= 1.001 * sent  # rounding of uneven rings
    assert sent < 1.05 * planned + 4000  # gloo's headers, and the number of rows


def test_a_killed_process_is_named_by_the_others(ran: Path, faults: Faults):
    for index in (0, 2):
        said = (ran / f"lost-{index}").read_text()
        assert said.startswith(f"process 1 of 3 did not answer (seen by process {index})")
        assert "run the same command again" in said
    faults.survived("killed (SIGKILL) one of several processes")


def test_a_process_that_is_too_late_for_the_list_of_live_ones_names_none(
    monkeypatch: pytest.MonkeyPatch,
):
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    late = Processes(1, 3, TCPStore("127.0.0.1", first.port, is_master=False))
    del first  # its server with it
    monkeypatch.setattr("saesub.training.distributed.processes._GRACE_S", 0.1)
    said = late.report_loss()
    assert said.startswith("One of 3 processes, and process 0 with the list of live ones, did not")


@pytest.mark.parametrize("count", CASES)
def test_only_the_first_process_shows_a_bar(ran: Path, count: int):
    shown = [(ran / f"output-{count}-{r}").read_text().count("| mse_loss") for r in range(count)]
    assert shown[0] > 0
    assert shown[1:] == [0] * (count - 1)


def test_a_killed_process_ends_the_job_which_continues_when_run_again(ran: Path, faults: Faults):
    killed, again = (ran / "torchrun").read_text().split("torchrun: process 0 failed\n")
    assert "process 0 of 2 did not answer (seen by process 1)" in killed
    assert "run the same command again and it continues from its last checkpoint" in killed
    assert "process 0 begins at step 0" in killed
    assert "process 0 begins at step 21" in again
    uninterrupted = load_file(ran / "whole" / "sae_weights.safetensors")
    for name, weights in load_file(ran / "sae" / "sae_weights.safetensors").items():
        assert torch.equal(weights, uninterrupted[name])
    faults.survived("killed (SIGKILL) one of several processes under torchrun, then run again")


@pytest.mark.parametrize("count", CASES)
def test_slices_fit_their_norm_together(ran: Path, count: int):
    for index in range(count):
        norms = json.loads((ran / f"norms-{count}-{index}").read_text())
        assert norms["together"] == pytest.approx(norms["whole"], rel=1e-5)
        assert norms["slice"] > 1.05 * norms["whole"]


def test_a_process_started_alone_is_a_job_of_its_own(activations: torch.Tensor):
    with join() as processes:
        assert isinstance(processes, Processes)
        assert (processes.index, processes.count, processes.share(7)) == (0, 1, range(7))
        assert torch.equal(processes.gather_rows(activations[:5]), activations[:5])
        with pytest.raises(SaesubError, match="already joined"), join():
            pass


@pytest.mark.parametrize("more", [{}, {"WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1"}])
def test_a_process_without_the_rest_of_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SaesubError, match="RANK is set, but not all that torchrun sets"), join():
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to have too few of them")
def test_a_process_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(SaesubError, match="no GPU for local rank"), join():
        pass


def test_folders_of_other_names_are_no_states(tmp_path: Path):
    with join() as processes:
        for name in ("state-foo", "state-7.partial", "state-"):
            (tmp_path / name).mkdir()
        assert newest_state(processes, tmp_path) is None
        for tokens in (20, 100):
            write_state(processes, tmp_path, tokens, {"x": torch.ones(2)}, {}, {})
        assert newest_state(processes, tmp_path) == tmp_path / "state-100"
    assert {path.name for path in tmp_path.iterdir()} == {
        *(".lock", "state-foo", "state-", "state-100")
    }


def test_an_older_torch_trains_without_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.8.0+cpu"))
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    monkeypatch.delitem(sys.modules, "saesub.training.distributed.checkpoint")
    importlib.import_module("saesub.training.distributed.checkpoint")
    cfg = replace(Case("data").cfg(None), total_training_samples=3 * BATCH, lr_decay_steps=0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4))
    needed = pytest.raises(SaesubError, match=r"need torch 2\.9 or newer, not 2\.8\.0")
    with join() as processes:

        def trainer(cfg: SAETrainerConfig) -> DataParallelSAETrainer:
            batches = iter(lambda: torch.randn(BATCH, 16), None)
            return DataParallelSAETrainer(processes, cfg, sae, lambda _: batches)

        with needed:
            trainer(replace(cfg, checkpoint_path=str(tmp_path)))
        plain = trainer(cfg)
        plain.fit()
        assert plain.n_training_samples == 3 * BATCH
        with needed:
            plain.save_checkpoint("now", tmp_path)
        with needed:
            read_state(processes, tmp_path, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_another_jobs_half_written_state_stays(tmp_path: Path):
    """The second job comes while the first, which holds the lock, writes the same state."""
    partial = tmp_path / "state-20.partial"
    partial.mkdir()
    with join() as processes, ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / ".lock"):
            state = (processes, tmp_path, 20, {"x": torch.ones(2)}, {}, {})
            second = pool.submit(write_state, *state)
            with pytest.raises(FutureTimeout):
                second.result(timeout=1)
            assert partial.is_dir()
        second.result(timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "state-20"}


def test_gradients_are_clipped_over_processes_without_a_copy():
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=100, d_sae=40_000, k=8))
    for parameter in sae.parameters():
        parameter.grad = torch.randn_like(parameter)
    squared = sum(p.grad.double().square().sum() for p in sae.parameters())
    expected = {name: p.grad / squared.sqrt() for name, p in sae.named_parameters()}
    with (
        join() as processes,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as ran,
    ):
        SlicedDictionary(processes).clip_gradients(sae)
    assert 0 < max(event.self_cpu_memory_usage for event in ran.events()) < sae.W_dec.nbytes / 10
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "count"), [(10, 4), (5, 4), (2, 4), (0, 3), (515, 2)])
def test_shares_are_those_of_torch_chunk(n: int, count: int):
    chunks = [len(part) for part in torch.arange(n).chunk(count)] if n else []
    shares = [Processes(index, count, HashStore()).share(n) for index in range(count)]
    assert [len(share) for share in shares] == chunks + [0] * (count - len(chunks))
    assert [i for share in shares for i in share] == list(range(n))
