"""`saesub check-gpu`: its checks pass for backends that are right, and report each one that is not.

There is no GPU here: the backends are the CPU's and Triton's interpreter, and a card is pretended.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from saesub import cli
from saesub.errors import SaesubError
from saesub.extras import gpu_check, gpu_rows, gpu_speed
from saesub.extras.gpu_check import Check, Sizes, kernels_passed, run_checks
from saesub.extras.gpu_rows import Size
from saesub.topk import cpu, cpu_library, gpu_record, triton_backend
from saesub.topk.eligibility import features_that_fit
from saesub.topk.shadow import EncoderShadow
from saesub.training import native_step

CPU = torch.device("cpu")
SMALL = Sizes(
    methods=(Size(7, 5, 40, 3), Size(65, 24, 300, 12)),
    step=Size(128, 24, 512, 4),
    on_cpu=Size(64, 16, 256, 4),
    far=Size(9, 16, 64, 4, offset=1000),
)
TINY = Sizes(
    methods=(Size(7, 5, 40, 3),),
    step=Size(16, 24, 64, 4),
    on_cpu=Size(16, 16, 64, 4),
    far=Size(5, 6, 24, 3, offset=40),
)
needs_native = pytest.mark.skipif(cpu_library.library() is None, reason="no C++ compiler here")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def _of_cpu(backend: cpu.CpuBackend = cpu.BACKEND) -> dict[str, Check]:
    checks = run_checks(CPU, backend=backend, named="auto", sizes=SMALL)
    return {check.name: check for check in checks}


@needs_native
def test_the_checks_pass_for_the_cpus_backend():
    told = []
    checks = run_checks(CPU, backend=cpu.BACKEND, named="auto", sizes=SMALL, tell=told.append)
    assert told == checks
    left = {c.name.split(",")[0] for c in checks if c.outcome == "left out"}
    assert left == {"no step waits"}
    assert {c.outcome for c in checks} == {"passed", "left out"}
    assert len(checks) == 2 + 6 * 3 + 4 + 1
    assert kernels_passed(checks)


@needs_triton
@pytest.mark.slow
def test_the_checks_pass_for_the_kernels_in_the_interpreter(monkeypatch):
    backend = triton_backend.BACKEND
    monkeypatch.setattr(native_step, "row_backend", lambda *given, **more: backend)
    monkeypatch.setattr(gpu_check, "_STEPS", 4)
    checks = run_checks(CPU, backend=backend, named="triton", sizes=TINY)
    assert {c.name: c.detail for c in checks if c.outcome == "failed"} == {}
    assert kernels_passed(checks)


@needs_triton
def test_the_search_in_few_bits_is_checked_by_itself(monkeypatch):
    """At a size where it does not leave the work to the other search; and with one fault."""
    backend, size = triton_backend.BACKEND, Size(5, 16, 1100, 1)
    assert "recall 1.0" in gpu_check._method(gpu_rows.check_shadow, backend, size, CPU)

    def half_written(shadow, W_enc, W_dec, first, count):
        write(shadow, W_enc, W_dec, first, count // 2)

    write = EncoderShadow._write
    monkeypatch.setattr(EncoderShadow, "_write", half_written)
    with pytest.raises(gpu_rows.CheckError, match=r"the search finds 0\.\d+ of the top 1"):
        gpu_check._method(gpu_rows.check_shadow, backend, size, CPU)


class _WrongRows(cpu.RowGradients):
    """Rows whose methods are wrong as a class attribute says."""

    wrong = ""

    def _norms(self, W_enc):
        squared, through = super()._norms(W_enc)
        if self.wrong == "norm":
            squared = squared * 1.001
        if self.wrong == "through":
            through = through.roll(1)
        return squared, through

    def _adam(self, settings, step, clip, tensors, moved, shadow):
        if self.wrong == "clip":
            clip = torch.ones_like(clip)
        if self.wrong == "step":
            step = step + 1
        if self.wrong == "eager":
            tensors[0].add_(1e-3)  # moves features without entries too
        super()._adam(settings, step, clip, tensors, moved, shadow)
        if self.wrong == "moved" and moved is not None:
            moved += 1


class _Wrong(cpu.CpuBackend):
    """The CPU's backend with one fault."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def shadow(self, sae, kept, *, in_subspace=True):
        if self.wrong == "recall":  # the fault is in the search without one
            return None
        return super().shadow(sae, kept, in_subspace=in_subspace)

    def _search(self, x, W_enc, b_enc, k, feature_scale):
        if self.wrong == "scale":
            feature_scale = None
        features, pre = super()._search(x, W_enc, b_enc, k, feature_scale)
        if self.wrong == "recall":  # one entry of each token is the worst instead
            features = features.clone()
            pre = pre.clone()
            scores = x @ W_enc + b_enc
            pre[:, 0], features[:, 0] = scores.min(1)
        if self.wrong == "pre":
            pre = pre + 1e-2
        if self.wrong == "twice":
            features, pre = features.clone(), pre.clone()
            features[:, 1], pre[:, 1] = features[:, 0], pre[:, 0]
        return features, pre

    def _exact_search(self, x, W_enc, b_enc, k, feature_scale):
        if self.wrong == "exact":
            return super()._exact_search(x, W_enc, b_enc, k + 1, feature_scale)
        return super()._exact_search(x, W_enc, b_enc, k, feature_scale)

    def _decode(self, selected, values, W_dec, b_dec, target, weight):
        decoded = super()._decode(selected, values, W_dec, b_dec, target, weight)
        if self.wrong in ("x_hat", "g_out", "g_pre", "g_bias", "squared_error"):
            value = getattr(decoded, self.wrong)
            return dataclasses.replace(decoded, **{self.wrong: value * 1.001})
        if self.wrong == "NaN":
            decoded.x_hat[0, 0] = torch.nan
        return decoded

    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae):
        if self.wrong == "entry":  # one entry is lost
            values = values.clone()
            values[values.argmax()] = 0
        rows = super()._row_gradients(features, tokens, values, g_pre, x, g_out, d_sae)
        wrong = _WrongRows(*(getattr(rows, f.name) for f in dataclasses.fields(rows)))
        object.__setattr__(wrong, "wrong", self.wrong)
        return wrong


@needs_native
@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ("scale", "search"),
        ("recall", "search"),
        ("pre", "search"),
        ("twice", "search"),
        ("exact", "search"),
        ("x_hat", "decode"),
        ("g_out", "decode"),
        ("g_pre", "decode"),
        ("g_bias", "decode"),
        ("squared_error", "decode"),
        ("NaN", "decode"),
        ("norm", "norms"),
        ("through", "norms"),
        ("entry", "norms"),
        ("entry", "Adam"),
        ("clip", "Adam"),
        ("step", "SparseAdam"),
        ("eager", "SparseAdam"),
        ("moved", "SparseAdam"),
    ],
)
def test_a_wrong_backend_is_reported_by_the_check_of_its_method(wrong, check):
    sizes = *SMALL.methods, SMALL.far
    wanted = {f"{check}, {size}" for size in sizes}
    waiting = gpu_check._of_kernels(CPU, _Wrong(wrong), "auto", SMALL)
    checks = [gpu_check._outcome(*one) for one in waiting if one[0] in wanted]
    assert len(checks) == len(sizes)
    assert [c.detail for c in checks if c.outcome != "failed"] == []
    assert all("Error:" not in c.detail for c in checks)  # found, not stumbled over
    assert not kernels_passed(checks)


@needs_native
@pytest.mark.parametrize("wrong", ["step", "g_pre", "recall"])
def test_a_wrong_step_is_reported(monkeypatch, wrong):
    backend = _Wrong(wrong)
    if wrong == "g_pre":
        monkeypatch.setattr(_Wrong, "_decode", _without_gradient)
    monkeypatch.setattr(native_step, "row_backend", lambda *given, **more: backend)
    monkeypatch.setattr("saesub.topk.sae_search.row_backend", lambda *given, **more: cpu.BACKEND)
    found = _of_cpu()
    assert found["steps of topk by adam"].outcome == "failed", found["steps of topk by adam"]


def _without_gradient(self, *given):
    decoded = cpu.CpuBackend._decode(self, *given)
    return dataclasses.replace(decoded, g_pre=torch.zeros_like(decoded.g_pre))


@needs_native
def test_a_trainer_that_does_not_take_the_fused_step_is_reported(monkeypatch):
    monkeypatch.setattr(native_step, "row_backend", lambda *given, **more: None)
    check = _of_cpu()["steps of topk by adam"]
    assert (check.outcome, check.detail) == ("failed", "the trainer does not take the fused step")


@needs_native
def test_one_check_that_breaks_does_not_stop_the_others(monkeypatch):
    def broken(*given):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cpu.CpuBackend, "_decode", broken)
    found = _of_cpu()
    check = found[f"decode, {SMALL.far}"]
    assert check.outcome == "failed"
    assert check.detail == "RuntimeError: an illegal memory access was encountered"
    assert found[f"norms, {SMALL.far}"].outcome == "passed"


def test_without_triton_or_on_an_old_card_torchs_operators_are_checked(monkeypatch):
    monkeypatch.setattr(gpu_check, "triton_version", lambda: None)
    checks = run_checks(CPU, sizes=TINY)
    assert [(c.about, c.outcome) for c in checks] == [("kernels", "left out"), ("torch", "passed")]
    assert not kernels_passed(checks)
    monkeypatch.setattr(gpu_check, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(gpu_check.LeftOutError, match=r"capability 8\.0"):
        gpu_check._kernels_run(torch.device("cuda"), triton_backend.BACKEND)


def test_kernels_that_do_not_compile_are_a_failure_with_the_reason(monkeypatch):
    def unavailable():
        gpu_check.warnings.warn("no C compiler", stacklevel=1)
        return False

    monkeypatch.setattr(gpu_check, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(triton_backend, "available", unavailable)
    (check, _) = run_checks(CPU, sizes=TINY)
    assert (check.outcome, check.detail) == ("failed", "no C compiler")


def test_a_card_with_too_little_memory_leaves_out_far_indices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 10**9, 16 * 10**9))
    far = Sizes().far
    assert (far.d_sae - 1) * far.d > 2**31
    with pytest.raises(gpu_check.LeftOutError, match="16 GB are free and 58 GB are needed"):
        gpu_check._beyond_int32(lambda *given: "", cpu.BACKEND, far, torch.device("cuda"))


def test_torch_waits_again_after_the_check_for_waiting(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with suppress(RuntimeError), gpu_check._waiting_is_an_error():
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes[-1] == "default"


# --- a pretended card ----------------------------------------------------------------------------


class _Properties:
    name, major, minor, total_memory = "NVIDIA Pretended", 9, 0, 80 * 10**9


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A CUDA device in name: what asks for its properties is answered."""
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_record, "triton_version", lambda: "3.7.1")
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda device: _Properties.name,
        "get_device_capability": lambda device: (9, 0),
        "get_device_properties": lambda device: _Properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    gpu_record.has_passed.cache_clear()
    yield torch.device("cuda", 0)
    gpu_record.has_passed.cache_clear()


def test_a_note_holds_for_the_same_card_libraries_and_kernels(card, monkeypatch):
    assert not gpu_record.has_passed(card)
    path = gpu_record.note_passed(card, {"checks": []})
    assert gpu_record.has_passed(card)
    assert not gpu_record.has_passed(CPU)
    changes = {
        "saesub.topk.gpu_record.triton_version": lambda: "3.8.0",
        "saesub.topk.gpu_record.source_digest": lambda part: "other",
        "torch.cuda.get_device_name": lambda device: "NVIDIA Other",
        "torch.cuda.get_device_capability": lambda device: (8, 6),
        "torch.__version__": "3.0.0",
    }
    for name, value in changes.items():
        gpu_record.has_passed.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert not gpu_record.has_passed(card), name
        gpu_record.has_passed.cache_clear()
        assert gpu_record.has_passed(card)
    gpu_record.note_failed(card)
    assert not path.exists()
    assert not gpu_record.has_passed(card)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"conditions": {}}', "\xff"])
def test_a_damaged_note_is_none(card, damage):
    path = gpu_record.note_passed(card, {})
    path.write_bytes(damage.encode("latin-1"))
    gpu_record.has_passed.cache_clear()
    assert not gpu_record.has_passed(card)


def test_a_note_is_read_once(card, monkeypatch):
    gpu_record.note_passed(card, {})
    assert gpu_record.has_passed(card)
    monkeypatch.setattr(gpu_record, "conditions", None)
    assert gpu_record.has_passed(card)


def _outcomes(*outcomes: gpu_check.Outcome) -> list[Check]:
    return [Check(f"check {n}", "kernels", o, "in words", 0.1) for n, o in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "status", "noted"),
    [
        (["passed", "passed", "left out"], 0, True),
        (["passed", "failed", "passed"], 1, False),
        (["left out"], 0, False),
        (["failed"], 1, False),
    ],
)
def test_the_command_reports_notes_and_returns_a_status(
    card, monkeypatch, capsys, tmp_path, outcomes, status, noted
):
    gpu_record.note_passed(card, {})  # of an earlier check
    asked = []

    def row(device, d_sae, backend, optimizer):
        asked.append(backend)
        return gpu_speed.Speed(d_sae, backend, optimizer, 123_456.0, 1.5, None)

    monkeypatch.setattr(gpu_speed, "run_checks", lambda device, tell: _outcomes(*outcomes))
    monkeypatch.setattr(gpu_speed, "_row", row)
    monkeypatch.setattr(gpu_speed, "_driver", lambda: "580.1")
    file = tmp_path / "report.json"
    assert cli.main(["check-gpu", "--json", str(file)]) == status
    assert gpu_record.has_passed(card) == noted
    assert set(asked) == ({"triton", "torch"} if noted else {"torch"})
    text, report = capsys.readouterr().out, json.loads(file.read_text())
    assert report["card"] == "NVIDIA Pretended"
    assert [check["outcome"] for check in report["checks"]] == outcomes
    assert len(report["speed"]) == (8 if noted else 4)
    for shown in ("NVIDIA Pretended", "9.0", "580.1", torch.__version__, "123,456", "in words"):
        assert shown in text
    assert ("did not pass" in text) != noted


def test_without_cuda_the_command_says_so_and_returns_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["check-gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_report_without_a_folder_is_refused_before_anything_runs(card, capsys, monkeypatch):
    monkeypatch.setattr(gpu_speed, "run_checks", None)
    assert cli.main(["check-gpu", "--json", "nowhere/report.json"]) == 2
    assert "no folder for nowhere/report.json" in capsys.readouterr().err


def test_a_row_that_runs_out_of_memory_says_so(monkeypatch):
    def too_large(*given):
        try:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        except torch.OutOfMemoryError as error:
            raise SaesubError("The GPU ran out of memory: train fewer features.") from error

    monkeypatch.setattr(gpu_speed, "_timed", too_large)
    rows = gpu_speed.speed_table(torch.device("cuda"), ("torch",), (64,))
    assert {row.failure for row in rows} == {"out of memory"}


class _Event:
    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 2000.0


def test_the_rate_is_of_the_timed_steps(monkeypatch):
    """Steps on the CPU, with a card's clock and memory pretended."""
    monkeypatch.setattr(gpu_speed, "BATCH", 64)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**9)
    rows = gpu_speed.speed_table(CPU, ("torch",), (128,))
    assert [row.failure for row in rows] == [None, None]
    assert {row.tokens_per_second for row in rows} == {gpu_speed.TIMED * 64 / 2}
    assert {row.peak_gb for row in rows} == {3.0}


def test_an_sae_of_the_checks_has_auxk_and_leaves_the_users_random_numbers():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sae = gpu_check._sae("topk", TINY.step, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert sae.cfg.aux_loss_coefficient > 0


# --- docs/gpu.md ---------------------------------------------------------------------------------


def test_the_pages_memory_follows_from_its_formula():
    page = (Path(__file__).resolve().parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        d, features = (int(cell.replace(",", "")) for cell in row[:2])
        weights = 4 * (2 * d + 1)
        fused = 3 * weights + 2 * d + 700
        assert row[2] == f"{features * fused / 1e9:.2f}"
        assert row[3] == f"{features * 5 * weights / 1e9:.2f}"
        # As many as the error for a GPU without memory says.
        beside = 10 * 4 * 4096 * d
        for total, is_fused in (
            (features * fused + beside, True),
            (features * 5 * weights + beside + 10**9, False),
        ):
            assert features_that_fit(total, d, d, 4096, fused=is_fused) == features


def test_the_page_says_how_much_must_be_free():
    page = (Path(__file__).resolve().parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    far = Sizes().far
    needed = gpu_check._FAR_TABLES * 4 * far.d * far.d_sae + gpu_check._FAR_REST
    assert f"if {needed / 1e9:.0f} GB are free" in page
