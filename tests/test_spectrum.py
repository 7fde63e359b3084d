"""Spectrum against direct float64 computation, known spectra, and damaged files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesub.activations.spectrum import Spectrum, SpectrumAccumulator, massive
from saesub.errors import SaesubError
from saesub.init.subspace import choose_d_init


def _with_spectrum(variances: torch.Tensor, n: int = 4000) -> torch.Tensor:
    """Float64 rows whose sample covariance is exactly diagonal with these variances."""
    d = len(variances)
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.mean(0)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right * math.sqrt(n) * variances.sqrt()


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("d", [5, 192, 193, 400])
def test_equals_direct_computation(offset: float, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    mixing = torch.randn(d, d, generator=generator) / math.sqrt(d)
    x = torch.randn(3000, d, generator=generator) @ mixing
    x += offset * torch.randn(d, generator=generator)
    accumulator = SpectrumAccumulator(d)
    for block in x.split([1, 700, 1299, 1000]):
        accumulator.update(block)
    spectrum = accumulator.finish()
    exact = x.double()
    expected = torch.cov(exact.T, correction=0)
    assert spectrum.n_tokens == 3000
    torch.testing.assert_close(spectrum.mean, exact.mean(0), rtol=0, atol=1e-6)
    assert (spectrum.covariance - expected).norm() / expected.norm() < 1e-5
    assert spectrum.mean_norm == pytest.approx(exact.norm(dim=1).mean().item(), rel=1e-6)


def test_a_drifting_mean_costs_no_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 30, generator=generator) + 1e3 * torch.arange(4).repeat_interleave(
        1000
    ).unsqueeze(1)
    expected = torch.cov(x.double().T, correction=0)
    accumulator = SpectrumAccumulator(30)
    for block in x.split(1000):
        accumulator.update(block)
    covariance = accumulator.finish().covariance
    within = torch.eye(30, dtype=torch.float64) - 1 / 30
    # Across the drift's direction, where a fixed shift would leave float32 rounding of 1e6.
    difference = within @ (covariance - expected) @ within
    assert difference.abs().max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 199), max_size=5, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_merged_in_any_split_and_order(cuts: list[int], order) -> None:
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(1)) * 3 + 50
    ends = [*sorted(cuts), 200]
    parts = [
        Spectrum.from_activations(x[a:b], {"hook_name": "h"})
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    whole = Spectrum.from_activations(x.double())
    assert merged.n_tokens == 200
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-6)
    assert merged.mean_norm == pytest.approx(whole.mean_norm, rel=1e-6)
    assert merged.metadata == {"hook_name": "h"}


def test_white_spectrum() -> None:
    spectrum = Spectrum.from_activations(_with_spectrum(torch.ones(20, dtype=torch.float64)))
    assert spectrum.effective_rank("singular_values") == pytest.approx(20, rel=1e-9)
    assert spectrum.effective_rank("variance") == pytest.approx(20, rel=1e-9)
    assert [spectrum.rank_at(s) for s in (0.04, 0.5, 0.501, 0.99, 1.0)] == [1, 10, 11, 20, 20]
    assert spectrum.variance_in(5) == pytest.approx(0.25)


def test_rank_deficient_spectrum() -> None:
    variances = torch.tensor([4.0] * 3 + [0.0] * 9, dtype=torch.float64)
    spectrum = Spectrum.from_activations(_with_spectrum(variances))
    assert spectrum.rank_at(0.99) == spectrum.rank_at(1.0) == 3
    assert spectrum.effective_rank("variance") == pytest.approx(3, rel=1e-6)
    assert spectrum.eigenvalues.min() >= 0


def test_geometric_spectrum() -> None:
    variances = 0.5 ** torch.arange(30, dtype=torch.float64)
    spectrum = Spectrum.from_activations(_with_spectrum(variances))
    # The top r hold 1 - 2^-r, so 99 % takes 7; the entropy of a geometric law at 1/2 is 2 bits.
    assert spectrum.rank_at(0.99) == 7
    assert spectrum.effective_rank("variance") == pytest.approx(4, rel=1e-4)
    q = 0.5**0.5
    entropy = -(math.log(1 - q) + q / (1 - q) * math.log(q))
    assert spectrum.effective_rank("singular_values") == pytest.approx(math.exp(entropy), rel=1e-2)
    torch.testing.assert_close(spectrum.eigenvalues, variances, rtol=1e-6, atol=1e-12)


def test_basis_is_orthonormal_and_principal() -> None:
    variances = torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    basis = Spectrum.from_activations(_with_spectrum(variances)).basis(2)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis.abs(), torch.eye(4)[:, :2], atol=1e-6, rtol=0)


def test_low_precision_input() -> None:
    x = torch.randn(500, 8).half()
    expected = torch.cov(x.double().T, correction=0)
    spectrum = Spectrum.from_activations(x)
    torch.testing.assert_close(spectrum.covariance, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite_and_stays_usable(bad: float) -> None:
    accumulator = SpectrumAccumulator(3)
    accumulator.update(torch.eye(3))
    x = torch.zeros(4, 3)
    x[2, 1] = bad
    with pytest.raises(SaesubError, match="NaN or infinite"):
        accumulator.update(x)
    assert accumulator.finish().n_tokens == 3


def test_errors_say_what_to_do() -> None:
    few = Spectrum.from_activations(torch.randn(10, 16))
    with pytest.raises(SaesubError, match=r"10 tokens cannot show the rank of 16.*n_tokens >= 17"):
        few.rank_at(0.99)
    with pytest.raises(SaesubError, match="cannot show"):
        few.effective_rank("variance")
    with pytest.raises(SaesubError, match=r"span at most 9.*n_tokens >= 11"):
        few.basis(10)
    assert few.basis(9).shape == (16, 9)
    many = Spectrum.from_activations(torch.randn(40, 16))
    for share in (0, -1, 1.01, math.nan):
        with pytest.raises(SaesubError, match="share"):
            many.rank_at(share)
    for r in (0, 17):
        with pytest.raises(SaesubError, match=r"1\.\.16"):
            many.basis(r)
    with pytest.raises(SaesubError, match="singular_values"):
        many.effective_rank("entropy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SaesubError, match="constant"):
        Spectrum.from_activations(torch.ones(40, 16)).rank_at(0.99)
    with pytest.raises(SaesubError, match="no activations"):
        SpectrumAccumulator(4).finish()
    with pytest.raises(SaesubError, match="width"):
        SpectrumAccumulator(0)
    with pytest.raises(SaesubError, match=r"\(n, 4\)"):
        SpectrumAccumulator(4).update(torch.zeros(3, 5))


def test_merge_refuses_what_does_not_belong_together() -> None:
    x = torch.randn(40, 4)
    a = Spectrum.from_activations(x, {"hook_name": "a", "corpus": "one"})
    with pytest.raises(SaesubError, match="widths 4 and 3"):
        a + Spectrum.from_activations(x[:, :3])
    with pytest.raises(SaesubError, match="hook_name"):
        a + Spectrum.from_activations(x, {"hook_name": "b"})
    both = a + Spectrum.from_activations(x, {"hook_name": "a", "corpus": "two"})
    assert both.metadata == {"hook_name": "a", "corpus": "one + two"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    spectrum = Spectrum.from_activations(torch.randn(50, 6), {"hook_name": "h", "model": "é"})
    path = tmp_path / "new" / "s.safetensors"
    spectrum.save(path)
    loaded = Spectrum.load(path)
    assert torch.equal(loaded.covariance, spectrum.covariance)
    assert torch.equal(loaded.mean, spectrum.mean)
    assert (loaded.n_tokens, loaded.mean_norm) == (50, spectrum.mean_norm)
    assert loaded.metadata == spectrum.metadata
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]


def test_any_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Spectrum.from_activations(torch.randn(50, 6), {"hook_name": "h"}).save(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for at in (0, 5, 9, 30, header // 2, header - 9, header, header + 100, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(SaesubError, match="damaged"):
            Spectrum.load(path)
    for length in (0, 7, 100, header, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(SaesubError, match="damaged"):
            Spectrum.load(path)
    with pytest.raises(SaesubError, match="no spectrum"):
        Spectrum.load(tmp_path / "absent")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    spectrum = Spectrum.from_activations(torch.randn(50, 6))
    spectrum.save(path)
    old = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(SaesubError, match="no space"):
        (spectrum + spectrum).save(path)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def _with_sinks(share: float, times: float, n: int = 4096, d: int = 64) -> tuple[Any, Any]:
    """Ordinary tokens, and the same with a share of them moved `times` the median norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) * torch.logspace(0, -2, d)
    sinks = x.clone()
    hit = torch.rand(n, generator=generator) < share
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    sinks[hit] += direction * times * x.norm(dim=1).median()
    return x[~hit], sinks


@pytest.mark.parametrize("share", [0.002, 0.02, 0.08])
@pytest.mark.parametrize("times", [40.0, 100.0, 3000.0])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_massive_activations_are_left_out_and_counted(share, times, offset):
    ordinary, with_sinks = _with_sinks(share, times)
    clean = Spectrum.from_activations(ordinary + offset)
    with pytest.warns(UserWarning, match="massive activations; pass keep_massive=True"):
        found = Spectrum.from_activations(with_sinks + offset, {"hook_name": "h"})
    assert found.metadata["massive_tokens"] == str(len(with_sinks) - len(ordinary))
    assert found.n_tokens == len(ordinary)
    torch.testing.assert_close(found.covariance, clean.covariance, rtol=1e-5, atol=1e-6)
    assert found.mean_norm == pytest.approx(clean.mean_norm)
    assert choose_d_init(found) == choose_d_init(clean)
    kept = Spectrum.from_activations(with_sinks + offset, keep_massive=True)
    assert kept.n_tokens == len(with_sinks)
    assert kept.effective_rank("singular_values") < 0.9 * clean.effective_rank("singular_values")
    assert kept.metadata["massive_tokens"] == "kept"
    assert (kept + kept).metadata["massive_tokens"] == "kept"
    with pytest.raises(SaesubError, match="same keep_massive"):
        kept + found


def test_large_tokens_that_are_no_sinks_count():
    """Newlines in the first layers of gemma3-270m are a class of tokens 15 times as large."""
    _, x = _with_sinks(0.05, 15.0)
    assert Spectrum.from_activations(x).n_tokens == len(x)
    rare = torch.zeros(1000, 8)
    rare[::50] = torch.randn(20, 8)  # a feature site at which most tokens are silent
    assert Spectrum.from_activations(rare).n_tokens == 1000


def test_a_few_sinks_are_counted_without_a_warning(recwarn):
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    x[77] *= 1000
    assert Spectrum.from_activations(x).metadata == {"massive_tokens": "1"}
    assert not recwarn.list


@pytest.mark.parametrize("sizes", [[500, 20, *[1] * 80, 400], [16] * 50 + [200], [1] * 1000])
def test_massive_activations_are_found_in_small_blocks_and_after_a_resume(sizes):
    ordinary, x = _with_sinks(0.01, 100.0, n=1000)
    accumulator = SpectrumAccumulator(64)
    for i, block in enumerate(x.split(sizes)):
        if i == 40:
            accumulator = SpectrumAccumulator.from_state(accumulator.state())
        accumulator.update(block)
    with pytest.warns(UserWarning, match="massive"):
        found = accumulator.finish()
    assert found.n_tokens == len(ordinary)
    both = found + found
    assert both.metadata["massive_tokens"] == str(2 * (len(x) - len(ordinary)))


def test_a_token_is_massive_by_the_mean_of_the_others():
    """Where tokens are of two kinds, the median is at one of them, and the mean between."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)) / 8
    x[:490, 0] += 15
    x[77, 0] = 25
    assert not massive(x).any()
    x[77, 0] = 1000
    assert massive(x).nonzero().tolist() == [[77]]


def test_few_tokens_and_equal_ones_are_not_judged():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    x[7] = 1000
    assert not massive(x[:31]).any()
    assert massive(x).nonzero().tolist() == [[7]]
    last_bits = torch.randint(-1, 2, (100, 64), generator=torch.Generator().manual_seed(0))
    equal = 1000 + 6e-5 * last_bits
    equal[5] = 1100
    assert not massive(equal).any()


def test_a_resumed_measurement_keeps_massive_activations():
    _, x = _with_sinks(0.01, 100.0, n=1000)
    accumulator = SpectrumAccumulator(64, keep_massive=True)
    accumulator.update(x[:500])
    accumulator = SpectrumAccumulator.from_state(accumulator.state())
    accumulator.update(x[500:])
    assert accumulator.finish().n_tokens == len(x)


def test_activations_of_numpy_and_of_integers():
    x = torch.randn(100, 5)
    expected = Spectrum.from_activations(x).covariance
    assert torch.equal(Spectrum.from_activations(x.numpy()).covariance, expected)  # pyright: ignore
    with pytest.raises(SaesubError, match="floating-point"):
        Spectrum.from_activations(torch.ones(9, 5, dtype=torch.int64))
